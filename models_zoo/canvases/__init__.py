"""A small LLaVA that answers questions about canvases of handwritten digits, its processor, and how it was trained."""
