"""Rules of ops that compute each element by itself, after broadcasting."""

from __future__ import annotations

from dataclasses import replace

from autoparallel.graph.graph import Dim
from autoparallel.graph.operators import BRANCH_TAKEN
from autoparallel.rules.registry import rule
from autoparallel.rules.rule import Loops, OpCall, ShardingRule

UNARY = """
abs acos acosh asin asinh atan atanh bitwise_not ceil cos cosh deg2rad elu erf erfc erfinv exp
exp2 expm1 floor gelu hardsigmoid hardswish hardtanh leaky_relu log log10 log1p log2 log_sigmoid
logical_not logit mish reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh
softplus sqrt square tan tanh threshold trunc celu isnan isinf isfinite clamp clamp_min
clamp_max nan_to_num frac sgn digamma lgamma absolute clip special_expit
rad2deg signbit sinc i0 isposinf isneginf hardshrink softshrink angle mvlgamma
special_i0e special_i1 special_i1e special_entr special_erfcx special_log_ndtr special_ndtri
""".split()

# Ops through which a pending sum passes: f(a + b) = f(a) + f(b).
_LINEAR_UNARY = [
    "aten.neg.default",
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten.to.device",
    "aten._to_copy.default",
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.detach.default",
    "aten.positive.default",
    "aten._conj.default",
    "aten.conj_physical.default",
    "aten.resolve_conj.default",
    "aten.resolve_neg.default",
    "aten.negative.default",
    "aten.mul.Scalar",
    "aten.div.Scalar",
    "aten.true_divide.Scalar",
]

# Binary ops by the overloads that they have.
_OVERLOADS = {
    "Tensor Scalar": """
        eq ne lt le gt ge fmod remainder bitwise_and bitwise_or bitwise_xor copysign
        __and__ __or__ __xor__ __lshift__ __rshift__
    """,
    "Tensor": "xlogy ldexp bitwise_left_shift bitwise_right_shift",
    "default": """
        maximum minimum fmax fmin hypot atan2 logical_and logical_or logical_xor logaddexp
        logaddexp2 nextafter heaviside gcd lcm special_xlog1py special_zeta
    """,
    "default Scalar": "floor_divide",
    "Tensor_Tensor Tensor_Scalar Scalar": "pow",
}
BINARY = tuple(
    f"{name}.{overload}"
    for overloads, names in _OVERLOADS.items()
    for name in names.split()
    for overload in overloads.split()
)


def broadcast(call: OpCall) -> tuple[tuple[tuple[Loops, ...], ...], dict[str, Dim]]:
    """Return the loops of every operand and result, one per dim of the result, aligned right;
    and their sizes.
    """
    shape = call.results[0].shape
    sizes: dict[str, Dim] = {}
    for index, size in enumerate(shape):
        if size != 1:
            sizes[f"d{index}"] = size
    dims: list[tuple[Loops, ...]] = []
    for tensor in (*call.operands, *call.results):
        offset = len(shape) - len(tensor.shape)
        dims.append(
            tuple(
                () if size == 1 else (f"d{offset + index}",)
                for index, size in enumerate(tensor.shape)
            )
        )
    return tuple(dims), sizes


def pointwise(call: OpCall, *linear: set[int]) -> ShardingRule:
    """Return the rule of y[i] = f(a[i], b[i], ...): every dim can be split.

    linear: as in ShardingRule.
    """
    dims, sizes = broadcast(call)
    count = len(call.operands)
    groups = tuple(frozenset(group) for group in linear)
    return ShardingRule(dims[:count], dims[count:], sizes, linear=groups)


@rule(BRANCH_TAKEN)
def branch_taken(call: OpCall) -> ShardingRule:
    """A truth value, which all ranks ask for alike."""
    return replace(pointwise(call), function="branch_taken")


@rule(
    *(f"aten.{name}.default" for name in UNARY),
    *(f"aten.{target}" for target in BINARY),
    "aten.clamp.Tensor",
    "aten.polar.default",
    "aten.clamp_min.Tensor",
    "aten.clamp_max.Tensor",
    "aten.where.Scalar",
    "aten.isin.Tensor_Scalar",
)
def nonlinear(call: OpCall) -> ShardingRule:
    """y[i] = f(a[i], ...) where f(a + b) is not f(a) + f(b), so that no pending sum passes."""
    return pointwise(call)


@rule(*_LINEAR_UNARY)
def linear_unary(call: OpCall) -> ShardingRule:
    """y[i] = f(a[i]) where f(a + b) = f(a) + f(b), for floating point numbers."""
    # Casting to or from integers rounds, which no sum survives.
    if not call.operands[0].dtype.is_floating_point or not call.results[0].dtype.is_floating_point:
        return pointwise(call)
    return pointwise(call, {0})


