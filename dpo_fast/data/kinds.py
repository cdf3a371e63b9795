"""The kinds of example: a pair, a completion with a label, a group with scores, a demonstration.

Tables of token ids name their columns after their kind, and `ExampleLengths` counts the tokens of
any kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dpo_fast.data.lists import Lists, runs
from dpo_fast.data.sharing import Sharing, sharing_of
from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Kind:
    """The columns of one kind of example, beside `prompt`.

    name: of many examples; one: of one example.
    answers: columns that continue the prompt.
    numbers: optional columns of floats.
    label_columns: columns that say how good the answers are. An example has one of them, and it is
        stored under the first name.
    many: the one column of answers is a list of any length.
    """

    name: str
    one: str
    answers: tuple[str, ...]
    numbers: tuple[str, ...]
    label_columns: tuple[str, ...] = ()
    many: bool = False

    @property
    def single(self) -> bool:
        """Whether an example is one sequence."""
        return len(self.answers) == 1 and not self.many

    @property
    def stored_labels(self) -> tuple[str, ...]:
        """The stored label column, or nothing for a kind without one."""
        return self.label_columns[:1]

    @property
    def reason_columns(self) -> tuple[str, ...]:
        """Optional columns that say how each answer ended; one of lists where `many`."""
        if self.many:
            return ("finish_reasons",)
        return (
            ("finish_reason",) if self.single else tuple(f"{a}_finish_reason" for a in self.answers)
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """Columns of token ids, the prompt's first."""
        return ("prompt_ids", *(f"{answer}_ids" for answer in self.answers))

    @property
    def scored(self) -> tuple[str, ...]:
        """Columns of bools, one for each answer: which of its tokens are scored. Without it, all are."""
        return tuple(f"{answer}_scored" for answer in self.answers)

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Columns of the reference's log-prob sums, one for each answer; none where `many`."""
        return () if self.many else tuple(f"reference_{answer}_logps" for answer in self.answers)

    def answer_ids(self, example: Mapping) -> list[list[int]]:
        """The token ids of every answer of an example."""
        return list(example[self.ids[1]]) if self.many else [example[name] for name in self.ids[1:]]

    def answer_flags(self, example: Mapping) -> list[list[bool] | None]:
        """Which tokens of every answer are scored; None where all are."""
        flags = [example.get(name) for name in self.scored]
        if not self.many:
            return flags
        return list(flags[0] or [None] * len(example[self.ids[1]]))


NUMBERS = ("weight", "margin", "soft_label")
PAIRS = Kind(
    "pairs",
    "a pair",
    ("chosen", "rejected"),
    (*NUMBERS, "reference_chosen_logps", "reference_rejected_logps"),
)
COMPLETIONS = Kind(
    "completions",
    "a completion with a label",
    ("completion",),
    (*NUMBERS, "reference_completion_logps"),
    label_columns=("label",),
)
GROUPS = Kind(
    "groups",
    "a group of completions with scores",
    ("completions",),
    ("weight",),
    label_columns=("scores", "ranks"),
    many=True,
)
# An answer to learn, as SFT has it. It has neither a label nor another answer to be compared with.
DEMONSTRATIONS = Kind("demonstrations", "a demonstration", ("completion",), ("weight",))
KINDS = (PAIRS, COMPLETIONS, GROUPS, DEMONSTRATIONS)


def kind_of(columns: list[str]) -> Kind:
    """The kind of a table of token ids, by its columns."""
    return next(kind for kind in KINDS if {kind.ids[1], *kind.stored_labels} <= set(columns))


