"""Rows that name what the user says and what is answered: alpaca, Orca, query and response.

They are chats: what the user says becomes a message, so that a chat template writes it. Bare text is had by
naming the column of the prompt, as in data.columns={prompt: question}.
"""

from __future__ import annotations

from typing import Any

from dpo_fast.data.forms.fields import Raw, first, text, user
from dpo_fast.data.json_text import decode
from dpo_fast.data.messages import (
    Messages,
    are_messages,
    check_messages,
    from_text,
    messages_in,
    say,
)
from dpo_fast.data.verdicts import BadRow


def opened(row: Raw) -> Raw:
    """A row whose `text` is JSON of question, chosen and rejected, as RLHF-V's, with those as columns."""
    told = row.get("text")
    if isinstance(told, str) and '"rejected"' in told and "rejected" not in row:
        found = from_text(told)
        if isinstance(found, dict) and {"question", "chosen", "rejected"} <= found.keys():
            return {**found, **{name: value for name, value in row.items() if name != "text"}}
    return row


def alpaca(row: Raw) -> Raw:
    """instruction, input, output or chosen and rejected, system, history; also LLaMA-Factory's names."""
    said = [text(row, "instruction", "prompt"), text(row, "input", "query")]
    prompt = [*_history(row.pop("history", None)), *user("\n".join(filter(None, said)))]
    return {"prompt": prompt, **_answers(row)}


def query(row: Raw) -> Raw:
    """query (or question, or input), history, system, and answers."""
    before = _history(row.pop("history", None))
    name = next(name for name in ("query", "question", "input") if row.get(name) is not None)
    talk = messages_in(row[name]) if isinstance(row[name], str) else row[name]
    if are_messages(talk):
        del row[name]
        return {"prompt": [*before, *check_messages(talk, name)], **_answers(row)}
    return {"prompt": [*before, *user(text(row, name))], **_answers(row)}


def _answers(row: Raw) -> Raw:
    """Two answers, one with a label, a ranking of more than two, or one to learn."""
    if row.get("completions") is not None:
        return {name: row.pop(name) for name in ("completions", "scores", "ranks") if name in row}
    if row.get("rejected") is not None:
        return {name: row.pop(name) for name in ("chosen", "rejected") if name in row}
    answer = first(row, "output", "response", "completion", "answer")
    if row.get("rejected_response") is not None:
        return {"chosen": answer, "rejected": row.pop("rejected_response")}
    if isinstance(answer, list) and len(answer) == 2:
        return {"chosen": answer[0], "rejected": answer[1]}
    if isinstance(answer, list):
        return {"completions": answer, "ranks": list(range(1, len(answer) + 1))}
    if "label" in row:
        return {"completion": answer, "label": row.pop("label")}
    ranked = from_text(answer) if isinstance(answer, str) else None
    if isinstance(ranked, list):  # as in CSV
        return _answers(row | {"output": ranked})
    return {"completion": answer}


def _history(value: Any) -> Messages:
    """Earlier turns, as a list of (question, answer) or of messages."""
    if isinstance(value, str) and value.strip():
        try:
            value = decode(value)
        except ValueError:
            raise BadRow(
                "field 'history' is not a list", "expected [[question, answer], ...]"
            ) from None
    if are_messages(value):
        return check_messages(value, "history")
    if value and not isinstance(value, list):
        raise BadRow("field 'history' is not a list", "expected [[question, answer], ...]")
    messages: Messages = []
    for index, turn in enumerate(value or []):
        if (
            not isinstance(turn, list)
            or len(turn) != 2
            or not all(isinstance(t, str) for t in turn)
        ):
            raise BadRow("a turn of history is not a pair", f"history[{index}]: {turn!r:.80}")
        messages += [say("user", turn[0]), say("assistant", turn[1])]
    return messages
