"""Larger models that are made of trained ones: where a training begins."""
