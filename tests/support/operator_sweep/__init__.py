"""PyTorch's own operator and module databases, split in many ways and compared with the unsplit.

`subjects` puts an op or a module into a small model, `trial` plans and runs that model in many
ways, `launch` runs each subject in a process of its own, `outcomes` is what comes of that, and
`table` writes it.
"""
