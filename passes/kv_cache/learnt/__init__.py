"""Methods that learn from data what to keep: fitted by ``accelpass.calibrate``, and kept in a plan."""
