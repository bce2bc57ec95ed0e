"""How much of what a user's libraries hold can be converted, architecture by architecture, and whether it is exact."""
