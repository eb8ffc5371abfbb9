"""Sample calls, one or more of every op that has a rule.

Uneven sizes are among them: 5 on 2 and 3 ranks, 7 on all. Symbolic ones may leave ranks empty.
"""

import sample_layers
import torch
from calls import Call, call, fixed, ints, truth, x

from autoparallel.rules.ops.pointwise import BINARY, UNARY

_DOMAINS = {
    "acosh": (1.1, 2.0),
    **dict.fromkeys(("log", "log10", "log1p", "log2", "sqrt", "rsqrt"), (0.2, 0.9)),
    **dict.fromkeys(("logit", "digamma", "lgamma", "special_ndtri", "special_entr"), (0.2, 0.9)),
    "mvlgamma": (2.0, 3.0),
}
_MORE_ARGUMENTS = {
    "clamp": (-0.5, 0.6),
    "clamp_min": (-0.3,),
    "clamp_max": (0.4,),
    "clip": (-0.5, 0.6),
    "threshold": (0.1, 0.7),
    "mvlgamma": (2,),
}
_WITHOUT_GRADIENT = {"nextafter", "heaviside"}


def _unary(name: str) -> Call:
    if name == "bitwise_not":
        return call("bitwise_not.default", ints(7, 5))
    low, high = _DOMAINS.get(name, (0.2, 0.9))
    operand = x(7, 5, low=low, high=high, signs=name not in _DOMAINS)
    return call(f"{name}.default", operand, *_MORE_ARGUMENTS.get(name, ()))


_ON_INTEGERS = set(
    """
    __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor __lshift__ __rshift__ gcd lcm
    bitwise_left_shift bitwise_right_shift floor_divide
    """.split()
)


def _binary(target: str) -> Call:
    name, _, overload = target.partition(".")
    if name in _ON_INTEGERS:
        left, right, number = ints(7, 5), ints(5), 3
    elif name in ("pow", "xlogy", "special_xlog1py"):
        left, right, number = x(7, 5, signs=False), x(5, signs=name == "pow"), 2.5
        right = right if name == "pow" else x(5, signs=False)
    elif name in _WITHOUT_GRADIENT:
        left, right, number = fixed(7, 5), fixed(5), 0.7
    elif name == "special_zeta":
        left, right, number = x(7, 5, low=1.2, high=2, signs=False).detach(), x(5, signs=False), 0.7
    elif name == "ldexp":
        left, right, number = x(7, 5), ints(5, high=4), 0.7
    else:
        left, right, number = x(7, 5), x(5), 0.7
    if overload == "Scalar" and name == "pow":
        return call(target, number, left)
    if overload in ("Scalar", "Tensor_Scalar"):
        return call(target, left, number)
    return call(target, left, right)


