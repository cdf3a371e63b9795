"""A safetensors file written one tensor after the other: the memory is that of the largest.

`safetensors.torch.save_file` wants all tensors of a file at once, and makes a second copy of each. What
comes from another such file is copied byte for byte, so its dtype need not be known to torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dpo_fast.models.checkpoint import read_header

CHUNK = 1 << 24
# https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where its bytes lie, and what they are."""

    file: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises UserError if it is none, or is cut off."""
    begin, header = read_header(file)
    return {
        name: Stored(file, begin + first, last - first, entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        for first, last in [entry["data_offsets"]]
    }


def write_tensors(tensors: Mapping[str, Tensor | Stored], file: Path) -> int:
    """Write tensors, of memory or of other files. Returns their bytes; raises OSError."""
    # Large elements first, as safetensors does: every tensor begins at a multiple of their size.
    order = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        tensor = tensors[name]
        dtype = tensor.dtype if isinstance(tensor, Stored) else DTYPES[tensor.dtype]
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        for name in order:
            _write(tensors[name], stream)
    return end


def _width(tensor: Tensor | Stored) -> int:
    """Bytes of an element; of several that share bytes, one."""
    if isinstance(tensor, Tensor):
        return tensor.itemsize
    count = 1
    for size in tensor.shape:
        count *= size
    return max(tensor.nbytes // max(count, 1), 1)


def _write(tensor: Tensor | Stored, stream: BinaryIO) -> None:
    if isinstance(tensor, Tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stream.write(memoryview(flat.view(torch.uint8).numpy()))
        return
    with tensor.file.open("rb") as source:
        source.seek(tensor.start)
        left = tensor.nbytes
        while left:
            part = source.read(min(left, CHUNK))
            if not part:
                raise OSError(f"{tensor.file} is cut off")
            stream.write(part)
            left -= len(part)
