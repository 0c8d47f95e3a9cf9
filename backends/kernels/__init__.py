"""Kernels and what calls them, by device."""
