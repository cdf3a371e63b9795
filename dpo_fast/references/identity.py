"""Which model a reference was computed with."""

from __future__ import annotations

import hashlib
from pathlib import Path


def model_digest(path: str, trust_remote_code: bool = False) -> str:
    """A hash that tells models apart: the configuration and samples of every weights file.

    Reading a 70B model whole would take minutes on every start. Training moves all weights, so 64 kB
    from 32 places of each file differ between any two models that are not the same. A hub id is told
    by its revision.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
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