def _pointwise() -> list[Call]:
    same = x(4, 5)
    kept = x(4, 5)
    return [
        *map(_unary, UNARY),
        *map(_binary, BINARY),
        call("clamp.Tensor", x(4, 5), fixed(5)),
        call("clamp.Tensor", x(4, 5), fixed(4, 5) - 1, fixed(5) + 1),
        call("clamp_min.Tensor", x(4, 5), fixed(5)),
        call("clamp_max.Tensor", x(4, 1), x(4, 5)),
        call("isin.Tensor_Scalar", ints(4, 5), 3),
        call("complex.default", x(4, 5), x(5)),
        call("polar.default", x(4, 5), x(4, 5)),
        call("linalg_cross.default", x(4, 3), x(4, 3)),
        call("linalg_cross.default", x(3, 5), x(3, 5), dim=0),
        call("fill.Tensor", fixed(4, 5), x()),
        call("fill.Scalar", fixed(4, 5), 0.3),
        call("zero.default", x(4, 5)),
        call("masked_fill.Scalar", x(3, 4, 5), truth(4, 5), 0.5),
        call("masked_fill.Scalar", truth(4, 5), truth(5), True),
        call("masked_fill.Scalar", x(3, 4, 5), truth(4, 5), 0.0),
        call("masked_fill.Tensor", x(3, 4, 5), truth(4, 5), x()),
        call("where.ScalarOther", truth(4, 5), x(5), 0.5),
        call("where.ScalarOther", truth(4, 5), x(5), 0),
        call("where.ScalarSelf", truth(5), 0.0, x(4, 5)),
        call("where.ScalarSelf", truth(5), 0.3, x(4, 5)),
        call("where.Scalar", truth(4, 5), 0.3, 0.0),
        call("lerp.Scalar", x(4, 5), x(5), 0.3),
        call("lerp.Tensor", x(4, 5), x(5), x(4, 1)),
        call("div.Tensor_mode", fixed(4, 5), fixed(5), rounding_mode="floor"),
        call("div.Tensor_mode", x(4, 5), x(5), rounding_mode="trunc"),
        call("div.Scalar_mode", ints(4, 5), 2, rounding_mode="trunc"),
        call("prelu.default", x(4, 5, 6), x(5)),
        call("prelu.default", x(4, 5), x(1)),
        call("addcmul.default", x(4, 5), x(5), x(4, 1), value=0.5),
        call("addcdiv.default", x(4, 5), x(5), x(4, 5), value=0.5),
        call("addcmul.default", x(4, 5), kept, kept),
        call("neg.default", x(4, 5)),
        call("rsub.Tensor", x(4, 5), x(5)),
        call("rsub.Tensor", x(4, 5), x(5), alpha=2),
        call("neg.default", ints(4, 5)),
        call("to.dtype", x(4, 5), torch.float64),
        call("to.dtype", ints(4, 5), torch.float64),
        call("to.dtype", fixed(4, 5), torch.int64),
        call("to.dtype", truth(4, 5), torch.float64),
        call("to.dtype", x(4, 5), torch.float64, False, False, torch.contiguous_format),
        call("to.dtype_layout", ints(4, 5), dtype=torch.float64, layout=torch.strided),
        call("to.device", x(4, 5), torch.device("cpu"), torch.float64),
        call("_to_copy.default", x(4, 5), dtype=torch.float64),
        call("clone.default", x(4, 5)),
        call("contiguous.default", x(4, 5)),
        call("alias.default", x(4, 5)),
        call("detach.default", x(4, 5)),
        call("positive.default", x(4, 5)),
        call("mul.Scalar", x(4, 5), 0.7),
        call("div.Scalar", x(4, 5), 0.7),
        call("add.Tensor", x(4, 5), x(5)),
        call("add.Tensor", x(4, 5), x(4, 1), alpha=2),
        call("add.Tensor", x(4, 5), 0.3),
        call("add.Tensor", same, same),
        call("add.Tensor", ints(4, 5), ints(5)),
        call("add.Tensor", truth(4, 5), truth(5)),
        call("add.Scalar", x(4, 5), 0.3),
        call("subtract.Tensor", x(4, 5), x(5), alpha=2),
        call("multiply.Tensor", x(4, 5), x(5)),
        call("divide.Tensor", x(4, 5), x(5)),
        call("true_divide.Tensor", x(4, 5), x(5)),
        call("true_divide.Scalar", x(4, 5), 0.7),
        call("negative.default", x(4, 5)),
        call("sub.Tensor", x(3, 4, 5), x(4, 5)),
        call("sub.Scalar", x(4, 5), 0.3),
        call("rsub.Scalar", x(4, 5), 0.3),
        call("mul.Tensor", x(4, 5), x(5)),
        call("mul.Tensor", x(4, 5), fixed(4, 1)),
        call("mul.Tensor", x(4, 5), 0.7),
        call("mul.Tensor", kept, kept),
        call("mul.Tensor", truth(4, 5), truth(5)),
        call("div.Tensor", x(4, 5), x(5)),
        call("div.Tensor", x(4, 5), 0.7),
        call("div.Tensor", ints(4, 5), 2),
        call("div.Tensor", kept, kept),
        call("where.self", truth(4, 5), x(4, 5), x(5)),
        call("where.self", truth(5), x(4, 5), x()),
        call("zeros_like.default", x(4, 5)),
        call("ones_like.default", ints(4, 5)),
        call("full_like.default", x(4, 5), 0.3),
        call("rand_like.default", x(4, 7)),
        call("randn_like.default", fixed(5, 6, 7), dtype=torch.float32),
        call("rand.default", (4, 7), dtype=torch.float16),
        call("randn.default", (4, 7, 3)),
        call("randn.default", ()),
        call("dropout.default", x(8, 5), 0.4, True),
        call("dropout.default", x(4, 5), 0.4, False),
        call("mul.Tensor", x(4, 5, 6), x(5, 1), symbolic={4: "s0", 5: "s1"}),
        call("dropout.default", x(4, 5, 6), 0.4, True, symbolic={4: "s0", 5: "s1"}),
    ]


