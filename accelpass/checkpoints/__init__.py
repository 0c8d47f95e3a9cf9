"""Quantized checkpoints of other tools, read into this library's formats: GPTQ, AWQ, compressed-tensors and GGUF."""
