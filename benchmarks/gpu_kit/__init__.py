"""What is tried and measured on one GPU, for `benchmarks/gpu.py`; on a CPU with tiny sizes."""
