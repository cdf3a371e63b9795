"""YAML whose every fault is a YAMLError with a line, and which stands for no more than it shows.

Numbers are those of YAML 1.2, and of JSON: to PyYAML, which follows YAML 1.1, 1e-6 is a text, 010 is 8 and
1:30 is 90.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from dpo_fast.wording import clipped, quoted

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000  # with every alias written out
DEEPEST = 50
# What PyYAML lets through of values that do not fit their type, as `2020-99-99` and `!!int abc`.
FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


INT = re.compile(r"[-+]?(?:0b[01_]+|0o[0-7]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)")
# Of an exponent alone three digits: more are the hash of a commit, as 12e4567.
FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]{1,3}"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def _with_our_numbers(kind: type) -> None:
    """Let a loader or a dumper know a number when it sees one."""
    tags = {f"tag:yaml.org,2002:{name}": shape for name, shape in (("int", INT), ("float", FLOAT))}
    known = kind.yaml_implicit_resolvers
    kind.yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0] not in tags]
        for first, resolvers in known.items()
    }
    for tag, shape in tags.items():
        whole = re.compile(f"(?:{shape.pattern})\\Z")
        kind.add_implicit_resolver(tag, whole, list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which PyYAML alone would keep the last; and alias bombs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        alias = isinstance(event, yaml.AliasEvent)
        if self._depth == DEEPEST:
            raise ComposerError(None, None, f"more than {DEEPEST} levels", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and node not in self._sizes:
            raise ComposerError(None, None, "an alias of what it stands in", event.start_mark)
        if not alias:
            self._sizes[node] = 1 + sum(self._sizes[each] for each in _below(node))
        if self._sizes[node] > MOST_VALUES:
            problem = f"it stands for more than {MOST_VALUES:,} values"
            raise ComposerError(None, None, problem, event.start_mark)
        return node

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except FAULTS as error:
            value = quoted(node.value) if isinstance(node, yaml.ScalarNode) else "it"
            problem = f"{value} is not a value of type {node.tag.rpartition(':')[2]} ({error})"
            raise ConstructorError(None, None, clipped(problem), node.start_mark) from None

    def construct_yaml_int(self, node):
        text = self.construct_scalar(node).replace("_", "").lower()
        base = {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("-+")[:2], 10)
        return int(text, base)

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_with_our_numbers(_Loader)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Puts a text into quotes that would be read as a number."""


_with_our_numbers(_Dumper)


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def load(text: str) -> Any:
    """The value of YAML text. Raises yaml.YAMLError."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and {MOST_BYTES:,} is the most")
    return yaml.load(text, Loader=_Loader)


def dump(value: Any, **options: Any) -> str:
    """YAML text of a value that `load` gives back as it was. options: of `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, **options)
