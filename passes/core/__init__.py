"""What every pass stands on: bases, registry, manager, options, plans."""
