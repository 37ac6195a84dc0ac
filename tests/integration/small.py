"""The small job of the integration tests, as fields."""

SMALL = {
    "name": "small",
    "data": {
        "source": {
            "format": "synthetic",
            "rows": 6000,
            "num_categorical": 4,
            "keys_per_feature": 500,
        },
        "split": {"by": "fraction", "evaluation": 0.25},
        "label": {"column": "click"},
        "numeric": [{"columns": ["n[0-9]*"]}],
        "shuffle": {"block_rows": 1000},
    },
    "features": [{"columns": ["c[0-9]*"]}],
    "table_defaults": {"dim": 8, "optimizer": {"kind": "adam", "learning_rate": 0.01}},
    "model": {"kind": "dlrm", "bottom": [8], "top": [16]},
    "training": {
        "batch_size": 128,
    },
    "run": {"threads": 1},
    "report": {"every_steps": 7},
    "evaluation": {"every_steps": 10},
    "checkpoint": {"every_steps": 6, "keep_last": 2},
}
"""36 steps in one epoch: 4,500 training rows in batches of 128."""
STEPS = 36
