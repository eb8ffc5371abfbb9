"""The runner, and bundled plain models: what somebody needs to train something for real.

Here belong configurations, text and rows, GPT and BERT in torch alone, the training loop, logs,
evaluation, and comparisons of runs. The runner is a user of the public functions: it makes a plan,
applies it, and trains the module as one in one process trains; nothing below knows of it. Splitting
belongs in `parallel`, saving a split model in `parallel.checkpoint`, hand-written splits in
`megatron_rules`.
"""
