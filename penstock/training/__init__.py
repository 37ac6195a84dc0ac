"""The parts of the training loop: one step, dense optimizer, metrics, checkpoints, signals."""
