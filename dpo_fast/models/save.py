"""A trained model written over the folder that it came from.

Everything that came in stays: files of the tokenizer and the processor, the generation config, code,
and every tensor that was not trained, such as a vision tower's. Trained tensors replace those that they
were loaded from, under the names that the checkpoint gives them.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo_fast.models.checkpoint import NAMED_WEIGHTS, weight_files
from dpo_fast.models.stored_names import as_stored
from dpo_fast.models.tensor_writer import Stored, stored_tensors, write_tensors

# Weights in any format, and what a trainer leaves beside them.
HEAVY = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"),
    *(".npz", ".index.json", ".index.json.gz"),
)
LEFT = (
    *("trainer_state.json", "training_args.json", "adapter_config.json", "merged_from.json"),
    # Of a checkpoint that is a model folder as well; the scripts are DeepSpeed's.
    *("state.json", "manifest.json", "dpo_fast.yaml", "zero_to_fp32.py", "zero_to_torch.py"),
)
FOLDERS = ("additional_chat_templates",)
# What makes texts and pictures into the model's input: it goes with an adapter, too.
INPUT_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*"),
)
PROCESSOR_FILES = ("*processor*.json",)


def copy_files(source: Path, target: Path) -> None:
    """Copy all of a model folder but its weights."""
    for file in sorted(source.rglob("*")):
        inner = file.relative_to(source)
        hidden = any(part.startswith(".") for part in inner.parts)
        deep = len(inner.parts) > 1 and inner.parts[0] not in FOLDERS and file.suffix != ".py"
        if file.is_file() and not (hidden or deep or _is_left(file.name)):
            _copy(source, inner, target)


def copy_input_files(source: Path, target: Path, processor: bool = True) -> None:
    """Copy what makes texts, and pictures, into the model's input."""
    for pattern in INPUT_FILES + (PROCESSOR_FILES if processor else ()):
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not _is_left(file.name):
                _copy(source, file.relative_to(source), target)


def remove_input_files(folder: Path) -> None:
    """Remove the files of a tokenizer; another takes its place."""
    for pattern in INPUT_FILES:
        for file in folder.glob(pattern):
            file.unlink()


def _is_left(name: str) -> bool:
    return name.endswith(HEAVY) or name in LEFT


def _copy(source: Path, inner: Path, target: Path) -> None:
    place = target / inner
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / inner, place)


def write_model(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    source: Path,
    target: Path,
    untouched: Collection[str] = (),
) -> None:
    """Write a folder that `from_pretrained` loads as it loaded `source`.

    model: gives the names of its parameters; its weights are not read.
    state: the trained tensors by their names in the model, whole. Others stay as they are in `source`.
    untouched: names among them whose tensors nothing has changed.
    """
    target.mkdir(parents=True, exist_ok=True)
    copy_files(source, target)
    sizes: Counter[torch.dtype] = Counter()
    for tensor in state.values():
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    tree = json.loads((target / "config.json").read_text(encoding="utf-8"))
    tree.pop(NAMED_WEIGHTS, None)  # the files have their usual names now
    if sizes.total():  # some architectures keep a few tensors in fp32
        _note_dtype(tree, str(sizes.most_common(1)[0][0]).removeprefix("torch."))
    note_vocabulary(tree, model.config.get_text_config())
    (target / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    names = {file: tensor_names(file) for file in weight_files(source)}
    loaded, trained = as_stored(
        model, [name for each in names.values() for name in each], state, untouched
    )
    _write_shards(names, loaded, trained, target)


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors of a file of weights."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    return list(_unpickled(file))


def _unpickled(file: Path) -> dict[str, Tensor]:
    # Files of before PyTorch 1.6 are no archives, and cannot be mapped.
    archive = zipfile.is_zipfile(file)
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    # Beside tensors some have a number, say of a version, which safetensors cannot hold.
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _write_shards(
    names: Mapping[Path, list[str]], loaded: set[str], trained: dict[str, Tensor], target: Path
) -> None:
    """The checkpoint in as many files as it had; tensors with new names are in the last."""
    new = [name for name in trained if not any(name in each for each in names.values())]
    shards, size = {}, 0
    last = list(names)[-1]
    for number, (file, own) in enumerate(names.items(), 1):
        tensors: dict[str, Tensor | Stored] = {
            name: trained[name] for name in own if name in trained
        }
        tensors |= _kept(file, [name for name in own if name not in trained and name not in loaded])
        tensors |= {name: trained[name] for name in new} if file == last else {}
        place = "model.safetensors"
        if len(names) > 1:
            place = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        shards |= dict.fromkeys(tensors, place)
        size += write_tensors(tensors, target / place)
    if len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shards.items()))}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _kept(file: Path, names: list[str]) -> dict[str, Tensor | Stored]:
    """Tensors of a file that stay as they are; of a safetensors file they are not read."""
    if file.suffix != ".safetensors":
        return read_tensors(file, names)
    stored = stored_tensors(file)
    return {name: stored[name] for name in names}


def read_tensors(file: Path, names: list[str]) -> dict[str, Tensor]:
    """Tensors of a file of weights by their names."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name) for name in names}
    tensors = _unpickled(file) if names else {}
    return {name: tensors[name] for name in names}


def _note_dtype(config: dict, dtype: str) -> None:
    """The dtype of the weights, for those who load the model with dtype='auto'. The rest stays."""
    text = config.get("text_config")
    for tree in (config, *([text] if isinstance(text, dict) else [])):
        for name in ("dtype", "torch_dtype"):
            if name in tree:
                tree[name] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype


def note_vocabulary(config: dict, text: PretrainedConfig) -> None:
    """The rows of the embeddings, where an adapter had more than its base.

    A part of a configuration may leave out what is the default of its class, as Gemma 3's does.
    """
    rows, kind = text.vocab_size, text.model_type
    parts = [each for each in config.values() if isinstance(each, dict)]
    own = next(
        (each for each in parts if each.get("model_type") == kind), config.get("text_config")
    )
    own = own if isinstance(own, dict) else config
    if own.get("vocab_size", getattr(type(text)(), "vocab_size", rows)) != rows:
        own["vocab_size"] = rows
    if config.get("vocab_size", rows) != rows:
        config["vocab_size"] = rows
