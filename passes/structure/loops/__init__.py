"""Loops that a capture has unrolled, and what need not be done in each trip."""