class OneKind:
    """The kind of all rows of the data: that of the first row. chats: whether any row is a chat."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.chats = False
        self._first = ""

    def see(self, where: str, kind: Kind, chat: bool) -> None:
        """Raises UserError if this row is of another kind than those before."""
        self.chats = self.chats or chat
        if self.kind is None:
            self.kind, self._first = kind, where
        elif kind != self.kind:
            raise UserError(
                f"{where} is {kind.one} and {self._first} is {self.kind.one}: data is one or the other. "
                "Keep them apart, or set data.format to pairs, messages, unpaired or groups and "
                "data.on_bad_row=skip to pass over those of the other kind; data.format=sft makes a "
                "demonstration of any of them"
            )


@dataclass(frozen=True)
class ExampleLengths:
    """Token counts of P examples with S answers in all, int64.

    prompt_P: tokens of the prompt.
    answers_S: tokens of each answer, example by example.
    counts_P: answers of each example, 1 or more.
    scored_S: scored tokens of each answer; by default all of them.
    sharing: what the answers of an example have in common; by default nothing.
    beginning: tokens that all prompts begin with; 0 where it is not known.
    """

    kind: Kind
    prompt_P: np.ndarray
    answers_S: np.ndarray
    counts_P: np.ndarray
    scored_S: np.ndarray | None = None
    sharing: Sharing | None = None
    beginning: int = 0

    def __post_init__(self) -> None:
        if self.scored_S is None:
            object.__setattr__(self, "scored_S", self.answers_S)
        if self.sharing is None:
            object.__setattr__(self, "sharing", Sharing.none(len(self)))

    @classmethod
    def of(cls, examples: Sequence[Mapping], kind: Kind) -> ExampleLengths:
        """Lengths of token ids, as `collate` takes them."""
        answers = [kind.answer_ids(example) for example in examples]
        flags = [each for example in examples for each in kind.answer_flags(example)]
        tokens = [len(ids) for each in answers for ids in each]
        scored = [size if each is None else sum(each) for size, each in zip(tokens, flags)]
        prompts = [len(example["prompt_ids"]) for example in examples]
        sizes = [prompts, tokens, list(map(len, answers)), scored]
        sizes = [np.array(values, dtype=np.int64) for values in sizes]
        found = sharing_of(Lists.of([ids for each in answers for ids in each]), sizes[2])
        return cls(kind, *sizes, found)

    def __len__(self) -> int:
        return len(self.prompt_P)

    @cached_property
    def starts_P(self) -> np.ndarray:
        """Place of each example's first answer in `answers_S`."""
        return np.cumsum(self.counts_P) - self.counts_P

    @property
    def longest_P(self) -> np.ndarray:
        """Tokens of each example's longest answer."""
        return np.maximum.reduceat(self.answers_S, self.starts_P) if len(self) else self.prompt_P

    @property
    def sums_P(self) -> np.ndarray:
        """Tokens of each example's answers together."""
        return self._sums(self.answers_S)

    @property
    def scored_P(self) -> np.ndarray:
        """Scored tokens of each example."""
        return self._sums(self.scored_S)

    def take(self, indices: Sequence[int] | np.ndarray) -> ExampleLengths:
        """Lengths of these examples, in their order."""
        indices = np.asarray(indices, dtype=np.int64)
        counts_P = self.counts_P[indices]
        places_S = runs(self.starts_P[indices], counts_P)
        sizes = (self.prompt_P[indices], self.answers_S[places_S], counts_P)
        sharing = Sharing(*(values_P[indices] for values_P in self.sharing))
        return ExampleLengths(self.kind, *sizes, self.scored_S[places_S], sharing, self.beginning)

    def joined(self, units: Sequence[np.ndarray]) -> ExampleLengths:
        """Lengths of units of these examples, of one prompt each, as if a unit were one example.

        What answers of a unit have in common is not known here.
        """
        members = self.take(np.concatenate([np.zeros(0, np.int64), *units]))
        ends = np.cumsum([0, *map(len, units)])
        counts_P = np.diff(np.concatenate([[0], np.cumsum(members.counts_P)])[ends])
        prompt_P = members.prompt_P[ends[:-1]]
        return ExampleLengths(self.kind, prompt_P, members.answers_S, counts_P, members.scored_S)

    def columns(self) -> dict[str, np.ndarray]:
        """Lengths by column: `prompt` and answers, [P] each; `completions` of groups [S]."""
        names, count = self.kind.answers, len(self.kind.answers)
        sides = [self.answers_S] if self.kind.many else self.answers_S.reshape(-1, count).T
        return {"prompt": self.prompt_P, **dict(zip(names, sides))}

    def _sums(self, values_S: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values_S, self.starts_P) if len(self) else self.prompt_P
