"""The check before the first update: is the reference the model that training starts from?

Rounding makes the log-probs of one model differ from batch to batch: products of another size add in
another order, and bf16 keeps the last bit of it through all layers. A wrong reference differs by more.
The check measures both:

difference   root mean square over sequences of (policy - reference) / sqrt(scored tokens). Where tokens
             are compared one by one, that of the tokens if it is larger.
rounding     the same of two evaluations of the policy. The second has other neighbours in the batch and
             embeddings whose last bit is changed. Some machines give the same row whatever the batch is,
             so neighbours alone would show nothing of a reference that another machine stored.

Rounding errors of tokens are about independent, so those of a sum grow with the square root of its
length. A run is refused where the difference exceeds rounding by `allowance`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.errors import UserError
from dpo_fast.losses import Totals
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.finite import some
from dpo_fast.training.loss_pass import LossPass, token_reference
from dpo_fast.training.splits import Split

EXAMPLES = 16  # that are compared, of all ranks; the first step may have fewer
TWICE = 8  # of a rank's first micro-batch, that are evaluated twice
FLOOR = 1e-6  # nats a token, below which no difference counts


@dataclass(frozen=True)
class Start:
    """What `check_start` found.

    loss: of the batches, and `expected`: the same with the policy's own log-probs as the reference.
    difference, rounding: nats a token, as above.
    rewards: what rounding moves the reward of a sequence by, root mean square.
    sequences: that were compared, of all ranks.
    """

    loss: float
    expected: float
    difference: float
    rounding: float
    rewards: float
    sequences: int

    @property
    def accepted(self) -> float:
        """The largest difference that rounding explains."""
        return allowance(self.sequences) * max(self.rounding, FLOOR)

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged beside the evaluation of step 0."""
        names = ("loss", "expected", "difference", "rounding", "rewards")
        return {f"start/{name}": getattr(self, name) for name in names}

    @property
    def refusal(self) -> str:
        """What is said where the difference is not accepted."""
        return (
            f"before the first update the loss is {self.loss:.7f} and should be {self.expected:.7f}, "
            "because policy and reference are the same model there. Their log-probs of "
            f"{self.sequences} sequences differ by {self.difference:.2g} nats a token; two evaluations "
            f"of the policy differ by {self.rounding:.2g}, so rounding explains {self.accepted:.2g}. "
            "Look at reference.cache_dir (a reference of another model?), at dropout or other noise in "
            "the model's forward, and at model.dtype"
        )

    @property
    def of_columns(self) -> str:
        """What is said of sums that came with the data, whose model is not known."""
        if self.difference <= self.accepted:
            return (
                "the reference columns of the data are the policy's own log-probs, but for rounding "
                f"({self.difference:.2g} nats a token)"
            )
        return (
            f"the reference columns of the data differ from the policy by {self.difference:.2g} nats a "
            f"token, and rounding explains {self.accepted:.2g}; the loss is {self.loss:.7f}, and would be "
            f"{self.expected:.7f} with the policy's own. They are of another model or of other tokens: "
            "another template, end of turn or truncation"
        )

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.7f}, expected {self.expected:.7f} where policy = reference; their "
            f"log-probs differ by {self.difference:.2g} nats a token, {self.accepted:.2g} may be "
            f"rounding, which moves the reward of a sequence by {self.rewards:.2g}"
        )


def allowance(sequences: int) -> float:
    """How many times rounding a difference may be. The mean of few sequences scatters more."""
    return 2 + 4 / math.sqrt(max(sequences, 1))


def check_start(*arguments) -> Start:
    """As `measure_start`. Raises UserError if policy and reference differ by more than rounding."""
    start = measure_start(*arguments)
    if not start.difference <= start.accepted:
        raise UserError(start.refusal)
    return start


@torch.no_grad()
def measure_start(
    engine,
    batches: Sequence[ScoredBatch],
    again: Sequence[ScoredBatch],
    loss_pass: LossPass,
    provider,
    totals: Totals,
    where: Callable[[int], str] = str,
) -> Start:
    """Compare policy and reference before any update. Collective.

    It holds for any loss that has a reference, since the loss with the policy as its own reference is
    what it must be.

    batches: this rank's first micro-batches of the first step, as many as every other rank has.
    again: examples of the first of them in other batches (`other_batches`), as many on every rank.
    totals: counts of the examples in the batches of all ranks.
    where: the file and line of an example.

    Raises:
        UserError: numbers are not finite.
    """
    losses = torch.zeros(2, dtype=torch.float64, device=engine.device)
    squares, seen, compared = Squares(engine.device), {}, {}
    for batch in batches:
        batch = batch.to(engine.device)
        reference = loss_pass.reference(provider, batch)
        token_outputs = loss_pass.token_outputs(engine, batch)
        logp_T = token_outputs["logp"]
        own = reference | token_reference(logp_T, batch)
        for place, each in enumerate((reference, own)):
            losses[place] += loss_pass.loss(token_outputs, each, batch, totals).loss
        squares.compare(logp_T, reference["reference_S"], reference.get("reference_T"), batch)
        seen |= by_example(logp_T, batch)
        compared |= by_example(reference["reference_S"], batch, torch.ones_like(batch.lengths_S))
    check_finite(where, policy=seen, reference=compared)
    evaluate_again(engine, again, seen, squares)
    losses = data_ranks.sum_once(losses).tolist()
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"before the first update the loss is {losses[0]:g}, though all log-probs are finite: numbers "
            "overflow in the loss; look at the columns weight and margin and at the options of loss"
        )
    return squares.start(*losses, loss_pass.objective.options.beta)


