"""`model.adapter_path`: an adapter on another copy of its base than the one that it names, or of the hub;
and `model.adapters`: others that stay active and frozen under the one that is trained.

The adapter's folder is linked into the cache with the base that the configuration names, and that folder
is `model.path` while a process runs: an adapter's folder is a model everywhere. So is a folder with a list
of adapters (`checkpoint.ADAPTERS`): its base with them. Files have what was given, and the folder is made
again from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import ADAPTER_CONFIG, ADAPTERS, adapters_under, base_of, is_adapter
from dpo_fast.models.hub import split_revision

# What a folder of an adapter may hold beside its weights that a run reads.
HUB_FILES = (
    *("adapter_*", ADAPTERS),
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json"),
)
HUB_FILES += ("vocab*", "merges.txt", "*.model", "chat_template*", "*processor*.json")


GIVEN = ("path", "adapter_path", "adapters")  # what such a folder is made of


def linked(values: Any) -> Any:
    """The values of a section with one folder for `path`, `adapter_path` and `adapters`.

    Without the latter two they are given back as they are.

    Raises:
        ValueError: as `with_adapter_path` and `with_adapters`.
    """
    return with_adapters(with_adapter_path(values))


def path_of(values: Mapping[str, Any]) -> Any:
    """The path of a section's model as it is given: one folder. Raises UserError as `linked` does."""
    try:
        return linked(values).get("path")
    except ValueError as error:
        raise UserError(str(error)) from None


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


# Names that mean something else: of the trained adapter, of its copies, and of folders in an export.
TAKEN_NAMES = ("default", "ref", "taken", "merged", "engine", "additional_chat_templates")


def with_adapters(values: Any) -> Any:
    """The values of a section with a folder for `path` that also lists `adapters`.

    Raises:
        ValueError: one is no adapter, a name cannot be used, or nothing would be trained on them.
    """
    if not isinstance(values, Mapping) or not values.get("adapters"):
        return values
    adapters, path = values["adapters"], values.get("path")
    if not isinstance(adapters, Mapping) or not isinstance(path, str):
        return values
    if values.get("adapter") == "merge":
        raise ValueError(
            "model.adapters stay active and frozen under the one that is trained, and model.adapter=merge "
            "makes the adapter in model.path part of the base; name it in model.adapters, too, and the "
            "base in model.path"
        )
    if values.get("lora") is None and not is_adapter(path):
        raise ValueError(
            f"model.adapters={', '.join(map(str, adapters))} stay as they are, and there is no adapter to "
            "train beside them: set model.lora, or train one further with model.path or model.adapter_path"
        )
    known = adapters_under(path)
    for name in adapters:
        if not re.fullmatch(r"[A-Za-z]\w*(-\w+)*", str(name)) or name in (*TAKEN_NAMES, *known):
            raise ValueError(
                f"model.adapters.{name}: choose another name, of letters, digits, _ and -, and none of "
                f"{', '.join((*TAKEN_NAMES, *known))}"
            )
    folders = {n: str(_folder(str(a), f"model.adapters.{n}={a}")) for n, a in adapters.items()}
    return {**values, "path": str(_listed(path, known | folders)), "adapters": None}


def _listed(path: str, adapters: Mapping[str, str]) -> Path:
    """A folder of links to the files of an adapter, if path is one, with a list of others beside it."""
    there = Path(os.path.expanduser(path))
    there = there.resolve() if there.exists() else None
    content = {"adapters": {name: str(Path(each).resolve()) for name, each in adapters.items()}}
    if there is not None and is_adapter(str(there)):
        config = json.loads((there / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name, revision = split_revision(_absolute(base_of(str(there))))
        config |= {"base_model_name_or_path": name, "revision": revision}
        files = {file.name: file for file in there.iterdir() if file.is_file()}
        made = {ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True)}
        title = there.name
    else:
        content["base"] = _absolute(path)
        # The tokenizer that the last of them was trained with.
        files = next(
            filter(None, map(_tokenizer_files, reversed(content["adapters"].values()))), {}
        )
        made, title = {}, "-".join(adapters)
    return _made(title, files, made | {ADAPTERS: json.dumps(content, indent=2, sort_keys=True)})


def _absolute(path: str) -> str:
    there = Path(os.path.expanduser(path))
    return str(there.resolve()) if there.exists() else path


def _tokenizer_files(adapter: str) -> dict[str, Path]:
    folder = Path(adapter)
    found = {file.name: file for each in HUB_FILES[2:] for file in folder.glob(each)}
    known = {"tokenizer_config.json", "tokenizer.json"} & set(found)
    return {name: file for name, file in found.items() if file.is_file()} if known else {}


def _folder(adapter: str, option: str) -> Path:
    """The adapter's folder here. Raises ValueError."""
    folder = Path(os.path.expanduser(adapter))
    if folder.exists() or adapter.startswith((".", "/", "~")):
        if not folder.exists():
            raise ValueError(f"{option}: no such folder; if it lies elsewhere now, name that one")
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
        under = [f"{Path(each).name}/adapter_*" for each in adapters_under(found).values()]
        if under:
            snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, *under])
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {durable.first_line(error)}") from None
    if not is_adapter(found):
        raise ValueError(f"{option}: the hub has no {ADAPTER_CONFIG} there, so it is no adapter")
    return Path(found)


def _linked(adapter: Path, base: str) -> Path:
    """A folder of links to an adapter's files, whose configuration names this base."""
    name, revision = split_revision(base)
    there = Path(os.path.expanduser(base))
    name = str(there.resolve()) if there.exists() else name
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": name, "revision": revision}
    made = {ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True)}
    under = adapters_under(str(adapter))
    if under:
        made[ADAPTERS] = json.dumps({"adapters": under}, indent=2, sort_keys=True)
    files = {file.name: file for file in adapter.iterdir() if file.is_file()}
    return _made(adapter.name, files, made)


def _made(title: str, files: Mapping[str, Path], made: Mapping[str, str]) -> Path:
    """A folder in the cache with links to files, and texts that take their place. It is made once."""
    from huggingface_hub import constants

    places = [str(files[name].absolute()) for name in sorted(files)]
    known = "\0".join([*places, *(text for pair in sorted(made.items()) for text in pair)])
    key = hashlib.sha256(known.encode()).hexdigest()[:12]
    target = Path(constants.HF_HOME) / "dpo_fast" / "adapters" / f"{title}-{key}"
    if target.is_dir():
        return target
    aside = target.with_name(f".{target.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, file in files.items():
        if name not in made:
            (aside / name).symlink_to(
                file.absolute()
            )  # which may be a link that leads elsewhere later
    for name, text in made.items():
        (aside / name).write_text(text, encoding="utf-8")
    try:
        aside.rename(target)
    except OSError:  # another rank was faster
        shutil.rmtree(aside, ignore_errors=True)
    return target
