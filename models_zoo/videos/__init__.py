"""The LLaVA of canvases, taught to answer questions about short videos of handwritten digits, and how it was trained."""
