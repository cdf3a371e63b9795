"""Objects as files: a run is of files, which it can be resumed, evaluated and told from.

What is handed over in memory is written once to the folder `inputs` of the run, under a name that ends in
a hash of its content: the same objects are the same files in another process, and on every rank.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError

FOLDER = "inputs"
HASH = 12  # characters


def stage(root: Path, name: str, write: Callable[[Path], None], suffix: str = "") -> Path:
    """A file or folder that `write` makes, as `name-<hash><suffix>` in a folder.

    Raises:
        UserError: it cannot be written.
    """
    aside = root / f".{name}-{os.getpid()}{suffix}"
    with durable.writing(aside, "Make room, or name another train.output_dir"):
        root.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        try:
            write(aside)
            target = root / f"{name}-{content_hash(aside)}{suffix}"
            try:
                durable.publish(aside, target)
            except OSError:
                if not target.exists():  # another rank or run was not faster
                    raise
        finally:
            _remove(aside)
    return target


def content_hash(path: Path) -> str:
    """Of a file, or of the files of a folder with their names."""
    found = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        found.update(b"" if file == path else str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                found.update(part)
    return found.hexdigest()[:HASH]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def model_folder(
    model: Any, root: Path, name: str, processing: Callable[[Path], None] | None = None
) -> Path:
    """A model of transformers, or an adapter of peft, as a folder that `from_pretrained` loads.

    processing: writes tokenizer and processor beside it.

    Raises:
        UserError: it is no such model, or one whose weights cannot be had whole.
    """
    check_model(model, name)
    adapter = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if adapter:
        _check_base(model, name)
    elif getattr(model, "is_quantized", False):
        raise UserError(
            f"{name} has quantised weights: name the model by its path, and have it quantised by "
            "quantization, as docs/TRAINING.md says"
        )

    def write(folder: Path) -> None:
        try:
            if adapter:
                _save_active(model, folder, name)
            else:
                model.save_pretrained(str(folder))
        except ValueError as error:  # a generation config that contradicts itself is not written
            told = " ".join(" ".join(str(error).splitlines()[:2]).split()).rstrip(".")
            raise UserError(
                f"{name} cannot be saved, as a run needs it: {told}. Mend it until "
                "model.save_pretrained works, or name a folder"
            ) from None
        if processing is not None:
            processing(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's, which says nothing

    return stage(root, name, write)


def _save_active(model: Any, folder: Path, name: str) -> None:
    """The adapter of peft that is active, and no other of the same model. Raises UserError for several."""
    active = list(model.active_adapters)
    if len(active) != 1:
        raise UserError(
            f"{name} has {len(active)} active adapters ({', '.join(active) or 'none'}), and one is "
            f"trained: call {name}.set_adapter with its name; others stay active under it by model.adapters"
        )
    model.save_pretrained(str(folder), selected_adapters=active)
    inner = folder / active[0]  # of those that peft has named itself the folder itself
    if inner.is_dir():
        for file in inner.iterdir():
            file.replace(folder / file.name)
        inner.rmdir()


def check_model(model: Any, name: str) -> None:
    """Raises UserError unless it is a model of transformers or peft."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        own = isinstance(model, type)
        kind = f"the class {model.__name__}" if own else f"a {type(model).__name__}"
        raise UserError(
            f"{name} is {kind}: expected a model of transformers or peft, a folder, or a hub id"
        )


def uncompiled(model: Any) -> Any:
    """The model inside one of torch.compile, which has its weights; any other as it is."""
    return getattr(model, "_orig_mod", model)


