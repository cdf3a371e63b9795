"""load_examples: files to tokenised examples, kept on disk under a hash of what made them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from dpo_fast import durable
from dpo_fast.data.build import build
from dpo_fast.data.config import IMAGES, DataConfig
from dpo_fast.data.entries import SourceOptions
from dpo_fast.data.folders import Role
from dpo_fast.data.gather import gather
from dpo_fast.data.images.laid import ImageLoader
from dpo_fast.data.images.model import images_of
from dpo_fast.data.images.store import IMAGES_FILE, STATES_FILE, ImageStore, changed_image
from dpo_fast.data.kinds import (
    COMPLETIONS,
    DEMONSTRATIONS,
    GROUPS,
    PAIRS,
    ExampleLengths,
    Kind,
    kind_of,
)
from dpo_fast.data.lists import Lists
from dpo_fast.data.mixture import Mixture, plan
from dpo_fast.data.parts import Part, parts_of
from dpo_fast.data.report import DataReport
from dpo_fast.data.seal import damage, seal
from dpo_fast.data.several import check_alike, source_shares, split_rows
from dpo_fast.data.template_file import check_template_used, read_template
from dpo_fast.errors import UserError

DATA_REPORT_FILE = "report.json"
ELSEWHERE = "Name another folder with data.cache_dir"
# Raised by one whenever the same input would give other examples or other files.
FORMAT_VERSION = 12
# Options that leave what is stored as it is, or are in its key by their content. A new option counts
# until it stands here: a cache that is made again is slow, a stale one is wrong.
APART = {
    *("train", "stopping_strategy", "eval", "eval_rows", "seed", "chat_template"),
    *("workers", "streaming", "stream_buffer", "cache_dir"),
}


def cache_root(config: DataConfig) -> Path:
    """data.cache_dir, or a folder in the cache of `datasets` (which obeys HF_DATASETS_CACHE)."""
    if config.cache_dir is not None:
        return Path(os.path.expanduser(config.cache_dir))
    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_fast"


def cache_key(part: Part, tokenizer: Any, eos_ids: Iterable[int]) -> str:
    """32 hex digits that change with anything that could change the stored rows of a part."""
    parts = {
        "version": FORMAT_VERSION,
        "sources": [source.identity() for source in part.sources],
        "tokenizer": tokenizer_hash(tokenizer),
        "template": read_template(part.config),
        "options": part.config.model_dump(exclude=APART),
        "eos_ids": sorted(set(eos_ids)),
        "images": images_of(tokenizer, part.config.images_kwargs).identity,
        **part.choice,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 hex of what a tokenizer does: vocabulary, merges, special tokens, chat template."""
    parts: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left over from the last call, not part of the tokenizer.
        parts["state"] = {k: v for k, v in state.items() if k not in ("truncation", "padding")}
    else:
        parts["vocabulary"] = tokenizer.get_vocab()
        parts["files"] = _saved_files(tokenizer)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _saved_files(tokenizer: Any) -> dict[str, str]:
    """Hashes of the vocabulary files that a tokenizer without a backend writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_vocabulary(folder)
        files = sorted(Path(folder).iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def publish_unless_there(finished: Path, target: Path) -> None:
    """`durable.publish`; if another process was first, its folder stays, since the contents are equal."""
    try:
        durable.publish(finished, target)
    except OSError:
        if not target.is_dir():
            raise


class Dataset:
    """Tokenised examples of one kind, memory-mapped.

    table: as `build` makes it. report: about all of it. rows: those of the table that belong to the
    data set, in its order; by default all. mixture: which of them the epochs of training draw; None
    where an epoch is all of them. images: makes pixel values; None where no example has images.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        table: datasets.Dataset,
        report: DataReport,
        rows: np.ndarray | None = None,
        mixture: Mixture | None = None,
        images: ImageLoader | None = None,
    ) -> None:
        self._table, self.images = table, images
        self._rows = np.arange(len(table)) if rows is None else rows
        self.report, self.mixture = report, mixture

    def narrowed(self, seed: int, epochs: int) -> Dataset:
        """A data set of those examples alone that a mixture draws in so many epochs."""
        mixture = self.mixture.narrowed(seed, epochs)
        rows = self._rows[mixture.used]
        return type(self)(self._table, self.report, rows, mixture, self.images)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example at `index`, which may count from the end. Raises IndexError."""
        row = self._table[int(self._rows[index])]
        return {name: value for name, value in row.items() if name not in ("where", "digest")}

    def where(self, index: int) -> str:
        """The file and line, or split and row, that an example came from."""
        return self._table[int(self._rows[index])]["where"]

    def named(self, places: list[str]) -> dict[int, str]:
        """The examples that came from these files and lines, by their index."""
        column = self._table.data.column("where")
        found = pyarrow.compute.is_in(column, value_set=pyarrow.array(places)).to_numpy()
        return {int(index): self.where(index) for index in found[self._rows].nonzero()[0]}

    @property
    def numbers(self) -> list[str]:
        """The optional float columns that the examples have."""
        return [name for name in self.kind.numbers if name in self._table.column_names]

    @property
    def lengths(self) -> ExampleLengths:
        """Token counts of prompts and answers."""
        return _lengths(self._table).take(self._rows)

    def column(self, name: str, indices: range) -> pyarrow.Array:
        """The values of these examples in a column that all have."""
        rows = pyarrow.array(self._rows[indices])
        return pyarrow.concat_arrays(self._table.data.column(name).take(rows).chunks)

    def token_lists(self, name: str, indices: np.ndarray) -> Lists:
        """The token ids of these examples in a column; of groups those of every answer."""
        return gather(self._table.data.column(name), self._rows[indices])

    @functools.cached_property
    def digests(self) -> pyarrow.Array:
        """sha256 of each example's token ids, binary [P]; the same on every machine."""
        return self._table.data.column("digest").take(self._rows).combine_chunks()

    @property
    def token_fingerprint(self) -> str:
        """sha256 hex of all token ids, in order; the same on every machine."""
        whole = self.digests.cast(pyarrow.binary(hashlib.sha256().digest_size))
        content = memoryview(whole.buffers()[1])[: len(whole) * whole.type.byte_width]
        return hashlib.sha256(content).hexdigest()

    @property
    def fingerprint(self) -> str:
        """sha256 hex of all that the loss may read: token ids, labels or scores, columns of numbers."""
        digest = hashlib.sha256(self.token_fingerprint.encode())
        digest.update(self._label_bytes())
        for name in self.numbers:
            digest.update(name.encode())
            digest.update(self._table.data.column(name).to_numpy()[self._rows].tobytes())
        return digest.hexdigest()

    def _label_bytes(self) -> bytes:
        return b""


