"""Parts of the store in the memory of a GPU: rows, slots, retention and batches."""
