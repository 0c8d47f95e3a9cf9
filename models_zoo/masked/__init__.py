"""A small masked-diffusion language model that reads bytes, and how it was trained."""