@rule(
    "aten.add.Tensor",
    "aten.sub.Tensor",
    "aten.subtract.Tensor",
    "aten.rsub.Tensor",
    "aten.add.Scalar",
    "aten.sub.Scalar",
    "aten.rsub.Scalar",
)
def add(call: OpCall) -> ShardingRule:
    """Linear in both operands together.

    A constant added to a pending sum would count on every rank.
    """
    if len(call.operands) != 2:
        return pointwise(call)
    # alpha would have to scale the bias that the product adds.
    plain = call.node.target == "aten.add.Tensor" and not call.node.kwargs
    return replace(pointwise(call, {0, 1}), adds=plain)


@rule("aten.mul.Tensor", "aten.multiply.Tensor")
def mul(call: OpCall) -> ShardingRule:
    """Linear in each operand by itself.

    x * x is linear in neither, since (a + b)^2 is not a^2 + b^2.
    """
    if len(call.operands) == 1:
        return pointwise(call, {0})
    if call.operands[0].name == call.operands[1].name:
        return pointwise(call)
    return pointwise(call, {0}, {1})


@rule("aten.div.Tensor", "aten.divide.Tensor", "aten.true_divide.Tensor")
def div(call: OpCall) -> ShardingRule:
    """Linear in the dividend. x / x is not."""
    same = len(call.operands) == 2 and call.operands[0].name == call.operands[1].name
    return pointwise(call) if same else pointwise(call, {0})


@rule("aten.addcmul.default", "aten.addcdiv.default")
def add_product(call: OpCall) -> ShardingRule:
    """x + a b or x + a / b: linear in x and one factor together, but not in a divisor."""
    names = [operand.name for operand in call.operands]
    if names[1] == names[2]:
        return pointwise(call)
    factors = ({0, 1}, {0, 2}) if "addcmul" in call.node.target else ({0, 1},)
    return pointwise(call, *factors)


@rule("aten.masked_fill.Tensor")
def masked_fill(call: OpCall) -> ShardingRule:
    """Linear in the tensor and the value together; the mask is the same on all ranks."""
    return pointwise(call, {0, 2})


@rule("aten.fill.Tensor")
def fill(call: OpCall) -> ShardingRule:
    """The value, repeated in the shape of another tensor, of which nothing else is read."""
    return pointwise(call)


@rule("aten.where.self")
def where(call: OpCall) -> ShardingRule:
    """Linear in both branches together; the condition is the same on all ranks."""
    return pointwise(call, {1, 2})


@rule("aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.masked_fill.Scalar")
def where_number(call: OpCall) -> ShardingRule:
    """One branch is a number, which would count on every rank unless it is zero."""
    at = 1 if call.node.target == "aten.where.ScalarSelf" else 2
    if call.argument(at, "value") != 0:
        return pointwise(call)
    return pointwise(call, {0 if "masked" in call.node.target else 1})


@rule("aten.complex.default")
def parts(call: OpCall) -> ShardingRule:
    """A complex number: linear in the real and the imaginary part together."""
    return pointwise(call, {0, 1})


@rule("aten.linalg_cross.default")
def cross(call: OpCall) -> ShardingRule:
    """Linear in each vector by itself; the dim of their three elements stays whole."""
    elementwise = pointwise(call, {0}, {1})
    rank = len(call.results[0].shape)
    dim = call.node.keyword("dim", -1) % rank
    if call.operands[0].name == call.operands[-1].name:
        elementwise = pointwise(call)
    return replace(elementwise, whole=frozenset(elementwise.results[0][dim]))


@rule("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(call: OpCall) -> ShardingRule:
    """a + weight (b - a): linear in both ends together, for a given weight."""
    return pointwise(call, {0, 1})


@rule("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def rounded_div(call: OpCall) -> ShardingRule:
    """A quotient that is rounded, through which no sum passes."""
    return pointwise(call)


@rule("aten.prelu.default")
def prelu(call: OpCall) -> ShardingRule:
    """One slope per channel, the second dim, or one for all. A slope has the channel's loop."""
    shape, slopes = call.operands[0].shape, call.operands[1].shape
    names = [f"d{i}" for i in range(len(shape))]
    slope = names[min(1, len(names) - 1)] if slopes else ""
    row = " ".join(names)
    return ShardingRule.parse(f"{row}, {slope} -> {row}", call)


@rule(
    *(f"aten.{name}_like.default" for name in ("zeros", "ones", "full")),
    "aten.zero.default",
    "aten.fill.Scalar",
)
def filled(call: OpCall) -> ShardingRule:
    """A constant in the operand's shape: its values do not depend on the operand's."""
    return pointwise(call)
