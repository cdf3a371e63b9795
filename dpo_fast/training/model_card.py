"""README.md of an exported model: the card that the hub shows, written beside every model.

It says what was done: data, loss, reference, metrics, versions, how to load it, whom to cite. Folders of
this machine and secrets are not in it. Metrics are those of metrics.jsonl, hashes those of run.json; what
a run has not written is left out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.losses.papers import bibtex, numbers
from dpo_fast.models.checkpoint import base_of
from dpo_fast.models.hub import split_revision
from dpo_fast.models.load import local_folder
from dpo_fast.training.config import RunConfig
from dpo_fast.training.public import flat, public

CARD = "README.md"
PICTURES = "<!-- curves -->"  # where the report puts pictures
END_OF_PICTURES = "<!-- end of curves -->"
ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?\Z")
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst")
KEPT = ("license", "license_name", "license_link", "language")  # of the base model's card
SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy of rewards",
    "rewards/margins": "margin of rewards",
    "rewards/chosen": "reward of chosen answers",
    "rewards/rejected": "reward of rejected answers",
    "logps/chosen": "log-prob of chosen answers",
    "logps/rejected": "log-prob of rejected answers",
}
OF_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "optim", "global_batch_size", "num_train_epochs"),
    *("max_steps", "weight_decay", "max_grad_norm", "seed"),
)


def write_card(
    config: RunConfig, folder: Path, step: int | None = None, adapter: bool = False
) -> None:
    """Write the card of a model into its folder.

    step: whose model it is; None: the last that the run has logged.
    adapter: the folder holds an adapter, and not a whole model.

    Raises:
        OSError: it cannot be written.
    """
    durable.write_file(folder / CARD, card(config, step, adapter))


def card(config: RunConfig, step: int | None, adapter: bool) -> str:
    """The text of a card."""
    run = Path(config.train.output_dir)
    facts, report = _json(run / "run.json"), _json(run / "data-report.json")
    if step is None and config.train.load_best_model_at_end:
        step = _json(run / "best.json").get("step")
    lines = [line for line in _lines(run / "metrics.jsonl") if step is None or line["step"] <= step]
    meta = metadata(config, adapter)
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n",
        f"# {config.run_name}\n",
        _summary(config, lines, adapter),
        _loading(config, meta, adapter),
        _method(config),
        _data(config, facts, report),
        _reference(config, facts),
        _metrics(lines),
        f"{PICTURES}\n{END_OF_PICTURES}\n",
        _options(config),
        _versions(facts),
        _citation(config),
    ]
    return "\n".join(part for part in parts if part)


def metadata(config: RunConfig, adapter: bool) -> dict[str, Any]:
    """The front matter, as the hub reads it."""
    base, known = base_model(config.model.path), _base_metadata(config)
    lora = config.model.has_adapters
    methods = ["dpo_fast", "preference-optimization", *_losses(config, tags=True)]
    kind = "image-text-to-text" if config.model.images else "text-generation"
    datasets = sorted({name for _, name in _sources(config) if _is_hub(name)})
    if base is None and not adapter:  # a folder's own base: a whole model comes from it, too
        base = known.get("base_model")
    meta = {
        "library_name": "peft" if adapter else "transformers",
        "base_model": base,
        "base_model_relation": "adapter" if adapter else "finetune",
        "model_name": config.run_name,
        "pipeline_tag": kind,
        "tags": list(dict.fromkeys([*methods, *(["lora"] if lora else [])])),
        "datasets": datasets,
        **{name: known[name] for name in KEPT if name in known},
    }
    if not meta["base_model"]:
        meta.pop("base_model_relation")
    return {name: value for name, value in meta.items() if value}


def base_model(path: str) -> str | None:
    """The hub id of the model that was trained; None of a folder."""
    with contextlib.suppress(UserError, OSError, ValueError):
        path = base_of(path)
    name = split_revision(path)[0]
    return name if _is_hub(name) else None


def _is_hub(name: str) -> bool:
    file = name.endswith(FILES) or Path(name).exists()
    return ID.match(name) is not None and "/" in name and not file


def _base_metadata(config: RunConfig) -> dict[str, Any]:
    """What of the front matter of the base model's card holds for ours, where its folder has one.

    Only what the hub takes: YAML here reads the language `no` as false; other trainers write folders as
    the base; and a license's link to a file of its repository leads nowhere from ours.
    """
    try:
        text = (Path(local_folder(config.model.path)) / CARD).read_text(encoding="utf-8")
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.S)
        values = yaml.safe_load(found[1]) if found else None
    except (UserError, OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(values, dict):
        return {}
    known = {name: _texts(values.get(name)) for name in (*KEPT, "base_model")}
    known["base_model"] = _texts(known["base_model"], ID)
    link, base = known["license_link"], base_model(config.model.path)
    if isinstance(link, str) and "://" not in link:
        known["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}" if base else None
    return {name: value for name, value in known.items() if value}


def _texts(value: Any, pattern: re.Pattern[str] | None = None) -> str | list[str] | None:
    """A text, or the texts of a list, that match the pattern; None if there is none."""
    values = ["no" if each is False else each for each in _listed(value)]
    kept = [each for each in values if isinstance(each, str)]
    kept = [each for each in kept if pattern is None or pattern.match(each)]
    return (kept if isinstance(value, list) else kept[0]) if kept else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shown_name(path: str) -> str:
    """A hub id, or the last part of a folder's or file's name: where it lies is nobody's business."""
    name = public(path)
    return name if _is_hub(split_revision(name)[0]) else name.rstrip("/").rpartition("/")[2]


