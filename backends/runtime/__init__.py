"""What runs beside compiled code: sampling runs, their clock and memory, checks of caches."""
