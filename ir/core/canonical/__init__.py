"""What capture makes of a graph so that it is canonical: casts instead of autocast, no aliases that say nothing."""
