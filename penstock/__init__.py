"""Penstock trains recommendation models whose embedding tables outgrow a GPU."""

__version__ = "0.1.0"
