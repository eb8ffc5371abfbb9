"""Tests trace without a log of what torch traces, which costs time and is read by nobody."""

import logging

import torch


def test_nobody_listens_to_traces() -> None:
    torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    assert logging.getLogger("torch.__trace").handlers == []
