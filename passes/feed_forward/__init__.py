"""Feed-forward layers that are computed in another size, for all tokens or for some."""
