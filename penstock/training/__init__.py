"""Parts of the training loop: the dense half's optimizer, metrics, checkpoints.

The loop itself is in `penstock.run`.
"""
