"""The tokens of a prompt: which inputs carry them, and graphs in which some of them are left out."""
