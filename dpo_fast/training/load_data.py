"""From the data of a configuration to its splits, checked against the losses and the reference."""

from __future__ import annotations

import math

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_fast.data.dataset import open_examples, prepare_examples
from dpo_fast.data.grouping import SamePrompt, exact_costs
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, KINDS, PAIRS, Kind
from dpo_fast.data.report import DataReport
from dpo_fast.data.sampler import BatchSampler, Sampler, TokenSampler
from dpo_fast.data.stream import Chunk
from dpo_fast.data.stream_mixture import open_stream
from dpo_fast.errors import UserError
from dpo_fast.losses import LOSSES
from dpo_fast.models import end_of_turn_ids
from dpo_fast.references.table import alternatives
from dpo_fast.training import data_ranks, distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.own_sampler import own_sampler
from dpo_fast.training.splits import Examples, Split, StreamSplit

REFERENCE_COLUMNS = {name for kind in KINDS for name in kind.reference_columns}


def load_split(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    shuffle: bool,
    trains: bool = True,
) -> Split | StreamSplit:
    """Read, check and tokenise a split (`train` or `eval`), or find it done; or begin a stream.

    shuffle: whether it comes in the order of training. trains: whether it is trained on, if so.

    Collective. Raises UserError.
    """
    if name == "train" and config.data.streaming:
        return stream_split(config, tokenizer)
    ends = end_of_turn_ids(config.model)
    folders = distributed.main_first(
        f"data/{name}", lambda: prepare_examples(config.data, tokenizer, split=name, eos_ids=ends)
    )
    examples = open_examples(config.data, tokenizer, split=name, folders=folders)
    if examples.mixture is not None:
        tell_shares(examples.report)
        examples = examples.narrowed(config.train.seed, planned_epochs(config, examples))
    split = make_split(config, tokenizer, name, examples, shuffle)
    tell_unused(name, examples)
    if shuffle and trains:
        tell_size(split.sampler)
        tell_idle_answers(config, examples)
    return split


