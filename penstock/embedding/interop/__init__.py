"""In and out of other libraries: TorchRec's batches, modules and states; weights trained elsewhere.

TorchRec is no requirement: its objects are known by what they offer, and those that are made need
it installed.
"""

from penstock.embedding.interop.keyed_jagged import from_keyed_jagged_tensor, to_keyed_jagged_tensor
from penstock.embedding.interop.modules import TorchRecBags, TorchRecSequences
from penstock.embedding.interop.weights import (
    export_state_dict,
    import_state_dict,
    import_weights,
)

__all__ = [
    "TorchRecSequences",
    "TorchRecBags",
    "export_state_dict",
    "from_keyed_jagged_tensor",
    "import_state_dict",
    "import_weights",
    "to_keyed_jagged_tensor",
]
