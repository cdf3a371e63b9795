"""What the pages say by name holds: commands parse, options exist, YAML is taken, links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_fast import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (
        *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "benchmarks/README")),
        *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "LOG.md"),
    )
}
BLOCK = re.compile(
    r"(?:(?<=\n\n)|\A)((?: {4}[^\n]*\n|\n(?= {4}))+)|^```\w*\n(.*?)^```", re.M | re.S
)


def blocks(text: str) -> Iterator[str]:
    """Code that stands apart: indented by four, or between fences."""
    for indented, fenced in BLOCK.findall(text):
        yield fenced or re.sub(r"^ {4}", "", indented, flags=re.M)


def commands(text: str) -> Iterator[str]:
    """What follows `dpo-fast` in blocks, and between backticks where arguments follow."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:.*\$\(which |.*srun )?dpo-fast\)? +([a-z].*)", line):
                yield match[1]
    yield from re.findall(r"`dpo-fast ([a-z][\w-]* [^`]+)`", text)


def test_commands_of_the_pages_parse():
    """Their names, options and arguments; and the keys that they set exist."""
    from typer.main import get_command

    from dpo_fast.cli.app import app

    found = 0
    for page, text in PAGES.items():
        for line in commands(text):
            if re.search(r"\[[A-Z-]|\b[A-Z]\b|^export --merge$", line):
                continue  # the form of a command: [OUT], --nproc N
            command, words = get_command(app), shlex.split(line, comments=True)
            while words and words[0] in getattr(command, "commands", {}):
                command, words = command.commands[words[0]], words[1:]
            if not words or words == ["trl"]:
                continue  # named without its arguments
            assert not hasattr(command, "commands"), f"{page}: dpo-fast {line}: no such command"
            try:
                command.make_context(command.name, list(words))
            except Exception as error:
                pytest.fail(f"{page}: dpo-fast {line}: {error}")
            found += 1
    assert found > 90


def fields_of(hint: Any) -> dict[str, Any]:
    from dpo_fast.training.config_types import _options

    models = [each for each in _options(hint) if hasattr(each, "model_fields")]
    return {name: field.annotation for each in models for name, field in each.model_fields.items()}


def exists(key: str) -> bool:
    """Whether a file of a run, or of rounds, has this key. Mappings take any name."""
    from dpo_fast.rounds.config import RoundsConfig
    from dpo_fast.training.config import RunConfig

    hint: Any = RunConfig if key.partition(".")[0] in RunConfig.model_fields else RoundsConfig
    for name in key.split("."):
        fields = fields_of(hint)
        if name not in fields and (hint is Any or "dict" in str(hint)):
            return True
        if name.isdigit():  # an entry of a list
            (hint,) = hint.__args__
            continue
        if name not in fields:
            return False
        hint = fields[name]
    return True


# Attributes of a model in PyTorch and peft, which is called `model` there as well.
OF_OBJECTS = ("model.save_pretrained", "model.lm_head", "model.base_model", "model.load_adapter")
SECTIONS = "model|data|loss|reference|train|parallel|log|health|generate|sample|judge|pairs|stages"


def test_options_of_the_pages_exist():
    named = re.compile(rf"(?<![\w./\"'-])((?:{SECTIONS})(?:\.[a-z0-9_]+)+)\b(?!\()")
    files = r"\.(jsonl|parquet|json|yaml|py|html|md|csv|gz|safetensors|sbatch|sh)$"
    found = 0
    assert exists("model.lora.r") and exists("stages.0.learning_rate")
    assert not exists("train.rate") and not exists("model.lora.x") and not exists("judge.prompt")
    for page, text in PAGES.items():
        if page.startswith("docs/FROM_"):  # the first column has the names of others
            text = re.sub(r"^\|[^|\n]*\|", "|", text, flags=re.M)
        for key in named.findall(text):
            known = (
                re.search(files, key) or key == "train.per_device_train_batch_size"
            )  # of a message
            if not known and not key.startswith(OF_OBJECTS):
                assert exists(key), f"{page} names {key}"
                found += 1
    assert found > 800


def merged(tree: dict, other: dict) -> dict:
    both = {
        name: merged(value, other[name])
        for name, value in tree.items()
        if isinstance(value, dict) and isinstance(other.get(name), dict)
    }
    return tree | other | both


def test_yaml_of_the_pages_is_taken(tmp_path, monkeypatch):
    """Blocks with sections of a run or of rounds; what each leaves out is filled in."""
    from dpo_fast.rounds.config import RoundsConfig
    from dpo_fast.training.config import build, build_config

    monkeypatch.chdir(tmp_path)
    whole = {"model": {"path": "m"}, "data": {"train": "rows.jsonl", "eval_rows": 9}}
    whole |= {"train": {"output_dir": "runs/a", "max_steps": 9}}
    rounds, found = {"model": {"path": "m"}, "output_dir": "runs/a"}, 0
    for page, text in PAGES.items():
        for block in blocks(text):
            try:
                tree = yaml.safe_load(block)
            except yaml.YAMLError:
                continue
            if not isinstance(tree, dict) or not tree.keys() <= RoundsConfig.model_fields.keys():
                continue
            in_rounds = tree.keys() & {"output_dir", "stages", "sample", "judge", "pairs"}
            try:
                if in_rounds:
                    build(RoundsConfig, merged(rounds, tree), page)
                else:
                    build_config(merged(whole, tree), page)
            except UserError as error:
                pytest.fail(f"{page}:\n{block}\n{error}")
            found += 1
    assert found >= 9


def anchors(text: str) -> set[str]:
    """Of the headings, as code hosts and MkDocs make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", prose, re.M)
    plain = (re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title).lower() for title in titles)
    made = {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


def test_links_of_the_pages_lead_to_headings():
    found = 0
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^):#\s]*)#([^)\s]+)\)", text):
            place = (ROOT / page).parent / target if target else ROOT / page
            assert anchor in anchors(place.read_text(encoding="utf-8")), (
                f"{page}: {target}#{anchor}"
            )
            found += 1
    assert found > 20
