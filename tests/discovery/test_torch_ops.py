"""Rules of torch's own ops that nobody wrote one for: what is free of each other is split."""

from __future__ import annotations

import pytest
import torch
from broad_cases import share_of
from calls import Call, fixed, ints, x

from autoparallel.discovery.discover import ProbeError, discover
from autoparallel.discovery.strategy_validation import derived, why_wrong


def complex_numbers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, dtype=torch.complex128, generator=generator)
    return numbers.requires_grad_()


def matrices(*shape: int) -> torch.Tensor:
    """Return symmetric positive matrices."""
    numbers = fixed(*shape, shape[-1])
    return (numbers @ numbers.mT + 3 * torch.eye(shape[-1])).requires_grad_()


def lower(*shape: int) -> torch.Tensor:
    """Return their triangular factors."""
    return torch.linalg.cholesky(matrices(*shape).detach()).requires_grad_()


FACTORS, PIVOTS = torch.linalg.lu_factor(matrices(4, 5).detach())
CALLS = [
    # A code of success for each matrix is the same whatever the numbers are.
    (("linalg_inv_ex.default", matrices(4, 5)), "a b c -> a d e, a; b c d e whole"),
    (
        ("_linalg_solve_ex.default", matrices(4, 5), x(4, 5, 6)),
        "a b c, a d e -> a f e, a g h, a i, a; e by alike_elsewhere; b c d f g h i whole",
    ),
    (
        ("linalg_lu_factor_ex.default", matrices(4, 5)),
        "a b c -> a d e, a f, a; b c d e f whole",
    ),
    (
        ("linalg_ldl_factor_ex.default", matrices(4, 5).detach()),
        "a b c -> a d e, a f, a; b c d e f whole",
    ),
    # Numbers that are nearly singular, or grow beyond all measure, are judged by their condition.
    (("linalg_pinv.atol_rtol_tensor", x(4, 6, 5)), "a b c -> a d e; b c d e whole"),
    (("cholesky_inverse.default", lower(4, 5)), "a b c -> a d e; b c d e whole"),
    (
        ("linalg_householder_product.default", x(4, 6, 5), x(4, 5)),
        "a b c, a d -> a e f; b c d e f whole",
    ),
    (
        ("ormqr.default", x(4, 6, 5), x(4, 5), x(4, 6, 3)),
        "a b c, a d, a e f -> a g f; b c d e g whole; linear in 2",
    ),
    (
        ("linalg_lu_solve.default", FACTORS.clone().requires_grad_(), PIVOTS, x(4, 5, 3)),
        "a b c, a d, a e f -> a g f; b c d e g whole; linear in 2",
    ),
    # Complex numbers.
    (("_conj.default", complex_numbers(4, 5)), "a b -> a b; linear in 0"),
    (("sgn.default", complex_numbers(4, 5)), "a b -> a b"),
    # Places where bags begin, from 0 and growing.
    (
        ("embedding_bag.default", x(9, 4), ints(8, low=0, high=9), torch.tensor([0, 3, 5])),
        "a b, c, d -> e b, f, d, d; b by alike_elsewhere; a c d e f whole",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "words"), share_of(CALLS, 3), ids=lambda item: str(item[0])[:40]
)
def test_rules_of_ops_of_torch(arguments: tuple[object, ...], words: str) -> None:
    """They are right at the call's own sizes too, on 2 and 3 ranks."""
    target, *args = arguments
    example = Call(f"aten.{target}", tuple(args)).example()
    rule = discover(example.call).rule(example.call)
    assert rule is not None
    assert rule.discovered == words
    for world_size in (2, 3):
        for strategy in derived(example, rule, world_size):
            # Matrices of a call are well-conditioned.
            wrong = why_wrong(example, strategy, world_size, rule, 1e-9)
            assert not wrong, f"{strategy} on {world_size}: {wrong}"


def test_a_sum_of_zeros_proves_no_pending_sum() -> None:
    """The first place of numbers that are none 0 is 0, and so are the sums of parts' places.

    With other numbers they are not: the op finds the first one that is not 0.
    """
    numbers = fixed(6, 5, 4)
    call = Call("aten.nonzero_static.default", (numbers,), {"size": 1}).example().call
    try:
        rule = discover(call).rule(call)
    except ProbeError:
        return  # it stays whole
    assert rule is not None
    assert set(rule.loops) <= rule.whole
