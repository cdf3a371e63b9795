"""The table of providers is what checks, trainer and doctor go by: an entry is all that a new one takes."""

import ast
from dataclasses import replace
from typing import get_args

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.cli.doctor_run import decisions, look
from dpo_fast.data.kinds import COMPLETIONS, PAIRS
from dpo_fast.errors import UserError
from dpo_fast.references import ReferenceSection
from dpo_fast.references.table import (
    DEFAULT,
    PROVIDERS,
    Materials,
    ProviderSpec,
    alternatives,
    default_provider,
)
from dpo_fast.training.config import RunConfig, build_config
from dpo_fast.training.memory import memory
from dpo_fast.training.references import build_references, check_stores
from tests.support.models import run_tree, write_model
from tests.support.paths import ROOT


class Constant:
    """A provider that says the same of every sequence."""

    def __call__(self, batch):
        return torch.full((len(batch.lengths_S),), -1.0)


TOY = ProviderSpec(
    "constant",
    "the same for every sequence",
    lambda materials: materials.for_every_split(Constant()),
    options=("sync_steps",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    write_model(folder / "model")
    write_model(folder / "other")
    return folder


def build(folder, provider: str, loss=None, reference=None, **sections) -> RunConfig:
    """A run with a provider that the section's own type need not know yet."""
    tree = run_tree(folder) | {"loss": loss or {}}
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    tree["data"].setdefault("train", str(folder / "pairs.jsonl"))
    named = {"provider": provider} | (reference or {})
    section = ReferenceSection.model_construct(_fields_set=set(named), **named)
    return build_config(tree | {"reference": section}, "tree")


@pytest.fixture
def add(monkeypatch):
    """Puts an entry into the table, with some fields changed."""

    def put(**fields) -> str:
        monkeypatch.setitem(PROVIDERS, TOY.name, replace(TOY, **fields))
        return TOY.name

    return put


def test_the_option_takes_what_the_table_has():
    assert get_args(ReferenceSection.model_fields["provider"].annotation) == tuple(PROVIDERS)
    assert ReferenceSection().provider == DEFAULT
    # The revision becomes part of the path.
    options = set(ReferenceSection.model_fields) - {"provider", "offload", "old_path", "revision"}
    assert options == {option for spec in PROVIDERS.values() for option in spec.options}
    for case in range(8):
        assert default_provider(*(bool(case >> bit & 1) for bit in range(3))) in PROVIDERS
    description = ReferenceSection.model_fields["provider"].description
    guide = (ROOT / "docs/TRAINING.md").read_text()
    for name, spec in PROVIDERS.items():
        assert f"\n| `{name}` " in guide
        assert name == spec.name and "\n" not in spec.meaning
        assert f"{name}: {spec.meaning}" in description
        assert ("path" in spec.options) == (spec.second_model != "never")
        assert ("per_token" in spec.options) == (spec.tokens == "stored")


@pytest.mark.parametrize(
    ("fields", "sections", "message"),
    [
        ({}, {"reference": {"per_token": True}}, "per_token=true is not used by .*=constant"),
        ({}, {"reference": {"mixup_alpha": 0.5}}, "mixup_alpha=0.5 is not used by .*=constant"),
        ({}, {"loss": {"token_clamp": 1.0}}, "token by token: set"),
        ({}, {"loss": {"type": "kto"}}, "provider=constant holds the data's own sequences"),
        ({}, {"reference": {"offload": True}}, "provider=constant there is no second model"),
        ({"compares": False}, {}, "provider=constant, but loss.type=sigmoid compares"),
        ({"needs_adapters": True}, {}, "provider=constant needs adapters: set model.lora"),
        (
            {"stores": True},
            {"data": {"streaming": True}, "train": {"max_steps": 3}},
            "provider=constant is computed over all of the data",
        ),
    ],
)
def test_checks_follow_an_entry(folder, add, fields, sections, message):
    """Each entry is refused for what it cannot do, and taken once the table says that it can."""
    with pytest.raises(UserError, match=message):
        build(folder, add(**fields), **sections)
    able = {
        "options": ("per_token", "mixup_alpha"),
        "tokens": "always",
        "any_sequence": True,
        "second_model": "always",
    }
    assert build(folder, add(**able), **sections).reference_spec.name == "constant"


def test_errors_name_an_entry_as_a_choice(folder, add):
    add(any_sequence=True)
    assert "constant" in alternatives(lambda spec: spec.any_sequence)
    with pytest.raises(UserError, match="choose frozen, .*, or constant"):
        build_config(
            run_tree(folder) | {"loss": {"type": "kto"}, "reference": {"provider": DEFAULT}}, "tree"
        )


def test_the_trainer_builds_an_entry(folder, add):
    config = build(folder, add())
    splits = [_Split("train", PAIRS), _Split("eval", PAIRS)]
    built = build_references(config, _Engine(), None, splits, load=None)
    assert set(built) == {"train", "eval"} and isinstance(built["train"], Constant)
    with pytest.raises(UserError, match="provider=constant stores nothing"):
        check_stores(config)
    check_stores(build(folder, add(stores=True)))


def test_the_doctor_tells_an_entry(folder, add):
    def lines(**fields):
        options = {"path": str(folder / "other")}
        stage = {"zero_stage": 3}
        config = build(folder, add(options=("path",), **fields), reference=options, parallel=stage)
        outlook = look(config)
        told = {row.what: row for row in decisions(outlook)}["reference"]
        return told, [line.what for line in memory(config, outlook.sizes, 1)]

    row, needed = lines()
    assert (row.value, row.origin, row.why) == ("constant", "option", TOY.meaning)
    assert "reference model" not in needed
    row, needed = lines(second_model="path")
    assert row.why == f"{TOY.meaning}, sharded over 1 rank"
    assert "reference model" in needed
    row, needed = lines(second_model="path", stores=True)
    assert "computed once by a second model" in row.why and str(folder / "other") in row.why
    assert "reference model, before training" in needed


def test_every_provider_is_built_from_its_materials():
    """With what it asks for and nothing else; one object per split, or one for all."""

    def refused(*_):
        pytest.fail("not asked for by the table")

    linear = torch.nn.Linear(1, 1)
    linear.as_started = None
    for spec in PROVIDERS.values():
        kinds = {"train": PAIRS, "eval": COMPLETIONS}
        materials = Materials(
            section=ReferenceSection(),
            kinds=kinds,
            engine=linear,
            policy=linear,
            second_model=(lambda: linear) if spec.second_model == "always" else refused,
            stored=(lambda kinds=kinds: dict.fromkeys(kinds, "stored")) if spec.stores else refused,
        )
        built = spec.build(materials)
        assert set(built) == {"train", "eval"}, spec.name
        for provider in built.values():
            assert (provider == "stored") == spec.stores
            assert (
                spec.follows == hasattr(provider, "after_step") == hasattr(provider, "state_dict")
            )
            if spec.tokens == "always":
                assert hasattr(provider, "token_logps"), spec.name


def test_no_one_else_knows_the_names():
    """Comparisons and dictionaries of the floors above go by the fields of an entry."""
    rooms = ("training", "cli", "references", "report")
    for file in (path for room in rooms for path in (ROOT / "dpo_fast" / room).rglob("*.py")):
        if file.name == "table.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            parts = []
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
            elif isinstance(node, ast.Dict):
                parts = [key for key in node.keys if key]
            found = {
                leaf.value
                for part in parts
                for leaf in ast.walk(part)
                if isinstance(leaf, ast.Constant)
            }
            assert not found & set(PROVIDERS), f"{file}:{node.lineno}"


class _Split:
    def __init__(self, name, kind) -> None:
        self.name, self.examples = name, type("Examples", (), {"kind": kind})


class _Engine:
    device = torch.device("cpu")
