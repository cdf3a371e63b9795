"""Models and tokenizers from a folder or a hub id, with errors that name what is missing."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo_fast.errors import UserError
from dpo_fast.models.config import LoraSection, ModelSection
from dpo_fast.models.layers import compile_layers, use_liger_kernel
from dpo_fast.models.scoring import ScoringModel

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def check_model_path(path: str, option: str = "model.path") -> None:
    """Check that a folder holds a model. A name that is not a folder is left to the hub.

    Raises:
        UserError: naming the option, the path and what was expected there.
    """
    folder = Path(path).expanduser()
    if not is_folder(path, option):
        return
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(
            f"{option}={path} is not a model folder: it has no config.json (found: {_names(folder)})"
        )
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise UserError(f"{config} is not JSON: {error}") from None
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise UserError(
            f"{option}={path} has a config.json but no weights: expected *.safetensors "
            f"(found: {_names(folder)})"
        )


def is_folder(path: str, option: str) -> bool:
    """Whether it is a folder here rather than a hub id. Raises UserError if it is neither."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option}={path} is a file; expected a folder")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if not folder.exists() and looks_local:
        raise UserError(
            f"{option}={path}: no such folder; expected one that save_pretrained wrote, or a hub id "
            "like org/name"
        )
    return folder.exists()


def _names(folder: Path) -> str:
    return ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model section, with a padding token."""
    path = section.tokenizer or section.path
    option = "model.tokenizer" if section.tokenizer else "model.path"
    is_folder(path, option) if section.tokenizer else check_model_path(path)
    try:
        tokenizer = _transformers_tokenizer(path, section.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{option}={path}: no tokenizer can be loaded: {_first(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{option}={path}: the tokenizer has no eos_token; set one and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # nothing attends to padding
    return tokenizer


def _transformers_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in transformers' own form.

    For a Mistral model transformers prefers the package mistral-common, where that is installed: it has
    no chat template, no offsets, and is saved in another form than the model.
    """
    tekken = Path(path, "tekken.json")
    if tekken.exists() and not tekken.with_name("tokenizer.json").exists():
        from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

        return convert_tekken_tokenizer(str(tekken))
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if type(tokenizer).__name__ != "MistralCommonBackend":
        return tokenizer
    return AutoTokenizer.from_pretrained(
        path, trust_remote_code=trust_remote_code, mistral_format=False
    )


def end_of_turn_ids(section: ModelSection) -> list[int]:
    """The ids at which the model stops generating: eos_token_id of its generation config, else its config.

    Chat models name more of them there than the tokenizer's one EOS.
    """
    path, trust = section.path, section.trust_remote_code
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        ids = None
    if ids is None:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
            ids = getattr(config.get_text_config(), "eos_token_id", None)
        except (OSError, ValueError, KeyError):  # load_model says what is wrong with it
            return []
    ids = [] if ids is None else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


def load_model(
    section: ModelSection,
    *,
    attention: str,
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    option: str = "model.path",
) -> ScoringModel:
    """The model of a section as a `ScoringModel`, without dropout.

    Under DeepSpeed's `HfDeepSpeedConfig` at stage 3 the weights are sharded while they load.
    """
    config = load_model_config(section, option)
    _without_dropout(config)
    with _told(section, option):
        model = AutoModelForCausalLM.from_pretrained(
            section.path,
            config=config,
            dtype=section.torch_dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
        )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if section.use_liger_kernel:
        use_liger_kernel(model)
    if section.torch_compile:
        compile_layers(model)
    scoring = ScoringModel(model, implementation=implementation, workspace_bytes=workspace_bytes)
    if section.lora is not None:
        add_lora(scoring, section.lora)
    return scoring


def load_model_config(section: ModelSection, option: str = "model.path") -> PretrainedConfig:
    """The configuration of a section's model, without its weights."""
    check_model_path(section.path, option)
    with _told(section, option):
        return AutoConfig.from_pretrained(section.path, trust_remote_code=section.trust_remote_code)


def load_skeleton(section: ModelSection, option: str = "model.path") -> PreTrainedModel:
    """The modules and shapes of a section's model on the meta device, without weights."""
    config = load_model_config(section, option)
    with _told(section, option), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=section.torch_dtype, trust_remote_code=section.trust_remote_code
        )


@contextlib.contextmanager
def _told(section: ModelSection, option: str):
    """Turns an error in loading into one that names the option and its value."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{option}={section.path}: the model cannot be loaded: {_first(error)}"
        ) from error


def _without_dropout(config) -> None:
    """A preference loss compares two passes over the same tokens; dropout would be noise there."""
    for name in vars(config):
        if name.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(
            getattr(config, name), float
        ):
            setattr(config, name, 0.0)


def add_lora(scoring: ScoringModel, section: LoraSection) -> None:
    """Wrap the backbone's layers with adapters and freeze everything else.

    Raises:
        UserError: adapters on the head, which makes no logits that they could change.
    """
    from peft import LoraConfig, get_peft_model

    targets = section.target_modules
    named = [targets] if isinstance(targets, str) else targets
    if any(name.split(".")[-1] in ("lm_head", "embed_out") for name in named):
        raise UserError(
            f"model.lora.target_modules={targets}: the head cannot carry an adapter, because it "
            "never makes logits; name layers of the backbone, or all-linear"
        )
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        scoring.model = get_peft_model(scoring.model, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules={targets}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
