"""Every way of writing attention, found in a graph and replaced by one semantic node."""
