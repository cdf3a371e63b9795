"""docs/ROUNDS_CONFIG.md is made of the fields of `RoundsConfig`."""

from __future__ import annotations

from dpo_fast.judging.config import EVERYWHERE, JudgeSection
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.config_docs import page, rounds_schema
from tests.support.paths import ROOT


def test_the_page_is_made_of_the_code():
    assert (ROOT / "docs/ROUNDS_CONFIG.md").read_text(encoding="utf-8") == page(), "run make docs"


def test_every_key_of_the_file_and_of_its_own_sections_has_a_meaning():
    text = page()
    for name in RoundsConfig.model_fields:
        assert f"| `{name}` |" in text or f"\n## `{name}`\n" in text, name
    for line in text.splitlines():
        if line.startswith("| `"):
            key, _, _, meaning, _ = (cell.strip() for cell in line.strip("|").split(" | "))
            assert meaning, key


def test_an_option_says_which_judges_take_it():
    node = rounds_schema()["properties"]["judge"]
    (judge,) = (each for each in node["anyOf"] if "properties" in each)
    assert judge["properties"]["beta"]["refused"] == "unless type is implicit"
    told = {name for name, field in judge["properties"].items() if "refused" in field}
    assert told == set(JudgeSection.model_fields) - set(EVERYWHERE)
