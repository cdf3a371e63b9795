"""The stored reference: complete or absent, checked when read, the same for any split of the work."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.data.layouts import collate
from dpo_fast.errors import UserError
from dpo_fast.references import CachedReference, compute_table
from dpo_fast.references.cached import key_of, load_table, model_digest, save_table
from tests.models import write_model

MANIFEST = {"format": 1, "model": "m", "data": "d", "rows": 3, "dtype": "fp32"}
TABLE = torch.tensor([[-1.0, -2.0], [-3.5, -4.0], [-5.0, -6.25]])
PAIRS = [
    {"prompt_ids": [1], "chosen_ids": [10 + row, 2], "rejected_ids": [20 + row] * (row + 1)}
    for row in range(5)
]


def scorer(input_ids, position_ids, attention_mask, segments, rows_T, targets_T):
    """A model whose log-probability of a token is minus its number."""
    return {"logp": -targets_T.float()}


def test_what_is_saved_is_loaded(tmp_path):
    folder = tmp_path / "deep" / "train"
    folder.parent.mkdir()
    assert load_table(folder, MANIFEST) is None
    save_table(folder, TABLE, MANIFEST)
    assert torch.equal(load_table(folder, MANIFEST), TABLE)
    save_table(folder, TABLE + 1, MANIFEST)  # in place of the old
    assert torch.equal(load_table(folder, MANIFEST), TABLE + 1)
    assert [path.name for path in folder.parent.iterdir()] == ["train"]


@pytest.mark.parametrize("name", ["model", "data", "dtype", "rows"])
def test_another_manifest_is_refused_by_name(tmp_path, name):
    save_table(tmp_path / "train", TABLE, MANIFEST)
    with pytest.raises(UserError, match=f"{name} is .* there and 'other' here.*delete the folder"):
        load_table(tmp_path / "train", MANIFEST | {name: "other"})
    assert key_of(MANIFEST) != key_of(MANIFEST | {name: "other"})


def test_damage_is_noticed(tmp_path):
    folder = tmp_path / "train"
    save_table(folder, TABLE, MANIFEST)
    values = folder / "logps.safetensors"
    content = bytearray(values.read_bytes())
    content[-1] ^= 1  # one bit of one value
    values.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_table(folder, MANIFEST)
    values.write_bytes(content[:20])
    with pytest.raises(UserError, match="cannot be read"):
        load_table(folder, MANIFEST)
    save_table(folder, TABLE, MANIFEST)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    with pytest.raises(UserError, match="cannot be read"):
        load_table(folder, MANIFEST)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_table_is_computed_whatever_the_batches(layout, size):
    order = [3, 0, 4, 1, 2]
    chunks = [order[start : start + size] for start in range(0, 5, size)]
    batches = [collate([PAIRS[row] for row in rows], layout, indices=rows) for rows in chunks]
    table = compute_table(scorer, [*batches, collate([], layout)], 5)
    expected = [[-(10 + row + 2), -(20 + row) * (row + 1)] for row in range(5)]
    assert table.tolist() == expected
    reference = CachedReference(table)(collate([PAIRS[4], PAIRS[0]], layout, indices=[4, 0]))
    assert reference.tolist() == [*expected[4], *expected[0]]


def test_a_row_that_is_missing_or_doubled_is_an_error():
    batch = collate(PAIRS[:2], "packed", indices=[0, 1])
    with pytest.raises(RuntimeError, match="1 of 3 reference rows"):
        compute_table(scorer, [batch], 3)
    with pytest.raises(RuntimeError, match="2 of 2 reference rows"):
        compute_table(scorer, [batch, batch], 2)


def test_model_digest_tells_models_apart(tmp_path):
    a, b = write_model(tmp_path / "a", seed=0), write_model(tmp_path / "b", seed=1)
    same = write_model(tmp_path / "same", seed=0)
    assert model_digest(str(a)) == model_digest(str(same)) != model_digest(str(b))
