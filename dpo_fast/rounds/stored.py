"""A run whose reference is the model that sampled its answers finds their log-probs beside the samples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dpo_fast.models import load_tokenizer
from dpo_fast.references.sequences import fill, read_sequences
from dpo_fast.references.store import Request, default_place, find_stored, named_place
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.load_data import load_split
from dpo_fast.training.weights import identity_of


def fill_references(config: RunConfig, files: Iterable[Path]) -> list[str]:
    """Fill what a run stores from log-probs of sequences, as far as they have all of a split. Collective.

    The run computes the rest, as without this. A reference that is there stays.

    files: of `references/sequences.py`; those of other models are passed over.

    Returns:
        The splits that were filled, by name; one twice where reference.old_path is another model.

    Raises:
        UserError: a file is damaged, or the reference cannot be written.
    """
    known = [read_sequences(file) for file in files]
    filled: list[str] = []
    if not config.stored_models or not known or config.data.streaming:
        return filled
    tokenizer = load_tokenizer(config.model)
    names = ("train", "eval") if config.data.has_eval else ("train",)
    splits = [load_split(config, tokenizer, name, shuffle=False) for name in names]
    for model in config.stored_models:
        path = model.path or config.model.path
        identity = identity_of(config, path)
        for split in splits:
            dtype, named_by = config.model.precision, f"{model.named_by}={path}"
            request = Request(
                split.name, split.examples, identity, dtype, model.per_token, named_by
            )
            place = (
                default_place(config.train.output_dir, request)
                if model.cache_dir is None
                else named_place(model.cache_dir, request)
            )

            def work(place=place, request=request) -> bool:
                return find_stored(place, request) is None and fill(place.own, request, known)

            if distributed.from_main(work):
                filled.append(split.name)
                say(
                    f"the reference log-probs ({split.name}) are those of the samples: none is computed"
                )
    return filled
