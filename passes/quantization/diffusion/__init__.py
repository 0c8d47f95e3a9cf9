"""Quantization of diffusion models: inputs rounded token by token, balanced by denoising step."""
