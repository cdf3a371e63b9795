"""YAML whose every fault is a YAMLError with a line, and which stands for no more than it shows."""

from __future__ import annotations

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


def _below(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def load(text: str) -> Any:
    """The value of YAML text. Raises yaml.YAMLError."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, and {MOST_BYTES:,} is the most")
    return yaml.load(text, Loader=_Loader)
