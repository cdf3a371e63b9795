"""LLaMA-Factory's data: names in dataset_info.json, their forms, columns and mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_fast.errors import UserError
from dpo_fast.migration.counted import put_held_out
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.files import beside, read_mapping
from dpo_fast.migration.option import flag, listed
from dpo_fast.migration.sources import put_sources, short

INFO = "dataset_info.json"


# Columns of dataset_info.json where none are named, by the formatting.
COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}


ROLES = {  # tags whose values we know by themselves
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}


def put_data(draft: Draft) -> None:
    if not draft.has("dataset"):
        raise draft.missing("data", "dataset")
    train = _sources(draft, "dataset")
    _weights(draft, train)
    put_sources(draft, train, "dataset", "dataset_dir")
    if draft.has("eval_dataset"):
        held = _sources(draft, "eval_dataset")
        draft.put("data.eval", short(held), "eval_dataset")
    put_held_out(draft, "val_size")
    if flag(draft["streaming"]):
        draft.put("data.streaming", True, "streaming")
        draft.put("data.stream_buffer", int(draft["buffer_size"]), "buffer_size")
    draft.put("data.max_length", int(draft["cutoff_len"]), "cutoff_len")
    pixels = {f"{end}_pixels": f"image_{end}_pixels" for end in ("min", "max")}
    bounds = {ours: int(draft[name]) for ours, name in pixels.items() if draft.has(name)}
    if bounds:
        draft.put("data.images_kwargs", bounds, *pixels.values())
    if flag(draft["mask_history"]):
        draft.put("data.scored", "last", "mask_history")
    if draft.has("template"):
        draft.lose(
            "template",
            "LLaMA-Factory writes chats by templates of its own, and here the tokenizer's "
            "chat template does. "
            ""
            "For the model's own template they are alike: compare with `dpo-fast data`; for "
            "another one name "
            "a Jinja file in data.chat_template",
        )


def _sources(draft: Draft, option: str) -> list[dict[str, Any]]:
    names = [str(each) for each in listed(draft[option])]
    folder = str(draft["dataset_dir"])
    if folder == "ONLINE":
        return [{"path": f"{name}:train"} for name in names]
    if folder.startswith("REMOTE:"):
        return _unknown(draft, option, names, f"{INFO} is on the hub ({folder})")
    try:
        file = beside(str(Path(folder) / INFO), Path(draft.place), INFO, "dataset_dir")
    except UserError:
        return _unknown(
            draft, option, names, f"there is no {folder}/{INFO} here or above {draft.place}"
        )
    known = read_mapping(file)
    if missing := [name for name in names if name not in known]:
        raise draft.fault(option, f"{', '.join(missing)} is not in {file}")
    return [_source(draft, name, known[name], file) for name in names]


def _unknown(draft: Draft, option: str, names: list[str], why: str) -> list[dict[str, Any]]:
    """Sources by their names alone, which no run can read: that is told."""
    draft.lose(
        option,
        f"{why}, so that nothing says what {', '.join(names)} stands for: name files or hub ids in "
        "data.train, or import where it is",
    )
    return [{"path": name} for name in names]


def _source(draft: Draft, name: str, about: Any, file: Path) -> dict[str, Any]:
    """An entry of dataset_info.json as an entry of data.train."""
    place = f"{INFO}: {name}"
    if not isinstance(about, dict):
        raise UserError(f"{file}: {name}: expected a mapping")
    made: dict[str, Any] = {"path": _path(about, file, name)}
    formatting = about.get("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise UserError(f"{file}: {name}: formatting={formatting}: expected alpaca or sharegpt")
    made["format"] = formatting
    columns = {k: v for k, v in dict(about.get("columns") or {}).items() if v}
    columns = {k: v for k, v in columns.items() if v != k and COLUMNS[formatting].get(k) != v}
    if columns:
        made["columns"] = columns
    for tag, value in dict(about.get("tags") or {}).items():
        if value not in ROLES.get(tag, ()):
            draft.lose(
                f"{place}: {tag}",
                f"{value!r} is no name that messages go by: rename it in the rows",
            )
    if about.get("num_samples") or draft["max_samples"]:
        _rows(draft, about.get("num_samples"), made)
    known = (
        "hf_hub_url",
        "ms_hub_url",
        "script_url",
        "file_name",
        "cloud_file_name",
        "formatting",
        "ranking",
        "subset",
        "split",
        "folder",
        "num_samples",
        "columns",
        "tags",
        "revision",
    )
    for key in set(about) - set(known):
        draft.lose(f"{place}: {key}", f"no key of {INFO} that the import knows")
    if about.get("folder"):
        draft.lose(f"{place}: folder", "name the files of that folder in data.train")
    return made


def _path(about: dict[str, Any], file: Path, name: str) -> str:
    if about.get("hf_hub_url"):
        config = f"{about['subset']}/" if about.get("subset") else ""
        revision = f"@{about['revision']}" if about.get("revision") else ""
        return f"{about['hf_hub_url']}{revision}:{config}{about.get('split') or 'train'}"
    if about.get("file_name"):
        return str(file.parent / about["file_name"])
    raise UserError(
        f"{file}: {name}: neither hf_hub_url nor file_name; ModelScope and loading scripts are not read: "
        "download the rows, and name their file"
    )


def _rows(draft: Draft, own: Any, made: dict[str, Any]) -> None:
    if own:
        made["rows"] = int(own)
        draft.note(
            "LLaMA-Factory takes num_samples rows with repeats where there are fewer; here "
            "fewer are an error."
        )
    elif draft.has("max_samples"):
        made["_most"] = int(draft["max_samples"])


def _weights(draft: Draft, sources: list[dict[str, Any]]) -> None:
    most = [each.pop("_most") for each in sources if "_most" in each]
    if most:
        _most_rows(draft, sources, most[0])
    strategy = str(draft["mix_strategy"])
    if strategy == "concat":
        return
    probabilities = [float(each) for each in listed(draft["interleave_probs"])]
    shares = probabilities or [1.0] * len(sources)
    if len(shares) != len(sources):
        raise draft.fault("interleave_probs", f"{len(sources)} sources need as many")
    for source, share in zip(sources, shares, strict=True):
        source["weight"] = share
    names = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}
    if strategy not in names:
        raise draft.fault("mix_strategy", f"choose from concat, {', '.join(names)}")
    draft.put("data.stopping_strategy", names[strategy], "mix_strategy", "interleave_probs")


def _most_rows(draft: Draft, sources: list[dict[str, Any]], most: int) -> None:
    """The first so many rows of every source, which data.max_rows are where there is one source."""
    if len(sources) == 1 and not draft.has("eval_dataset"):
        draft.put("data.max_rows", most, "max_samples")
        return
    draft.lose(
        "max_samples",
        f"at most {most:,} rows of every source: set `rows` in those that have more (data.train[].rows); "
        "fewer than that are an error here, so it is not written",
    )
