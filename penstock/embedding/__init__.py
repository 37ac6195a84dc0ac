"""Embedding tables by 64-bit key: stores, and the torch module over them."""

from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.collection.table_stores import TableStats
from penstock.embedding.store import TableRows

__all__ = ["EmbeddingCollection", "TableRows", "TableStats"]
