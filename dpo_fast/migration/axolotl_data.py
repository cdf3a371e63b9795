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
# Types of SFT -> our form. None: found by the columns.
DEMONSTRATIONS: dict[str, str | None] = {
    "chat_template": None,
    "chat_template.default": None,
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "alpaca": "alpaca",
    "alpaca_chat": "alpaca",
    "alpaca_instruct": "alpaca",
    "alpaca_w_system": "alpaca",
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
ASKED = {  # of a type of SFT that is written out
    "field_instruction": "prompt",
    "field_input": "query",
    "field_output": "response",
    "field_system": "system",
}
USUAL = {"prompt": "instruction", "query": "input", "response": "output"}
WRITTEN = "{!r}: write it into the rows; the tokenizer's chat template stands in its place"
OF_SOURCES = {  # further keys of a source that lose something, and why
    "chat_template": "one template holds for all rows: data.chat_template",
    "chat_template_jinja": "one template holds for all rows: data.chat_template",
    "conversation": "the tokenizer's chat template stands in its place",
    "shards": "set `rows` (data.train[].rows)",
    "shards_idx": "set `rows` (data.train[].rows)",
    "drop_system_message": "take the system messages out of the rows",
    "split_thinking": "the chat template decides about thinking: data.chat_template_kwargs",
    "field_thinking": "name it reasoning_content in the messages",
    "template_thinking_key": "name it reasoning_content in the messages",
    "message_field_training_detail": "a message is scored whole, or not at all (weight: 0)",
    "input_transform": "transform the rows before",
    "input_format": "transform the rows before",
    "logprobs_field": "there is no distillation",
    "temperature": "there is no distillation",
}
SCORED = ("weight", "loss", "train", "training")  # names of a message's flag that rows may have
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
    *("message_field_role", "message_field_content", "message_field_training", "preprocess_shards"),
    *("roles_to_train", "train_on_eos", "train_on_eot", "field", "field_human", "field_model"),
    *("text_column", "skip", "seed"),
    *FIELDS,
    *ASKED,
)
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
BUILT_IN = ("json", "csv", "parquet", "arrow", "text")


OWN = ("tokenizer_default", "jinja")  # templates that are none of Axolotl's
OWN_OF_SOURCE = [("chat_template", each) for each in OWN]


def put_data(draft: Draft, method: str) -> None:
    """The sources of training and evaluation."""
    if draft.has("pretraining_dataset") and method == "sft":
        _texts(draft)
        _template(draft)
        return
    if draft.has("test_datasets"):
        held = [
            _source(draft, each, "test_datasets", method) for each in _list(draft, "test_datasets")
        ]
        draft.put("data.eval", short(held), "test_datasets")
    made = [_source(draft, each, "datasets", method) for each in _list(draft, "datasets")]
    train = [each for index, each in enumerate(made) if each not in made[:index]]
    if len(train) < len(made):
        draft.lose("datasets", "a source that stands there twice comes once: give it a weight")
    put_sources(draft, train, "datasets")
    put_held_out(draft, "val_set_size")
    _template(draft)


def _texts(draft: Draft) -> None:
    """Rows of text that are read while training."""
    name = "pretraining_dataset"
    found = draft[name] if isinstance(draft[name], list) else [draft[name]]
    found = [{"path": each} if isinstance(each, str) else each for each in found]
    draft.given[name] = found
    made = [
        _source(draft, {"type": "pretrain", **each}, name, "sft") for each in _list(draft, name)
    ]
    put_sources(draft, made, name)
    draft.put("data.streaming", True, name)
    for each in found:
        if each.get("skip"):
            draft.lose(f"{name}.skip", "a stream begins with its first row")
    if draft.has("datasets"):
        draft.lose("datasets", f"{name} stands in its place")


def _template(draft: Draft) -> None:
    jinja = draft["chat_template_jinja"]
    if jinja and "{" not in str(jinja):
        draft.put("data.chat_template", str(jinja), "chat_template_jinja")
    elif jinja:
        draft.lose(
            "chat_template_jinja", "write it into a file, and name that in data.chat_template"
        )
    name = str(draft["chat_template"] or "tokenizer_default")
    if name in OWN:
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
        if about[key] is not None and (key, about[key]) not in OWN_OF_SOURCE:
            why = "the import does not know it; rows are read as docs/FORMATS.md says"
            draft.lose(f"{option}.{key}", OF_SOURCES.get(key, why))
    made: dict[str, Any] = {"path": _path(draft, about, option)}
    kind = about.get("type")
    fields = about | (kind if isinstance(kind, dict) else {})
    if method == "sft":
        return _demonstration(draft, about, option, made)
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


def _demonstration(draft: Draft, about: dict, option: str, made: dict[str, Any]) -> dict[str, Any]:
    """A source of SFT."""
    kind = about.get("type")
    columns: dict[str, Any] = {}
    if isinstance(kind, dict):
        made["format"] = "alpaca"
        columns = {ours: kind[theirs] for theirs, ours in ASKED.items() if kind.get(theirs)}
        for name in sorted(set(kind) - set(ASKED)):
            if kind[name]:
                draft.lose(f"{option}.type.{name}", WRITTEN.format(kind[name]))
    elif kind:
        made |= _form(draft, str(kind), option)
    if made.get("format") == "text":
        columns["text"] = about.get("field") or about.get("text_column")
    else:
        columns |= {o: about[t] for t, o in FIELDS.items() if about.get(t) and t != "field_system"}
    columns = {o: t for o, t in columns.items() if t and t != o and USUAL.get(o) != t}
    if columns:
        made["columns"] = columns
    _turns(draft, about, option)
    _messages(draft, about, option)
    return made


def _form(draft: Draft, kind: str, option: str) -> dict[str, str]:
    """data.format for a type of SFT, and a word about the template that it writes by itself."""
    name = kind if kind in DEMONSTRATIONS else kind.partition(":")[0].partition(".")[0]
    if name not in DEMONSTRATIONS:
        draft.lose(
            f"{option}.type={kind}", "a type that the import does not know: see docs/FORMATS.md"
        )
        return {}
    if name not in ("chat_template", "chat_template.default", "completion", "pretrain"):
        draft.lose(
            f"{option}.type={kind}",
            "it writes prompts of its own, and here the tokenizer's chat template does; the columns are "
            "read",
        )
    if name in ("completion", "pretrain"):
        draft.note(
            f"type: {name} splits texts of more than sequence_len tokens into several. Here they are too "
            "long: data.truncation says what becomes of them."
        )
    form = DEMONSTRATIONS[name]
    return {"format": form} if form else {}


def _turns(draft: Draft, about: dict, option: str) -> None:
    """Which messages of a conversation are learnt, and which ends of them."""
    roles = about.get("roles_to_train")
    if roles is not None and not set(roles) & {"assistant", "gpt"}:
        draft.lose(f"{option}.roles_to_train", "the assistant's messages are learnt")
    elif roles and set(roles) & {"user", "human"}:
        draft.put("data.scored", "all", option)
    for name in ("train_on_eos", "train_on_eot"):
        if about.get(name) not in (None, "turn"):
            draft.lose(f"{option}.{name}", "every turn that is scored is scored with its end")
    if about.get("message_field_training") not in (None, *SCORED):
        told = f"name the flag of a message one of {', '.join(SCORED)}"
        draft.lose(f"{option}.message_field_training", told)


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
    mapping = {name: about.get(f"message_field_{name}") for name in ("role", "content")}
    mapping = {name: value for name, value in mapping.items() if value}
    mapping |= about.get("message_property_mappings") or {}
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
