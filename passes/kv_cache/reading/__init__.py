"""Methods that keep all tokens, and read less of some."""
