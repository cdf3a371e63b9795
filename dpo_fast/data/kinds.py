"""What a row of the data is: a pair of answers, or a completion that is good or bad by itself."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_fast.errors import UserError


@dataclass(frozen=True)
class Kind:
    """name: of many rows; one: of one row. answers: names of the columns that continue the prompt.
    numbers: optional columns of floats."""

    name: str
    one: str
    answers: tuple[str, ...]
    numbers: tuple[str, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the columns of token ids, the prompt's first."""
        return ("prompt_ids", *(f"{answer}_ids" for answer in self.answers))


NUMBERS = ("weight", "margin", "soft_label")
PAIRS = Kind(
    "pairs",
    "a pair",
    ("chosen", "rejected"),
    (*NUMBERS, "reference_chosen_logps", "reference_rejected_logps"),
)
COMPLETIONS = Kind("completions", "a completion with a label", ("completion",), NUMBERS)


class OneKind:
    """The kind of all rows, which the first one tells."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self._first = ""

    def see(self, where: str, kind: Kind) -> None:
        """Raises UserError if this row is of another kind than those before."""
        if self.kind is None:
            self.kind, self._first = kind, where
        elif kind != self.kind:
            raise UserError(
                f"{where} is {kind.one} and {self._first} is {self.kind.one}: data is one or the other. "
                "Keep them apart, or set data.format to pairs, messages or unpaired and "
                "data.on_bad_row=skip to pass over those of the other kind"
            )
