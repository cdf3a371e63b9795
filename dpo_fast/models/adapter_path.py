"""`model.adapter_path`: an adapter on another copy of its base than the one that it names, or of the hub.

The adapter's folder is linked into the cache with the base that the configuration names, and that folder
is `model.path` from there on: an adapter's folder is a model everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.models.checkpoint import ADAPTER_CONFIG, is_adapter
from dpo_fast.models.hub import split_revision

# What a folder of an adapter may hold beside its weights that a run reads.
HUB_FILES = ("adapter_*", "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json")
HUB_FILES += ("vocab*", "merges.txt", "*.model", "chat_template*", "*processor*.json")


def with_adapter_path(values: Any) -> Any:
    """The values of a section with `adapter_path` in place of `path`, its base.

    Raises:
        ValueError: it is no adapter, `path` is one, or the hub does not have it.
    """
    if not isinstance(values, Mapping) or values.get("adapter_path") is None:
        return values
    adapter, base = str(values["adapter_path"]), values.get("path")
    from huggingface_hub import constants

    option = f"model.adapter_path={adapter}"
    if not isinstance(base, str):
        raise ValueError(f"{option} is an adapter on model.path, which is not set")
    if is_adapter(base):
        raise ValueError(
            f"{option}: model.path={base} is an adapter itself; name the base model, or leave "
            "model.adapter_path out to train that one further"
        )
    folder = _folder(adapter, option)
    try:
        linked = _linked(folder, base)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: {ADAPTER_CONFIG} is no JSON: {error}") from None
    except OSError as error:
        raise ValueError(
            f"{option}: its folder is linked into the cache of the hub, {constants.HF_HOME}, and that "
            f"failed: {error}; set HF_HOME to a folder that can be written"
        ) from None
    return {**values, "path": str(linked), "adapter_path": None}


def _folder(adapter: str, option: str) -> Path:
    """The adapter's folder here. Raises ValueError."""
    folder = Path(os.path.expanduser(adapter))
    if folder.exists() or adapter.startswith((".", "/", "~")):
        if not is_adapter(adapter):
            raise ValueError(
                f"{option} holds no {ADAPTER_CONFIG}: expected a folder that peft's save_pretrained wrote, "
                "or a hub id"
            )
        return folder.resolve()
    from huggingface_hub import snapshot_download

    name, revision = split_revision(adapter)
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {durable.first_line(error)}") from None
    if not is_adapter(found):
        raise ValueError(f"{option}: the hub has no {ADAPTER_CONFIG} there, so it is no adapter")
    return Path(found)


def _linked(adapter: Path, base: str) -> Path:
    """A folder of links to an adapter's files, whose configuration names this base. It is made once."""
    from huggingface_hub import constants

    name, revision = split_revision(base)
    there = Path(os.path.expanduser(base))
    name = str(there.resolve()) if there.exists() else name
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": name, "revision": revision}
    content = json.dumps(config, indent=2, sort_keys=True)
    known = "\0".join([str(adapter), content, *sorted(file.name for file in adapter.iterdir())])
    key = hashlib.sha256(known.encode()).hexdigest()[:12]
    target = Path(constants.HF_HOME) / "dpo_fast" / "adapters" / f"{adapter.name}-{key}"
    if target.is_dir():
        return target
    aside = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in adapter.iterdir():
        if file.is_file() and file.name != ADAPTER_CONFIG:
            (aside / file.name).symlink_to(file.resolve())
    (aside / ADAPTER_CONFIG).write_text(content, encoding="utf-8")
    try:
        aside.rename(target)
    except OSError:  # another rank was faster
        shutil.rmtree(aside, ignore_errors=True)
    return target
