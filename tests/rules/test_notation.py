"""The written rules in einsum-like words, a line for each op, so that a change of a rule is read.

notation.txt has the rule of one sample of every op (tests/support/sample_calls.py), the first with
the most loops. To write it anew:

    PYTHONPATH=tests/support python tests/rules/test_notation.py

Read the difference before committing it: strategies are proven by test_strategy_validation, but
that a rule allows less than it did is seen only here.
"""

from __future__ import annotations

from pathlib import Path

from sample_calls import CALLS

from autoparallel.rules.lookup import find_rule, registered
from autoparallel.rules.notation import notation
from autoparallel.rules.rule import ShardingRule
from autoparallel.rules.user_rules import written_at

FILE = Path(__file__).parent / "notation.txt"


def lines() -> list[str]:
    """Return "aten.mm.default: a b, b c -> a c; b summed; linear in 0, 1" for every op, sorted."""
    rules: dict[str, ShardingRule] = {}
    for sample in CALLS:
        author = find_rule(sample.target)
        assert author is not None, sample
        rule = author(sample.example().call)
        # Of several samples, the one that shows most: a scalar has no loops.
        if sample.target not in rules or len(rule.loops) > len(rules[sample.target].loops):
            rules[sample.target] = rule
    # A user's rule, such as the one in the docstring of register_rule, is not the project's.
    targets = [target for target in registered() if not written_at(target)]
    return [f"{target}: {notation(rules[target])}" for target in targets]


def test_rules_are_those_that_were_read() -> None:
    assert lines() == FILE.read_text().splitlines()


def main() -> None:
    """Write the file anew."""
    FILE.write_text("".join(f"{line}\n" for line in lines()))


if __name__ == "__main__":
    main()
