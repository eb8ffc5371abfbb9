"""The parallel module: what a rank has in place of the user's model, and what lies around it.

Here belongs what an nn.Module needs around a rank's program: parameters as DTensors, their first
values, checkpoints, seeds, hooks, the processes of a job, comparisons between the ranks, Python
that is not captured, and all ranks simulated in one process. What an emitted program calls belongs
in runtime/, its text in rewrite/; plans are made in planning/, and api.py puts all of it together.
"""
