"""Sizes as expressions: what a graph for a range of sizes asks of a call, as text that a document can hold.

The sizes of its inputs are expressions in named symbols, such as ``height`` or ``8*width``; each symbol has a smallest
and a largest value, and conditions hold between them. Expressions are plain arithmetic on whole numbers: nothing else
in them is read, because documents come from a vault.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Size: TypeAlias = "int | str"

_LONGEST_EXPRESSION = 1_000
_DEEPEST = 100
_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": max, "min": min}


@dataclass(frozen=True)
class Symbol:
    """A size that varies, from ``least`` to ``most``, both included."""

    name: str
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.name} {self.least}-{self.most}"


@dataclass(frozen=True)
class Sizes:
    """The conditions of a graph on the sizes of its tensors: see :class:`pipevault.graphs.signature.CallSignature`."""

    sizes: tuple[Size, ...]
    symbols: tuple[Symbol, ...]
    conditions: tuple[str, ...]


class Expression:
    """One expression. Raises ``ValueError`` for text that is none."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST_EXPRESSION:
            raise ValueError(f"an expression of {len(text)} characters is too long")
        names: set[str] = set()
        try:
            self._evaluate = _compiled(ast.parse(text, mode="eval").body, names)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"{text[:40]!r} is not an expression") from error
        self.symbols = frozenset(names)

    def value(self, symbols: Mapping[str, int]) -> int:
        """Return the value for those ``symbols``; ``ZeroDivisionError`` where it has none."""
        return int(self._evaluate(symbols))

    def solve(self, size: int, known: Mapping[str, int]) -> tuple[str, int] | None:
        """Return the one symbol that is not ``known`` and its value if the expression has the value ``size``; ``None``
        where there is more than one, or no whole number does it.
        """
        unknown = self.symbols - known.keys()
        if len(unknown) != 1:
            return None
        [name] = unknown
        at_zero, at_one = (self.value({**known, name: value}) for value in (0, 1))
        if at_one == at_zero or (size - at_zero) % (at_one - at_zero):
            return None
        solution = (size - at_zero) // (at_one - at_zero)
        return (name, solution) if self.value({**known, name: solution}) == size else None


expression = functools.lru_cache(maxsize=4096)(Expression)


def solve(
    pairs: Iterable[tuple[str, int]], symbols: Sequence[Symbol], conditions: Sequence[str]
) -> dict[str, int] | None:
    """Return the value of each symbol for which the expressions in ``pairs`` have the sizes next to them, the symbols
    lie in their ranges and the conditions hold; ``None`` if there are no such values.
    """
    waiting = [(expression(text), size) for text, size in pairs]
    found: dict[str, int] = {}
    try:
        while waiting:
            left = []
            for known, size in waiting:
                if known.symbols <= found.keys():
                    if known.value(found) != size:
                        return None
                elif (solution := known.solve(size, found)) is not None:
                    found[solution[0]] = solution[1]
                else:
                    left.append((known, size))
            if len(left) == len(waiting):
                return None
            waiting = left
        within = all(one.least <= found[one.name] <= one.most for one in symbols)
        return found if within and all(expression(text).value(found) for text in conditions) else None
    except (KeyError, ZeroDivisionError):
        return None


def _compiled(node: ast.AST, names: set[str], depth: int = 0) -> Callable[[Mapping[str, int]], Any]:
    """Return what evaluates arithmetic on whole numbers, and add its symbols to ``names``; else ``ValueError``."""
    if depth > _DEEPEST:
        raise ValueError("an expression is nested too deeply")
    inside = node.args if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
    parts = [_compiled(part, names, depth + 1) for part in inside if isinstance(part, ast.expr)]
    match node:
        case ast.Name():
            names.add(node.id)
            return operator.itemgetter(node.id)
        case ast.Constant() if type(node.value) in (int, bool):
            value = node.value
            return lambda symbols: value
        case ast.BinOp() | ast.UnaryOp() if type(node.op) in _OPERATORS:
            compute = _OPERATORS[type(node.op)]
            return lambda symbols: compute(*(part(symbols) for part in parts))
        case ast.Compare() if all(type(op) in _OPERATORS for op in node.ops):
            compare = [_OPERATORS[type(op)] for op in node.ops]

            def holds(symbols: Mapping[str, int]) -> bool:
                values = [part(symbols) for part in parts]
                return all(op(a, b) for op, a, b in zip(compare, values, values[1:], strict=False))

            return holds
        case ast.BoolOp():
            join = all if isinstance(node.op, ast.And) else any
            return lambda symbols: join(part(symbols) for part in parts)
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            if node.keywords or not node.args:
                raise ValueError(f"{name} takes numbers alone")
            choose = _FUNCTIONS[name]
            return lambda symbols: choose(*[part(symbols) for part in parts])
    raise ValueError(f"an expression has no {type(node).__name__}")
