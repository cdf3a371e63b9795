"""An order of the examples by code of a user's own: what it sees, what it may give, and that it is exact.

The code is a function of `Rows` and the epoch, or a sampler of torch: an object that is iterated over,
after `set_epoch(epoch)` where it has that. Either gives places in `Rows`. An epoch may leave examples out
and repeat others; every epoch has as many as the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_fast.errors import UserError
from dpo_fast.losses.custom import told

if TYPE_CHECKING:
    from dpo_fast.data.dataset import Dataset
    from dpo_fast.data.stream import Chunk

OPTION = "train.sampler"


@dataclass(frozen=True)
class Rows:
    """The examples of a run as a sampler sees them, each by its place: 0 to len(rows) - 1.

    seed: train.seed.
    """

    examples: Dataset | Chunk
    seed: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The token ids of an example, and its numbers. Raises IndexError."""
        return self.examples[place]

    @property
    def prompt_tokens(self) -> np.ndarray:
        """Tokens of each prompt, int64 [P]."""
        return np.asarray(self.examples.lengths.prompt_P, np.int64)

    @property
    def longest_answer_tokens(self) -> np.ndarray:
        """Tokens of each example's longest answer, int64 [P]."""
        return np.asarray(self.examples.lengths.longest_P, np.int64)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers that the run uses, such as weight or margin, [P]. Raises UserError."""
        if name not in self.examples.numbers:
            known = ", ".join(self.examples.numbers) or "none"
            raise UserError(f"{OPTION}: there is no column {name}; of numbers the run has: {known}")
        return self.examples.column(name, range(len(self))).to_numpy()

    def where(self, place: int) -> str:
        """The file and line that an example came from, as messages name it."""
        return self.examples.where(place)


class OwnOrder:
    """The order of every epoch as a user's code gives it, checked.

    name: in train.sampler. give: the function or object.
    kl: examples of a global batch, where the loss estimates kl from them: none may stand there twice.
    """

    def __init__(self, name: str, give: Any, rows: Rows, kl: int | None = None) -> None:
        self.name, self.give, self.rows, self.kl = name, give, rows, kl
        self._seen: dict[int, tuple[int, str]] = {}  # length and hash, by epoch
        self._latest: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """As a call, and kept while the steps of the epoch are taken."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self(epoch))
        return self._latest[1]

    def __call__(self, epoch: int) -> np.ndarray:
        """Places in the data in the order of an epoch, int64. Raises UserError."""
        if epoch and 0 not in self._seen:
            self(0)  # which says how long an epoch is
        order = self._checked(self._given(epoch), epoch)
        now = (len(order), hashlib.sha256(order.tobytes()).hexdigest())
        if self._seen.setdefault(epoch, now) != now:
            raise UserError(
                f"{self._where} gave epoch {epoch} in another order than the first time, and a run that "
                "goes on must find the same one: draw from np.random.default_rng((rows.seed, epoch)), or "
                "seed a generator with them"
            )
        if len(order) != (first := self._seen[0][0]):
            raise UserError(
                f"{self._where} gave {len(order)} places for epoch {epoch}, and {first} for the first: "
                "every epoch has as many"
            )
        return order

    @property
    def identity(self) -> str:
        """Its name, and a hash of the order of the first epoch."""
        self(0)
        return f"{self.name}, in the order {self._seen[0][1][:16]}"

    @property
    def _where(self) -> str:
        return f"{OPTION}={self.name}"

    def _given(self, epoch: int) -> Any:
        try:
            if _is_iterable(self.give):
                if hasattr(self.give, "set_epoch"):
                    self.give.set_epoch(epoch)
                return list(self.give)
            found = self.give(self.rows, epoch)
            return found if isinstance(found, np.ndarray) else list(found)
        except Exception as error:
            raise UserError(f"{self._where}, epoch {epoch}: {told(error)}") from error

    def _checked(self, found: Any, epoch: int) -> np.ndarray:
        """int64. Raises UserError for what are no places of the data."""
        where, size = f"{self._where} for epoch {epoch}", len(self.rows)
        try:
            order = np.asarray(found)
        except ValueError:  # lists of several lengths
            order = np.empty((0, 0))
        if order.ndim != 1 or not (order.dtype.kind in "iu" and len(order)):
            raise UserError(
                f"{where} gave {_what(found)}: expected places of examples, integers of 0 to {size - 1}"
            )
        if odd := [int(place) for place in order if not 0 <= place < size][:1]:
            raise UserError(
                f"{where} gave the place {odd[0]}, but the run has {size} examples, 0 to {size - 1}: "
                "rows that are dropped or held out are not among them"
            )
        order = order.astype(np.int64)
        self._check_kl(order, where)
        return order

    def _check_kl(self, order: np.ndarray, where: str) -> None:
        size = self.kl or len(order)
        for start in range(0, len(order), size) if self.kl else ():
            batch = order[start : start + size]
            if len(np.unique(batch)) < len(batch):
                raise UserError(
                    f"{where} gave an example twice in the global batch from place {start} on, and the "
                    "loss estimates kl from the completions of other rows of the batch: keep them apart"
                )


def check_sampler(name: str, give: Any) -> None:
    """Raises UserError unless it is a function, or a sampler of torch that gives places."""
    where = f"{OPTION}={name}"
    kinds = {each.__name__ for each in type(give).__mro__}
    if kinds & {"DistributedSampler", "BatchSampler"}:
        raise UserError(
            f"{where} is a {type(give).__name__}, but the trainer makes the batches and gives each rank "
            "its part: give a sampler of single examples, of all of them"
        )
    if isinstance(give, (type, str)) or not (callable(give) or _is_iterable(give)):
        raise UserError(
            f"{where} is a {type(give).__name__}: expected a function of rows and epoch that gives places, "
            "or a sampler of torch"
        )


def _is_iterable(give: Any) -> bool:
    return isinstance(give, Iterable)


def _what(found: Any) -> str:
    if isinstance(found, np.ndarray):
        return f"an array of shape {list(found.shape)} and dtype {found.dtype}"
    if not found:
        return "nothing"
    return f"a list that begins with a {type(found[0]).__name__}"
