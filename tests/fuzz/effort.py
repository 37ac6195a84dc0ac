"""How long the fuzz tests look: short and always the same on each commit, else as long as told.

    PENSTOCK_FUZZ_EXAMPLES=20000 python -m pytest tests/fuzz

tries so many random cases a test, other ones each time. A failure prints the case.
"""

import os

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("PENSTOCK_FUZZ_EXAMPLES", "0"))


def effort(examples: int) -> settings:
    """Settings of a test that tries `examples` cases on each commit."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        # Shrinking trains many jobs again; what was found is small anyway.
        phases=(Phase.explicit, Phase.generate, Phase.shrink) if EXAMPLES else tuple(Phase),
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )
