"""Single values of a row: texts, messages, numbers, labels and the optional columns. All raise BadRow."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from dpo_fast.data.config import TEMPLATE_ARGUMENTS
from dpo_fast.data.files import Cell
from dpo_fast.data.json_text import NotFinite, decode
from dpo_fast.data.kinds import Kind
from dpo_fast.data.messages import (
    Messages,
    are_messages,
    check_messages,
    check_not_python,
    from_text,
    messages_in,
)
from dpo_fast.data.plain import structure
from dpo_fast.data.verdicts import BadRow
from dpo_fast.wording import quoted

# Names that others give to our columns, for a hint.
SYNONYMS = {
    "prompt": ("question", "query", "instruction", "input", "user", "context", "text"),
    "chosen": (
        "good",
        "better",
        "best",
        "preferred",
        "winner",
        "win",
        "accepted",
        "positive",
        "y_w",
    ),
    "rejected": ("bad", "worse", "worst", "dispreferred", "loser", "lose", "negative", "y_l"),
    "completion": ("response", "output", "answer"),
    "label": ("desirable", "thumbs_up", "is_good", "is_chosen"),
}

# The product of two such numbers is finite in fp32.
LARGEST = 1e18

# What rounding may leave of a sum of log-probs above 0, where every token is certain.
ROUNDING = 0.01

# Columns that hold lists or objects in the forms that have them.
NESTED = (
    *("conversations", "messages", "conversation", "trajectory", "rejected_messages"),
    *("conversation_a", "conversation_b", "preferred_output", "non_preferred_output", "context"),
    *("completions", "answers", "generations", "ratings", "scores", "ranks", "input"),
)


def answer(row: Mapping[str, Any], raw: Mapping[str, Any], name: str) -> str | Messages:
    need(row, raw, name)
    return text_or_messages(row[name], name)


def items(row: Mapping[str, Any], raw: Mapping[str, Any], name: str) -> list:
    need(row, raw, name)
    value = _typed(row[name])
    if not isinstance(value, list):
        got = "null" if value is None else type(value).__name__
        raise BadRow(
            f"field {name!r} is not a list", f"expected one entry for each completion, got {got}"
        )
    return value


def need(row: Mapping[str, Any], raw: Mapping[str, Any], name: str) -> None:
    if name not in row:
        raise BadRow(
            f"missing field {name!r}",
            f"{seen(raw, name)}; data.columns.{name}=... names another column",
        )


def seen(raw: Mapping[str, Any], wanted: str) -> str:
    """The columns of a row, in words, and which of them may be meant."""
    lower = {name.lower(): name for name in raw}
    meant = [lower[each] for each in SYNONYMS.get(wanted, ()) if each in lower]
    near = meant or difflib.get_close_matches(wanted, list(raw), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"the row has {', '.join(map(repr, raw)) or 'no fields'}{hint}"


def text_or_messages(value: Any, name: str) -> str | Messages:
    """Text, or messages: a list of them, a single one, or JSON text of a list."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow(f"field {name!r} is not Unicode text", "it has a lone surrogate") from None
        check_not_python(value, name)
        value = messages_in(value) or str(value)
        if isinstance(value, str):
            return value
    if isinstance(value, (Mapping, list)):
        return check_messages(value, name)
    kind = "null" if value is None else type(value).__name__
    raise BadRow(f"field {name!r} has the wrong type", f"expected text or messages, got {kind}")


def unpacked(name: str, value: Any) -> Any:
    """The value of a column of a form that needs lists, where it is JSON text."""
    if not isinstance(value, str) or name not in NESTED:
        return value
    check_not_python(value, name)
    found = from_text(value)
    if name == "input":  # text, but for OpenAI's
        return found if isinstance(found, Mapping) and "messages" in found else value
    if name == "context":
        return found if are_messages(found) else value
    return value if found is None else found


def label(value: Any) -> bool:
    """A bool, or 0 or 1."""
    found = _typed(value)
    if isinstance(found, bool) or (isinstance(found, (int, float)) and found in (0, 1)):
        return bool(found)
    raise BadRow("field 'label' is not a bool", f"expected true or false, got {quoted(value)}")


def number(value: Any, name: str) -> float:
    value = _typed(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise BadRow(f"field {name!r} is not a number", f"got {quoted(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRow(f"field {name!r} is not finite", f"got {found}")
    return in_range(found, name)


def in_range(found: float, name: str) -> float:
    """The number. Raises BadRow for one that the loss, in fp32, could make infinite."""
    if abs(found) > LARGEST:
        raise BadRow(
            f"field {name!r} is out of range",
            f"{found:g} is beyond {LARGEST:g}; the loss is in fp32",
        )
    return found


def optional(row: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The optional columns that the row has: floats, `tools`, `chat_template_kwargs`.

    `unfinished` says of each answer whether it was cut off; it is there if any was.
    """
    found = {name: number(row[name], name) for name in kind.numbers if row.get(name) is not None}
    if not 0 <= found.get("soft_label", 0) <= 1:
        raise BadRow("field 'soft_label' is out of range", f"{found['soft_label']} is not in 0..1")
    if found.get("weight", 0) < 0:
        raise BadRow("field 'weight' is out of range", f"{found['weight']} is below 0")
    given = [name for name in kind.reference_columns if name in found]
    if 0 < len(given) < len(kind.reference_columns):
        raise BadRow(f"{given[0]} without its partner", "give both reference columns or neither")
    for name in given:
        _check_log_prob(found[name], name)
    for name, shape in (("tools", list), ("chat_template_kwargs", dict)):
        if value := _filled(row, name, shape):
            found[name] = value
    if any(cut := _unfinished(row, kind)):
        found["unfinished"] = cut
    clash = set(found.get("chat_template_kwargs", ())) & set(TEMPLATE_ARGUMENTS)
    if clash:
        raise BadRow(f"chat_template_kwargs sets {min(clash)!r}", "it is set by dpo_fast itself")
    return found


def _unfinished(row: Mapping[str, Any], kind: Kind) -> list[bool]:
    """Whether each answer was cut off, as servers and `dpo-fast sample` say it: for its length."""
    if not kind.many:
        return [row.get(name) == "length" for name in kind.reason_columns]
    return cut_off(row)


def cut_off(row: Mapping[str, Any]) -> list[bool]:
    """Whether each completion of a group was cut off; empty where nothing is said. Raises BadRow."""
    reasons = row.get("finish_reasons")
    if reasons is None:
        return []
    if (reasons := _typed(reasons)) is None or not isinstance(reasons, list):
        raise BadRow("field 'finish_reasons' is not a list", f"got {quoted(reasons)}")
    if len(reasons) != len(row["completions"]):
        raise BadRow(
            "finish_reasons and completions differ in number",
            f"{len(reasons)} and {len(row['completions'])}",
        )
    return [each == "length" for each in reasons]


def _check_log_prob(found: float, name: str) -> None:
    if found > ROUNDING:
        raise BadRow(
            f"field {name!r} is out of range",
            f"{found:g} is above 0, and log-probs are not; if it is a loss, turn its sign",
        )


def _filled(row: Mapping[str, Any], name: str, shape: type) -> Any:
    value = row.get(name)
    blank = isinstance(value, str) and not value.strip()
    return structure(value, name, shape) if value and not blank else None


def _typed(value: Any) -> Any:
    """The value of a cell of CSV, which knows only text."""
    if not isinstance(value, Cell):
        return value
    try:
        return decode(value.lower() if value.lower() in ("true", "false") else value)
    except NotFinite:
        return math.nan
    except ValueError:
        return str(value)
