"""The torch module over the stores, and what torch's tools ask of it."""
