"""The index of a GPU store: finds, claims and fills places for keys."""
