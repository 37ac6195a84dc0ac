"""What columns mean: keys, numbers, labels and times, from Arrow's types to plain arrays."""
