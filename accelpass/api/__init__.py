"""What ``accelpass.NAME`` calls."""
