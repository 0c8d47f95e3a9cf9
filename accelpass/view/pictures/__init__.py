"""Pictures as files: step plans, kept tokens, kept patches, bits of weights."""
