"""Docstrings here describe fields as lines of `name: what it is`. In the site these lines become lists."""

from __future__ import annotations

import re

from griffe import Class, Extension, Function, Module

# Google's sections are griffe's own.
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Examples:", "Example:", "Note:")
FIELD = re.compile(r"(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*):(?= )")


class FieldLists(Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_module_instance(self, *, mod: Module, **_) -> None:
        rewrite(mod)

    def on_class_instance(self, *, cls: Class, **_) -> None:
        rewrite(cls)

    def on_function_instance(self, *, func: Function, **_) -> None:
        rewrite(func)


def rewrite(thing: Module | Class | Function) -> None:
    if thing.docstring is not None:
        thing.docstring.value = with_lists(thing.docstring.value)


def with_lists(text: str) -> str:
    """Paragraphs whose first line is a field become lists; sections of Google's style stay."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(as_list(paragraph) for paragraph in paragraphs)


def as_list(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if lines[0].strip() in SECTIONS or not FIELD.match(lines[0]):
        return paragraph
    return "\n".join(FIELD.sub(r"- **\g<names>**:", line, count=1) for line in lines)
