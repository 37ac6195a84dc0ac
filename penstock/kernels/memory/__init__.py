"""Memory of a GPU that grows without being copied."""
