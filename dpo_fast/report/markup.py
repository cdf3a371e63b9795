"""Text of others as HTML that is only text, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# Controls have pictures of their own in Unicode. A browser would drop or mistake them: NUL, escape
# sequences of terminals. Marks that turn the direction of the text after them are shown by number.
CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
CONTROLS |= {0x7F: "\N{SYMBOL FOR DELETE}"}
CONTROLS |= {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
SURROGATES = re.compile("[\ud800-\udfff]")  # UTF-8 has no bytes for them


def text(value: object) -> str:
    """Escaped for content and attributes; control characters are made visible."""
    plain = str(value).replace("\r\n", "\n").translate(CONTROLS)
    return escape(SURROGATES.sub("\N{REPLACEMENT CHARACTER}", plain))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells that scrolls where it is too wide. numbers: columns that are aligned right."""
    kinds = [' class="n"' if place in numbers else "" for place in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr>'
        f"{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
