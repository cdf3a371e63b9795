"""The stored reference: it grows, is checked when read, and found by content, whatever the batches."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

import pyarrow.parquet

from dpo_fast import durable
from dpo_fast.data import kinds
from dpo_fast.data.batch import collate
from dpo_fast.data.dataset import PairDataset
from dpo_fast.data.kinds import ExampleLengths
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.references import CachedReference, blocks
from dpo_fast.references import store as references_store
from dpo_fast.references.artefact import MANIFEST, Growing, read_columns, read_manifest
from dpo_fast.references.cached import open_reference
from dpo_fast.references.compute import length_batches, part_table, score_part
from dpo_fast.references.store import Place, Request, default_place, find_stored, look, named_place

PAIRS = [
    {"prompt_ids": [1], "chosen_ids": [10 + row, 2], "rejected_ids": [20 + row] * (row + 1)}
    for row in range(5)
]
SUMS = [[-(10.0 + row + 2), -(20.0 + row) * (row + 1)] for row in range(5)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(blocks, "MOST", 2)


def dataset(rows) -> PairDataset:
    """Some of PAIRS in some order, as `load_examples` gives them."""
    pairs = [PAIRS[row] for row in rows]
    digests = [hashlib.sha256(repr(pair).encode()).digest() for pair in pairs]
    wheres = [f"pairs.jsonl:{row + 1}" for row in rows]
    columns = {name: [pair[name] for pair in pairs] for name in PAIRS[0]}
    return PairDataset(
        datasets.Dataset.from_dict(columns | {"where": wheres, "digest": digests}), report=None
    )


def request(rows=range(5), name="train", model="m", dtype="fp32", per_token=False) -> Request:
    return Request(name, dataset(rows), model, dtype, per_token)


def scorer(targets_U, predictions_T, **arguments):
    """A model whose log-probability of a token is minus its number."""
    assert not torch.is_grad_enabled()
    return {"logp": -targets_U[predictions_T].float()}


def table_of(wanted: Request, rows, layout="packed", size=2, score=scorer):
    pairs, lengths = wanted.examples, wanted.examples.lengths.take(rows)
    plan = length_batches(rows, LAYOUTS[layout].costs(pairs.lengths), size)
    batches = [collate([pairs[row] for row in some], layout, indices=some) for some in plan]
    values_T = score_part(score, [*batches, collate([], layout)], rows, lengths, "cpu")
    return part_table(values_T, lengths, pairs, rows, wanted.per_token)


def store(folder: Path, wanted: Request, **options) -> Path:
    """Compute a whole artefact, as one rank does."""
    growing = Growing(folder, wanted.manifest)
    growing.begin({"world_size": 1})
    for rows in parts_of(folder, wanted):
        growing.add(table_of(wanted, rows, **options))
    growing.close()
    return folder


def parts_of(folder: Path, wanted: Request) -> list[np.ndarray]:
    """The examples of each part that is missing."""
    return blocks.blocks(look(Place(folder), wanted).absent_P.nonzero()[0])


def opened(folders, rows, per_token=False) -> CachedReference:
    return open_reference(folders, dataset(rows).digests, per_token, "cpu")


def test_the_folder_reads_as_one_table_with_one_line(tmp_path):
    folder = store(tmp_path / "train", request(per_token=True))
    pandas = pytest.importorskip("pandas")
    for rows in (
        pandas.read_parquet(folder).to_dict("records"),
        pyarrow.parquet.read_table(folder).to_pylist(),
    ):
        assert [row["where"] for row in rows] == [f"pairs.jsonl:{row}" for row in range(1, 6)]
        assert [[row["chosen_logps"], row["rejected_logps"]] for row in rows] == SUMS
        assert [row["chosen_tokens"] for row in rows] == [2] * 5
        assert [row["rejected_tokens"] for row in rows] == [1, 2, 3, 4, 5]
        assert [list(row["chosen_token_logps"]) for row in rows] == [
            [-(10.0 + row), -2.0] for row in range(5)
        ]
        assert [len(row["digest"]) for row in rows] == [32] * 5
    schema = pyarrow.parquet.read_table(folder).schema
    per_token = pyarrow.list_(pyarrow.float32())
    types = {
        "digest": pyarrow.binary(),
        "where": pyarrow.string(),
        "chosen_logps": pyarrow.float32(),
        "rejected_logps": pyarrow.float32(),
        "chosen_tokens": pyarrow.int32(),
        "rejected_tokens": pyarrow.int32(),
        "chosen_token_logps": per_token,
        "rejected_token_logps": per_token,
    }
    assert schema.names == list(types)
    assert all(schema.field(name).type.equals(kind) for name, kind in types.items())
    plain = pyarrow.parquet.read_table(store(tmp_path / "plain", request()))
    assert plain.column_names == list(types)[:6]
    assert [file.name for file in sorted(folder.iterdir())] == [
        MANIFEST,
        *(f"part-0000{index}.parquet" for index in range(3)),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rows_per_part", [1, 3, 5, 100])
def test_values_are_those_of_the_scorer_whatever_the_batches(
    tmp_path, monkeypatch, layout, size, rows_per_part
):
    monkeypatch.setattr(blocks, "MOST", rows_per_part)
    folder = store(tmp_path / "train", request(per_token=True), layout=layout, size=size)
    reference = opened([folder], range(5), per_token=True)
    batch = collate([PAIRS[4], PAIRS[0]], layout, indices=[4, 0])
    assert reference(batch).tolist() == [*SUMS[4], *SUMS[0]]
    assert torch.equal(reference.token_logps(batch), -batch.targets_T.float())
    assert reference.token_logps(batch).dtype == reference(batch).dtype == torch.float32
    assert reference.token_logps(collate([], layout)).shape == (0,)


def test_rows_are_found_by_content_in_any_order_subset_and_number(tmp_path):
    folder = store(tmp_path / "train", request([3, 0, 1, 1, 2, 0, 4], per_token=True))
    for rows in ([4, 2, 0], [0, 1, 2, 3, 4], [1, 1, 3, 1]):
        reference = opened([folder], rows, per_token=True)
        assert reference.sums.view(-1, 2).tolist() == [SUMS[row] for row in rows]
        indices = list(range(len(rows)))
        batch = collate([PAIRS[row] for row in rows], "packed", indices=indices)
        assert torch.equal(reference.token_logps(batch), -batch.targets_T.float())
    halves = [store(tmp_path / name, request(rows)) for name, rows in (("a", [0, 3]), ("b", [1]))]
    assert opened(halves, [1, 0]).sums.view(-1, 2).tolist() == [SUMS[1], SUMS[0]]
    with pytest.raises(ValueError, match="1 of 2 pairs are not in"):
        opened(halves, [1, 2])


def test_sums_alone_have_no_token_values(tmp_path):
    folder = store(tmp_path / "train", request())
    with pytest.raises(ValueError, match="reference.per_token=true"):
        opened([folder], range(5)).token_logps(collate(PAIRS[:1], "packed"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_of_like_lengths_and_hold_every_row_once(layout):
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 50, (3 * 41,), generator=draw).numpy()
    lengths = ExampleLengths(kinds.PAIRS, sizes[:41], sizes[41:], np.full(41, 2))
    costs, rows = LAYOUTS[layout].costs(lengths), range(10, 41)
    batches = length_batches(rows, costs, 4)
    assert [len(batch) for batch in batches] == [4] * 7 + [3]
    ordered = [costs.alone_P[row] for batch in batches for row in batch]
    assert ordered == sorted(ordered, reverse=True)
    filled = length_batches(rows, costs, None, tokens=400)
    assert max(costs.of(batch) for batch in filled) <= 400
    assert len({len(batch) for batch in filled}) > 1
    for plan in (batches, filled):
        assert sorted(row for batch in plan for row in batch) == list(rows)


def test_what_is_stored_is_found_beside_the_run_by_content(tmp_path):
    place = default_place(tmp_path, request())
    assert find_stored(place, request()) is None
    store(place.own, request())
    assert find_stored(place, request()) == [place.own]
    assert place.own.parent == tmp_path / "reference"
    others = [request([0, 1]), request(model="x"), request(dtype="bf16"), request(per_token=True)]
    for other in others:
        assert default_place(tmp_path, other).own != place.own


def test_a_reference_that_comes_while_one_looks_is_found_by_the_next_look(tmp_path, monkeypatch):
    """Another run gives its folder its name between two questions to the file system."""
    place, wanted = default_place(tmp_path, request()), request()
    find = references_store._absent

    def absent(*arguments):
        with monkeypatch.context() as whole:
            whole.setattr(references_store, "_absent", find)
            store(place.own, request())
        return find(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(references_store, "_absent", absent)
        assert find_stored(place, wanted) is None
    assert find_stored(place, wanted) == [place.own]


def test_a_named_folder_serves_any_split_whose_pairs_are_in_it(tmp_path):
    root = tmp_path / "references"
    assert find_stored(named_place(root, request()), request()) is None
    store(root / "train-0123", request([0, 1, 2]))
    store(root / "eval", request([3, 4]))
    for wanted in (request([4, 0]), request([2, 2]), request([3], name="eval")):
        assert set(find_stored(named_place(root, wanted), wanted)) <= set(root.iterdir())
    # The artefact itself, too.
    wanted = request([2, 0])
    assert find_stored(named_place(root / "train-0123", wanted), wanted) == [root / "train-0123"]
    # A folder that is still being written is none.
    (root / "eval").rename(root / ".eval.partial")
    wanted = request([3], name="eval")
    assert find_stored(named_place(root, wanted), wanted) is None


def test_token_values_serve_a_run_that_wants_none_but_not_the_other_way(tmp_path):
    store(tmp_path / "tokens" / "train", request(per_token=True))
    store(tmp_path / "sums" / "train", request())
    place = named_place(tmp_path / "tokens", request())
    assert find_stored(place, request()) == [place.own]
    wanted = request(per_token=True)
    with pytest.raises(UserError, match="per_token is False there and True here. Name another"):
        find_stored(named_place(tmp_path / "sums", wanted), wanted)


@pytest.mark.parametrize("name", ["model", "dtype"])
def test_a_reference_of_something_else_is_refused_by_name(tmp_path, name):
    store(tmp_path / "train", request())
    wanted = request(**{name: "other"})
    with pytest.raises(
        UserError, match=f"{name} is '.*' there and 'other' here. Name another folder with"
    ):
        find_stored(named_place(tmp_path, wanted), wanted)


def test_pairs_that_are_missing_are_counted_and_the_first_is_named(tmp_path):
    store(tmp_path / "train", request([0, 1, 3]))
    wanted = request([0, 2, 1, 4])
    message = r"2 of 4 pairs \(train\) are not in it, the first pairs.jsonl:3; delete the folder"
    with pytest.raises(UserError, match=message):
        find_stored(named_place(tmp_path, wanted), wanted)
    with pytest.raises(UserError, match=message):
        find_stored(named_place(tmp_path / "train", wanted), wanted)


def test_damage_is_noticed(tmp_path):
    folder, wanted = tmp_path / "train", request()
    place = named_place(tmp_path, wanted)
    part, manifest = folder / "part-00001.parquet", folder / MANIFEST
    store(folder, wanted)
    content = part.read_bytes()
    for position in range(0, len(content), 97):  # one bit, anywhere
        flipped = bytearray(content)
        flipped[position] ^= 1
        part.write_bytes(flipped)
        with pytest.raises(UserError, match="damaged: part-00001.parquet changed"):
            find_stored(place, wanted)
    part.write_bytes(content[:20])
    with pytest.raises(UserError, match="damaged"):
        read_columns(folder, ["digest"])
    part.unlink()
    with pytest.raises(UserError, match="cannot be read.*No such file.*delete the folder"):
        find_stored(place, wanted)
    part.write_bytes(content)
    assert find_stored(place, wanted) == [folder]
    stored = json.loads(manifest.read_text())
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "holds no object"),
        (json.dumps({k: v for k, v in stored.items() if k != "parts"}), "names no parts"),
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            find_stored(place, wanted)
    manifest.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        find_stored(place, wanted)


def growing_in(folder: Path, **options) -> Growing:
    return Growing(folder, request(**options).manifest)


def begun(folder: Path, parts: int, **options) -> Path:
    """A folder that has some parts, by a process that was killed when it had written one more file."""
    wanted = request(**options)
    growing = Growing(folder, wanted.manifest)
    growing.begin({"world_size": 2})
    rows = parts_of(folder, wanted)
    for each in rows[:parts]:
        growing.add(table_of(wanted, each))
    growing._forget_lock()  # as the system does; the file stays
    (folder / f"part-{parts:05d}.parquet").write_bytes(b"torn")
    return folder


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_what_a_killed_process_wrote_is_kept_and_the_rest_added(tmp_path, parts):
    folder, wanted = begun(tmp_path / "train", parts), request()
    found = look(Place(folder), wanted)
    assert found.absent_P.tolist() == [row >= 2 * parts for row in range(5)] and found.lacks
    kept = {file: file.stat().st_mtime_ns for file in sorted(folder.glob("part-*"))[:parts]}
    store(folder, wanted)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert opened([folder], range(5)).sums.view(-1, 2).tolist() == SUMS
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert not list(folder.glob(".*"))
    computed = read_manifest(folder)["computed"]
    firsts = [(each["first_part"][5:10], each["world_size"]) for each in computed]
    assert firsts == [("00000", 2)] * bool(parts) + [(f"0000{parts}", 1)]


def test_rows_that_are_not_asked_for_may_be_missing(tmp_path):
    """A short run stores the first of them, and a longer one adds the others to the same folder."""
    short, rest = np.arange(5) < 2, np.arange(5) >= 3
    folder = begun(tmp_path / "train", 1)
    asks = [Request("train", dataset(range(5)), "m", "fp32", wanted_P=w) for w in (short, rest)]
    for place in (Place(folder), named_place(tmp_path, asks[0]), named_place(folder, asks[0])):
        assert find_stored(place, asks[0]) == [folder]
        assert find_stored(place, asks[1]) is None  # and no error: it is of the same data
    other = Request("train", dataset([4, 0, 1, 2, 3]), "m", "fp32", wanted_P=rest)
    with pytest.raises(
        UserError, match=r"other data: 2 of 5 pairs \(train\).* first pairs.jsonl:3;"
    ):
        find_stored(named_place(tmp_path, other), other)
    digests = dataset(range(5)).digests
    sums = open_reference([folder], digests, False, "cpu", wanted_P=short).sums.view(-1, 2)
    assert sums[:2].tolist() == SUMS[:2] and sums[2:].isnan().all()
    with pytest.raises(ValueError, match="2 of 5 pairs are not in"):
        open_reference([folder], digests, False, "cpu", wanted_P=rest)
    none = open_reference([], digests, False, "cpu", wanted_P=short & rest)
    assert none(collate([], "packed", indices=[])).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 5000])
def test_where_blocks_end_follows_from_the_order_alone(monkeypatch, count):
    monkeypatch.setattr(blocks, "MOST", 2048)
    order = np.random.default_rng(0).permutation(5000)
    whole, first = blocks.blocks(order), blocks.blocks(order[:count])
    assert [len(each) for each in whole] == [64, 64, 128, 256, 512, 1024, 2048, 904]
    full = [each for each in first if len(each) == len(whole[0]) or count == 5000]
    assert all((a == b).all() for a, b in zip(full, whole))
    assert sorted(np.concatenate([[], *first])) == sorted(order[:count])
    assert all((np.diff(each) > 0).all() for each in whole)


@pytest.mark.parametrize("option", [{"model": "x"}, {"rows": [0, 1]}, {"per_token": True}])
def test_a_folder_begun_for_something_else_is_refused_and_stays(tmp_path, option):
    folder = begun(tmp_path / "train", 1)
    with pytest.raises(UserError, match="was begun for something else.*Delete it to begin anew"):
        growing_in(folder, **option).begin()
    assert (folder / "part-00000.parquet").exists()


def test_a_second_process_waits_for_the_first_and_has_nothing_to_do(tmp_path):
    folder, wanted, waited = tmp_path / "train", request(), []
    first, second = growing_in(folder), growing_in(folder)
    first.begin()
    for rows in parts_of(folder, wanted):
        first.add(table_of(wanted, rows))

    def wait():
        waited.append(1)
        if len(waited) == 3:
            first.close()

    second.begin(wait=wait)
    assert len(waited) == 3 and not parts_of(folder, wanted)
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert not list(folder.glob(".*"))


def test_two_processes_that_make_the_folder_at_once_have_one(tmp_path, monkeypatch):
    publish = durable.publish

    def late(made, target):
        monkeypatch.setattr(durable, "publish", publish)
        first.begin()
        publish(made, target)

    first, second = growing_in(tmp_path / "train"), growing_in(tmp_path / "train")
    monkeypatch.setattr(durable, "publish", late)
    second.begin(wait=first.close)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_nfs_locks_only_what_is_open_for_writing(tmp_path, monkeypatch):
    """There flock is a lock of fcntl, and raises EBADF for a folder."""
    flock = fcntl.flock

    def nfs(descriptor, how):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", nfs)
    first, waited = growing_in(tmp_path / "train"), []
    first.begin()
    growing_in(tmp_path / "train").begin(wait=lambda: (waited.append(1), first.close()))
    assert waited == [1]


def test_nobody_waits_for_something_else(tmp_path):
    growing_in(tmp_path / "train").begin()
    with pytest.raises(UserError, match="was begun for something else"):
        growing_in(tmp_path / "train", model="x").begin(wait=lambda: pytest.fail("waits"))


def test_a_full_disk_is_told_and_costs_nothing(tmp_path, monkeypatch):
    folder, wanted = tmp_path / "train", request()
    growing = growing_in(folder)
    growing.begin()
    growing.add(table_of(wanted, range(2)))

    def full(file, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_file", full)
        with pytest.raises(UserError, match="cannot be written.*No space left.*kept"):
            growing.add(table_of(wanted, range(2, 4)))
        with pytest.raises(UserError, match="cannot be written.*No space left"):
            growing_in(tmp_path / "other").begin()
    growing.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    assert [rows.tolist() for rows in parts_of(folder, wanted)] == [[2, 3], [4]]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        growing_in(tmp_path / "file" / "train").begin()
    with pytest.raises(UserError, match="is a file"):
        named_place(tmp_path / "file", request())


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    def broken(targets_U, predictions_T, **arguments):
        targets_T = targets_U[predictions_T]
        logp = -targets_T.float()
        return {"logp": torch.where(targets_T == 23, value, logp)}

    message = "log-probs of 1 pairs are not finite, the first pairs.jsonl:4;"
    with pytest.raises(UserError, match=message):
        table_of(request(), range(2, 4), score=broken)


@pytest.mark.parametrize("inside", ["", "train"])
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/first/refrence", "runs/first/reference"),
        ("run/first/reference", "runs/first/reference"),
    ],
)
def test_a_slip_in_the_folder_does_not_compute_everything_anew(tmp_path, typed, meant, inside):
    stored = tmp_path / meant / inside
    store(stored, request([0]))
    with pytest.raises(UserError, match=f"{typed} does not exist, and .*{meant} holds a stored"):
        named_place(str(tmp_path / typed), request())
    assert not (tmp_path / typed).exists()
    for other in (request(model="x"), request(dtype="bf16"), request(per_token=True)):
        assert named_place(str(tmp_path / typed), other)  # what is there is none of theirs
    (tmp_path / typed).mkdir(parents=True)  # meant as it was typed
    assert named_place(str(tmp_path / typed), request()).own == tmp_path / typed / "train"


def test_a_new_folder_beside_others_is_no_slip(tmp_path):
    (tmp_path / "reference" / "train").mkdir(parents=True)  # holds none
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / MANIFEST).write_text("{}")
    for name in ("references", "new/reference"):
        assert named_place(str(tmp_path / name), request()).own == tmp_path / name / "train"
