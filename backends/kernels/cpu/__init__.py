"""Packed products on CPUs."""
