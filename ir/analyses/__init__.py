"""Read-only analyses of a program. Each is a function ``Program -> result``, called as ``program.analysis(fn)``."""
