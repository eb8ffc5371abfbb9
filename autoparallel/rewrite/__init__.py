"""From a plan to the program of one rank: readable Python that calls ops on local tensors.

Here belongs how the text is written: names, expressions, the arguments of local calls, conversions,
and compiling it. Functions that the text calls are in runtime/, the nn.Module around it is in
parallel/, and what an op's arguments become on a part is said by its rule (rules/). No op is named
here.
"""
