"""Changes of whole graphs: torch functions spliced in, stretches for other rows, cuts between blocks."""
