"""One table over many ranks: whose a row is, what travels, and a store that is all of them."""
