"""The identity of a model's weights: every byte counts, and nothing else does."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_fast.errors import UserError
from dpo_fast.models import identity
from dpo_fast.models.checkpoint import read_header
from dpo_fast.models.identity import model_identity
from tests.support.models import write_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("identity") / "model")


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def of(folder, **options) -> str:
    return model_identity(str(folder), **options)


def edit(folder, change) -> None:
    """Change the tensors in place, or give others."""
    tensors = load_file(folder / WEIGHTS)
    given = change(tensors)
    save_file(given if isinstance(given, dict) else tensors, folder / WEIGHTS, {"format": "pt"})


def test_any_bit_of_any_tensor_makes_another_model(model, copy):
    before, file = of(model), copy / WEIGHTS
    assert of(copy) == before
    start, header = read_header(file)
    found = {before}
    for entry in header.values():
        first, last = entry["data_offsets"]
        for place in (first, (first + last) // 2, last - 1):
            with file.open("r+b") as stream:
                stream.seek(start + place)
                byte = stream.read(1)[0]
                stream.seek(start + place)
                stream.write(bytes([byte ^ 1]))
            found.add(of(copy))
            with file.open("r+b") as stream:
                stream.seek(start + place)
                stream.write(bytes([byte]))
    assert len(found) == 3 * len(header) + 1
    assert of(copy) == before


def test_names_shapes_and_dtypes_count(model, copy):
    norm = "model.norm.weight"
    keys = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    changes = {
        "exchanged": lambda x: x.update(zip(keys, [x[name] for name in reversed(keys)])),
        "renamed": lambda x: x.update({"other": x.pop(norm)}),
        "shaped": lambda x: x.update({norm: x[norm].view(1, -1)}),
        "typed": lambda x: x.update({norm: x[norm].bfloat16()}),
        "one less": lambda x: x.pop(norm),
        "one more": lambda x: x.update({"more": torch.zeros(1)}),
    }
    found = {of(model)}
    for name, change in changes.items():
        shutil.copy(model / WEIGHTS, copy / WEIGHTS)
        edit(copy, change)
        assert of(copy) not in found, name
        found.add(of(copy))
    assert len(found) == len(changes) + 1


def test_shards_order_and_other_files_do_not_count(model, copy, tmp_path):
    before = of(model)
    edit(copy, lambda tensors: dict(reversed(tensors.items())))
    (copy / "README.md").write_text("a note")
    assert of(copy) == before
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert of(tmp_path / "shards") == before
    # What transformers does not load does not count either.
    save_file({"x": torch.ones(1)}, copy / "consolidated.safetensors")
    assert of(copy) == before


def test_the_configuration_counts_where_it_changes_results(model, copy):
    before, file = of(model), copy / "config.json"
    config = json.loads(file.read_text())
    same = {
        "transformers_version": "9",
        "use_cache": False,
        "dtype": "bfloat16",
        "attention_dropout": 0.1,
    }
    file.write_text(json.dumps(config | same))
    assert of(copy) == before
    for change in ({"rms_norm_eps": 1e-5}, {"num_attention_heads": 2}, {"rope_theta": 5e5}):
        file.write_text(json.dumps(config | change))
        assert of(copy) != before, change
    # Code of the model's own.
    file.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "own.C"}}))
    (copy / "own.py").write_text("class C: pass")
    first = of(copy)
    (copy / "own.py").write_text("class C: x = 1")
    assert len({before, first, of(copy)}) == 3


def test_pickled_weights_count_whole(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    before = of(copy)
    content = bytearray((copy / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "pytorch_model.bin").write_bytes(content)
    assert of(copy) != before


def test_damage_is_told(model, copy):
    content = (model / WEIGHTS).read_bytes()
    for part in (content[:4], content[:400], content[:-1], content + b"x", b"\xff" * 64):
        (copy / WEIGHTS).write_bytes(part)
        with pytest.raises(UserError, match="model.safetensors is no whole safetensors file"):
            of(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(UserError, match="holds no weights: expected one of model.safetensors"):
        of(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match="names model-1.safetensors, which is not there"):
        of(copy)
    index.write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="is no index of shards"):
        of(copy)


def test_a_second_start_reads_nothing_and_a_change_is_seen(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED", 0)
    cache, sizes = tmp_path / "cache", []

    def found() -> str:
        return of(copy, cache=cache, watch=lambda size: sizes.append(size) or (lambda count: None))

    first = found()
    assert found() == first == of(copy)
    assert sizes[0] > 0 == sizes[1]
    # The same size, and the clock set back: the inode's change remains.
    stat = (copy / WEIGHTS).stat()
    with (copy / WEIGHTS).open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x01")
    os.utime(copy / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = found()
    assert second == of(copy) != first and sizes[2] > 0
    for damaged in ("{", "[]", '{"stamp": 1}'):
        for file in cache.iterdir():
            file.write_text(damaged)
        assert found() == second
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert found() == second


def test_what_was_written_a_moment_ago_is_not_kept(copy, tmp_path):
    of(copy, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_reading_is_told_byte_by_byte(copy):
    told = []

    def watch(size):
        told.append(size)
        return lambda count: told.append(-count)

    of(copy, watch=watch)
    assert sum(told) == 0 < told[0]


def test_a_hub_id_is_its_commit(monkeypatch):
    from transformers.utils import hub

    commit = "0123456789" * 4
    file = f"/cache/models--org--name/snapshots/{commit}/config.json"
    monkeypatch.setattr(hub, "cached_file", lambda *a, **k: file)
    assert of("org/name") == of("org/name@main") == f"org/name@{commit}"
    file = "/elsewhere/config.json"
    with pytest.raises(UserError, match="org/name was not loaded from a repository with commits"):
        of("org/name")
