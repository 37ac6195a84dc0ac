"""Embedding tables by 64-bit key: stores, and the torch module over them."""

from penstock.embedding.collection import EmbeddingCollection
from penstock.embedding.store import TableRows
from penstock.embedding.table_stats import TableStats

__all__ = ["EmbeddingCollection", "TableRows", "TableStats"]
