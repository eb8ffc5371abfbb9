"""Rules of recurrent networks that torch runs as one op."""

from __future__ import annotations

from autoparallel.errors import UnsupportedOpError
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Dims, OpCall, ShardingRule


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(call: OpCall) -> ShardingRule:
    """Sequences of the batch are independent; the steps, features and layers of each are not.

    Raises UnsupportedOpError for dropout between layers, which torch draws inside of the op.
    """
    if call.node.args[4] > 1 and call.node.args[5] and call.node.args[6]:
        raise UnsupportedOpError(
            f"{call.node.target} with dropout between its layers",
            where=call.node.where,
            why="it draws numbers of its own, which every rank would draw differently",
            fix="use one layer per module, with nn.Dropout in between",
        )
    first = bool(call.node.args[8])
    batch = call.operands[0].shape[0 if first else 1]
    loop = ("b",) if batch != 1 else ()
    sequence: Dims = (loop, (), ()) if first else ((), loop, ())
    states: tuple[Dims, ...] = (((), loop, ()),) * (len(call.results) - 1)
    weights: list[Dims] = [((),) * len(w.shape) for w in call.operands[1 + len(states) :]]
    return ShardingRule(
        (sequence, *states, *weights), (sequence, *states), {"b": batch} if loop else {}
    )
