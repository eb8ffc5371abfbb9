"""The functions that the emitted program of one rank calls while it runs.

Here belong collectives and redistribution between placements, kernels that communicate inside of an
op, random ops, recomputation in the backward pass, and the groups of ranks that all these talk
through, as processes or as threads. Text of programs is written in `rewrite/`, and the nn.Module
around a program, with its parameters and checkpoints, is in `parallel/`. Nothing here plans, prices
or reads a plan.
"""