def _contraction() -> list[Call]:
    square, weight = x(5, 5), x(6, 5)
    return [
        call("linear.default", x(3, 4, 6), x(5, 6)),
        call("linear.default", x(8), x(5, 8)),
        call("linear.default", x(4, 6), x(6)),
        call("linear.default", x(4, 5, 6), x(8, 6), symbolic={4: "s0", 5: "s1"}),
        call("linear.default", square, square),
        call("linear.default", weight, weight),
        call("mm.default", x(4, 5), x(5, 6)),
        call("bmm.default", x(4, 5, 6), x(4, 6, 7)),
        call("matmul.default", x(5), x(5)),
        call("matmul.default", x(5), x(5, 6)),
        call("matmul.default", x(5), x(4, 5, 6)),
        call("matmul.default", x(4, 5), x(5)),
        call("matmul.default", x(3, 4, 5), x(5, 6)),
        call("matmul.default", x(3, 4, 5), x(3, 5, 6)),
        call("matmul.default", x(2, 1, 4, 5), x(3, 5, 6)),
        call("matmul.default", x(4, 5), x(3, 5, 6)),
        call("matmul.default", x(3, 4, 5), x(1, 5, 6)),
        call("vdot.default", x(5), x(5)),
        call("mv.default", x(4, 5), x(5)),
        call("dot.default", x(5), x(5)),
        call("outer.default", x(4), x(5)),
        call("addmm.default", x(6), x(4, 5), x(5, 6), beta=0.5, alpha=2),
        call("addmm.default", x(4, 1), x(4, 5), x(5, 6)),
        call("addmv.default", x(4), x(4, 5), x(5)),
        call("baddbmm.default", x(4, 1, 7), x(4, 5, 6), x(4, 6, 7), beta=0.5, alpha=2),
        call("addbmm.default", x(5, 7), x(4, 5, 6), x(4, 6, 7)),
        call("lu_unpack.default", x(4, 5, 3, 3), ints(4, 5, 3, high=4).int()),
        call("lu_unpack.default", x(5, 2, 4), ints(5, 2, high=5).int(), True, False),
        Call("autoparallel.branch_taken.default", (truth() | True, True, 0), {}, {}),
        call("einsum.default", "bshd,bthd->bhst", (x(3, 5, 4, 6), x(3, 7, 4, 6))),
        call("einsum.default", "...k, nk -> ...n", (x(3, 4, 5), x(6, 5))),
        call("einsum.default", "ik,kj", (x(4, 5), x(5, 6))),
        call("einsum.default", "i,j,k->ki", (x(4), x(5), x(6))),
        call("einsum.default", "iij->j", (x(4, 4, 5),)),
        call("einsum.default", "...i,...i", (x(4, 1, 5), x(6, 5))),
        call("einsum.default", "ij,jk->ik", (square, square)),
        call("einsum.default", "bsk,nk->bsn", (x(4, 5, 6), x(8, 6)), symbolic={4: "s0", 5: "s1"}),
    ]


