"""The processes that train one job together: how they start, find each other, and agree."""
