"""What quantization methods stand on: weights in formats, calibration block by block, codes of a plan, bits by an integer program."""