def _shape() -> list[Call]:
    symbolic = {5: "s0", 3: "s1"}
    return [
        call("reshape.default", x(4, 6, 5), (24, 5)),
        call("reshape.default", x(5, 24), (5, 4, 6)),
        call("reshape.default", x(5, 24), (5, 4, -1)),
        call("reshape.default", x(4, 6, 5), (8, 3, 5)),
        call("reshape.default", x(4, 9), (6, 6)),
        call("reshape.default", x(1, 8, 5), (8, 1, 5)),
        call("reshape.default", truth(4, 6), (24,)),
        call("reshape.default", x(5, 3, 24), (5, 3, 4, 6), symbolic=symbolic),
        call("reshape.default", x(5, 3, 4, 6), (5, 3, 24), symbolic=symbolic),
        call("reshape.default", x(5, 3, 8), (15, 8), symbolic=symbolic | {15: "s0*s1"}),
        call("view.default", x(5, 24), (5, 4, 6)),
        call("transpose.int", x(4, 5, 6), 1, -1),
        call("transpose.int", x(), 0, -1),
        call("transpose.int", x(5, 3, 6), 0, -1, symbolic=symbolic),
        call("swapaxes.default", x(4, 5, 6), 0, 2),
        call("swapdims.default", x(4, 5, 6), 0, 2),
        call("movedim.int", x(4, 5, 6), 0, -1),
        call("movedim.intlist", x(4, 5, 6, 7), (0, 2), (-1, 0)),
        call("moveaxis.int", x(4, 5, 6), 2, 0),
        call("moveaxis.intlist", x(4, 5, 6), (0, 1), (1, 0)),
        call("diagonal.default", x(4, 5, 6), 1, 0, 2),
        call("repeat.default", x(4, 1, 5), (3, 5, 1)),
        call("repeat.default", x(4, 6), (7, 1, 2)),
        call("repeat.default", x(4, 6), (0, 2)),
        call("repeat.default", x(1, 4), (8, 1), symbolic={8: "s0"}),
        call("tile.default", x(4, 1, 6), (5, 2)),
        call("repeat_interleave.self_int", x(4, 5, 6), 3, 1),
        call("repeat_interleave.self_int", x(1, 4), 6, 0),
        call("repeat_interleave.self_int", x(4, 5), 3),
        call("pixel_shuffle.default", x(3, 20, 4, 5), 2),
        call("pixel_shuffle.default", x(8, 4, 5), 2),
        call("pixel_unshuffle.default", x(3, 5, 8, 6), 2),
        call("channel_shuffle.default", x(3, 20, 4), 4),
        call("channel_shuffle.default", x(3, 7, 4), 1),
        call("view_as_complex.default", fixed(4, 5, 2)),
        *(
            call(f"{name}.default", torch.complex(fixed(4, 5), fixed(4, 5)).conj())
            for name in ("_conj", "conj_physical", "resolve_conj", "resolve_neg")
        ),
        call("view_as_real.default", torch.complex(fixed(4, 5), fixed(4, 5))),
        call("diag_embed.default", x(4, 5)),
        call("diag_embed.default", x(4, 5, 6), 1, 0, 2),
        call("t.default", x(4, 5)),
        call("numpy_T.default", x(4, 5)),
        call("mT.default", x(3, 4, 5)),
        call("permute.default", x(4, 5, 6), (2, 0, -2)),
        call("unsqueeze.default", x(4, 5), -1),
        call("unsqueeze.default", x(4, 5), 0),
        call("squeeze.dim", x(4, 1, 5), 1),
        call("squeeze.dim", x(4, 5), 1),
        call("squeeze.dims", x(4, 1, 5, 1), (1, -1)),
        call("squeeze.default", x(4, 1, 5, 1)),
        call("expand.default", x(4, 1, 5), (4, 6, 5)),
        call("expand.default", x(1, 5), (4, 3, 5)),
        call("expand.default", x(4, 1, 5), (-1, 6, -1)),
        call("expand.default", x(3, 1, 4), (3, 5, 4), symbolic=symbolic),
    ]


def _cutting() -> list[Call]:
    return [
        call("split.Tensor", x(12, 5), 4),
        call("split.Tensor", x(5, 12), 6, -1),
        call("split.Tensor", x(5, 8), 3, 1),
        call("split.Tensor", x(5, 12), 4, 1, symbolic={5: "s0"}),
        call("chunk.default", x(12, 5), 3),
        call("chunk.default", x(5, 24), 7, 1),
        call("tensor_split.sections", x(5, 12), 3, -1),
        call("tensor_split.sections", x(5, 7), 3, 1),
        call("split_with_sizes.default", x(5, 12), (4, 4, 4), 1),
        call("split_with_sizes.default", x(5, 12), (6, 2, 4), 1),
        call("chunk.default", x(4, 5), 1),
        call("split.Tensor", x(4, 5), 4),
        call("split_with_sizes.default", x(24, 3), (12, 6, 6)),
        call("split.Tensor", x(3, 20), 8, 1),
        call("cat.default", (x(3, 12), x(3, 6), x(3, 18)), 1),
        call("unsafe_split.Tensor", x(5, 12), 4, 1),
        call("unsafe_split_with_sizes.default", x(5, 12), (6, 6), 1),
        call("split_with_sizes_copy.default", x(5, 12), (6, 2, 4), 1),
        call("slice_scatter.default", x(5, 9), x(5, 9), -1, symbolic={5: "s0"}),
        call("diagonal_scatter.default", x(4, 5, 6), x(5, 4), 0, 0, 2),
        call("rot90.default", x(4, 5, 6), 1, (0, 2)),
        call("rot90.default", x(4, 5, 6), 2, (1, 2)),
        call("glu.default", x(5, 12)),
        call("glu.default", x(8, 5), 0),
        call("unbind.int", x(4, 3, 5), 1),
        call("select.int", x(4, 3, 5), 1, -1),
        call("slice.Tensor", x(4, 9, 5), 1, 2, 8, 2),
        call("slice.Tensor", x(9, 5), 0, 3),
        call("slice_scatter.default", x(4, 9, 5), x(4, 3, 5), 1, 2, 8, 2),
        call("slice_scatter.default", x(9, 5), x(2, 5), 0, 7),
        call("select_scatter.default", x(4, 9, 5), x(4, 5), 1, -2),
        call("narrow.default", x(4, 9, 5), 1, 2, 5),
        call("unfold.default", x(4, 9, 5), 1, 3, 2),
        call("tril.default", x(4, 5, 6), 1),
        call("triu.default", x(4, 5, 6)),
        call("flip.default", x(4, 5, 6), (0, -1)),
        call("roll.default", x(4, 5, 6), (1, 2), (0, 2)),
        call("roll.default", x(4, 5), (3,)),
        call("constant_pad_nd.default", x(4, 5, 6), (1, 2)),
        call("constant_pad_nd.default", x(4, 5, 6), (0, 0, 2, 1), 0.5),
        call("pad.default", x(4, 5, 6), (1, 2)),
        call("pad.default", x(4, 5, 6), (1, 2), "reflect"),
        call("pad.default", x(4, 5, 6), (1, 2), "constant", 0.5),
        call("cat.default", (x(4, 6), x(4, 6), x(4, 6)), -1),
        call("cat.default", (x(4, 6), x(4, 5)), 1),
        call("cat.default", (x(5, 6), x(5, 6)), 1, symbolic={5: "s0"}),
        call("cat.default", (x(4, 6), fixed(3, 6))),
        call("concat.default", (x(4, 6), x(4, 6)), 1),
        call("concatenate.default", (x(4, 6), x(4, 6))),
        call("stack.default", (x(4, 5), x(4, 5)), 1),
    ]


