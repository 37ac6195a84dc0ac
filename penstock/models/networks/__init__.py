"""Networks of one label, one a file; and a user's own."""
