"""The files of a model folder: which of them `from_pretrained` reads weights from, and what they hold.

A folder with adapter_config.json is an adapter (peft). It names its base model, and the two together are
the model. A folder with adapters.json names adapters that stay active and frozen, under the one that the
folder holds or on the base that the file names.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.hub import split_revision

# In the order in which transformers looks for them; an index names its shards.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NAMED_WEIGHTS = "transformers_weights"  # of a configuration
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = (
    "adapters.json"  # {"adapters": {name: folder}}, and "base" where there is no adapter beside
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` loads, in the order of their names.

    Raises:
        UserError: there are none, or the index is damaged or names one that is missing.
    """
    for name in (*_named_weights(folder), *FILES):
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = [folder / shard for shard in sorted(set(read_index(file).values()))]
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{file} names {shard.name}, which is not there")
        return shards
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not found:
        raise UserError(f"{folder} holds no weights: expected one of {', '.join(FILES)}")
    return found


def _named_weights(folder: Path) -> tuple[str, ...]:
    """The file that a configuration names, which transformers loads before any other, if it does."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(NAMED_WEIGHTS)
    except (OSError, ValueError, AttributeError):  # an adapter, or what `check_model_path` tells
        return ()
    return (name,) if isinstance(name, str) else ()


def read_index(file: Path) -> dict[str, str]:
    """The shard of each tensor, by the tensor's name. Raises UserError."""
    try:
        shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no index of shards: {type(error).__name__} {error}") from None


def read_header(file: Path) -> tuple[int, dict[str, dict]]:
    """Where the tensors of a safetensors file begin, and of each dtype, shape and data_offsets.

    Raises:
        UserError: it is none, or is cut off.
    """
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > file.stat().st_size:
                raise ValueError("it is shorter than its header")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        if not all(isinstance(entry.get("dtype"), str) for entry in header.values()):
            raise ValueError("a tensor has no dtype")
        end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != end:
            raise ValueError(f"it has {file.stat().st_size} bytes, its header says {end}")
    except (OSError, ValueError, KeyError, TypeError, struct.error, AttributeError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from None
    return 8 + size, header


def adapters_under(path: str) -> dict[str, str]:
    """Folders of the adapters that stay active and frozen in the model of a path, by their names."""
    found = _read_adapters(path).get("adapters", {})
    return {name: str(Path(os.path.expanduser(path)) / folder) for name, folder in found.items()}


def _read_adapters(path: str) -> dict[str, Any]:
    file = Path(os.path.expanduser(path)) / ADAPTERS
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        dict(found.get("adapters", {})).items()
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no list of adapters: {error}") from None


def check_weights(path: str, option: str = "model.path") -> None:
    """Check the files of weights of a folder, of an adapter those of its base too. Hub ids pass.

    Raises:
        UserError: as `check_readable`.
    """
    folder = Path(os.path.expanduser(path))
    for name, under in adapters_under(path).items():
        check_readable(adapter_file(under, f"model.adapters.{name}"))
    if base_of(path, option) != path:
        if is_adapter(path):
            check_readable(adapter_file(path, option))
        check_weights(base_of(path, option), "base_model_name_or_path")
    elif folder.is_dir():
        for file in weight_files(folder):
            check_readable(file)


def check_readable(file: Path) -> None:
    """Check a file of weights by what it says of itself; its tensors are not read.

    Raises:
        UserError: it is damaged, or a pickle of more than tensors, which is not loaded.
    """
    if file.suffix == ".safetensors":
        read_header(file)
        return
    import torch  # the rest of this module needs none

    try:
        # Files of before PyTorch 1.6 are no archives, and cannot be mapped.
        archive = zipfile.is_zipfile(file)
        torch.load(file, map_location="meta", weights_only=True, mmap=archive)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} is damaged, or holds Python objects beside tensors, which could run code and are not "
            "loaded: save the model anew, as safetensors"
        ) from None
    except Exception as error:  # torch raises nearly anything when it reads a damaged file
        raise UserError(
            f"{file} is no whole file of weights: {durable.first_line(error)}"
        ) from None


def code_files(folder: Path) -> list[Path]:
    """The Python files of a model that comes with code of its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sorted(folder.rglob("*.py")) if "auto_map" in config else []


def is_adapter(path: str) -> bool:
    """Whether a folder holds an adapter. A hub id is taken for a whole model."""
    return (Path(os.path.expanduser(path)) / ADAPTER_CONFIG).is_file()


def read_adapter_config(path: str, option: str) -> dict[str, Any]:
    """The configuration of an adapter folder. Raises UserError if it cannot be read or has no base."""
    file = Path(os.path.expanduser(path)) / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not config.get("base_model_name_or_path"):
            raise ValueError(
                "it has no base_model_name_or_path; enter the folder of the base model"
            )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{option}={path}: {file} is no adapter's configuration: {error}") from None
    return config


def trains_biases(path: str) -> bool:
    """Whether an adapter folder trains the base model's biases."""
    return read_adapter_config(path, "model.path").get("bias", "none") != "none"


