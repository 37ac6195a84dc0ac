"""Metrics, in bounded memory, each of which merges and is saved."""
