"""What is built of the repository, and that it works without it."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dpo_fast import RunConfig
from tests.support.paths import ROOT

PACKAGE = ROOT / "dpo_fast"
PROJECT = (ROOT / "pyproject.toml").read_text()

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built of the sdist alone."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    # A folder of its own: setuptools packs what an earlier build left in build/, deleted modules too.
    settings = folder / "settings.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT],
        env=os.environ | {"DIST_EXTRA_CONFIG": str(settings)},
        check=True,
        capture_output=True,
        timeout=240,
    )
    return folder


@pytest.fixture(scope="module")
def installed(built) -> Path:
    """A folder with the wheel unpacked as pip does it, dependencies aside."""
    place = built / "site"
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed here")
    subprocess.run([*command, "--target", place, wheel], check=True, timeout=120)
    return place


def run(installed: Path, *words: str, cwd: Path) -> str:
    """What Python prints that sees the installed package before any other."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_package(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    names = set(wheel.namelist())
    expected = {
        f"dpo_fast/{path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*.py")
        if "kernels" not in path.relative_to(PACKAGE).parts
    }
    expected |= {f"dpo_fast/kernels/{path.name}" for path in (ROOT / "kernels/ops").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    recipes = {f"dpo_fast/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    recipes |= {f"dpo_fast/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    assert recipes <= names  # `dpo-fast init` begins with one
    sources = {f"dpo_fast/csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cu*")}
    assert sources and sources <= names
    assert "dpo_fast/py.typed" in names, "type checkers read our annotations"
    about = next(name.removesuffix("METADATA") for name in names if name.endswith("/METADATA"))
    assert b"License-Expression: Apache-2.0" in wheel.read(f"{about}METADATA")
    assert wheel.read(f"{about}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_holds_what_the_wheel_is_made_of(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "kernels/ops/linear_logp.py"} <= names
    assert {f"configs/{path.name}" for path in (ROOT / "configs").iterdir()} <= names


def test_the_version_is_one(built, installed, tmp_path):
    import dpo_fast

    assert f"-{dpo_fast.__version__}-" in next(built.glob("*.whl")).name
    said = run(
        installed,
        "-c",
        "import importlib.metadata as m, dpo_fast; "
        "print(m.version('dpo_fast'), dpo_fast.__version__, dpo_fast.__file__)",
        cwd=tmp_path,
    ).split()
    assert said[:2] == [dpo_fast.__version__] * 2 and said[2].startswith(str(installed))
    assert f"## {dpo_fast.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_it_works_without_the_repository(installed, tmp_path):
    """The command line, the kernels' package, and what it reads of its own folder."""
    assert "dpo_fast" in run(installed, "-m", "dpo_fast", "--version", cwd=tmp_path)
    run(
        installed, "-m", "dpo_fast", "init", "run.yaml", "--model", "m", "--data", "d", cwd=tmp_path
    )
    shown = run(installed, "-m", "dpo_fast", "config", "show", "run.yaml", cwd=tmp_path)
    assert "path: m" in shown
    text = (tmp_path / "run.yaml").read_text()
    schema = re.search(r"\$schema=(\S+)", text)[1]
    assert schema.startswith(str(installed)) and Path(schema).is_file()
    code = (
        "import dpo_fast.kernels, dpo_fast.csrc, pathlib, torch; "
        "from dpo_fast import linear_logp; "
        "assert (pathlib.Path(dpo_fast.csrc.__path__[0]) / 'bindings.cpp').is_file(); "
        "out = linear_logp(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2])); "
        "print(tuple(out.shape) if hasattr(out, 'shape') else len(out))"
    )
    assert run(installed, "-c", code, cwd=tmp_path).strip()


def test_every_extra_is_in_the_table_of_the_readme():
    """An extra that no page names is one that nobody installs."""
    (section,) = re.findall(r"\[project.optional-dependencies\]\n(.*?)\n\[", PROJECT, re.S)
    extras = re.findall(r"^(\w+) = \[", section, re.M)
    assert {"train", "dev"} <= set(extras)
    told = re.findall(r"^\| `(\w+)` \| ", (ROOT / "README.md").read_text(), re.M)
    assert set(extras) <= set(told), "the table of extras in README.md"


def test_what_the_type_checker_reads_runs_as_well():
    names = runpy.run_path(str(ROOT / "tests/support/typed_use.py"))
    assert names["plain"].objective.names == ("sigmoid", "sft")
    listed = re.search(r"\[tool.mypy\].*?files = \[(.*?)\]", PROJECT, re.S)[1]
    files = re.findall(r'"(.+?)"', listed)
    assert "tests/support/typed_use.py" in files and all((ROOT / name).exists() for name in files)


def test_type_checkers_see_every_default_of_a_configuration():
    """Without pydantic's plugin they know a default by its keyword; else every option is required."""
    calls = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Field":
                calls += 1
                assert not node.args, f"{file}:{node.lineno}: write Field(default=...)"
    assert calls > 200 and "pydantic.mypy" not in PROJECT
    # What the class writes out for them is what it has.
    source = (PACKAGE / "training/config.py").read_text()
    (init,) = [
        each for each in ast.walk(ast.parse(source)) if getattr(each, "name", "") == "__init__"
    ]
    assert {each.arg for each in init.args.kwonlyargs} == RunConfig.model_fields.keys()
