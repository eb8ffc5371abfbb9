"""The parts of `benchmarks/gpu.py` try and measure on one GPU; on a CPU with tiny sizes."""