class PairDataset(Dataset):
    """Tokenised pairs. Made by load_examples.

    dataset[i] has the lists of int prompt_ids, chosen_ids and rejected_ids, and the floats weight,
    margin, soft_label, reference_chosen_logps and reference_rejected_logps as far as the data has
    them, in every example or in none. Where the data has tokens of answers that are not scored, it has
    chosen_scored and rejected_scored, lists of bool, or None where all tokens are scored. `report` is
    about the whole data set that was read.
    """

    kind = PAIRS


class CompletionDataset(Dataset):
    """Tokenised completions with labels. Otherwise as `PairDataset`.

    dataset[i] has prompt_ids, completion_ids, the bool label, true for a desirable completion, and
    the floats weight, margin, soft_label and reference_completion_logps as far as the data has them.
    """

    kind = COMPLETIONS

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """bool [P], true for desirable completions."""
        return self._table.data.column("label").to_numpy()[self._rows]

    def _label_bytes(self) -> bytes:
        return self.labels.tobytes()


class GroupDataset(Dataset):
    """Tokenised groups: two or more completions of a prompt, with scores. Otherwise as `PairDataset`.

    dataset[i] has prompt_ids, completions_ids (a list of lists), the floats scores, one for each
    completion, and the float weight where the data has it.
    """

    kind = GROUPS

    def _label_bytes(self) -> bytes:
        scores = self._table.data.column("scores").take(pyarrow.array(self._rows))
        return scores.combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes()


