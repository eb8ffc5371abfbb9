"""Bundled plain models and a small trainer: what a demo or a test needs to train something.

Here belong GPT and BERT in torch alone, text and batches, the training loop, and records and
comparisons of runs. Nothing here knows how a model is split: a model over many processes trains as
one in one process does. Splitting belongs in `parallel`, saving a split model in
`parallel.checkpoint`, hand-written splits in `megatron_rules`.
"""
