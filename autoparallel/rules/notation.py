"""A sharding rule in einsum-like words, as plans, pictures and tests show it."""

from __future__ import annotations

from autoparallel.graph.graph import leaves
from autoparallel.rules.rule import ShardingRule

__all__ = ["notation"]


def notation(rule: ShardingRule) -> str:
    """Return the rule in einsum-like words: "a b, b c -> a c; b summed; linear in 0, 1".

    Loops are letters in order of appearance; (a b) is a dim that merges loops, 1 a dim without one,
    () a tensor without dims. Behind the arrow's two sides are said: the loops whose split leaves a
    pending sum, those that a kernel splits, those that consist of others, those that cannot be
    split, and the sets of operands through which a pending sum passes (0+1 for both together).

    >>> product = ShardingRule(
    ...     operands=((("i",), ("k",)), (("k",), ("j",))),
    ...     results=((("i",), ("j",)),),
    ...     sizes={"i": 2, "k": 3, "j": 5},
    ...     linear=(frozenset({0}), frozenset({1})),
    ... )
    >>> notation(product)
    'a b, b c -> a c; b summed; linear in 0, 1'
    """
    names = {loop: _letter(index) for index, loop in enumerate(rule.loops)}

    def word(loops: tuple[str, ...]) -> str:
        """Return one dim."""
        text = " ".join(names[loop] for loop in loops)
        return f"({text})" if len(loops) > 1 else text or "1"

    sides = (
        ", ".join(" ".join(map(word, dims)) or "()" for dims in tensors)
        for tensors in (rule.operands, rule.results)
    )
    in_results = set(leaves(rule.results))
    in_results |= {whole for name, (whole, _, _) in rule.pieces.items() if name in in_results}
    free = [loop for loop in rule.loops if loop not in rule.whole]
    summed = [names[loop] for loop in free if loop not in in_results and loop not in rule.kernels]
    parts = [" -> ".join(sides)]
    if summed:
        parts.append(f"{' '.join(summed)} summed")
    if rule.kernels:
        parts += [f"{names[loop]} by {kernel.name}" for loop, kernel in rule.kernels.items()]
    for loop in dict.fromkeys(whole for whole, _, _ in rule.pieces.values()):
        pieces = (names.get(name, "1") for name, row in rule.pieces.items() if row[0] == loop)
        parts.append(f"{names[loop]} is {', '.join(pieces)} end to end")
    whole = [loop for loop in rule.loops if loop in rule.whole and loop not in rule.pieces]
    if whole:
        parts.append(f"{' '.join(names[loop] for loop in whole)} whole")
    if rule.linear:
        groups = ["+".join(str(index) for index in sorted(group)) for group in rule.linear]
        parts.append(f"linear in {', '.join(groups)}")
    return "; ".join(parts)


def _letter(index: int) -> str:
    """Return the name of a loop: a letter, and numbered ones where letters end."""
    return chr(ord("a") + index) if index < 26 else f"a{index}"
