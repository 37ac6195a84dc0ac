"""The processes that train one job together: how they find each other, and what they tell."""
