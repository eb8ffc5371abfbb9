"""Planning: from a model and a request to the plan of least cost.

Here belong the request and its defaults, tracing for a plan, the search with and without a memory
limit, plans of models in parts and of calls that come later, and the translation between solutions
and plans. The cost network is built in strategy/; the algorithms that solve it know numbers only
and are in planners/; what a finished plan takes is told by analysis/, and it is applied by
parallel/.
"""