def _losses(config: RunConfig, tags: bool = False) -> list[str]:
    """The losses by name. That of one in a file has no folder, in a tag no file either."""
    found = (name.rpartition(":") for name in config.loss.names)
    files = ((file.rpartition("/")[2], colon, own) for file, colon, own in found)
    return [own if tags else file + colon + own for file, colon, own in files]


def _sources(config: RunConfig) -> Iterator[tuple[str, str]]:
    """The split and the name of each source of data."""
    for split in ("train", "eval"):
        given = getattr(config.data, split)
        for each in given if isinstance(given, list) else [given]:
            path = each if isinstance(each, str) else getattr(each, "path", None)
            if isinstance(each, dict):
                path = each.get("path")
            if isinstance(path, str):
                yield split, path.partition(":")[0] if "://" not in path else path


def _summary(config: RunConfig, lines: list[dict[str, Any]], adapter: bool) -> str:
    base, what = (
        _shown_name(config.model.told),
        "An adapter of" if adapter else "A model trained from",
    )
    link = f"[{base}](https://huggingface.co/{split_revision(base)[0]})"
    told = link if base_model(config.model.path) == split_revision(base)[0] else f"`{base}`"
    losses = " + ".join(f"`{name}`" for name in _losses(config))
    steps = f", {lines[-1]['step']:,.0f} steps" if lines else ""
    return (
        f"{what} {told}: preference optimisation with the loss {losses}{steps}. Made by dpo_fast.\n"
    )


def _loading(config: RunConfig, meta: dict[str, Any], adapter: bool) -> str:
    auto = "AutoModelForImageTextToText" if config.model.images else "AutoModelForCausalLM"
    code = f"from transformers import {auto}, AutoTokenizer\n\n"
    code += 'path = "PATH"  # this folder, or its hub id\n'
    if adapter:
        base = meta.get("base_model", "BASE")
        code = "from peft import PeftModel\n" + code
        code += "" if "base_model" in meta else f"# BASE: {_shown_name(config.model.told)}\n"
        code += f'model = {auto}.from_pretrained("{base}", dtype="auto")\n'
        code += "model = PeftModel.from_pretrained(model, path)\n"
    else:
        code += f'model = {auto}.from_pretrained(path, dtype="auto")\n'
    code += "tokenizer = AutoTokenizer.from_pretrained(path)\n"
    return f"## How to load it\n\n```python\n{code}```\n"


def _method(config: RunConfig) -> str:
    loss, rows = config.loss, []
    weights = loss.weights or [1.0] * len(loss.names)
    for name, spec, weight in zip(_losses(config), loss.objective.specs, weights):
        formula = spec.formula.replace(spec.name, name)
        rows.append(f"| `{name}` | {weight:g} | {_cell(formula)} | {_cell(spec.source)} |")
    used = {name for spec in loss.objective.specs for name in spec.options}
    options = {
        name: value
        for name, value in loss.model_dump(mode="json").items()
        if name in used and value is not None
    }
    told = ", ".join(f"{name} = {value}" for name, value in options.items())
    head = "| loss | weight | formula | source |\n|---|---|---|---|\n"
    return "## Loss\n\n" + head + "\n".join(rows) + f"\n\nOptions: {told or 'none'}.\n"


