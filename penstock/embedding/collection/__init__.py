"""The torch module over the stores, and what torch's tools ask of it."""

from penstock.embedding.collection.collection import EmbeddingCollection, available_cores

__all__ = ["EmbeddingCollection", "available_cores"]
