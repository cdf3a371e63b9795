"""Which weights a model folder holds: one hash over every byte that changes what the model computes.

Hashed are the tensors by name, dtype, shape and content, the configuration without the keys that change
nothing, and the code that comes with the model. Files are not hashed by name or order: a checkpoint that
was sharded anew, or copied, is the same model. A hub id is identified by its commit.

The digests of a file's tensors are kept under the file's path, size, times and inode, so a second start
reads no weights.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import (
    adapter_file,
    adapters_under,
    base_of,
    code_files,
    is_adapter,
    read_adapter_config,
    read_header,
    weight_files,
)
from dpo_fast.models.hub import commit_of, split_revision

VERSION = 1  # raised whenever the same files would give another hash
CHUNK = 1 << 22
# A file may change twice within one tick of its clock. One that was written so recently is hashed again.
SETTLED = 2_000_000_000  # ns
# Keys of config.json that change no log-probability, or that the run sets itself.
IDLE_KEYS = {
    *("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype"),
    *("architectures", "_attn_implementation_autoset", "_attn_implementation"),
}
IDLE_ADAPTER_KEYS = {
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("task_type", "lora_dropout", "init_lora_weights", "loftq_config", "megatron_core"),
}

Tensor = tuple[str, str, tuple[int, ...], str]  # name, dtype, shape, sha256 of the bytes
Advance = Callable[[int], None]  # called with the bytes that have been read
Watch = Callable[[int], Advance]  # called with the bytes that will be read


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are hashed together: a tensor, or all of a file that is not read by tensors."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def unwatched(size: int) -> Advance:
    return lambda count: None


def model_identity(path: str, cache: Path | None = None, watch: Watch = unwatched) -> str:
    """A hash that two models share only if all of their weights are equal.

    path: folder or hub id.
    cache: folder of the digests that are known.
    watch: is told of the reading, for a progress bar.

    Raises:
        UserError: a file cannot be read, or a hub id has no commit.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        return _hub_identity(path)
    if is_adapter(path) or base_of(path) != path:
        return _adapter_identity(path, cache, watch)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = {
        "config": _without_idle(config),
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in code_files(folder)],
        "tensors": sorted(hash_tensors(weight_files(folder), cache, watch)),
    }
    return _hash(parts)


def _adapter_identity(path: str, cache: Path | None, watch: Watch) -> str:
    """Of a base with an adapter, with others under it, or with these alone."""

    def of_adapter(folder: str) -> dict:
        config = read_adapter_config(folder, "model.path")
        return {
            "adapter": {name: config[name] for name in config if name not in IDLE_ADAPTER_KEYS},
            "tensors": sorted(hash_tensors([adapter_file(folder)], cache, watch)),
        }

    parts = {"base": model_identity(base_of(path), cache, watch)}
    parts |= of_adapter(path) if is_adapter(path) else {}
    under = sorted(_hash(of_adapter(each)) for each in adapters_under(path).values())
    return _hash(parts | ({"under": under} if under else {}))


def _hash(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hub_identity(path: str) -> str:
    commit = commit_of(path)
    if commit is None:
        raise UserError(
            f"{path} was not loaded from a repository with commits, so its weights cannot be told from "
            "others: name the folder that holds them"
        )
    return f"{split_revision(path)[0]}@{commit}"


def _without_idle(config: dict) -> dict:
    """A configuration without what changes no log-probability; nested ones as well."""
    return {
        name: _without_idle(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in IDLE_KEYS and "dropout" not in name
    }


def hash_tensors(
    files: Iterable[Path], cache: Path | None = None, watch: Watch = unwatched
) -> list[Tensor]:
    """Digests of all tensors of these files, in any order. What the cache lacks is read in parallel."""
    known = {file: _known(file, cache) for file in files}
    unread = {file: spans_of(file) for file, tensors in known.items() if tensors is None}
    spans = [span for each in unread.values() for span in each]
    advance = watch(sum(span.size for span in spans))
    before = {file: _stamp(file) for file in unread}
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        largest_first = sorted(spans, key=lambda span: -span.size)
        digests = dict(
            zip(
                largest_first,
                pool.map(functools.partial(_hash_span, advance=advance), largest_first),
            )
        )
    for file, each in unread.items():
        known[file] = [(span.name, span.dtype, span.shape, digests[span]) for span in each]
        _keep(file, cache, before[file], known[file])
    return [tensor for tensors in known.values() for tensor in tensors]


def spans_of(file: Path) -> list[Span]:
    """What is hashed of a file: the tensors of a safetensors file, any other as a whole."""
    if file.suffix != ".safetensors":
        return [Span(file, "", "file", (), 0, file.stat().st_size)]
    start, header = read_header(file)
    return [
        Span(file, name, entry["dtype"], tuple(entry["shape"]), start + first, last - first)
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    ]


def _hash_span(span: Span, advance: Advance) -> str:
    digest, left = hashlib.sha256(), span.size
    buffer = memoryview(bytearray(min(CHUNK, left)))
    try:
        with span.file.open("rb", buffering=0) as stream:
            stream.seek(span.start)
            while left:
                count = stream.readinto(buffer[: min(len(buffer), left)])
                if not count:
                    raise UserError(
                        f"{span.file} is cut off: {left} bytes of {span.name} are missing"
                    )
                digest.update(buffer[:count])
                left -= count
                advance(count)
    except OSError as error:
        raise UserError(f"{span.file} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def _stamp(file: Path) -> list:
    found = file.stat()
    return [VERSION, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _place(file: Path, cache: Path) -> Path:
    return cache / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"


def _known(file: Path, cache: Path | None) -> list[Tensor] | None:
    """The digests that are kept of a file as it is now."""
    if cache is None:
        return None
    try:
        kept = json.loads(_place(file, cache).read_text(encoding="utf-8"))
        if kept["stamp"] == _stamp(file):
            return [
                (name, dtype, tuple(shape), hash_) for name, dtype, shape, hash_ in kept["tensors"]
            ]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not whole: it is made again
    return None


def _keep(file: Path, cache: Path | None, stamp: list, tensors: list[Tensor]) -> None:
    """Keep digests for the next start, unless the file changed meanwhile or a moment ago."""
    changed = max(stamp[2:4])
    if cache is None or stamp != _stamp(file) or time.time_ns() - changed < SETTLED:
        return
    content = json.dumps({"file": str(file.resolve()), "stamp": stamp, "tensors": tensors})
    with contextlib.suppress(
        OSError
    ):  # without a cache the next start takes longer, and that is all
        cache.mkdir(parents=True, exist_ok=True)
        durable.write_file(_place(file, cache), content)
