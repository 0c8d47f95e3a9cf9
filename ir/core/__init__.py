"""The program: capture, canonical graph, its tensors, patterns, and the rules that every pass keeps."""
