"""A plan in the words of other programs: torch's own tensor parallelism, transformers, and others.

Here belongs what turns a plan into a text that another program reads. What such a program cannot
express is listed beside the text. Graphs of other libraries (torch.fx, networkx) are view's.
"""
