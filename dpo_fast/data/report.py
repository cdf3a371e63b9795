"""What became of the rows: read, refused and cut; how long the examples are; a few of them in full."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_fast.data.config import IMAGES
from dpo_fast.data.images.tokens import text_and_images
from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS, ExampleLengths, Kind
from dpo_fast.data.verdicts import Tally
from dpo_fast.wording import printable

ROWS_SHOWN = 3  # of those refused for one reason
HEAD, TAIL = 60, 100  # prompt tokens shown before and after the gap; the end matters more
MOST_DIGITS = 15  # of a count
PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


@dataclass
class SourceShare:
    """One of several sources.

    examples: those of it that may be trained on; None in a stream, which does not know them.
    share: what its weight asks for, 0 to 1; None without weights.
    drawn: examples of it in an epoch; of a stream, those so far.
    """

    name: str
    examples: int | None
    share: float | None
    drawn: int


@dataclass
class DataReport:
    """Counts over one data set, before any examples of it are held out for evaluation.

    rows_read = examples_kept + bad.total + dropped.total
    held_out: examples of them that are for evaluation.
    bad, dropped: rows by reason, with the first 50 of each reason.
    prompts_cut, bos_added: examples; answers_cut, eos_added: single answers.
    left_out: turns that are not scored because the template leaves out their thinking.
    bare: examples of text, where there is a chat template and nobody said that it is not to be used.
    trailing: answers without their last messages, which are not the assistant's.
    boundary_merges: examples in which a token straddles the prompt's end.
    lengths: percentiles of tokens, {name: {"p5": int, ..., "max": int}}. The names are prompt, each
        column of answers, longest = prompt + longest answer (max_length bounds it) where examples
        have several answers, and total = prompt + all answers.
    tokens: sums over the data: prompt, each column of answers, scored, total, and separate, which
        goes through the model when prompts are not shared.
    kind: name of the kind of the examples.
    desirable: completions whose label is true.
    even: groups with one score for all their completions.
    answers: answers of all examples together.
    chats: whether any row is a list of messages.
    with_images: examples that have images. images: in all examples together, with image_tokens tokens,
        those of a prompt counted once.
    mixture: the sources, where they have options of their own.
    """

    sources: list[str]
    rows_read: int = 0
    examples_kept: int = 0
    held_out: int = 0
    bad: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    prompts_cut: int = 0
    answers_cut: int = 0
    boundary_merges: int = 0
    bos_added: int = 0
    eos_added: int = 0
    left_out: int = 0
    trailing: int = 0
    bare: int = 0
    ignored_columns: list[str] = field(default_factory=list)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kind: str = PAIRS.name
    desirable: int = 0
    even: int = 0
    answers: int = 0
    chats: bool = False
    with_images: int = 0
    images: int = 0
    image_tokens: int = 0
    mixture: list[SourceShare] = field(default_factory=list)

    @classmethod
    def joined(cls, reports: Sequence[DataReport], lengths: ExampleLengths) -> DataReport:
        """The report on several parts of one kind together. lengths: of all of them."""
        first, *others = copy.deepcopy(reports)
        for other in others:
            for each in fields(cls):
                if isinstance(getattr(other, each.name), (int, list)):
                    setattr(first, each.name, getattr(first, each.name) + getattr(other, each.name))
            first.bad.update(other.bad)
            first.dropped.update(other.dropped)
        first.chats, first.ignored_columns = bool(first.chats), sorted(set(first.ignored_columns))
        first.measure(lengths)
        return first

    def shares(self) -> list[tuple[str, str]]:
        """Each source by name, and in words what it gives and what its weight asks for."""
        total = sum(each.drawn for each in self.mixture) or 1
        told = []
        for each in self.mixture:
            whole = "so far" if each.examples is None else "of an epoch"
            text = f"{each.drawn:,} of {total:,} examples {whole}, {each.drawn / total:.2%}"
            if each.share is not None:
                text += f" (planned {each.share:.2%})"
            if each.examples is not None and each.examples != each.drawn:
                text += f", from {each.examples:,}"
                text += f", {each.drawn / each.examples:.2f} times each" * (
                    each.drawn > each.examples
                )
            told.append((each.name, text))
        return told

    @property
    def bad_rows(self) -> list[tuple[str, str]]:
        """(where, message) of bad rows, the first 50 of each kind."""
        return list(self.bad)

    def keep(self, kind: Kind, columns: Mapping[str, Sequence]) -> None:
        """Counts rows that are kept: what their tokenising did to them, and their labels or scores.

        columns: by name, with a value for each row.
        """
        self.kind = kind.name
        count = len(columns["merged"])
        self.examples_kept += count
        self.boundary_merges += int(np.sum(columns["merged"]))
        self.bos_added += int(np.sum(columns["bos_added"]))
        self.eos_added += int(np.sum(columns["eos_added"]))
        self.prompts_cut += int(np.count_nonzero(columns["prompt_cut"]))
        self.answers_cut += int(np.sum(columns["answers_cut"]))
        self.left_out += int(np.sum(columns["left_out"]))
        self.trailing += int(np.sum(columns["trailing"]))
        self.bare += int(np.sum(columns["bare"]))
        told = [len(each or ()) for each in columns[IMAGES]]
        self.with_images += int(np.count_nonzero(told))
        self.images += sum(told)
        self.image_tokens += int(np.sum(columns["image_tokens"]))
        if kind.many:
            self.answers += sum(map(len, columns["scores"]))
            self.even += sum(min(scores) == max(scores) for scores in columns["scores"])
        else:
            self.answers += count * len(kind.answers)
        if kind == COMPLETIONS:
            self.desirable += int(np.count_nonzero(columns["label"]))

    def measure(self, lengths: ExampleLengths) -> None:
        """Fills `lengths` and `tokens`."""
        prompt, named = lengths.prompt_P, lengths.columns()
        several = not lengths.kind.single
        longest = {"longest": prompt + lengths.longest_P} if several else {}
        columns = {**named, **longest, "total": prompt + lengths.sums_P}
        self.lengths = {name: _percentiles(values) for name, values in columns.items()}
        sums = {name: int(columns[name].sum()) for name in (*named, "total")}
        again = int((prompt * (lengths.counts_P - 1)).sum())
        scored = int(lengths.scored_S.sum())
        self.tokens = {**sums, "scored": scored, "separate": sums["total"] + again}

    def notes(self) -> list[str]:
        """Sentences about what was done to the rows, for a reader."""
        examples, answers = self.examples_kept, self.answers
        facts = (
            (
                self.bare,
                examples,
                f"{self.kind} are text and go to the model without its chat template, nothing between "
                "prompt and answer: data.apply_chat_template=true makes chats of them, false says that "
                "this is meant",
            ),
            (self.prompts_cut, examples, "prompts were cut to fit data.max_length"),
            (self.answers_cut, answers, "answers were cut to fit data.max_length"),
            (
                self.boundary_merges,
                examples,
                f"{self.kind} have a token across the prompt's end; it is scored",
            ),
            (self.bos_added, examples, "prompts did not have their BOS token; it was put first"),
            (self.eos_added, answers, "answers did not end their turn; EOS was put last"),
            (
                self.trailing,
                answers,
                "answers end with messages that are not the assistant's; these are left off",
            ),
            (
                self.even,
                examples,
                "groups have one score for all their completions; nothing is preferred there",
            ),
            (self.held_out, examples, f"{self.kind} are held out for evaluation"),
        )
        notes = [f"{count} of {whole} {text}" for count, whole, text in facts if count]
        if self.with_images:
            notes.append(
                f"{self.with_images:,} of {examples:,} {self.kind} have images: {self.images:,} with "
                f"{self.image_tokens:,} tokens"
            )
        if self.left_out:
            notes.append(
                f"{self.left_out} turns are not scored, because the chat template leaves their thinking "
                "out of earlier turns"
            )
        answers = self.tokens.get("total", 0) - self.tokens.get("prompt", 0)
        if unscored := answers - self.tokens.get("scored", answers):
            notes.append(f"{unscored:,} of {answers:,} tokens of answers are not scored")
        if self.ignored_columns:
            notes.append(f"columns not used: {', '.join(self.ignored_columns)}")
        return notes

    @property
    def kept(self) -> str:
        """What is kept, in words."""
        text = f"{self.examples_kept:,} {self.kind} kept"
        if self.kind == COMPLETIONS.name:
            undesirable = self.examples_kept - self.desirable
            return f"{text} ({self.desirable:,} desirable, {undesirable:,} undesirable)"
        if self.kind == GROUPS.name:
            return f"{text} of {self.answers:,} completions"
        return text

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """The inverse of to_json. Raises ValueError or RecursionError for other text."""
        values = json.loads(text, parse_int=_count)
        return TypeAdapter(cls).validate_python(values)


def _count(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _percentiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    # "higher" gives a length that occurs, and the max at 100.
    return {name: int(np.percentile(values, q, method="higher")) for name, q in PERCENTILES.items()}


def render_report(report: DataReport, console: Console) -> None:
    """Prints what was read, what was refused and why, and the lengths."""
    refused = f"{report.bad.total:,} bad, {report.dropped.total:,} dropped"
    summary = f"{report.rows_read:,} rows read, {report.kept}, {refused}"
    console.print(_text(", ".join(report.sources)), Text(summary), sep="\n")
    for name, share in report.shares():
        console.print(_text(f"- {name}: {share}"))
    for title, tally in (("Bad rows", report.bad), (f"Dropped {report.kind}", report.dropped)):
        if tally.total:
            console.print(_verdicts(title, tally))
    if report.lengths:
        console.print(_lengths(report))
    for note in report.notes():
        console.print(_text(f"- {note}"))


def _verdicts(title: str, tally: Tally) -> Table:
    table = Table("reason", "rows", "first", title=title, title_justify="left")
    for kind, count in sorted(tally.counts.items(), key=lambda item: -item[1]):
        first = ", ".join(where for where, _ in tally.rows[kind][:ROWS_SHOWN])
        table.add_row(_text(kind), f"{count:,}", _text(first))
    return table


def _lengths(report: DataReport) -> Table:
    table = Table("tokens", title="Lengths", title_justify="left")
    for name in (*PERCENTILES, "sum"):
        table.add_column(name, justify="right")
    for name, values in report.lengths.items():
        total = report.tokens.get(name)
        cells = [f"{values[percentile]:,}" for percentile in PERCENTILES]
        table.add_row(name, *cells, "" if total is None else f"{total:,}")
    return table


def render_examples(dataset: Any, tokenizer: Any, console: Console, n: int = 3) -> None:
    """Prints the first n examples of a `Dataset` or a `Chunk` token by token.

    What is scored stands in ⟦ ⟧, one pair of them for each run of scored tokens, so that it shows without
    colour. A middle dot separates tokens. Line breaks are written \\n.
    """
    for index in range(min(n, len(dataset))):
        row = dataset[index]
        console.rule(_text(f"{dataset.kind.name[:-1]} {index}  {dataset.where(index)}"))
        answers = _answers(row)
        width = max(len("rejected"), *(len(title) for _, title, _ in answers)) + 1
        console.print(
            Text(f"{'prompt':<{width}}", style="bold") + _prompt(row["prompt_ids"], tokenizer)
        )
        for (ids, title, style), flags in zip(answers, dataset.kind.answer_flags(row)):
            answer = _answer(_pieces(ids, tokenizer), flags, style)
            console.print(Text(f"{title:<{width}}", style="bold") + answer)


def _answers(row: dict[str, Any]) -> list[tuple[list[int], str, str]]:
    """Ids, title and style of each answer."""
    if "scores" in row:
        best = max(row["scores"])
        titles = [(f"{score:.3g}", "green" if score == best else "red") for score in row["scores"]]
        return [(ids, *title) for ids, title in zip(row["completions_ids"], titles)]
    if "completion_ids" in row and "label" not in row:
        return [(row["completion_ids"], "answer", "green")]
    if "label" in row:
        title, style = ("desirable", "green") if row["label"] else ("undesirable", "red")
        return [(row["completion_ids"], title, style)]
    return [(row["chosen_ids"], "chosen", "green"), (row["rejected_ids"], "rejected", "red")]


def _answer(pieces: list[str], flags: list[bool] | None, style: str) -> Text:
    """flags: which of the tokens are scored; None if all are."""
    text = Text()
    for scored, group in groupby(zip(flags or [True] * len(pieces), pieces), itemgetter(0)):
        run = [piece for _, piece in group]
        text.append(f"⟦{'·'.join(run)}⟧" if scored else "·".join(run), style if scored else "dim")
    return text


def _prompt(ids: list[int], tokenizer: Any) -> Text:
    if len(ids) <= HEAD + TAIL:
        return Text("·".join(_pieces(ids, tokenizer)), style="dim")
    head, tail = _pieces(ids[:HEAD], tokenizer), _pieces(ids[-TAIL:], tokenizer)
    gap = f" … {len(ids) - HEAD - TAIL} tokens … "
    return Text("·".join(head) + gap + "·".join(tail), style="dim")


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """Each token's text, or the vocabulary's name for it where it is not whole characters."""
    found: list[str] = []
    for run in text_and_images(ids):
        found += [f"[image: {run} tokens]"] if isinstance(run, int) else _words(run, tokenizer)
    return found


def _words(ids: list[int], tokenizer: Any) -> list[str]:
    texts = [tokenizer.decode([index]) for index in ids]
    names = tokenizer.convert_ids_to_tokens(ids)
    texts = [name if "\ufffd" in text or not text else text for text, name in zip(texts, names)]
    shown = (text.replace("\n", "\\n").replace("\t", "\\t") for text in texts)
    return list(map(printable, shown))


def _text(text: str) -> Text:
    """What others wrote, for a terminal."""
    return Text(printable(text))
