"""Rules of torch's ops, one file for each family; lookup.py imports all of them.

Only these files and the graph's passes name ops. A rule states the loop nest of its op and nothing
of hardware or plans.
"""
