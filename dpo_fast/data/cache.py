"""Names and publication of tokenised data on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.sources import Source
from dpo_fast.data.tokenise import read_template

# Raised by one whenever the same input would give other rows or another layout on disk.
FORMAT_VERSION = 3
# The options that change what is stored. Where it is stored, by how many processes, and how it is
# split for evaluation do not.
OPTIONS = (
    *("format", "columns", "prompt_end", "max_length", "max_prompt_length", "truncation"),
    *("on_bad_row", "add_eos", "max_rows"),
)


def cache_root(config: DataConfig) -> Path:
    """data.cache_dir, or a folder in the cache of `datasets` (which obeys HF_DATASETS_CACHE)."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_fast"


def cache_key(
    config: DataConfig, tokenizer: Any, sources: list[Source], eos_ids: Iterable[int]
) -> str:
    """32 hex digits that change with anything that could change the stored rows."""
    parts = {
        "version": FORMAT_VERSION,
        "sources": [source.identity() for source in sources],
        "tokenizer": tokenizer_hash(tokenizer),
        "template": read_template(config),
        "options": config.model_dump(include=set(OPTIONS)),
        "eos_ids": sorted(set(eos_ids)),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 hex of what a tokenizer does: vocabulary, merges, special tokens, chat template."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call, not part of the tokenizer.
        parts["state"] = {k: v for k, v in state.items() if k not in ("truncation", "padding")}
    else:
        parts["vocabulary"] = tokenizer.get_vocab()
        parts["files"] = _saved_files(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _saved_files(tokenizer: Any) -> dict[str, str]:
    """Hashes of the vocabulary files that a tokenizer without a backend writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        files = sorted(Path(folder).iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def publish(finished: Path, target: Path) -> None:
    """Renames a finished folder to its final name: readers see all of it or nothing.

    When another process published the same key first, its folder stays: the contents are equal.
    """
    try:
        os.rename(finished, target)
    except OSError:
        if not target.is_dir():
            raise
