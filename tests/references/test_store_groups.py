"""The stored reference of groups: lists of any length, found by content, resumable."""

import hashlib

import pytest
import torch

datasets = pytest.importorskip("datasets")

from dpo_fast.data.batch import collate
from dpo_fast.data.dataset import GroupDataset, PairDataset
from dpo_fast.data.kinds import GROUPS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.references import blocks
from dpo_fast.references.artefact import Growing
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.store import Place, Request, default_place, find_stored, look, named_place

# Two to four answers of one token and more; a sum tells the answer.
ROWS = [
    {
        "prompt_ids": [1, 5 + row],
        "completions_ids": [[10 * row + side] * (side + 1) for side in range(2 + row % 3)],
        "scores": [float(side) for side in range(2 + row % 3)],
    }
    for row in range(7)
]
SUMS = [[-float(sum(ids)) for ids in row["completions_ids"]] for row in ROWS]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(blocks, "MOST", 3)


def table_of(rows: list[dict], numbers) -> datasets.Dataset:
    """As `build` makes it, but for the digests."""
    wheres = [f"groups.jsonl:{number + 1}" for number in numbers]
    ids = [[value for name, value in row.items() if name != "scores"] for row in rows]
    digests = [hashlib.sha256(repr(each).encode()).digest() for each in ids]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return datasets.Dataset.from_dict(columns | {"where": wheres, "digest": digests})


def groups(numbers) -> GroupDataset:
    """Some of ROWS in some order, as `load_examples` gives them."""
    return GroupDataset(table_of([ROWS[number] for number in numbers], numbers), report=None)


def lay_out(data, rows, layout):
    return collate([data[row] for row in rows], layout, indices=rows, kind=GROUPS)


def minus_targets(targets_U, predictions_T, **_):
    """A model whose log-probability of a token is minus its number."""
    return {"logp": -targets_U[predictions_T].float()}


def compute(growing, data, rows, scorer=minus_targets, per_token=True):
    """A part, as `compute_reference` does."""
    plan = length_batches(rows, LAYOUTS["shared_prefix"].costs(data.lengths), 2)
    batches, mine = [lay_out(data, some, "shared_prefix") for some in plan], data.lengths.take(rows)
    values_T = score_part(scorer, batches, rows, mine, "cpu")
    growing.add(part_table(values_T, mine, data, rows, per_token))


def store(folder, data, per_token=True) -> Request:
    request = Request("train", data, "m", "fp32", per_token)
    growing = Growing(folder, request.manifest)
    growing.begin()
    for rows in parts_of(folder, request):
        compute(growing, data, rows, per_token=per_token)
    growing.close()
    return request


def parts_of(folder, request):
    return blocks.blocks(look(Place(folder), request).absent_P.nonzero()[0])


def opened(folders, data, per_token=True):
    return open_reference(folders, data.digests, per_token, "cpu", GROUPS)


def test_the_folder_reads_as_one_table_of_lists(tmp_path):
    pandas = pytest.importorskip("pandas")
    folder = tmp_path / "train"
    request = store(folder, groups(range(7)))
    table = pandas.read_parquet(folder)
    assert list(table) == [
        "digest",
        "where",
        "completions_logps",
        "completions_tokens",
        "completions_token_logps",
    ]
    for row, sums, stored in zip(ROWS, SUMS, table.to_dict("records"), strict=True):
        ids = row["completions_ids"]
        assert stored["completions_logps"].tolist() == sums
        assert stored["completions_tokens"].tolist() == [len(each) for each in ids]
        values = [values.tolist() for values in stored["completions_token_logps"]]
        assert values == [[-float(token) for token in each] for each in ids]
    assert find_stored(named_place(str(folder), request), request) == [folder]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_found_by_content_in_any_order_and_number(tmp_path, layout):
    folders = [tmp_path / name for name in ("some", "others")]
    store(folders[0], groups([0, 1, 2, 3, 3]))
    store(folders[1], groups([6, 3, 5, 4]))
    numbers = [6, 5, 4, 3, 2, 1, 0, 4]
    data = groups(numbers)
    reference = opened(folders, data)
    for rows in ([4, 0, 7, 5], [6], [3, 3], list(range(8))):
        batch = lay_out(data, rows, layout)
        assert reference(batch).tolist() == sum((SUMS[numbers[row]] for row in rows), [])
        assert torch.equal(reference.token_logps(batch), -batch.targets_T.float())
        assert reference(batch).dtype == reference.token_logps(batch).dtype == torch.float32
    empty = lay_out(data, [], layout)
    assert reference(empty).shape == reference.token_logps(empty).shape == (0,)
    with pytest.raises(ValueError, match="4 of 8 groups are not in"):
        opened(folders[:1], data)


def test_sums_alone_have_no_token_values(tmp_path):
    data = groups(range(4))
    store(tmp_path / "train", data, per_token=False)
    reference = opened([tmp_path / "train"], data, per_token=False)
    batch = lay_out(data, [2, 1], "packed")
    assert reference(batch).tolist() == SUMS[2] + SUMS[1]
    with pytest.raises(ValueError, match="reference.per_token=true"):
        reference.token_logps(batch)


def test_parts_that_are_done_are_kept(tmp_path):
    data, folder = groups(range(7)), tmp_path / "train"
    request = Request("train", data, "m", "fp32", True)
    growing = Growing(folder, request.manifest)
    growing.begin()
    assert len(parts := parts_of(folder, request)) == 3
    compute(growing, data, parts[0])
    assert [rows.tolist() for rows in parts_of(folder, request)] == [[3, 4, 5], [6]]

    def broken(targets_U, predictions_T, **_):
        """Not finite for the last answer of row 4, the second row of part 1."""
        targets_T = targets_U[predictions_T]
        return {"logp": torch.where(targets_T == 42, torch.inf, 0.0)}

    with pytest.raises(UserError, match="log-probs of 1 groups are not finite, .*groups.jsonl:5"):
        compute(growing, data, parts[1], broken)
    for rows in parts[1:]:
        compute(growing, data, rows)
    growing.close()
    assert opened([folder], data).sums.tolist() == sum(SUMS, [])


def test_a_pair_of_the_same_tokens_does_not_take_a_groups_reference(tmp_path):
    own = store(tmp_path / "train", groups([0]))
    pair = {"prompt_ids": [1, 5], "chosen_ids": [0], "rejected_ids": [1, 1]}
    pairs = PairDataset(table_of([pair], [0]), report=None)
    wanted = Request("train", pairs, "m", "fp32")
    with pytest.raises(UserError, match="computed for something else: kind is 'groups'"):
        find_stored(named_place(str(tmp_path / "train"), wanted), wanted)
    assert default_place("run", own).own != default_place("run", wanted).own


def test_other_scores_want_no_other_reference(tmp_path):
    """A reward model that scores the same completions anew changes no log-probability."""
    rescored = [row | {"scores": [-score for score in row["scores"]]} for row in ROWS]
    data, other = groups(range(7)), GroupDataset(table_of(rescored, range(7)), report=None)
    assert data.fingerprint != other.fingerprint
    request = store(tmp_path / "reference" / "train", data)
    again = Request("train", other, "m", "fp32", True)
    assert again.manifest == request.manifest
    assert default_place(str(tmp_path), again) == default_place(str(tmp_path), request)
