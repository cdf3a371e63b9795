"""The forms by name, and which of them a row has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_fast.data.forms import conversations, instructions, ratings
from dpo_fast.data.forms.fields import Raw, given
from dpo_fast.data.messages import are_messages
from dpo_fast.data.verdicts import BadRow


@dataclass(frozen=True)
class Form:
    """One form of rows.

    name: for data.format.
    needs: its columns; of several in one entry, one.
    convert: takes them out of a row, and returns those of a row of our own.
    inner: keys of the objects in the list of its last column, by which it is known.
    auto: whether it is found by its columns; otherwise only by its name.
    without: columns that such a row does not have.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[Raw], Raw]
    inner: tuple[str, ...] = ()
    auto: bool = True
    without: tuple[str, ...] = ()

    def missing(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The first of its columns that the row lacks; empty if it has the form."""
        has = given(row)
        lacks = next((names for names in self.needs if not has & set(names)), ())
        if lacks or not self.inner:
            return lacks
        column = self.needs[-1][0]
        items = row[column]
        objects = isinstance(items, list) and items and isinstance(items[0], Mapping)
        return () if objects and set(self.inner) <= set(items[0]) else (column,)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the form, going by its columns."""
        return self.auto and not self.missing(row) and not given(row) & set(self.without)


def _form(
    name: str,
    needs: str,
    convert: Callable[[Raw], Raw],
    inner: str = "",
    auto: bool = True,
    without: tuple[str, ...] = (),
) -> Form:
    columns = tuple(tuple(each.split("|")) for each in needs.split())
    return Form(name, columns, convert, tuple(inner.split()), auto, without)


SAID = "query|question|input"
TALK = "|".join(conversations.CONVERSATIONS)
LABELLED = "output|response|completion label"
ANSWER = "output|response|completion|answer"
JUDGED = ("chosen", "rejected", "completion", "completions")
# A row has the first form whose columns it has.
FORMS = (
    _form("nemo_rl", "context completions", ratings.nemo_rl, "rank completion"),
    _form("ultrafeedback", "instruction|prompt completions", ratings.ultrafeedback, "response"),
    _form("ultrafeedback", "instruction|input|prompt ratings generations", ratings.generations),
    _form("nectar", "prompt answers", ratings.nectar, "answer rank"),
    _form("helpsteer3", "context response1 response2 overall_preference", ratings.helpsteer3),
    _form(
        "helpsteer2",
        "prompt response_1 response_2 preference_strength",
        ratings.helpsteer2_preference,
    ),
    _form("helpsteer2", "prompt response helpfulness", ratings.helpsteer2),
    _form("safe_rlhf", "prompt response_0 response_1 better_response_id", ratings.safe_rlhf),
    _form("shp", "history human_ref_A human_ref_B labels", ratings.shp),
    _form("openai", "input preferred_output non_preferred_output", conversations.openai),
    _form("arena", "conversation_a conversation_b winner", conversations.arena),
    _form("swift", f"{TALK} rejected_response|rejected_messages", conversations.swift),
    _form("swift", f"{SAID} response|output rejected_response", instructions.query),
    _form("sharegpt", f"{TALK} chosen rejected", conversations.sharegpt),
    _form("sharegpt", f"{TALK} label", conversations.sharegpt),
    _form("swift", f"{TALK} label", conversations.sharegpt, auto=False),
    _form("alpaca", "instruction chosen rejected", instructions.alpaca),
    _form("alpaca", "instruction output|response|completion", instructions.alpaca),
    _form("alpaca", "prompt chosen rejected", instructions.alpaca, auto=False),
    _form("alpaca", "prompt output|response|completion", instructions.alpaca, auto=False),
    _form("alpaca", "instruction completions scores|ranks", instructions.alpaca),
    _form("alpaca", "prompt completions scores|ranks", instructions.alpaca, auto=False),
    _form("orca", f"{SAID} chosen rejected", instructions.query),
    _form("orca", f"{SAID} {LABELLED}", instructions.query),
    _form("sharegpt", TALK, conversations.demonstration, without=JUDGED),
    _form("swift", TALK, conversations.demonstration, auto=False),
    _form("swift", f"{SAID} response|output", instructions.query, auto=False),
    _form("orca", f"{SAID} {ANSWER}", instructions.query, without=JUDGED),
    _form("text", "text", conversations.whole_text, without=("prompt", *JUDGED)),
    _form("hh", "chosen rejected", conversations.dialogues, auto=False),
)
NAMES = tuple(dict.fromkeys(form.name for form in FORMS))
# Columns of forms beside those of pairs, completions and groups; data.columns may name them too.
COLUMNS = tuple(
    dict.fromkeys(
        [column for form in FORMS for names in form.needs for column in names]
        + ["system", "history", "kto_tag", "chosen_response", "rejected_response"]
    )
)


def find_form(row: Raw, name: str, mapped: Mapping[str, str]) -> Form | None:
    """The form of a row; None for a pair, a completion or a group as it is.

    name: data.format. mapped: data.columns; naming a column that only a chat has tells that texts are
    to be a chat.

    Raises:
        BadRow: the row does not have the form that data.format names.
    """
    if name in NAMES:
        forms = [form for form in FORMS if form.name == name]
        found = next((form for form in forms if not form.missing(row)), None)
        if found is None:
            lacks = " or ".join(map(repr, forms[0].missing(row)))
            raise BadRow(
                f"not in data.format={name}", f"the row has no {lacks} as that form has it"
            )
        return found
    if name != "auto":
        return None
    if _is_plain(row):
        wants_chat = {"system", "query", "history", "input"} & set(mapped)
        texts = all(isinstance(row.get(each), str) for each in ("prompt", "chosen", "rejected"))
        alpaca = next(form for form in FORMS if form.name == "alpaca" and not form.auto)
        return alpaca if wants_chat and texts else None
    return next((form for form in FORMS if form.fits(row)), None)


def _is_plain(row: Raw) -> bool:
    """Whether the row is a pair, a completion or a group by our own columns."""
    has = given(row)
    if {"chosen", "rejected"} <= has:
        return "prompt" in has or _whole(row["chosen"])
    if {"prompt", "completion"} <= has:
        return True
    items = row.get("completions")
    return {"prompt", "completions"} <= has and not (
        isinstance(items, list)
        and items
        and isinstance(items[0], Mapping)
        and not are_messages(items[:1])
    )


def _whole(answer: Any) -> bool:
    """Whether an answer is a conversation from its beginning, with the prompt."""
    if not are_messages(answer):
        return False
    role = str(answer[0].get("role", answer[0].get("from"))).lower()
    return role in ("system", "developer", "user", "human")
