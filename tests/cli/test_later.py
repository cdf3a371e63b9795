"""What is wrong in a configuration is told before transformers and PyTorch are imported."""

import json
import os
import subprocess
import sys

import pytest

from dpo_fast.cli.later import import_when_used

TELL = """
import json, sys
from dpo_fast.cli import app

class Left(Exception):
    pass

def leave(code):
    raise Left(code)

app._leave = leave
for words in json.load(sys.stdin):
    sys.argv = ["dpo-fast", *words]
    try:
        app.main()
    except Left as left:
        assert left.args == (2,)
    heavy = [name for name in ("torch._C", "transformers", "datasets") if name in sys.modules]
    assert not heavy, (words, heavy)
"""
WRONG = {  # what is set, or another file: what is said
    "train.max_stepz=3": "did you mean max_steps?",
    "loss.type=simpoo": "did you mean simpo?",
    "loss.beta=-1": "must be greater than 0",
    "nonsense": "expected section.key=value",
    "model.path={tmp}/gone": "no such folder",
    "model.path={tmp}": "no config.json",
    "model.tokenizer={tmp}/gone": "model.tokenizer",
    "reference.path={tmp}/gone": "reference.path",
    "data.train={tmp}/rowz.jsonl": "Did you mean 'rows.jsonl'?",
    "data.eval={tmp}/gone.jsonl": "no such file",
    "train.lr_scheduler_type=cosin": "did you mean cosine?",
    "reference.provider=adapter_off": "needs adapters",
    "train.eval_steps=5": "nothing to evaluate on",
    "train.layout=paked": "shared_prefix",
    "train.output_dir=/proc/none": "cannot be written",
}


@pytest.mark.processes
def test_a_mistake_is_told_before_large_imports(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    run = {
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "train": {"output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    words = [["train", str(tmp_path / "gone.yaml")]]
    words += [["train", str(tmp_path / "run.yaml"), wrong.format(tmp=tmp_path)] for wrong in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", TELL],
        input=json.dumps(words),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("dpo-fast: ")]
    assert "no such configuration file" in told[0]
    for message, expected in zip(told[1:], WRONG.values(), strict=True):
        assert expected in message


USES = {  # how a package is used: a name for it
    "import {name}.part": "later_part",
    "from {name} import VALUE": "later_from",
    "{name}.VALUE": "later_value",
}


@pytest.mark.parametrize("use", USES)
def test_a_package_is_loaded_when_it_is_used(tmp_path, monkeypatch, use):
    name = USES[use]
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(f"from {name} import part\nVALUE = part.VALUE\n")
    (tmp_path / name / "part.py").write_text(
        "import sys\nsys.times = getattr(sys, 'times', 0) + 1\nVALUE = 3\n"
    )
    monkeypatch.setattr(sys, "times", 0, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    import_when_used(name)
    space = {}
    exec(f"import {name}\nimport {name}", space)
    assert f"{name}.part" not in sys.modules
    exec(use.format(name=name), space)
    package = sys.modules[name]
    assert package is space[name] and package.VALUE == 3 and type(package) is type(sys)
    assert package.part is sys.modules[f"{name}.part"] and sys.times == 1
    assert package.part.__spec__.origin.endswith("part.py")
    assert not any(type(finder).__name__ == "_PackageFirst" for finder in sys.meta_path)


def test_what_is_loaded_or_missing_stays_as_it_is():
    import_when_used("json")
    assert sys.modules["json"] is json
    import_when_used("no_such_package_here")
    assert "no_such_package_here" not in sys.modules
