"""Attention of a few new tokens over stored rows: what it takes and gives, and its definition."""
