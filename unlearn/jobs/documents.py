"""Job descriptions in YAML: built as data, so that they are valid whatever stands in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Keeps the order of keys and writes scripts as they are read, line by line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def documents(comments: Iterable[str], contents: Iterable[Mapping[str, Any]]) -> str:
    """Write documents one after the other, with lines of comment above them."""
    head = "".join(f"# {' '.join(line.split())}\n" for line in comments)
    body = "---\n".join(
        yaml.dump(dict(one), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
        for one in contents
    )
    return head + body
