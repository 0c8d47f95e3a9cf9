"""Patterns of a prompt's attention, each a selection of blocks."""
