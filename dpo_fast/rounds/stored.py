"""A run whose reference is the model that sampled its answers finds their log-probs beside the samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dpo_fast import durable
from dpo_fast.models import load_tokenizer
from dpo_fast.references.sequences import fill, read_sequences
from dpo_fast.references.store import Request, default_place, find_stored, named_place
from dpo_fast.training import distributed
from dpo_fast.training.config import RunConfig
from dpo_fast.training.console import say
from dpo_fast.training.fit import choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.weights import identity_of


def fill_references(
    config: RunConfig, files: Iterable[Path], earlier: Iterable[Path] = ()
) -> list[str]:
    """Fill what a run stores from log-probs of sequences, as far as they have all of a split. Collective.

    The run computes the rest, as without this. A reference that is there stays.

    files: of `references/sequences.py`; those of other models are passed over.
    earlier: folders of references that other runs have stored, each for a split of the same model.

    Returns:
        The splits that were filled, by name; one twice where reference.old_path is another model.

    Raises:
        UserError: a file is damaged, or the reference cannot be written.
    """
    known, earlier = [read_sequences(file) for file in files], list(earlier)
    filled: list[str] = []
    if not config.stored_models or not (known or earlier) or config.data.streaming:
        return filled
    config = choose(config).applied(config)
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
                if find_stored(place, request) is not None:
                    return False
                linked = link_stored(place.own, earlier) and find_stored(place, request) is not None
                return linked or fill(place.own, request, known)

            if distributed.from_main(work):
                filled.append(split.name)
                say(f"the reference log-probs ({split.name}) are there already: none is computed")
    return filled


def link_stored(folder: Path, earlier: Iterable[Path]) -> bool:
    """Take over a reference that an earlier run has stored: one of the same model, dtype and data.

    Their hash is the folder's name (`default_place`). Files are linked where the file system can.
    """
    found = next((each / folder.name for each in earlier if (each / folder.name).is_dir()), None)
    if found is None:
        return False
    if folder.is_dir():  # begun, by a run that scored some rows
        return False
    aside = durable.aside(folder)
    shutil.rmtree(aside, ignore_errors=True)
    with durable.writing(folder, "Make room, and the same command goes on"):
        shutil.copytree(found, aside, copy_function=_link)
        durable.publish(aside, folder)
    return True


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
