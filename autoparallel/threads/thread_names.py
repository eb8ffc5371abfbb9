"""Names of threads that a reader knows, inferred from what calls do with them.

No name of a module, a parameter or a model is looked at: heads are what a product of activations
goes through side by side, a feed-forward dim is what one product with a weight makes and the next
one sums, wherever that is. Threads of inputs are called by the user's names of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from autoparallel.graph.graph import Graph, Node, Sym, hint
from autoparallel.graph.weight_values import weight_values
from autoparallel.rules.rule import ShardingRule
from autoparallel.threads.thread import Passage, Thread, Treatment

__all__ = ["ROLES", "InputNames", "Namer"]

# The user's name of each input, by the name of its node.
InputNames = Mapping[str, str]

# Every name that does not come from the user's inputs, and what makes a thread be called so.
ROLES: Mapping[str, str] = {
    "batch": "dim 0 of the first input",
    "sequence": "dim 1 of an input of whole numbers with two dims, or what attention goes over",
    "vocabulary": "rows of the longest table that is looked up by an input",
    "categories": "rows of a shorter table that is looked up by an input",
    "positions": "rows of a table that is looked up by numbers that the model makes",
    "classes": "what a loss sums over, where no table has as many rows",
    "experts": "weights side by side, each for its part of the activations",
    "heads": "what a product of activations goes through side by side",
    "key-value heads": "heads of keys and values that several heads of queries share",
    "heads per key-value head": "heads of queries that share keys and values",
    "head size": "what the product of queries and keys sums, or the values of one head",
    "channels": "what a window over an image or a signal sums, or makes",
    "channel groups": "channels that a window sums apart from the others",
    "window": "places of a window over an image or a signal",
    "places": "places of an image or a signal that windows have made",
    "hidden": "what most activations have, and norms need whole",
    "feed-forward": "what a product with a weight makes and the next one sums, free in between",
    "fused parts": "equal parts of one product's result that are taken apart",
    "features": "what products with weights make or sum",
}


class Namer:
    """A Namer gives the threads of one graph their names.

    products: passages through products, by thread. weights: values that come from parameters alone.
    """

    def __init__(
        self,
        graph: Graph,
        threads: Sequence[Thread],
        rules: Mapping[str, ShardingRule | None],
        inputs: InputNames,
    ) -> None:
        self.graph, self.threads, self.rules, self.inputs = graph, threads, rules, inputs
        self.nodes: Mapping[str, Node] = {node.name: node for node in graph.nodes}
        self.weights = weight_values(graph)

    def named(self) -> tuple[Thread, ...]:
        """Return the threads with their names."""
        steps: tuple[Callable[[], Mapping[int, str]], ...] = (
            self.of_inputs,
            self.of_tables,
            self.of_hidden,
            self.of_products,
            self.of_weights,
        )
        names: dict[int, str] = {}
        for step in steps:
            # What is known already stays: the first steps are the surest.
            self.known = names
            names = {**step(), **names}
        return tuple(
            replace(thread, name=names.get(thread.number) or self.plain(thread))
            for thread in self.threads
        )

    def plain(self, thread: Thread) -> str:
        """Return the name of a thread of which nothing is known but where it begins."""
        birth = thread.births[0] if thread.births else None
        if birth is None:
            return "inside of an op"
        for other in thread.births:
            if other.kind == "input":
                return f"{self.inputs.get(other.name) or 'input'}.{other.dim}"
        if birth.kind != "call":
            return f"of a {birth.kind}"
        first = next(iter(self._by_call.get(birth.name, ())), None)
        if first is not None and self._is_window(first):
            return "places"
        parts = self.nodes[birth.name].target.split(".")
        return f"made by {parts[1] if len(parts) > 2 else parts[0]}"

    def of_inputs(self) -> dict[int, str]:
        """Name what inputs bring: the batch, the sequence, the channels of an image."""
        names: dict[int, str] = {}
        given = [node.result for node in self.graph.nodes if node.kind == "input"]
        at: dict[tuple[str, int], int] = {
            (birth.name, birth.dim): thread.number
            for thread in self.threads
            for birth in thread.births
            if birth.kind == "input"
        }
        for index, value in enumerate(given):
            for dim in range(len(value.shape)):
                number = at.get((value.name, dim))
                if number is None or number in names:
                    continue
                whole_numbers = not (value.dtype.is_floating_point or value.dtype.is_complex)
                if dim == index == 0:
                    names[number] = "batch"
                elif any(map(self._runs_windows, self._products(number))):
                    names[number] = "places"
                elif dim != 1:
                    continue
                elif whole_numbers and len(value.shape) == 2 and "sequence" not in names.values():
                    names[number] = "sequence"
                elif any(map(self._is_window, self._products(number))):
                    names[number] = "channels"
        return names

    def of_tables(self) -> dict[int, str]:
        """Name the rows of tables, and the classes of losses."""
        from_inputs = self._from_inputs()
        by_input: dict[int, int] = {}
        names: dict[int, str] = {}
        for thread in self.threads:
            for passage in thread.treated(Treatment.KERNEL):
                node, rule = self.nodes[passage.call], self.rules[passage.call]
                reads = node.operands()
                if rule is None or passage.results or rule.flops:
                    continue
                position = passage.operands[0][0]
                if reads[position] in self.weights:
                    others = [name for name in reads if name != reads[position]]
                    if any(name in from_inputs for name in others):
                        by_input[thread.number] = hint(thread.size)
                    elif others:
                        names[thread.number] = "positions"
                elif not self.graph.values[node.results[0].name].shape and len(reads) > 1:
                    names[thread.number] = "classes"
        longest = max(by_input.values(), default=0)
        for number, size in by_input.items():
            names[number] = "vocabulary" if size == longest else "categories"
        for number, name in names.items():
            # A head of its own, beside a table with as many rows.
            if name == "classes" and hint(self.threads[number].size) == longest:
                names[number] = "vocabulary"
        return names

    def of_products(self) -> dict[int, str]:
        """Name the dims of attention, experts and windows, by the part they have in products."""
        names: dict[int, str] = {}
        for node in self.graph.calls:
            rule = self.rules[node.name]
            if rule is None or not rule.flops:
                continue
            reads = node.operands()
            weights = [position for position, name in enumerate(reads) if name in self.weights]
            heads: list[int] = []
            for passage in self._by_call.get(node.name, ()):
                role = self._role(passage, node, rule, weights)
                for number in passage.threads:
                    if number in self.known or not role:
                        continue
                    names.setdefault(number, role)
                    if role == "heads":
                        heads.append(number)
            # Two of them side by side: queries share the keys and values of the outer ones.
            if len(heads) == 2 and all(names[number] == "heads" for number in heads):
                self._shared(heads, names)
        return names

    def _role(self, passage: Passage, node: Node, rule: ShardingRule, weights: list[int]) -> str:
        """Return the name that one product gives to the threads of a loop; "" for none."""
        reads = node.operands()
        having = {position for position, _ in passage.operands}
        activations = [p for p in range(len(reads)) if p not in weights]
        if not weights:
            floating = [p for p in activations if self.graph.values[reads[p]].requires_grad]
            if len(floating) < 2:
                return ""
            shared = sum(position in having for position in floating)
            if shared >= 2 and passage.results:
                return "heads"
            if not shared:
                return ""
            # Weights make the size of a head; what they do not make is gone through.
            made = all(
                any(self._weighted(product) for product in self._products(number))
                for number in passage.threads
            )
            return "head size" if made else "sequence"
        weight_dims = [self.graph.values[reads[p]].shape for p in weights]
        if max(map(len, weight_dims)) < 3:
            return ""
        if self._is_window(passage):
            if having <= set(weights) and not passage.results:
                return "window"
            if having & set(weights) and having & set(activations) and passage.results:
                return "channel groups"
            return "channels" if having & set(weights) else ""
        beside = passage.results or passage.kernel
        if having & set(weights) and beside and (len(having) > 1 or passage.kernel):
            return "experts"
        return ""

    def _shared(self, heads: list[int], names: dict[int, str]) -> None:
        """Tell the heads of keys and values from those of queries that share them."""
        for place in self.threads[heads[0]].places:
            row = [
                number
                for number in heads
                if any(
                    (other.value, other.dim) == (place.value, place.dim)
                    for other in self.threads[number].places
                )
            ]
            if len(row) == 2:
                outer = min(
                    heads,
                    key=lambda number: next(
                        other.inner
                        for other in self.threads[number].places
                        if (other.value, other.dim) == (place.value, place.dim)
                    ),
                )
                for number in heads:
                    inner = "heads per key-value head"
                    names[number] = "key-value heads" if number == outer else inner
                return

    def of_hidden(self) -> dict[int, str]:
        """Name the thread that most activations have, if norms need it or products sum it."""
        counts: dict[int, tuple[int, int]] = {}
        for thread in self.threads:
            if thread.number in self.known or isinstance(thread.size, Sym):
                continue
            through = sum(bool(p.results) and not self._is_weight(p) for p in thread.passages)
            summed = sum(
                passage.treatment in (Treatment.SUMMED, Treatment.KERNEL)
                and not passage.results
                and self._weighted(passage)
                for passage in thread.passages
            )
            if summed > 1:
                counts[thread.number] = summed, through
        best = max(counts, key=lambda number: counts[number], default=None)
        if best is None:
            return {}
        products = self._products(best)
        windows = sum(map(self._is_window, products))
        return {best: "channels" if 2 * windows > len(products) else "hidden"}

    def of_weights(self) -> dict[int, str]:
        """Name what products with weights make and sum, and what is taken apart behind them."""
        names: dict[int, str] = {}
        # A router scores as many experts as there are weights side by side.
        experts = {
            hint(self.threads[number].size)
            for number, name in self.known.items()
            if name == "experts"
        }
        for thread in self.threads:
            if thread.number in self.known:
                continue
            products = self._products(thread.number)
            made = any(p.results and self._weighted(p) for p in products)
            summed = any(p.treatment is Treatment.SUMMED and self._weighted(p) for p in products)
            apart = any(
                passage.is_end and (rule := self.rules[passage.call]) is not None and rule.free
                for passage in thread.treated(Treatment.WHOLE)
            )
            if made and apart:
                names[thread.number] = "fused parts"
            elif made and hint(thread.size) in experts:
                names[thread.number] = "experts"
            elif made and summed and thread.is_free:
                names[thread.number] = "feed-forward"
            elif made or summed:
                names[thread.number] = "features"
        return names

    # -- facts

    @cached_property
    def _by_call(self) -> Mapping[str, Sequence[Passage]]:
        """The passages of every call, each once."""
        by_call: dict[str, dict[Passage, None]] = {}
        for thread in self.threads:
            for passage in thread.passages:
                by_call.setdefault(passage.call, {})[passage] = None
        return {name: tuple(passages) for name, passages in by_call.items()}

    def _products(self, number: int) -> list[Passage]:
        """Return the passages of a thread through products."""
        passages = self.threads[number].passages
        return [p for p in passages if (rule := self.rules[p.call]) is not None and rule.flops]

    def _weighted(self, passage: Passage) -> bool:
        """Return whether a passage is through a product with a weight that has the loop."""
        rule, reads = self.rules[passage.call], self.nodes[passage.call].operands()
        return bool(rule and rule.flops) and any(
            reads[position] in self.weights for position, _ in passage.operands
        )

    def _is_weight(self, passage: Passage) -> bool:
        """Return whether the call only makes one weight of another."""
        return self.nodes[passage.call].results[0].name in self.weights

    def _is_window(self, passage: Passage) -> bool:
        """Return whether a product is one of windows: its rule says so, or its result has places
        that nothing else has.
        """
        rule = self.rules[passage.call]
        if rule is None or not rule.flops:
            return False
        if rule.windows:
            return True
        read = {loop for dims in rule.operands for names in dims for loop in names}
        return any(loop not in read for dims in rule.results for names in dims for loop in names)

    def _runs_windows(self, passage: Passage) -> bool:
        """Return whether windows of a product move along the thread."""
        rule = self.rules[passage.call]
        return rule is not None and passage.loop in rule.windows

    def _from_inputs(self) -> set[str]:
        """Return the values that follow from inputs, and from no parameter."""
        from_inputs: set[str] = set()
        for node in self.graph.nodes:
            reads = node.operands()
            follows = any(name in from_inputs for name in reads)
            if node.kind == "input" or (node.kind == "call" and follows):
                from_inputs.update(value.name for value in node.results)
        return from_inputs
