"""The strategies of every op and what they cost together: the cost network.

Here belongs whatever turns a graph into the planner's numbers: the rule that each call follows, the
splits worth considering, strategies on the whole mesh, ways to store parameters, tables of
redistribution, recomputation and saved activations, and the constraints that a user puts on them.
The price of one op or collective by itself comes from `cost`; what an op allows comes from `rules`.
Solving the network, and reading a plan from a solution, belongs in `planning`; the memory and time
of a finished plan in `analysis`.
"""
