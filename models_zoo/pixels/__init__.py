"""A small language model of images: it writes a handwritten digit pixel by pixel; how it was trained."""
