"""What is true of a row in any store: first values, updates, rounding, how long it lives."""
