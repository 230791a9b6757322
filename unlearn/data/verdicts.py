"""Verdict expressions: which of a row's generations count as right.

``llama & math_verify`` names columns that hold one verdict per generation; ``correctness.llama``
looks inside a column. ``&`` (and), ``|`` (or), ``~`` (not) and brackets join them.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.errors import UserError, did_you_mean

HINT = "name columns and join them with &, | and ~, e.g. 'correctness.llama & ~flagged'"

LIST_HINT = "give one true or false (or 1, 0, null) per answer"


@dataclass(frozen=True)
class Verdict:
    """A parsed expression; nothing in it is ever executed."""

    text: str
    tree: ast.expr

    @classmethod
    def parse(cls, text: str) -> "Verdict":
        """Read an expression.

        Raises:
            UserError: it holds something else than names, ``&``, ``|``, ``~`` and brackets.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError):
            raise UserError(f"cannot read the verdict '{text}'", HINT) from None
        found = cls(text, tree)
        found._check(tree)
        return found

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            self._check(node.left)
            self._check(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            self._check(node.operand)
        elif _path(node) is None:
            raise UserError(f"cannot read the verdict '{self.text}'", HINT)

    @property
    def columns(self) -> list[str]:
        """The columns it names, each once."""
        return list(dict.fromkeys(_names(self.tree)))

    def lists(self, row: Mapping[str, Any], place: str) -> dict[str, Sequence[Any]]:
        """Give the verdicts of every column that it names; none where a row has null instead.

        Raises:
            UserError: a column is not there, holds no list, or holds something else than true,
                false, 0, 1 and null.
        """
        return {name: _column(row, name, place) for name in self.columns}

    def right(self, lists: Mapping[str, Sequence[Any]], at: int) -> bool:
        """Tell whether generation ``at`` is right; an unknown verdict (null) counts as no."""
        return _holds(self.tree, {name: bool(values[at]) for name, values in lists.items()})


def _path(node: ast.expr) -> str | None:
    """Give ``a.b`` of a name or an attribute; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := _path(node.value)):
        return f"{start}.{node.attr}"
    return None


def _names(node: ast.expr) -> Iterator[str]:
    if (path := _path(node)) is not None:
        yield path
    else:
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                yield from _names(part)


def _holds(node: ast.expr, said: Mapping[str, bool]) -> bool:
    if isinstance(node, ast.UnaryOp):
        return not _holds(node.operand, said)
    if isinstance(node, ast.BinOp):
        left, right = _holds(node.left, said), _holds(node.right, said)
        return left and right if isinstance(node.op, ast.BitAnd) else left or right
    path = _path(node)
    assert path is not None
    return said[path]


def _column(row: Mapping[str, Any], name: str, place: str) -> Sequence[Any]:
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = value if isinstance(value, Mapping) else ()
            raise UserError(f"{place} has no column '{name}'{did_you_mean(part, names)}", HINT)
        value = value[part]
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{place}: '{name}' is {value!r}, no list of verdicts", LIST_HINT)
    for verdict in value:  # a text such as "false" would count as yes
        if verdict is not None and verdict not in (False, True):
            raise UserError(f"{place}: '{name}' holds {verdict!r}, which is no verdict", LIST_HINT)
    return value