def _grouped() -> list[Call]:
    """Return grouped products: transformers' op takes float64; torch's only float32, and strides
    of 16 bytes.
    """
    import transformers.integrations.moe  # noqa: F401

    def small(*shape: int) -> torch.Tensor:
        return x(*shape).detach().float().requires_grad_()

    ends = torch.tensor([4, 4, 6, 9, 11], dtype=torch.int32)
    some, none = ends.long(), torch.tensor([0, 0, 11, 11, 11], dtype=torch.int32)
    name = "transformers.grouped_mm_fallback.default"
    return [
        Call(name, (x(11, 6), x(5, 6, 7), ends)),
        Call(name, (x(11, 8), x(5, 8, 6), some)),
        Call(name, (x(11, 6), x(5, 6, 4), none), symbolic={11: "s0"}),
        call("_grouped_mm.default", small(11, 16), small(5, 16, 24), ends),
        call("_grouped_mm.default", small(5, 12, 16), small(5, 16, 24)),
    ]


def _experts() -> list[Call]:
    """Return routed experts: with gates and biases, a column- and a row-parallel product; with an
    odd one that nobody chose, so that a rank may get nothing; and with sizes of the inputs.
    """

    def chosen(tokens: int, choices: int, count: int) -> torch.Tensor:
        scores = torch.rand(tokens, count, generator=torch.Generator().manual_seed(3))
        return scores.topk(choices).indices

    name = "autoparallel.routed_experts.default"
    gated = (
        "a = product(row0, table0); b = lookup(table2); c = aten.add.Tensor(a, b); "
        "d, e = aten.chunk.default(c, 2, -1); f = aten.silu.default(d); g = aten.mul.Tensor(f, e); "
        "h = product(g, table1, True); i = lookup(table3); j = aten.add.Tensor(h, i); "
        "k = aten.unsqueeze.default(value0, -1); l = aten.mul.Tensor(j, k); l"
    )
    tables = (x(5, 3, 8), x(5, 3, 4), x(5, 8), x(5, 3))
    plain = "a = product(row0, table0); b = aten.mul.Tensor(a, plain0); b"
    strided = (
        "a = product(row0, table0); b = aten.slice.Tensor(a, 1, 0, 99, 2); "
        "c = aten.slice.Tensor(a, 1, 1, 99, 2); d = aten.mul.Tensor(b, c); "
        "e = product(d, table1); e"
    )
    two = chosen(24, 2, 5).view(4, 6, 2)
    few = chosen(7, 1, 3).unsqueeze(0).clamp(max=1)
    return [
        Call(name, ((x(4, 6, 3),), two, (x(4, 6, 2),), tables, (), gated)),
        Call(name, ((x(1, 7, 3),), few, (), (x(3, 3, 4),), (x(4),), plain)),
        Call(
            name,
            ((x(11, 3),), chosen(11, 3, 4), (), (x(4, 3, 8), x(4, 4, 5)), (), strided),
            symbolic={11: "s0"},
        ),
    ]


CALLS = (
    *_pointwise(),
    *_contraction(),
    *_grouped(),
    *_experts(),
    *_shape(),
    *_cutting(),
    *sample_layers.reduction(),
    *sample_layers.normalization(),
    *sample_layers.attention(),
    *sample_layers.indexing(),
    *sample_layers.losses(),
    *sample_layers.convolution(),
    *sample_layers.recurrent(),
)
