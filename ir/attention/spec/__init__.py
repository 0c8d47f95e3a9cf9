"""The semantic attention: its spec, its op, and the reference that defines what it means."""