def _data(config: RunConfig, facts: dict[str, Any], report: dict[str, Any]) -> str:
    known = (facts.get("made_of") or {}).get("data") or {}
    rows = []
    for split in dict.fromkeys(name for name, _ in _sources(config)):
        names = ", ".join(
            f"`{_shown_name(name)}`" for key, name in _sources(config) if key == split
        )
        rows.append([split, names, known.get(split, {})])
    if "eval" in known and all(row[0] != "eval" for row in rows):
        rows.append(["eval", "held out of train", known["eval"]])
    told = [
        f"| {split} | {names} | {_number(found.get('rows'))} | {_hash(found.get('sha256'))} |"
        for split, names, found in rows
    ]
    text = "## Data\n\n| split | source | rows | sha256 of the rows as trained on |\n|---|---|---|---|\n"
    read, kept = report.get("rows_read"), report.get("examples_kept")
    more = ""
    if isinstance(read, int) and isinstance(kept, int):
        more = f"\nOf {read:,} rows read, {kept:,} were kept ({report.get('kind', 'examples')}).\n"
    return text + "\n".join(told) + "\n" + more


def _reference(config: RunConfig, facts: dict[str, Any]) -> str:
    weights = (facts.get("made_of") or {}).get("weights") or {}
    told = [f"- model before training: {_hash(weights.get('model.path'))}"] if weights else []
    if config.loss.objective.needs_reference:
        path = config.reference.path or config.model.told
        found = weights.get("reference.path") or (
            weights.get("model.path") if config.reference.path is None else None
        )
        told.append(
            f"- reference: `{_shown_name(path)}`, by `{config.reference_provider}`: {_hash(found)}"
        )
    else:
        told.append("- reference: none, the loss compares with none")
    if "reference.old_path" in weights:
        told.append(f"- model that wrote the completions: {_hash(weights['reference.old_path'])}")
    return "## Reference\n\nHashes are of the weights.\n\n" + "\n".join(told) + "\n"


def _metrics(lines: list[dict[str, Any]]) -> str:
    """First and last values of what was measured, of the evaluation and of training."""
    rows = []
    for prefix, where in (("eval_", "evaluation"), ("", "training")):
        for name, words in SHOWN.items():
            values = [(line["step"], line.get(prefix + name)) for line in lines]
            values = [(step, value) for step, value in values if isinstance(value, (int, float))]
            if values:
                (first, before), (last, after) = values[0], values[-1]
                rows.append(
                    f"| {where} | {words} | {_decimal(before)} ({first}) | {_decimal(after)} ({last}) |"
                )
    if not rows:
        return ""
    head = "| of | metric | first (step) | last (step) |\n|---|---|---|---|\n"
    return "## Metrics\n\n" + head + "\n".join(rows) + "\n"


def _options(config: RunConfig) -> str:
    tree = config.resolved()
    train = {f"train.{name}": tree["train"].get(name) for name in OF_TRAINING}
    data = {f"data.{name}": tree["data"].get(name) for name in ("max_length",)}
    model = {f"model.{name}": tree["model"].get(name) for name in ("dtype",)}
    lora = dict(flat({"model": {"lora": tree["model"].get("lora") or {}}}))
    found = {**train, **data, **model, **{k: v for k, v in lora.items() if v not in ({}, None)}}
    rows = [f"| `{k}` | {_cell(str(public(v, k)))} |" for k, v in found.items() if v is not None]
    return "## Options\n\n| option | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _versions(facts: dict[str, Any]) -> str:
    starts = facts.get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else {}
    versions = last.get("versions") if isinstance(last, dict) else None
    if not isinstance(versions, dict):
        return ""
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"{last.get('ranks', '?')} x {last.get('device', '?')}"
    return f"## Versions\n\n{told}. Trained on {where}.\n"


def _citation(config: RunConfig) -> str:
    entries = [bibtex(number) for number in numbers(config.loss.objective.specs)]
    if not entries:
        return ""
    return "## Citation\n\nThe loss is from:\n\n```bibtex\n" + "\n\n".join(entries) + "\n```\n"


def _decimal(value: float) -> str:
    return f"{round(value, 4) + 0.0:.4f}"  # 0 added: a reward of -1e-9 is no -0.0000


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _hash(value: Any) -> str:
    return f"`{value}`" if value else "not recorded"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _json(file: Path) -> dict[str, Any]:
    """A file of the run; {} where there is none that can be read: the card does without."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), (int, float)):
            found.append(values)
    return found
