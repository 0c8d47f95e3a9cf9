"""How the methods of this family keep tokens: slots under a budget, low rank, keys before their rotation."""
