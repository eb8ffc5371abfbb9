"""What the emitted modules call: conversions, communicating kernels, the module around them."""
