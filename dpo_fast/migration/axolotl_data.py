"""Axolotl's data sets: what each `type` is as data.format, data.columns and a chat template."""

from __future__ import annotations

import os
from typing import Any

from dpo_fast.migration.counted import put_held_out
from dpo_fast.migration.draft import Draft
from dpo_fast.migration.sources import put_sources, short

# The part of a type behind its template -> our form. None: found by the columns.
FORMS: dict[str, str | None] = {
    "intel": "orca",
    "icr": "orca",
    "argilla": None,
    "argilla_chat": None,
    "ultra": None,
    "default": None,
    "nectar": "nectar",
    "prompt_pairs": "alpaca",
}
TEMPLATES = ("chatml", "llama3", "zephyr", "passthrough")  # that a type writes by itself
FIELDS = {  # of a type that is written out, or of chat_template.default
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
    "field_messages": "messages",
    "field_tools": "tools",
}
PLAIN = {  # formats that write a field as it stands
    "prompt_format": "{prompt}",
    "chosen_format": "{chosen}",
    "rejected_format": "{rejected}",
    "completion_format": "{completion}",
}
KNOWN = (
    "path",
    "name",
    "split",
    "type",
    "data_files",
    "ds_type",
    "revision",
    "roles",
    "trust_remote_code",
    "message_property_mappings",
    *FIELDS,
)
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
BUILT_IN = ("json", "csv", "parquet", "arrow", "text")


def put_data(draft: Draft, method: str) -> None:
    """The sources of training and evaluation."""
    if draft.has("test_datasets"):
        held = [
            _source(draft, each, "test_datasets", method) for each in _list(draft, "test_datasets")
        ]
        draft.put("data.eval", short(held), "test_datasets")
    train = [_source(draft, each, "datasets", method) for each in _list(draft, "datasets")]
    put_sources(draft, train, "datasets")
    put_held_out(draft, "val_set_size")
    _template(draft)


def _template(draft: Draft) -> None:
    jinja = draft["chat_template_jinja"]
    if jinja and "{" not in str(jinja):
        draft.put("data.chat_template", str(jinja), "chat_template_jinja")
    elif jinja:
        draft.lose(
            "chat_template_jinja", "write it into a file, and name that in data.chat_template"
        )
    name = str(draft["chat_template"] or "tokenizer_default")
    if name in ("tokenizer_default", "jinja"):
        if draft.has("chat_template"):
            draft.spare("chat_template", "the tokenizer's own, or the file")
    else:
        draft.lose(
            "chat_template",
            "templates of Axolotl's own are not here: the tokenizer's stands in its place, "
            "or a Jinja file in "
            "data.chat_template. `dpo-fast data` shows what is written",
        )


def _list(draft: Draft, option: str) -> list[dict]:
    found = draft[option]
    wrong = not isinstance(found, list) or not all(
        isinstance(e, dict) and e.get("path") for e in found
    )
    if wrong:
        raise draft.fault(option, "expected a list of mappings with a path each")
    return found


def _source(draft: Draft, about: dict, option: str, method: str) -> dict[str, Any]:
    for key in sorted(set(about) - set(KNOWN)):
        if about[key] is not None:
            draft.lose(
                f"{option}.{key}",
                "the import does not know it; rows are read as docs/FORMATS.md says",
            )
    made: dict[str, Any] = {"path": _path(draft, about, option)}
    kind = about.get("type")
    fields = about | (kind if isinstance(kind, dict) else {})
    if isinstance(kind, dict):
        _written_out(draft, kind, option, made)
    elif kind:
        _by_type(draft, str(kind), option, made)
    columns = {ours: fields[theirs] for theirs, ours in FIELDS.items() if fields.get(theirs)}
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    if columns:
        made["columns"] = columns
    _messages(draft, about, option)
    return made


def _path(draft: Draft, about: dict, option: str) -> str:
    files = about.get("data_files")
    files = files if isinstance(files, list) else [files] if files else []
    if files and about["path"] in BUILT_IN and len(files) == 1:
        return str(files[0])
    if files:
        draft.lose(f"{option}.data_files", "name the files themselves in data.train")
    path = str(about["path"])
    local = path.startswith((".", "/", "~")) or about.get("ds_type") is not None
    if local or path.endswith(SUFFIXES) or os.path.exists(path):
        return path
    revision = f"@{about['revision']}" if about.get("revision") else ""
    config = f"{about['name']}/" if about.get("name") else ""
    return f"{about['path']}{revision}:{config}{about.get('split') or 'train'}"


def _by_type(draft: Draft, kind: str, option: str, made: dict[str, Any]) -> None:
    template, _, form = kind.rpartition(".")
    form = form or "default"
    if not template and kind in (*TEMPLATES, "chat_template"):
        template, form = kind, "default"
    if form not in FORMS:
        draft.lose(
            f"{option}.type={kind}", "a type that the import does not know: see docs/FORMATS.md"
        )
        return
    if FORMS[form]:
        made["format"] = FORMS[form]
    if form == "nectar":
        draft.put("data.group_pairs", "best_worst", option)
        draft.note(
            "nectar: Axolotl draws two of the answers; here a pair is the best and the worst."
        )
    if template in TEMPLATES:
        draft.lose(
            f"{option}.type={kind}",
            f"it writes {template} by itself, and here the tokenizer's chat template does; "
            f"data.chat_template "
            "names another one. The columns are read",
        )


def _written_out(draft: Draft, kind: dict, option: str, made: dict[str, Any]) -> None:
    for name, value in kind.items():
        if name in PLAIN and str(value) != PLAIN[name]:
            draft.lose(
                f"{option}.type.{name}",
                f"{value!r}: write it into the rows, or use a chat template",
            )
        elif name not in (*FIELDS, *PLAIN):
            draft.lose(f"{option}.type.{name}", "the import does not know it")


def _messages(draft: Draft, about: dict, option: str) -> None:
    mapping = dict(about.get("message_property_mappings") or {})
    usual = {"role": ("role", "from"), "content": ("content", "value")}
    for name, value in mapping.items():
        if value not in usual.get(name, ()):
            draft.lose(
                f"{option}.message_property_mappings.{name}",
                f"rename {value!r} in the messages to {name}",
            )
    known = {"user", "human", "assistant", "gpt", "system", "tool"}
    for target, sources in dict(about.get("roles") or {}).items():
        if odd := [each for each in sources if each not in known]:
            draft.lose(
                f"{option}.roles.{target}",
                f"{', '.join(map(str, odd))}: rename these roles in the messages",
            )
