"""The commands of the command line, a file each: what a user types becomes calls of the public API.

Here belong arguments, the names by which models are known on the command line, and the order of
what is printed. How a plan is made, explained or exported belongs in the packages below, where
Python can call it. Nothing here is imported by the rest but by cli.py, and nothing here imports
torch before a command needs it.
"""
