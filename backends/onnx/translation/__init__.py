"""From a rewritten graph's operators to those of the ONNX standard."""
