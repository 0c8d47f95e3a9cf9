"""Debug mode: each pass's graph against the one before it, as code and as pages."""
