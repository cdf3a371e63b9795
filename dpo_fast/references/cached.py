"""Reference log-probabilities computed once and kept on disk, with a manifest that is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.errors import UserError
from dpo_fast.references.live import Scorer, score

VALUES = "logps.safetensors"
MANIFEST = "manifest.json"


class CachedReference:
    """Looks up a batch's rows in a table of [rows, 2] fp32, chosen and rejected."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, batch: ScoredBatch) -> Tensor:
        rows_P = batch.indices_P.to(self.table.device)
        return self.table[rows_P].flatten().to(batch.input_ids.device, non_blocking=True)


def compute_table(scorer: Scorer, batches: Iterable[ScoredBatch], rows: int) -> Tensor:
    """[rows, 2] fp32 on the CPU. Each rank scores its own batches; the union must cover every row.

    Every rank must bring the same number of batches, since a sharded model is gathered together.
    """
    table = torch.zeros(rows, 2, dtype=torch.float64)
    seen = torch.zeros(rows, dtype=torch.int64)
    device = None
    for batch in batches:
        device = batch.input_ids.device
        values_P2 = score(scorer, batch).view(-1, 2)
        table[batch.indices_P.cpu()] = values_P2.double().cpu()
        seen[batch.indices_P.cpu()] += 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        table, seen = table.to(device), seen.to(device)
        dist.all_reduce(table)  # one rank's value plus zeros: exact
        dist.all_reduce(seen)
    if not (seen == 1).all():
        raise RuntimeError(
            f"{int((seen != 1).sum())} of {rows} reference rows were not scored once"
        )
    return table.float().cpu()


def key_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]


def save_table(folder: Path, table: Tensor, manifest: dict) -> None:
    """Write aside, then rename: the folder is complete or absent."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    chosen, rejected = (column.contiguous() for column in table.unbind(1))
    save_file({"chosen": chosen, "rejected": rejected}, aside / VALUES)
    digest = hashlib.sha256((aside / VALUES).read_bytes()).hexdigest()
    (aside / MANIFEST).write_text(json.dumps(manifest | {"values_sha256": digest}, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def load_table(folder: Path, manifest: dict) -> Tensor | None:
    """The stored table, or None where nothing is stored.

    Raises:
        UserError: what is stored is damaged, or belongs to another model, data set or option.
    """
    if not folder.exists():
        return None
    remedy = "delete the folder to compute it again, or name another with reference.cache_dir"
    try:
        stored = json.loads((folder / MANIFEST).read_text())
        digest = stored.pop("values_sha256")
        content = (folder / VALUES).read_bytes()
        values = load_file(folder / VALUES)
        table = torch.stack([values["chosen"], values["rejected"]], dim=1)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"reference {folder} cannot be read ({error}); {remedy}") from error
    names = sorted(stored.keys() | manifest.keys())
    differing = [name for name in names if stored.get(name) != manifest.get(name)]
    if differing:
        details = "; ".join(
            f"{name} is {stored.get(name)!r} there and {manifest.get(name)!r} here"
            for name in differing
        )
        raise UserError(f"reference {folder} was computed for something else: {details}. {remedy}")
    if hashlib.sha256(content).hexdigest() != digest or len(table) != manifest["rows"]:
        raise UserError(f"reference {folder} is damaged: its values changed; {remedy}")
    return table


def model_digest(path: str) -> str:
    """A hash that tells models apart: the configuration and samples of every weights file.

    Reading a 70B model whole would take minutes on every start. Training moves all weights, so 64 kB
    from 32 places of each file differ between any two models that are not the same.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for place in range(32):
                stream.seek(size * place // 32)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()
