"""Images and jobs for clusters, as far as one can do without: they parse, and what they name exists."""

import re
import shutil
import subprocess

import pytest
import yaml

pytest.importorskip("typer")
pytest.importorskip("pydantic")

from typer.main import get_command

from dpo_fast.cli.app import app
from dpo_fast.training.config import build_config
from dpo_fast.training.config_file import apply
from tests.support.paths import ROOT

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT", "CMD"}


def check_command(words: list[str]) -> None:
    """What follows `dpo-fast` is a command of it, with options and keys that exist."""
    name, *rest = words
    command = get_command(app).commands[name]
    context = command.make_context(name, list(rest))
    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"output_dir": "o"}}
    for override in context.params.get("overrides") or ():
        apply(tree, override)
    build_config(tree, "the command")


def instructions(path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_names_what_is_there(path):
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    allowed = (ROOT / ".dockerignore").read_text()
    for name, rest in found:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}\n" in allowed, source
        for extras in re.findall(r"\.whl\)\[([\w,]+)\]", rest):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), (
                    extra
                )
    parts = dict(found)
    assert parts["ENTRYPOINT"] == '["dpo-fast"]' and parts["USER"] != "root"
    stages = [rest.split(" AS ")[1] for name, rest in found if name == "FROM" and " AS " in rest]
    assert re.findall(r"--from=(\w+)", path.read_text()) == stages == ["wheel"]


def test_images_hold_all_that_the_wheel_is_made_of():
    folders = re.search(r"package-dir\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    homes = {line.split('"')[-2].split("/")[0] for line in folders.splitlines()}
    for path in DOCKERFILES:
        copied = {rest.split()[0] for name, rest in instructions(path) if name == "COPY"}
        assert homes <= copied, path.name
    assert len(DOCKERFILES) == 2


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_for_slurm(path):
    text = path.read_text()
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", path], check=True, timeout=20)
    given = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M))
    assert len(given) == text.count("#SBATCH "), "every line of options is read"
    assert "@" in given["signal"] and "requeue" in given
    (line,) = re.findall(r"^.*\bdpo-fast (.*)$", text.split("set -euo pipefail")[1], re.M)
    words = line.replace('"$CONFIG"', "run.yaml").split("&")[0].split()
    if words[0] == "train":
        check_command(words)
        assert "train.resume_from_checkpoint=true" in words and "srun" in text
    else:
        command = get_command(app).commands[words[0]]
        assert command.make_context(words[0], words[1:]).params["nproc"] == 8


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_for_kubernetes(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= set(each) for each in documents)
    (job,) = (each["spec"] for each in documents if each["kind"] == "Job")
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] >= 300, "a step and a checkpoint"
    words = container.get("args") or container["command"]
    start = next(i for i, word in enumerate(words) if word == "train")
    check_command(words[start:])
    assert "train.resume_from_checkpoint=true" in words
    uid = re.search(r"--uid (\d+)", (ROOT / "docker/cuda.Dockerfile").read_text())[1]
    assert pod["securityContext"]["runAsUser"] == int(uid), "the image's own user"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) in (words[words.index("--nproc") + 1] if "--nproc" in words else words[2])
    for service in (each for each in documents if each["kind"] == "Service"):
        name, (port,) = service["metadata"]["name"], service["spec"]["ports"]
        assert service["spec"]["selector"] == job["template"]["metadata"]["labels"]
        assert pod["subdomain"] == name and service["spec"]["clusterIP"] == "None"
        assert f"--rdzv-endpoint={name}-0.{name}:{port['port']}" in words
        assert (
            f"--nnodes={job['completions']}" in words and job["parallelism"] == job["completions"]
        )
