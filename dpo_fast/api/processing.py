"""Tokenizers and processors as files: what makes texts and images into a model's input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.api.inputs import is_name, stage
from dpo_fast.errors import UserError

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
NOT_LOADED = (OSError, ValueError, KeyError, TypeError, ImportError)


def tokenizer_folder(given: Any, root: Path, model: str | None = None) -> Path:
    """A tokenizer as a folder; of a processor its tokenizer.

    model: the path of the model that it is for, which has a processor of its own.

    Raises:
        UserError: it is neither, or a processor that treats images otherwise than the model's own.
    """
    _check(given)
    if hasattr(given, "image_processor"):
        _check_as_own(given, model)
    tokenizer = getattr(given, "tokenizer", given)
    return stage(root, "tokenizer", lambda folder: _saved(tokenizer, folder))


def write_processing(given: Any, own: str, folder: Path) -> None:
    """Write tokenizer and processor to the folder of a model.

    given: what was handed over: a tokenizer, a processor, or where one lies; None for nothing.
    own: where the model itself was loaded from, and so where its processor is; empty where that is unknown.

    Raises:
        UserError: there is no tokenizer.
    """
    if own and given is not None and not hasattr(given, "image_processor"):
        _copy_processor(own, folder)
    if given is not None and not is_name(given):
        _check(given)
        _saved(given, folder)
        return
    where = str(own if given is None else given)
    if not where:
        raise UserError(
            "PreferenceRun: the model does not say where its tokenizer is; hand it over as processing_class"
        )
    _copy_all(where, folder)


def _copy_all(where: str, folder: Path) -> None:
    """Copy the files of a tokenizer, and of a processor where there is one. Raises UserError."""
    from dpo_fast.models.load import local_folder, transformers_tokenizer
    from dpo_fast.models.save import copy_input_files

    try:
        transformers_tokenizer(where, trust_remote_code=False)
        copy_input_files(local_folder(where), folder)
    except NOT_LOADED as error:
        raise UserError(
            f"PreferenceRun: no tokenizer can be loaded from {where} ({durable.first_line(error)}); hand "
            "it over as processing_class"
        ) from None


def _copy_processor(where: str, folder: Path) -> None:
    """Copy the files of a processor, where there are any."""
    from dpo_fast.models.hub import file_of, source

    for name in PROCESSOR_FILES:
        try:
            found = file_of(source(where), name)
        except NOT_LOADED:  # the model's folder is not there any more
            return
        if found is not None:
            (folder / name).write_bytes(found.read_bytes())


def _check(given: Any) -> None:
    if isinstance(given, type) or not hasattr(
        getattr(given, "tokenizer", given), "save_pretrained"
    ):
        kind = (
            f"the class {given.__name__}"
            if isinstance(given, type)
            else f"a {type(given).__name__}"
        )
        raise UserError(
            f"processing_class is {kind}: expected a tokenizer or a processor of "
            "transformers, a folder, or a hub id"
        )


def _check_as_own(given: Any, model: str | None) -> None:
    """Raises UserError for a processor that treats images otherwise than the one at the model's path."""
    from dpo_fast.data.images.model import deciding
    from dpo_fast.data.images.processor import load_processor
    from dpo_fast.models.config import ModelSection
    from dpo_fast.models.processor import processor_source

    where = None if model is None else processor_source(ModelSection(path=model))
    if where is None:
        return  # rows with images are refused then, by the model's name
    own = load_processor(where, given.tokenizer, f"model.path={model}").image_processor
    told, here = deciding(own), deciding(given.image_processor)
    for name in sorted(told.keys() | here.keys()):
        if _text(told.get(name)) != _text(here.get(name)):
            raise UserError(
                f"processing_class has image_processor.{name}={here.get(name)!r}, and that of {model} has "
                f"{told.get(name)!r}, which counts where the model is named: set data.images_kwargs, or "
                "hand over the model itself"
            )


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)  # a list is a tuple in another version


def _saved(given: Any, folder: Path) -> None:
    given.save_pretrained(str(folder))
