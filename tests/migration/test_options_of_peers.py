"""The tables against the sources of the trainers, where the environment names their folders.

AXOLOTL, LLAMAFACTORY and OPENRLHF: a source distribution or a wheel, unpacked.
"""

import ast
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("pydantic")

from dpo_fast.migration.importers import IMPORTERS

# Classes whose fields are read within an option, and fields that trainers set by themselves.
WITHIN = re.compile(
    r".*(Dataset|Type|Spec|Group)$|EBFTConfig|FSDPConfig|FP8Config|QATConfig|PTQConfig|LoftQConfig"
    r"|DynamicCheckpointConfig|SelectiveCheckpointingConfig|SpecialTokensConfig|.*Capabilities"
)
OWN = {"trl", "vllm"}  # sections that are laid open


def source(variable: str, *below: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no source")
    return next(path for path in Path(folder).rglob(below[0]) if all(b in str(path) for b in below))


def fields(folder: Path) -> dict[str, set[str]]:
    """Names of annotated fields, by the class that has them."""
    found: dict[str, set[str]] = {}
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                named = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
                found[node.name] = {each.id for each in named if isinstance(each, ast.Name)}
    return found


def known(kind: str) -> set[str]:
    return {name for options in IMPORTERS[kind].tables.values() for name in options}


def test_llamafactory():
    theirs = fields(source("LLAMAFACTORY", "hparams", "src/llamafactory"))
    assert theirs and not set().union(*theirs.values()) - known("llamafactory")


def test_axolotl():
    theirs = fields(source("AXOLOTL", "schemas", "src/axolotl/utils"))
    prefix = {"TRLConfig": "trl.", "VllmConfig": "vllm."}
    ours = known("axolotl") | set(IMPORTERS["axolotl"].names("grpo").values())
    for name, own in theirs.items():
        if not WITHIN.fullmatch(name):
            named = {prefix.get(name, "") + each for each in own - OWN}
            assert not named - ours, name


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_openrlhf(method):
    text = source("OPENRLHF", f"train_{method}.py", "openrlhf/cli").read_text()
    theirs = set(re.findall(r"add_argument\(\s*\"--([\w.]+)\"", text))
    importer = IMPORTERS["openrlhf"]
    names = importer.names(method)
    ours = {names.get(name, name) for name in importer.tables[method]}
    assert len(theirs) > 50 and not theirs - ours
    older = {name for name, each in importer.tables[method].items() if each.older}
    before = {"disable_trace_cache", *older}
    assert {name for name in ours if name not in theirs} <= before, "names of no version"
