"""Extents read ahead, shuffled block by block, and cut into batches."""
