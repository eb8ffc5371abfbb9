"""From a module and example inputs to a Graph, with nothing computed on the way.

Here belongs all that looks at the user's model: the example inputs and why a model refuses them,
torch.export, equal blocks that are traced once, decompositions of ops into simpler ones, side
effects that a graph would lose, and graph breaks (the largest submodules, where the whole cannot be
traced). Passes from one graph to another are in graph/passes, what an op allows is in rules/, and
modules that stay Python are run by parallel/. Nothing here knows of meshes, costs or plans.
"""