def planned_epochs(config: RunConfig, examples: Examples) -> int:
    """Epochs that a run begins: what later ones would draw of a mixture is not read, nor scored."""
    train = config.train
    if train.max_steps is None:
        return math.ceil(train.num_train_epochs)
    return -(-train.max_steps // _make_sampler(config, examples, True, 0, None).steps(1))


def stream_split(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> StreamSplit:
    """The stream of data.train at its beginning, its first chunk read."""

    def make(chunk: Chunk, accumulation: int | None) -> Split:
        return make_split(config, tokenizer, "train", chunk, True, chunk.number, accumulation)

    examples = open_stream(config.data, tokenizer, end_of_turn_ids(config.model))
    stream = StreamSplit(examples, make, config.train.max_steps)
    tell_unused("train", stream.examples)
    tell_shares(stream.examples.report)
    tell_size(stream.sampler)
    tell_idle_answers(config, stream.examples)
    return stream


def make_split(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    examples: Examples,
    shuffle: bool,
    first_epoch: int = 0,
    accumulation: int | None = None,
) -> Split:
    """Check examples and give them the sampler that the options ask for.

    shuffle: whether they are trained on. Otherwise a step is one micro-batch on each rank.
    first_epoch: number of the epoch that step 0 begins.
    accumulation: of a TokenSampler, if it is not to choose.

    Raises:
        UserError: examples of a kind that the loss or the reference cannot take, columns that the loss
            lacks or does not use, or an example that is larger than train.tokens_per_batch.
    """
    check_kind(config, name, examples)
    columns = used_columns(config, examples.numbers, examples.kind)
    sampler = _make_sampler(config, examples, shuffle, first_epoch, accumulation)
    wants_mismatched = "kl" in config.loss.objective.statistics
    mismatched_length = config.data.max_length if wants_mismatched else None
    layout, pad_id = config.train.layout, tokenizer.pad_token_id
    return Split(name, examples, sampler, layout, pad_id, columns, mismatched_length)


def _make_sampler(
    config: RunConfig, examples: Examples, shuffle: bool, first_epoch: int, accumulation: int | None
) -> BatchSampler:
    train = config.train
    if shuffle and train.sampler is not None:
        return own_sampler(config, examples, left_out(config, examples))
    order = {"seed": train.seed, "shuffle": shuffle, "first_epoch": first_epoch}
    order["world_size"] = world = data_ranks.data_ranks()
    order["mixture"] = mixture = examples.mixture if shuffle else None
    order["left_out"] = left_out(config, examples) if shuffle else frozenset()
    if train.group_prompts:
        order["same_prompt"] = SamePrompt.of(examples, train.layout)
    if train.tokens_per_batch is None:
        size = train.global_batch_size if shuffle else train.micro_batch_size * world
        epoch = len(examples if mixture is None else mixture)
        return Sampler(epoch, size, train.micro_batch_size, **order)
    costs = exact_costs(examples, train.layout)
    check_budget(train.tokens_per_batch, train.layout, costs.alone_P, examples)
    order["accumulation"] = accumulation if shuffle else 1
    return TokenSampler(costs, train.tokens_per_batch, train.global_batch_size, **order)


def left_out(config: RunConfig, examples: Examples) -> frozenset[int]:
    """The examples of train.skip_rows. Raises UserError if the data have no such row."""
    names = config.train.skip_rows
    if not names:
        return frozenset()
    found = examples.named(names)
    missing = sorted(set(names) - set(found.values()))
    if missing and not config.data.streaming:  # a chunk has some of the rows
        raise UserError(
            f"train.skip_rows={missing[0]!r} is no row of data.train: rows are named by file and line, as "
            f"in {examples.where(0)!r}"
        )
    if len(found) == len(examples):
        raise UserError("train.skip_rows leaves out all rows of data.train; name fewer")
    return frozenset(found)


def check_kind(config: RunConfig, name: str, examples: Examples) -> None:
    """Raises UserError if the losses or the reference cannot take examples of this kind."""
    objective, kind = config.loss.objective, examples.kind
    names = ", ".join(config.loss.names)
    where = f"data.{name} holds {kind.name}, the first {examples.where(0)}"
    if objective.grouped and kind != GROUPS:
        raise UserError(
            f"loss.type={names} goes by the scores of several completions of a prompt, but {where}; give "
            "rows with completions and scores, or choose another loss"
        )
    if kind == GROUPS and not objective.grouped:
        if objective.learns:
            raise UserError(
                f"loss.type={names} learns one answer of a row, but {where}; set data.format=sft, which "
                "takes the best one"
            )
        groups = " or ".join(spec.name for spec in LOSSES.values() if spec.grouped)
        raise UserError(
            f"loss.type={names} does not go by scores, but {where}; set loss.type to {groups}, set "
            "data.group_pairs=best_worst to make pairs of them, or give pairs"
        )
    if kind == DEMONSTRATIONS and not objective.learns:
        raise UserError(
            f"loss.type={names} needs to know which answers are better, but {where}: one answer, with "
            "neither a label nor another one beside it. Set loss.type=sft, which learns such answers, or "
            "give pairs, labels or scores (data.columns names yours)"
        )
    if kind.single and config.loss.use_weighting:
        raise UserError(
            f"loss.use_weighting=true weighs pairs by both answers, but {where}; leave it out, or give "
            "pairs"
        )
    if kind == COMPLETIONS and objective.paired:
        paired = ", ".join(spec.name for spec in objective.specs if spec.paired and not spec.single)
        single = " or ".join(spec.name for spec in LOSSES.values() if spec.kind == "completions")
        raise UserError(
            f"loss.type={paired} compares the two answers of a pair, but {where}; set loss.type to "
            f"{single}, or give pairs"
        )
    if kind == GROUPS and config.reference_spec.columns:
        raise UserError(
            f"reference.provider={config.reference_provider} takes sums of pairs or completions, but "
            f"{where}; set reference.provider to {alternatives(lambda spec: spec.scores)}"
        )
    if "kl" in objective.statistics and len(examples) < 2:
        raise UserError(
            f"loss.type={names} estimates kl from completions of other rows, but data.{name} has one row, "
            f"{examples.where(0)}; give it two or more"
        )


def tell_shares(report: DataReport) -> None:
    """Say what each source of a mixture gives to an epoch, or to the first chunk of a stream."""
    for name, share in report.shares():
        say(f"{name}: {share}")


def check_budget(budget: int, layout: str, alone_P: np.ndarray, examples: Examples) -> None:
    """Raises UserError unless every example fits into a micro-batch. alone_P: tokens of each."""
    longest = int(alone_P.argmax())
    if alone_P[longest] > budget:
        raise UserError(
            f"train.tokens_per_batch={budget} does not hold {examples.where(longest)}, which takes "
            f"{alone_P[longest]} tokens in the layout {layout}; set it to {alone_P[longest]} or more, or "
            "lower data.max_length"
        )


def tell_unused(name: str, examples: Examples) -> None:
    """Say which columns are passed over; what only looks like metadata shows here."""
    if unused := examples.report.ignored_columns:
        say(f"data.{name}: columns not used: {', '.join(unused)}")


def tell_idle_answers(config: RunConfig, examples: Examples) -> None:
    """Say that answers are computed which the loss does not look at."""
    if examples.kind == PAIRS and config.loss.objective.learns:
        say(
            "loss.type=sft learns the chosen answers, and the rejected ones are computed for metrics: "
            "data.format=sft leaves them out"
        )


def tell_size(sampler: BatchSampler) -> None:
    """Say how many examples a step has, if the tokens decide it."""
    if isinstance(sampler, TokenSampler):
        say(
            f"train.tokens_per_batch={sampler.budget}: micro-batches are {sampler.fill:.1%} full; "
            f"{sampler.bins_per_step} of them, {sampler.accumulation} on each rank, are a step of "
            f"{sampler.examples_per_step:.1f} examples on average "
            f"(train.global_batch_size={sampler.global_batch_size})"
        )
    if sampler.same_prompt is not None:
        say(f"train.group_prompts: {sampler.same_prompt}")


def used_columns(config: RunConfig, present: list[str], kind: Kind) -> tuple[str, ...]:
    """The columns of numbers that go into batches: all that are present.

    Raises:
        UserError: the run does not use one of them, or needs one that is not there.
    """
    objective, names = config.loss.objective, ", ".join(config.loss.names)
    used, needed = set(objective.columns), set(objective.needed_columns)
    if config.reference_spec.columns:
        used |= set(kind.reference_columns)
        needed |= set(kind.reference_columns)
    idle = [column for column in present if column not in used]
    if stored := [column for column in idle if column in REFERENCE_COLUMNS]:
        raise UserError(
            f"the data has the columns {' and '.join(stored)}, and reference.provider="
            f"{config.reference_provider} takes them from elsewhere: set reference.provider="
            f"{alternatives(lambda spec: spec.columns)}, or leave them out with data.columns"
        )
    if idle:
        raise UserError(
            f"the data has the columns {', '.join(idle)}, which loss.type={names} does not use; rename or "
            "remove them in the data, or choose another loss (docs/LOSSES.md says which uses what)"
        )
    if missing := sorted(needed - set(present)):
        raise UserError(
            f"the data has no columns {', '.join(missing)}, which loss.type={names} with "
            f"reference.provider={config.reference_provider} needs; name yours with data.columns"
        )
    return tuple(present)
