"""TRL's data: a name and its splits, a mixture, or the alignment handbook's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_fast.migration.arguments import evaluates
from dpo_fast.migration.counted import put_held_out
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.option import listed

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")


def put_data(draft: Draft) -> None:
    _mixture(draft)
    if sources := draft["datasets"]:
        draft.put("data.train", [_source(draft, each) for each in sources], "datasets")
        if draft.has("dataset_name"):
            draft.spare("dataset_name", "datasets stands in its place, there too")
    elif draft.has("dataset_mixer"):
        _mixer(draft)
        return
    elif draft.has("dataset_name"):
        draft.put(
            "data.train",
            _named(draft, draft["dataset_train_split"]),
            *("dataset_name", "dataset_config", "dataset_train_split"),
        )
    else:
        raise draft.missing("data", "dataset_name")
    if evaluates(draft) and draft.has("dataset_name") and not sources:
        names = ("dataset_test_split", "dataset_name", "dataset_config")
        draft.put("data.eval", _named(draft, draft["dataset_test_split"]), *names)
    elif draft.has("test_split_size"):
        put_held_out(draft, "test_split_size")


def _mixture(draft: Draft) -> None:
    """The alignment handbook's mapping of sources, as TRL's own options."""
    mixture = draft["dataset_mixture"] if "dataset_mixture" in draft.options else None
    if mixture is None:
        return
    sources = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(sources, list) or not all(isinstance(each, dict) for each in sources):
        raise draft.fault("dataset_mixture", "expected a list `datasets` of mappings with an id")
    made = []
    for source in sources:
        names = {"id": "path", "config": "name", "weight": "fraction"}
        made.append({names.get(key, key): value for key, value in source.items()})
    if len(made) == 1:  # its weight is a share of its rows
        share = made[0].pop("fraction", None)
        if share not in (None, 1, 1.0):
            draft.lose("dataset_mixture.weight", f"{share:g} of the rows: set `rows` of its source")
    draft.went("dataset_mixture", "data.train")
    draft.given["datasets"] = made
    if mixture.get("test_split_size") is not None:
        draft.given.setdefault("test_split_size", mixture["test_split_size"])


def _mixer(draft: Draft) -> None:
    """The alignment handbook's data: names with the share of their rows that is taken, and "
    "splits for all."""
    mixer, names = draft["dataset_mixer"], ("dataset_mixer", "dataset_splits", "dataset_configs")
    if not isinstance(mixer, dict):
        raise draft.fault("dataset_mixer", "expected names of data sets, with a share each")
    splits = [str(each) for each in listed(draft["dataset_splits"])] or ["train", "test"]
    configs = listed(draft["dataset_configs"]) or [None] * len(mixer)
    if len(configs) != len(mixer):
        raise draft.fault("dataset_configs", f"{len(mixer)} data sets need as many")
    for name, share in mixer.items():
        if float(share) != 1:
            draft.lose(
                f"dataset_mixer.{name}", f"{share:g} of its rows: set `rows` (data.train[].rows)"
            )
    for word, key in (("train", "data.train"), ("test", "data.eval")):
        if key == "data.eval" and not evaluates(draft):
            continue
        made = [
            f"{name}:{f'{config}/' if config else ''}{split}"
            for name, config in zip(mixer, configs, strict=True)
            for split in splits
            if word in split
        ]
        if made:
            draft.put(key, made if len(made) > 1 else made[0], *names)
    if "data.train" not in draft.keys:
        raise draft.fault("dataset_splits", "none of them has train in its name")


def _named(draft: Draft, split: str) -> str:
    config = draft["dataset_config"]
    path = Path(draft["dataset_name"])
    if path.is_file() or path.suffix.lower() in SUFFIXES:
        return str(draft["dataset_name"])
    return f"{draft['dataset_name']}:{f'{config}/' if config else ''}{split}"


def _source(draft: Draft, source: dict) -> dict:
    """An entry of datasets, TRL's DatasetConfig."""
    if not isinstance(source, dict) or not source.get("path"):
        raise draft.fault("datasets", f"{source!r} has no path")
    files = source.get("data_files")
    known = ("path", "name", "split", "fraction", "data_files", "data_dir", "columns")
    for key in set(source) - set(known):
        draft.lose(f"datasets.{key}", "no key of TRL's DatasetConfig")
    if isinstance(files, str) and source["path"] in ("json", "csv", "parquet", "arrow", "text"):
        made: dict[str, Any] = {"path": files}
    else:
        config = f"{source['name']}/" if source.get("name") else ""
        made = {"path": f"{source['path']}:{config}{source.get('split', 'train')}"}
        for key in ("data_files", "data_dir"):
            if source.get(key):
                draft.lose(f"datasets.{key}", "name the files themselves in data.train")
    if source.get("columns"):
        draft.spare(
            "datasets.columns",
            "columns of words that nothing uses are told; see data.ignore_columns",
        )
    if source.get("fraction") is not None:
        made["weight"] = float(source["fraction"])
    return made
