"""Forms of a batch and of the vectors for it, and how stores are asked for them."""
