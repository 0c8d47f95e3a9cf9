"""A text-to-speech decoder that writes patches of sound, each by a diffusion loop of its own."""
