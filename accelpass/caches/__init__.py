"""Key/value caches for transformers models, and what they hold."""
