"""Ops that compute alike, and about as fast, however their operands lie in memory.

Parts of a dim that is not the first lie apart in memory: to gather or to scatter them takes a copy.
It takes none where the split dim is the outermost one in memory, which is Megatron's order of
sequence and batch (arXiv:2205.05198). Values keep their shapes and get other strides, which most of
torch's ops hand on. The ops of this table are known to; where a model has others, such as a
convolution or an op of the user's, which may count on the order of the unsplit model, its values
lie as ever.
"""

from __future__ import annotations

from autoparallel.rules.ops.pointwise import BINARY, UNARY

__all__ = ["IN_ORDER", "takes_any_order"]

_NAMES = """
add.Tensor sub.Tensor subtract.Tensor rsub.Tensor add.Scalar sub.Scalar rsub.Scalar
mul.Tensor multiply.Tensor div.Tensor divide.Tensor true_divide.Tensor mul.Scalar div.Scalar
neg.default to.dtype _to_copy.default clone.default contiguous.default alias.default detach.default
addcmul.default addcdiv.default masked_fill.Tensor masked_fill.Scalar where.self where.ScalarOther
where.ScalarSelf lerp.Scalar lerp.Tensor dropout.default
linear.default mm.default bmm.default matmul.default
layer_norm.default rms_norm.default softmax.int log_softmax.int cross_entropy_loss.default
scaled_dot_product_attention.default
sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default cumsum.default
view.default reshape.default transpose.int permute.default t.default unsqueeze.default
squeeze.default squeeze.dim squeeze.dims expand.default select.int slice.Tensor narrow.default
split.Tensor split_with_sizes.default chunk.default unbind.int cat.default stack.default
embedding.default tril.default triu.default repeat_interleave.self_int numpy_T.default
""".split()
_ANY = frozenset(f"aten.{name}" for name in _NAMES)
_ANY |= {f"aten.{name}.default" for name in UNARY} | {f"aten.{target}" for target in BINARY}

# Functions of autoparallel.runtime.kernels that run an op in the order of its operand, where
# torch's own first copies the operand into the order of its dims.
IN_ORDER = {"aten.layer_norm.default": "layer_norm", "aten.rms_norm.default": "rms_norm"}


def takes_any_order(target: str) -> bool:
    """Return whether an op computes the same however its operands lie in memory.

    >>> takes_any_order("aten.linear.default"), takes_any_order("aten.batch_norm.default")
    (True, False)
    """
    return target in _ANY
