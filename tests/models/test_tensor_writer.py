"""Files of weights written tensor by tensor are those that safetensors writes."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_fast.models import save, tensor_writer
from dpo_fast.models.checkpoint import read_header
from dpo_fast.models.tensor_writer import DTYPES, stored_tensors, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    numbers = torch.randn(7, 6) * 40
    found = {f"of {name}": numbers.to(dtype) for dtype, name in DTYPES.items()}
    return found | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": numbers.T[1:, ::2],
        "a part": numbers[2:4],
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors_reads_what_is_written(tmp_path):
    expected = tensors()
    size = write_tensors(expected, tmp_path / "ours.safetensors")
    assert size == sum(tensor.nbytes for tensor in expected.values())
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(found[name]) == bytes_of(tensor), name
    save_file(
        {k: v.clone().contiguous() for k, v in expected.items()}, tmp_path / "theirs.safetensors"
    )
    dtypes = {}
    for who in ("ours", "theirs"):
        begin, header = read_header(tmp_path / f"{who}.safetensors")
        assert begin % 8 == 0
        for name, entry in header.items():
            assert entry["data_offsets"][0] % max(expected[name].itemsize, 1) == 0, (who, name)
        dtypes[who] = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    assert dtypes["ours"] == dtypes["theirs"]


def test_stored_tensors_are_copied_by_their_bytes(tmp_path, monkeypatch):
    """Also those of a dtype that torch cannot read, in parts that no element fits."""
    monkeypatch.setattr(tensor_writer, "CHUNK", 5)
    header = {"fp4": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}
    content = json.dumps(header).encode()
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(struct.pack("<Q", len(content)) + content + b"abc")
    write_tensors(tensors(), tmp_path / "in.safetensors")
    stored = stored_tensors(odd) | stored_tensors(tmp_path / "in.safetensors")
    write_tensors(stored | {"new": torch.ones(3)}, tmp_path / "out.safetensors")
    begin, found = read_header(tmp_path / "out.safetensors")
    first, last = found.pop("fp4")["data_offsets"]
    assert (tmp_path / "out.safetensors").read_bytes()[begin + first : begin + last] == b"abc"
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        out = {name: file.get_tensor(name) for name in found}
    assert torch.equal(out.pop("new"), torch.ones(3))
    expected = load_file(tmp_path / "in.safetensors")
    assert out.keys() == expected.keys()
    assert all(
        torch.equal(out[k].view(torch.uint8), v.view(torch.uint8))
        for k, v in expected.items()
        if v.ndim
    )


def test_a_file_that_is_cut_off_while_it_is_copied_is_told(tmp_path):
    write_tensors({"a": torch.ones(100)}, tmp_path / "in.safetensors")
    stored = stored_tensors(tmp_path / "in.safetensors")
    with (tmp_path / "in.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(OSError, match="in.safetensors is cut off"):
        write_tensors(stored, tmp_path / "out.safetensors")


def test_what_stays_is_not_read_into_memory(tmp_path, monkeypatch):
    """A vision tower of gigabytes goes from file to file."""
    write_tensors({"a": torch.ones(3), "tower": torch.zeros(4)}, tmp_path / "in.safetensors")
    monkeypatch.setattr(save, "read_tensors", lambda file, names: pytest.fail(str(names)))
    names = {tmp_path / "in.safetensors": ["a", "tower"]}
    save._write_shards(names, {"a"}, {"a": torch.ones(3) * 2}, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [2, 2, 2]
    assert load_file(tmp_path / "model.safetensors")["tower"].tolist() == [0] * 4