def check_unquantised(model: Any, name: str) -> None:
    """Raises UserError for an adapter on weights that were quantised as they were loaded.

    A run loads its base as the files have it.
    """
    if not (hasattr(model, "peft_config") and getattr(model, "is_quantized", False)):
        return
    from dpo_fast.models.config import ModelSection
    from dpo_fast.models.load import load_model_config

    paths = [config.base_model_name_or_path for config in model.peft_config.values()]
    path = paths[0] or getattr(model.config, "_name_or_path", "")
    files = load_model_config(ModelSection(path=path), name) if path else None
    if getattr(files, "quantization_config", None) is None:
        raise UserError(
            f"{name} is an adapter on quantised weights, and a run would load them whole: say how it "
            'quantises them, as in quantization={"load_in_4bit": True}'
        )


def check_trainable(model: Any, name: str) -> None:
    """Raises UserError for a model of which a part is frozen that a run trains: what texts come by.

    One that is frozen throughout is no such: peft leaves a merged model so.
    """
    check_model(model, name)
    if hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
        return
    from dpo_fast.models.parts import reached_by_texts

    reached = reached_by_texts(model)
    own = {each: p.requires_grad for each, p in model.named_parameters() if id(p) in reached}
    frozen = [each for each, trained in own.items() if not trained]
    if 0 < len(frozen) < len(own):
        raise UserError(
            f"{name} has frozen weights (requires_grad=False), {len(frozen)} of {len(own)}, {frozen[0]} "
            f"the first, and a whole model is trained whole: call {name}.requires_grad_(True), or train "
            "adapters with peft_config, which leave the rest as it is"
        )


def _check_base(model: Any, name: str) -> None:
    """Raises UserError unless an adapter says where its base is."""
    for config in model.peft_config.values():
        if not config.base_model_name_or_path:
            raise UserError(
                f"{name} is an adapter on a model that has no path: save the base with save_pretrained and "
                "load it from there, or hand over the base and peft_config"
            )
    base, configs = model.get_base_model(), list(model.peft_config.values())
    path, biases = configs[0].base_model_name_or_path, ("none", None)
    merged = any(getattr(module, "merged", False) is True for module in base.modules())
    if merged or getattr(base, "is_quantized", False):
        return
    trained = () if all(getattr(each, "bias", None) in biases for each in configs) else (".bias",)
    if odd := changed_weight(base, path, trained):
        raise UserError(
            f"{name} is an adapter on weights that are not those of {path}, where its base is looked for "
            f"({odd} differs): save the base with save_pretrained and load it from there, or hand over "
            "the base and peft_config"
        )


def changed_weight(model: Any, path: str, but: tuple[str, ...] = ()) -> str | None:
    """The name of a parameter that is not as the files of its model have it; None if all are.

    What the files call otherwise, or hold in another shape, is not compared; nor is a model whose files
    are not on this machine. but: ends of names that are not compared either.
    """
    own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    own = {name: p for name, p in own.items() if not name.endswith(but)}
    for file in _safetensors_of(path):
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            for name in sorted(own.keys() & set(tensors.keys())):
                if _differs(own[name].detach().cpu(), tensors.get_tensor(name)):
                    return name
    return None


def _safetensors_of(path: str) -> list[Path]:
    from dpo_fast.models.checkpoint import weight_files
    from dpo_fast.models.hub import file_of, source

    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = file_of(source(path), "config.json")
        if found is None:
            return []
        folder = found.parent
    try:
        return [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    except UserError:
        return []


def _differs(own: Any, stored: Any) -> bool:
    """Whether a parameter is not what its file holds, also if it was rounded as it was loaded."""
    import torch

    if own.shape != stored.shape:
        return False
    kinds = (own.dtype, torch.bfloat16, torch.float16)
    return not any(torch.equal(stored.to(kind).to(own.dtype), own) for kind in kinds)


def is_name(value: Any) -> bool:
    """Whether it is a path, a hub id, or a list of them, which the configuration takes as they are."""
    if isinstance(value, (str, os.PathLike)):
        return True
    return _is_list(value) and bool(value) and all(map(is_name, value))


def _is_list(value: Iterable) -> bool:
    return isinstance(value, (list, tuple))
