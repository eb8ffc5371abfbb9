"""Megatron's partition written by hand: the judge of the plans that the planner finds.

Here belong hand-written tensor-parallel layers and models (`regions`, `layers`, `models`), which
share no code with what they judge; the published partition stated as a plan (`recipe`); and
published models with their prices (`papers`), which are compared with printed figures. The planner
never reads any of it. Rules of ops belong in `autoparallel.rules`, the plain models in
`autoparallel.train`.
"""
