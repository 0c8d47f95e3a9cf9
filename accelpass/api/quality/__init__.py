"""How well a model answers with its passes: perplexity, agreement, options, and where two models differ."""