def base_of(path: str, option: str = "model.path") -> str:
    """The model that an adapter folder belongs to; of any other path the path itself.

    A relative one begins in this folder, or else in one above the adapter: the trainer was started there.
    """
    if not is_adapter(path):
        return _read_adapters(path).get("base", path)
    config = read_adapter_config(path, option)
    base, revision = config["base_model_name_or_path"], config.get("revision")
    if Path(os.path.expanduser(base)).exists():
        return base
    above = Path(os.path.expanduser(path)).resolve().parents
    whole = next((folder / base for folder in above if (folder / base).is_dir()), None)
    if whole is not None:
        return str(whole)
    return f"{base}@{revision}" if revision else base


def adapter_file(path: str, option: str = "model.path") -> Path:
    """The file of an adapter's weights. Raises UserError if there is none."""
    folder = Path(os.path.expanduser(path))
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{option}={path} has an {ADAPTER_CONFIG} but no weights: expected {ADAPTER_FILES[0]}"
    )


def adapter_vocabulary(path: str) -> int | None:
    """Rows of the embeddings that an adapter comes with, which may be more than its base has; else None.

    SFT that adds tokens leaves such an adapter.
    """
    if not is_adapter(path) or adapter_file(path).suffix != ".safetensors":
        return None
    _, header = read_header(adapter_file(path))
    rows = [
        entry["shape"][0]
        for name, entry in header.items()
        if name.endswith(tuple(f"{end}.weight" for end in (*HEADS, *EMBEDDINGS)))
    ]
    return max(rows, default=None)


def of_image_text_model(path: str) -> bool:
    """Whether an adapter is of a whole image-text model, whose text model is a part, by its names."""
    if not is_adapter(path) or adapter_file(path).suffix != ".safetensors":
        return any(of_image_text_model(under) for under in adapters_under(path).values())
    return any(".language_model." in name for name in read_header(adapter_file(path))[1])


def check_model_path(path: str, option: str = "model.path") -> None:
    """Check that a folder holds a model, or an adapter with its base. Other names are left to the hub.

    Raises:
        UserError: naming the option, the path and what was expected there.
    """
    folder = Path(os.path.expanduser(path))
    if not is_folder(path, option):
        return
    if is_adapter(path):
        base = base_of(path, option)
        if is_adapter(base):
            raise UserError(
                f"{option}={path} is an adapter on another adapter, {base}: merge that one into its base "
                "first (model.adapter=merge does it, or peft's merge_and_unload)"
            )
        try:
            check_model_path(base, "base_model_name_or_path")
        except UserError as error:
            raise UserError(
                f"{option}={path} is an adapter, and its base model cannot be found: {error}. Correct "
                f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
            ) from None
        return
    base = base_of(path, option)
    if base != path:  # with adapters under what is trained
        check_model_path(base, option)
        return
    config = folder / "config.json"
    if not config.is_file() and (folder / "state.json").is_file() and (folder / "engine").is_dir():
        raise UserError(
            f"{option}={path} is a checkpoint of a run without the model's own files: write them with "
            f"dpo-fast export {path}, or train with train.save_model=true"
        )
    if not config.is_file() and (folder / "final" / "tokenizer_config.json").is_file():
        raise UserError(f"{option}={path} is the folder of a run; its model is {folder / 'final'}")
    if not config.is_file():
        raise UserError(
            f"{option}={path} is not a model folder: it has no config.json (found: {_names(folder)})"
        )
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}") from None
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(
            f"{option}={path} has a config.json but no weights: expected *.safetensors "
            f"(found: {_names(folder)})"
        )


def is_folder(path: str, option: str) -> bool:
    """Whether it is a folder here rather than a hub id. Raises UserError if it is neither."""
    folder = Path(os.path.expanduser(path))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option}={path} is a file; expected a folder")
    looks_local = path.startswith((".", "/", "~")) or split_revision(path)[0].count("/") > 1
    if not folder.exists() and looks_local:
        raise UserError(
            f"{option}={path}: no such folder; expected one that save_pretrained wrote, or a hub id "
            "like org/name"
        )
    return folder.exists()


def _names(folder: Path) -> str:
    return ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
