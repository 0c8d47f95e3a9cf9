"""Visual tokens stay in the text, and cost less there: fewer keys, heads and hidden channels than words have."""
