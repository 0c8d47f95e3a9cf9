"""Attention on CUDA through the Triton kernels."""
