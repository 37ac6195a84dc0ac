"""Networks of several labels at once."""
