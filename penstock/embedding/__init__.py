"""Embedding tables by 64-bit key: stores, and the torch module over them."""

from penstock.embedding.collection import EmbeddingCollection, TableStats
from penstock.embedding.store import TableRows

__all__ = ["EmbeddingCollection", "TableRows", "TableStats"]
