"""Which rows a run reads, in which order, before any is decoded."""
