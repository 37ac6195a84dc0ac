"""One update for every row that a batch touches: sums of gradients, rules, rounding."""
