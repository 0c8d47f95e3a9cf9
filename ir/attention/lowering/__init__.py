"""From semantic attention back to operators, by spec."""
