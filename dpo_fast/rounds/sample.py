"""`dpo-fast sample`: completions of prompts, and their log-probs, in a folder.

    samples.jsonl            a row for each prompt, in their order (`generation/sample_rows.py`)
    samples.logps.parquet    log-probs of every sequence (`references/sequences.py`)
    samples.manifest.json    what they were made with; it is written last but for the rows

Until all is done the pieces lie in `.samples.partial`. The same command goes on after them, also on another
number of ranks; a command with other options is refused.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_fast.data.config import DataConfig
from dpo_fast.data.verdicts import BadRow, Dropped
from dpo_fast.errors import UserError
from dpo_fast.generation.batches import Batch, batches_of
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import Encoded, PromptCodec
from dpo_fast.generation.engine import LENGTH, Completion, Engine, Request, TooLong
from dpo_fast.generation.prompts import Prompts, read_prompts
from dpo_fast.models.checkpoint import check_model_path, is_folder
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.sample_folder import SampleFolder, Written, manifest_of
from dpo_fast.rounds.sample_logps import score_completions
from dpo_fast.rounds.sampler_model import Sampler
from dpo_fast.training import distributed, signals
from dpo_fast.training.config import build
from dpo_fast.training.console import progress_bar, say
from dpo_fast.training.lock import sole_run

KEPT = "what is done is kept: the same command goes on after it"
# Options of the section data that are of training alone.
OF_TRAINING = {
    *("train", "eval", "eval_rows", "stopping_strategy", "seed", "group_pairs"),
    *("streaming", "stream_buffer"),
}


@dataclass(frozen=True)
class Work:
    """What is to be completed: prompts, those of them that fit, and the batches of their completions."""

    section: SampleSection
    prompts: Prompts
    encoded: Encoded
    requests: list[Request]
    batches: list[Batch]


def sample(config: RoundsConfig) -> Path:
    """Sample completions as the configuration says; returns the file of rows. Collective.

    Raises:
        UserError: something does not fit, the engine fails, or the disk is full. What is done is kept.
        Interrupted: after a signal.
    """
    section_of(config)
    with signals.stop_at_once(KEPT):
        distributed.init_distributed()
        with sole_run(config.output_dir, "output_dir"):
            return sole_sample(config)


def section_of(config: RoundsConfig) -> SampleSection:
    """Raises UserError without a section `sample`, without its model, or for ranks that an engine lacks."""
    if config.sample is None:
        raise UserError(
            "the file has no section sample; it says which prompts are completed, and how"
        )
    if config.sample.prompts is None:
        raise UserError("sample.prompts is missing; name files, folders or hub ids of rows")
    check_model_path(config.model.path)
    if config.model.tokenizer is not None:
        is_folder(config.model.tokenizer, "model.tokenizer")
    if config.sample.engine.type == "vllm" and distributed.world_size() > 1:
        raise UserError(
            "sample.engine.type=vllm has processes of its own: start one rank, and set "
            "sample.engine.options={tensor_parallel_size: N}; or start servers and set type=openai"
        )
    return config.sample


def data_of(config: RoundsConfig) -> DataConfig:
    """How the prompts are read and tokenised: as the rows that a run trains on. Raises UserError."""
    tree = {name: value for name, value in config.data.items() if name not in OF_TRAINING}
    return build(DataConfig, {"train": config.sample.prompts, **tree}, "section data")


def sole_sample(config: RoundsConfig) -> Path:
    """`sample` in a folder that no other run uses."""
    section, data = section_of(config), data_of(config)
    sampler = Sampler(config.model, section, data)
    prompts = distributed.from_main(lambda: read_prompts(data, section))
    sampler.see(prompts.items)
    manifest = manifest_of(section, data, sampler.facts(), prompts.digest)
    folder = SampleFolder(Path(config.output_dir), section.output, manifest)
    if distributed.from_main(folder.is_complete):
        say(f"{folder.rows_file} is there already, sampled with the same options")
        return folder.rows_file
    work = plan(section, prompts, sampler)
    distributed.from_main(folder.begin)
    try:
        _complete(work, folder, sampler)
        if section.scores:
            score_completions(folder, sampler)
    finally:
        sampler.close()
        free_memory()
    say(distributed.from_main(lambda: folder.finish(prompts, work.encoded)))
    return folder.rows_file


def plan(section: SampleSection, prompts: Prompts, sampler: Sampler) -> Work:
    """Prompts as token ids, and in batches. Raises UserError."""
    tell_prompts(prompts, sampler.codec)
    encoded = sampler.encode(prompts.items)
    requests = [
        Request(prompts.items[place], ids, sampler.stop_ids(prompts.items[place]))
        for place, ids in zip(encoded.places, encoded.ids)
    ]
    lengths = [len(ids) or len(str(each.prompt.prompt)) for ids, each in zip(encoded.ids, requests)]
    size, alike = section.engine.sequences, sampler.needs_equal_lengths
    batches = batches_of(lengths, section.num_generations, size, section.seed, alike)
    if encoded.dropped:
        where, reason = encoded.dropped[0]
        say(
            f"{len(encoded.dropped)} prompts are left out; the first: {where}: {reason}",
            matters=True,
        )
    return Work(section, prompts, encoded, requests, batches)


def tell_prompts(prompts: Prompts, codec: PromptCodec | None) -> None:
    """Say how many there are, and what may be a slip."""
    count, parts = len(prompts.items), [f"{prompts.rows} rows"]
    parts += [f"{prompts.repeated} whose prompt came before"] if prompts.repeated else []
    parts += [f"{prompts.bad.total} without one that can be used"] if prompts.bad.total else []
    say(f"{count} prompts of {', '.join(parts)}")
    if codec is not None and codec.is_bare(prompts.items):
        say(
            "the prompts are text and go to the model as they stand, though its tokenizer has a chat "
            "template: data.apply_chat_template=true makes them the user's messages, false says that "
            "this is meant",
            matters=True,
        )


def _complete(work: Work, folder: SampleFolder, sampler: Sampler) -> None:
    """Write the completions that are missing. Every rank takes its share, and waits for the others."""
    journal = folder.journal("completions")
    done = journal.numbers()
    left = [batch for batch in work.batches if batch.number not in done]
    own = left[distributed.rank() :: distributed.world_size()]
    if done:
        say(f"{len(done)} of {len(work.batches)} batches are there already")
    distributed.barrier()  # nobody appends before all have read
    if own:
        engine = sampler.engine()
        with progress_bar("sampling", len(own)) as advance:
            for batch, found in engine.complete(own, work.requests):
                lines = [
                    _written(work, sampler, *each).line() for each in zip(batch.members, found)
                ]
                journal.append(batch.number, lines)
                advance()
        journal.close()
        _release(engine, sampler)
    distributed.await_all("sampled")


def _written(
    work: Work, sampler: Sampler, member: tuple[int, int], found: Completion | TooLong
) -> Written:
    """A completion with the ids that `train` makes of it, if it can."""
    place = work.encoded.places[member[0]]
    if isinstance(found, TooLong):
        return Written(place, member[1], None, str(found))
    if not work.section.scores:
        return Written(place, member[1], found)
    try:
        tokens = sampler.codec.sequence(
            work.prompts.items[place], found.text, found.finish_reason == LENGTH
        )
    except (BadRow, Dropped):
        return Written(place, member[1], found)
    size = None if found.ids is None else len(found.ids)
    same = None if size is None else tokens.answer_ids[:size] == list(found.ids)
    return Written(place, member[1], found, "", tokens, same)


def _release(engine: Engine, sampler: Sampler) -> None:
    """Give back an engine whose model is not scored with."""
    if not sampler.shares_model:
        engine.close()
        free_memory()


def free_memory() -> None:
    """Let another phase have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
