"""Helpers that know nothing of plans, graphs or meshes: any program could use them.

Here belong pytrees, copies of modules, random generators' state, files that processes share, and
sizes as text. A helper that reads a Graph goes to graph/, one that communicates to runtime/, and
one that only a single package uses stays in that package.
"""
