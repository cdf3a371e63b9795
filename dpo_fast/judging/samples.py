"""Rows of completions, as `dpo-fast sample` writes them or a user brings them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_fast.data.files import read_file
from dpo_fast.data.messages import check_messages
from dpo_fast.data.verdicts import BadRow, BadRows, Verdict
from dpo_fast.errors import UserError
from dpo_fast.wording import quoted

MOST_BYTES = 1 << 28  # of a row
AS_TEXT = (
    "tools",
    "chat_template_kwargs",
    "row",
    "images",
)  # objects, which Parquet has as JSON text
# Finish reasons of a completion that was cut off, and of others.
LENGTH, STOP = "length", "stop"


@dataclass(frozen=True)
class SampleRow:
    """A prompt with completions.

    place: of the row in its file, from 0. where: the same for people, as in samples.jsonl:17.
    prompt: text, or messages.
    completions: texts.
    finish_reasons: stop, length, ...; one for each completion, or none at all.
    content: the whole row.
    """

    place: int
    where: str
    prompt: str | list[dict[str, Any]]
    completions: list[str]
    finish_reasons: list[str]
    content: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages, with the system message of the column `system`."""
        own = (
            [{"role": "user", "content": self.prompt}]
            if isinstance(self.prompt, str)
            else self.prompt
        )
        system = self.content.get("system")
        has_one = bool(own) and own[0].get("role") == "system"
        return own if not system or has_one else [{"role": "system", "content": system}, *own]

    @property
    def columns(self) -> dict[str, Any]:
        """What the row has beside prompt and completions, such as the right answer.

        `row` holds the other columns that the prompt's own row had.
        """
        apart = ("prompt", "completions", "finish_reasons", "logps", "row")
        own = {name: value for name, value in self.content.items() if name not in apart}
        begun = self.content.get("row")
        return {**begun, **own} if isinstance(begun, dict) else own

    def unfinished(self, index: int) -> bool:
        return bool(self.finish_reasons) and self.finish_reasons[index] == LENGTH


class _Strict(BadRows):
    """Stops at a bad row, with a remedy that fits samples."""

    def __init__(self, option: str) -> None:
        super().__init__("error", MOST_BYTES)
        self.option = option

    def reject(self, where: str, verdict: Verdict) -> None:
        reason = str(verdict).partition(", or list ")[0]  # in options that samples have not
        raise UserError(
            f"{where}: {reason}. Mend the row of {self.option}, or have it made again: remove the file "
            "and run the same command"
        )


def read_rows(path: Path, option: str = "judge.samples") -> Iterator[SampleRow]:
    """The rows of a file of completions, JSON Lines or Parquet.

    Raises:
        UserError: naming file, line and field.
    """
    strict = _Strict(option)
    for place, (where, raw) in enumerate(read_file(path, strict)):
        try:
            yield sample_row(place, where, _decoded(raw) if path.suffix == ".parquet" else raw)
        except BadRow as verdict:
            strict.reject(where, verdict)


def read_scored(path: Path) -> Iterator[tuple[SampleRow, list[float | None]]]:
    """The rows of scores.jsonl, each with its scores. Raises UserError for what an edit has spoilt."""
    for row in read_rows(path, path.name):
        scores = row.content.get("scores")
        if not isinstance(scores, list) or len(scores) != len(row.completions):
            fault = f"expected one score for each of {len(row.completions)} completions"
            _Strict(path.name).reject(row.where, BadRow(f"{fault}, got {quoted(scores)}"))
        for score in scores:
            if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
                fault = f"the score {quoted(score)} is no number, and not null"
                _Strict(path.name).reject(row.where, BadRow(fault))
        yield row, scores


def sample_row(place: int, where: str, raw: Mapping[str, Any]) -> SampleRow:
    """A checked row. Raises BadRow."""
    content = {name: value for name, value in raw.items() if value is not None}
    for name in ("prompt", "completions"):
        if name not in content:
            raise BadRow(f"no field {name!r}", f"the row has {', '.join(raw) or 'none'}")
    prompt, completions = _talk(content["prompt"]), content["completions"]
    if isinstance(completions, (list, tuple)):
        completions = [_talk(each) for each in completions]
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise BadRow("'prompt' is neither text nor messages", quoted(prompt))
    if not isinstance(completions, (list, tuple)) or not completions:
        raise BadRow("'completions' is no list of texts", quoted(completions))
    texts = [_text(each, index) for index, each in enumerate(completions)]
    _check_unicode("prompt", prompt)
    for index, text in enumerate(texts):
        _check_unicode(f"completions[{index}]", text)
    reasons = content.get("finish_reasons", [])
    if reasons and (not isinstance(reasons, (list, tuple)) or len(reasons) != len(texts)):
        raise BadRow(
            "'finish_reasons' does not have one for each completion",
            f"{quoted(reasons)} for {len(texts)} completions",
        )
    return SampleRow(place, where, prompt, texts, list(reasons), content)


def _decoded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A row of Parquet with its messages and objects, which stand there as JSON text. Raises BadRow."""
    row = dict(raw)
    for name in ("prompt", *AS_TEXT):
        value = row.get(name)
        if isinstance(value, str) and (name != "prompt" or value.startswith("[{")):
            try:
                row[name] = json.loads(value)
            except (ValueError, RecursionError):
                if name != "prompt":
                    raise BadRow(f"{name!r} is no JSON", quoted(value)) from None
    return row


def _check_unicode(name: str, value: Any) -> None:
    """Raises BadRow for half a surrogate pair, which no tokenizer and no judge takes."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not Unicode text", "it has a lone surrogate") from None


def _talk(value: Any) -> Any:
    """Messages of ShareGPT's `from` and `value` with roles and contents; all else as it is."""
    turns = isinstance(value, (list, tuple)) and value
    if turns and all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in value):
        return check_messages(list(value), "prompt")
    return value


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )


def _text(value: Any, index: int) -> str:
    """A completion's text, which may stand in one message of the assistant, with what it thought."""
    if _is_chat(value) and len(value) == 1 and isinstance(value[0].get("content"), str):
        thought = value[0].get("reasoning_content") or value[0].get("thinking")
        content = value[0]["content"]
        return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content
    if not isinstance(value, str):
        raise BadRow(f"completions[{index}] is no text", quoted(value))
    return value
