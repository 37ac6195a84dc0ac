"""Checkpoints: one cut of all that a run needs to go on with the same bits."""
