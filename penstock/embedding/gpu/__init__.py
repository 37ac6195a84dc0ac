"""Rows in the memory of a GPU: its store, cut into index, slots, retention and batches."""
