"""The graph of a program (nodes that read and write named values) and the passes over it.

Here belongs what is true of a program by itself: its values and sizes, which of them share memory,
its repeated blocks, a rank's part of a shape, and passes from graph to graph (graph/passes). How a
module becomes a graph is in capture/, what an op allows in rules/, and how a graph is printed for
one rank in rewrite/.
"""
