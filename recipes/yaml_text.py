"""Recipe text: YAML with the rules of version 1.2, so that `on`, `1e-4` and dates mean themselves.

PyYAML follows version 1.1, in which the key ``on`` is a boolean and ``1e-4`` a string. Duplicate
keys and aliases are refused: a recipe is one experiment, written out once.
"""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from unlearn.errors import UserError

Tree = dict[str, Any]
Location = tuple[str | int, ...]

_RULES = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", "~nN\0"),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "aliases are not supported; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text; quote it", key_node.start_mark
                )
            if key in first:
                message = f"key '{key}' is given twice (first on line {first[key]})"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            first[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {  # noqa: RUF012
        # what version 1.1 reads as a number or date is quoted, so that any reader agrees
        first: [rule for rule in rules if rule[0] != _TAG + "bool"]
        for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16 if text.startswith("0x") else 10)


class Flow(dict[str, Any]):
    """A mapping that is written on one line."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    if not math.isfinite(value):
        return dumper.represent_float(value)
    mantissa, _, exponent = repr(value).partition("e")
    if exponent:
        mantissa = mantissa if "." in mantissa else mantissa + ".0"
        sign, digits = exponent[0], exponent[1:].lstrip("0")
        mantissa += f"e{sign}{digits}"
    return dumper.represent_scalar(_TAG + "float", mantissa)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # escapes on one line, as people write templates; plain text loses unusual line breaks
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", value, style=style)


for _name, (_pattern, _first) in _RULES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _name, re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )
_Loader.add_constructor(_TAG + "int", _construct_int)
_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    Flow, lambda dumper, data: dumper.represent_mapping(_TAG + "map", data, flow_style=True)
)


def parse(text: str) -> Any:
    """Read YAML; raise ValueError with one line (and the line number) when it cannot be read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_tree(text: str, name: str) -> Tree:
    """Read YAML that must be a group of keys.

    Raises:
        UserError: not YAML, empty, or something other than keys.
    """
    try:
        tree = parse(text)
    except ValueError as error:
        raise UserError(f"{name}, {error}", "the file is not valid YAML") from None
    if tree is None:
        raise UserError(f"{name} is empty", "`unlearn recipes copy npo FILE` gives a start")
    if not isinstance(tree, dict):
        raise UserError(f"{name} holds no keys", "it starts with `method: …`")
    return tree


def line_numbers(text: str) -> dict[Location, int]:
    """Give the line of every key and list item, counted from 1."""
    lines: dict[Location, int] = {}

    def walk(node: yaml.Node | None, at: Location) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[*at, key.value] = key.start_mark.line + 1
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[*at, index] = value.start_mark.line + 1
                walk(value, (*at, index))

    walk(yaml.compose(text, Loader=_Loader), ())
    return lines


def to_text(tree: Tree) -> str:
    """Write keys in their order; floats as people write them."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text
