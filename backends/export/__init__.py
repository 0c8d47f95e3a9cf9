"""From a model to graphs that leave torch.compile: capture by torch.export, passes, state as inputs. ONNX files and packages are written from them."""