class DemonstrationDataset(Dataset):
    """Tokenised answers to learn. Otherwise as `PairDataset`.

    dataset[i] has prompt_ids, completion_ids, and the float weight where the data has it.
    """

    kind = DEMONSTRATIONS


TYPES = (PairDataset, CompletionDataset, GroupDataset, DemonstrationDataset)
DATASETS = {each.kind: each for each in TYPES}


def load_examples(
    config: DataConfig, tokenizer: Any, *, split: Role, eos_ids: Iterable[int] = ()
) -> Dataset:
    """Reads, checks and tokenises data.train or data.eval, or finds it done before.

    The result is kept in data.cache_dir under a hash of the files' content, the tokenizer and the
    options. One rename publishes it, so several processes may run this at the same time. The columns
    of the rows tell their kind.

    tokenizer: a transformers tokenizer.
    eos_ids: end-of-turn ids beside its EOS, as in a model's generation config.

    Raises:
        UserError: data that cannot be read or used.
    """
    folders = prepare_examples(config, tokenizer, split=split, eos_ids=eos_ids)
    return open_examples(config, tokenizer, split=split, folders=folders)


def prepare_examples(
    config: DataConfig, tokenizer: Any, *, split: Role, eos_ids: Iterable[int] = ()
) -> list[str]:
    """The first half of `load_examples`: folders of the stored parts, built where they are not there."""
    if split not in ("train", "eval"):
        raise UserError(f"split={split!r}: expected train or eval")
    if split == "eval" and not config.has_eval:
        raise UserError("there is no evaluation data; set data.eval, or data.eval_rows")
    parts = parts_of(config, _role(config, split))
    return [str(_prepared(part, tokenizer, list(eos_ids))) for part in parts]


def open_examples(
    config: DataConfig, tokenizer: Any, *, split: Role, folders: list[str]
) -> Dataset:
    """The second half of `load_examples`. It reads nothing but the stored parts, memory-mapped."""
    tables, reports = zip(*(_open(Path(folder)) for folder in folders))
    table, report = tables[0], reports[0]
    if len(tables) > 1:
        check_alike(tables)
        table = datasets.concatenate_datasets(list(tables))
        report = DataReport.joined(reports, _lengths(table))
    check_template_used(config, report.chats)
    make, role = DATASETS[kind_of(table.column_names)], _role(config, split)
    sizes = list(map(len, tables))
    rows = [np.arange(sum(sizes))]
    if role == "train" and config.eval_rows:
        report = replace(report, held_out=config.eval_rows)
        rows = split_rows(sizes, make.kind, config, split)
    rows = np.concatenate(rows)
    sizes = np.histogram(rows, np.cumsum((0, *sizes)))[0].tolist()
    entries = config.train_entries if role == "train" else config.eval_entries
    mixture = None
    if config.weights and split == "train":
        seeds = [config.seed if entry.seed is None else entry.seed for entry in entries]
        mixture = plan(sizes, config.weights, seeds, config.stopping_strategy)
    if any(isinstance(entry, SourceOptions) for entry in entries):
        report = replace(report, mixture=source_shares(entries, sizes, config, mixture))
    images = None
    if IMAGES in table.column_names:
        store = ImageStore([Path(folder) / IMAGES_FILE for folder in folders])
        images = ImageLoader(images_of(tokenizer, config.images_kwargs), store)
    return make(table, report, rows, mixture, images)


def _role(config: DataConfig, split: Role) -> Role:
    """Whether a split is read from data.train or from data.eval."""
    return "eval" if split == "eval" and config.eval is not None else "train"


