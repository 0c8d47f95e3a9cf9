"""What a package holds: the archive, its manifest, the weights, and the processor that it needs."""
