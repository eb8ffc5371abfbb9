"""Training steps of several libraries side by side, for `benchmarks/steps.py`.

Each contender splits the same plain model, from the same weights, and trains it on the same batch.
A contender that is not installed, or does not run here, is listed with the reason.
"""