@torch.no_grad()
def evaluate_again(scorer, again: Sequence[ScoredBatch], seen: dict, squares: Squares) -> None:
    """Enter what a second evaluation of examples differs by. seen: the first one, by example."""
    with last_bits_changed(getattr(scorer, "module", scorer).causal_lm.get_input_embeddings()):
        for batch in again:
            batch = batch.to(squares.sums.device)
            logp_T = scorer(**forward_arguments(batch))["logp"]
            first_T = torch.cat([logp_T[:0], *(seen[i] for i in batch.indices_P.tolist())])
            squares.repeat(logp_T, first_T, batch)


def check_finite(where: Callable[[int], str], **logps: dict[int, Tensor]) -> None:
    """Raises UserError if log-probs are not finite. Collective.

    where: the file and line of an example; logps: of this rank's examples, by the name of the model.
    """
    found = []
    for name, of_example in logps.items():
        odd = [where(i) for i, values in of_example.items() if not values.isfinite().all()]
        if odd := distributed.joined(odd if data_ranks.counts() else []):
            found.append(f"log-probs of the {name} are not finite in {some(odd)}")
    if found:
        raise UserError(f"before the first update {'; '.join(found)}")


class Squares:
    """Sums of squared differences and their counts, of this rank's sequences and tokens."""

    NAMES = ("sequences", "tokens", "rounded_sequences", "rounded_tokens", "stored", "sums")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), 2, dtype=torch.float64, device=device)

    def compare(self, logp_T: Tensor, reference_S: Tensor, reference_T, batch: ScoredBatch) -> None:
        """Enter the differences of policy and reference."""
        moved_S = sum_sequences(logp_T, batch.lengths_S).double() - reference_S.double()
        self._add("sequences", moved_S, batch.lengths_S)
        # Sums are stored in fp32; a long one has lost more than its tokens did.
        self._add("stored", torch.finfo(torch.float32).eps * reference_S, batch.lengths_S)
        if reference_T is not None:
            self._add("tokens", logp_T - reference_T)

    def repeat(self, logp_T: Tensor, first_T: Tensor, batch: ScoredBatch) -> None:
        """Enter the differences of two evaluations of the policy."""
        moved_T = logp_T.double() - first_T.double()
        moved_S = sum_sequences(moved_T, batch.lengths_S)
        self._add("rounded_sequences", moved_S, batch.lengths_S)
        self._add("sums", moved_S)
        self._add("rounded_tokens", moved_T)

    def start(self, loss: float, expected: float, beta: float) -> Start:
        """The result over all ranks. Collective. beta: of the losses, the scale of rewards."""
        sums = dict(zip(self.NAMES, data_ranks.sum_once(self.sums).tolist()))
        square = {name: total / max(count, 1) for name, (total, count) in sums.items()}
        return Start(
            loss,
            expected,
            difference=math.sqrt(max(square["sequences"], square["tokens"])),
            rounding=math.sqrt(
                max(square["rounded_sequences"], square["rounded_tokens"]) + square["stored"]
            ),
            rewards=beta * math.sqrt(square["sums"]),
            sequences=int(sums["sequences"][1]),
        )

    def _add(self, name: str, moved: Tensor, lengths_S: Tensor | None = None) -> None:
        squared = moved.double().square()
        if lengths_S is not None:
            squared = squared / lengths_S.clamp_min(1)
        row = self.sums[self.NAMES.index(name)]
        row[0] += squared.sum()
        row[1] += len(squared)


def by_example(
    logp_T: Tensor, batch: ScoredBatch, lengths_S: Tensor | None = None
) -> dict[int, Tensor]:
    """The tokens of each example, by its place in the data. lengths_S: of its sequences, if others."""
    counts_P = batch.counts_P
    if counts_P is None:
        each = len(batch.lengths_S) // max(batch.num_examples, 1)
        counts_P = torch.full((batch.num_examples,), each)
    parts = iter(logp_T.split((batch.lengths_S if lengths_S is None else lengths_S).tolist()))
    return {
        index: torch.cat([next(parts) for _ in range(count)])
        for index, count in zip(batch.indices_P.tolist(), counts_P.tolist())
    }


def first_batches(split: Split, step: int) -> tuple[int, list[int]]:
    """How many micro-batches of each rank to compare, and the examples in them of all ranks.

    As few as hold `EXAMPLES`, or all of the step. Every rank finds the same.
    """
    ranks = range(data_ranks.data_ranks())
    ordered = zip(*(split.sampler.micro_batches(step, rank) for rank in ranks))
    indices: list[int] = []
    count = 0
    for each in ordered:
        indices += [index for mine in each for index in mine]
        count += 1
        if len(indices) >= EXAMPLES:
            break
    return count, indices


def other_batches(split: Split, indices: list[int]) -> list[ScoredBatch]:
    """Examples of a micro-batch, at most `TWICE`, in two batches of every other one, the last first.

    Products and padded rows have another size there. There are always two, so that ranks keep step.
    """
    some = indices[:TWICE][::-1]
    halves = (some[0::2], some[1::2])
    return [split.collate([split.examples[i] for i in half], half) for half in halves]


@contextlib.contextmanager
def last_bits_changed(embeddings: nn.Module) -> Iterator[None]:
    """Inside, every embedding is larger or smaller by its last bit, at random and seeded."""
    generator = torch.Generator().manual_seed(0)

    def change(module, arguments, output: Tensor) -> Tensor:
        sign = torch.randint(2, output.shape, generator=generator, dtype=torch.int8) * 2 - 1
        # An even number of halves would be rounded back.
        bit = 0.75 * torch.finfo(output.dtype).eps
        return output + output * (bit * sign.to(output.device, output.dtype))

    handle = embeddings.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