def _prepared(part: Part, tokenizer: Any, eos_ids: list[int]) -> Path:
    """The folder of a part that is stored; built first where it is not there, or is not what was stored."""
    root = cache_root(part.config)
    key = f"{cache_key(part, tokenizer, eos_ids)}-{_report_key()}"
    target = root / key
    if target.is_dir() and not _removed_if_damaged(target):
        return target
    with durable.writing(root, ELSEWHERE):
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=root, prefix=f".{key}-"))
    try:
        with durable.writing(root, ELSEWHERE):
            table, report = build(part, tokenizer, eos_ids, work)
            table.save_to_disk(str(work / "examples"))
            for name in (IMAGES_FILE, STATES_FILE):
                if (work / name).exists():
                    (work / name).rename(work / "examples" / name)
            report.measure(_lengths(datasets.load_from_disk(str(work / "examples"))))
            (work / "examples" / DATA_REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
            seal(work / "examples")
            publish_unless_there(work / "examples", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _removed_if_damaged(folder: Path) -> bool:
    """Whether a stored part was not as it was written, and has been removed. Raises UserError."""
    found = folder.stat().st_ino
    fault = damage(folder)
    if fault is not None:
        print(f"{folder}: the stored data is damaged ({fault}); it is made again", file=sys.stderr)
    elif (path := changed_image(folder)) is not None:
        print(f"{path}: the image has changed; {folder} is made again", file=sys.stderr)
    else:
        return False
    with durable.writing(folder, f"Delete the folder. {ELSEWHERE}"), suppress(FileNotFoundError):
        if folder.stat().st_ino == found:  # else another process has made it again
            aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-damaged-"))
            folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    return not folder.is_dir()


def _open(folder: Path) -> tuple[datasets.Dataset, DataReport]:
    """A stored part and the report on it."""
    try:
        report = DataReport.from_json((folder / DATA_REPORT_FILE).read_text(encoding="utf-8"))
        return datasets.load_from_disk(str(folder)), report
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{folder}: the stored data is damaged ({error}); delete the folder and run again"
        ) from error


def _report_key() -> str:
    """8 hex digits that change with the names of the report's counts, and so between versions."""
    names = sorted(field.name for field in fields(DataReport))
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:8]


def _lengths(table: datasets.Dataset) -> ExampleLengths:
    kind = kind_of(table.column_names)
    prompt_P, *sides = (_sizes(table.data.column(name)) for name in kind.ids)
    if kind.many:
        answers_S = _sizes(pyarrow.compute.list_flatten(table.data.column(kind.ids[1])))
        scored_S = _scored(table, kind.scored[0], answers_S, sides[0])
        return ExampleLengths(kind, prompt_P, answers_S, sides[0], scored_S)
    counts_P = np.full(len(prompt_P), len(sides))
    scored = [_scored(table, *each) for each in zip(kind.scored, sides)]
    answers_S, scored_S = (np.stack(each, axis=1).reshape(-1) for each in (sides, scored))
    return ExampleLengths(kind, prompt_P, answers_S, counts_P, scored_S)


def _scored(
    table: datasets.Dataset, name: str, sizes_S: np.ndarray, counts_P: np.ndarray | None = None
) -> np.ndarray:
    """Scored tokens of every answer of a column of flags, which is null where all are scored."""
    if name not in table.column_names:
        return sizes_S
    column = table.data.column(name).drop_null()
    told_S = table.data.column(name).is_valid().to_numpy()
    if counts_P is not None:
        column, told_S = pyarrow.compute.list_flatten(column), np.repeat(told_S, counts_P)
    flags_T = pyarrow.compute.list_flatten(column).to_numpy().astype(np.int64)
    ends_S = sizes_S[told_S].cumsum()
    scored_S = sizes_S.copy()
    scored_S[told_S] = np.add.reduceat(flags_T, ends_S - sizes_S[told_S])
    return scored_S


def _sizes(column: pyarrow.ChunkedArray) -> np.ndarray:
    """Length of every list of a column, int64."""
    return pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
