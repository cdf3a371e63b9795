"""Models and tokenizers from a folder or a hub id, with errors that name what is missing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dpo_fast.errors import UserError
from dpo_fast.models.adapters import check_adapter, load_adapter
from dpo_fast.models.adapters_under import put_under
from dpo_fast.models.buffers import narrow_buffers, unsharded
from dpo_fast.models.checkpoint import (
    adapter_vocabulary,
    adapters_under,
    base_of,
    check_model_path,
    check_weights,
    is_adapter,
    is_folder,
    of_image_text_model,
)
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import attention_of_parts
from dpo_fast.models.experts import keep_from_drawing
from dpo_fast.models.fp8 import use_fp8
from dpo_fast.models.hub import cached_revisions, commit_of, source, split_revision
from dpo_fast.models.layers import compile_layers, use_liger_kernel
from dpo_fast.models.lora import add_lora
from dpo_fast.models.parts import check_found, settle_parts
from dpo_fast.models.processor import processor_source, processor_template
from dpo_fast.models.quantization import loading_options, settle
from dpo_fast.models.save import HEAVY
from dpo_fast.models.scoring import ScoringModel
from dpo_fast.models.tiles import tile_layers


def local_folder(path: str) -> Path:
    """The folder of a model; of a hub id that of its files here, all but weights that were not loaded."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    name, _ = split_revision(path)
    commit = commit_of(path)
    try:
        ignored = [f"*{suffix}" for suffix in HEAVY]
        return Path(snapshot_download(name, revision=commit, ignore_patterns=ignored))
    except (OSError, ValueError):  # without a network: what there is
        return Path(snapshot_download(name, revision=commit, local_files_only=True))


def tokenizer_path(section: ModelSection) -> str:
    """Where the tokenizer of a section lies: of an adapter without one, with its base model."""
    if section.tokenizer is not None:
        return section.tokenizer
    folder = Path(os.path.expanduser(section.path))
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "tekken.json")
    own = any((folder / name).is_file() for name in names)
    return section.path if own else base_of(section.path)


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model section, with a padding token."""
    option = "model.tokenizer" if section.tokenizer else "model.path"
    is_folder(section.tokenizer, option) if section.tokenizer else check_model_path(section.path)
    path = tokenizer_path(section)
    try:
        tokenizer = transformers_tokenizer(path, section.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"{option}={path}: no tokenizer can be loaded: {_first(error)}{_cached(path)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{option}={path}: the tokenizer has no eos_token; set one and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # nothing attends to padding
    tokenizer.image_source = where = processor_source(section)  # for rows with images
    tokenizer.chat_template = processor_template(where) or tokenizer.chat_template
    return tokenizer


def transformers_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in transformers' own form.

    For a Mistral model transformers prefers the package mistral-common, where that is installed: it has
    no chat template, no offsets, and is saved in another form than the model.
    """
    tekken = Path(path, "tekken.json")
    if tekken.exists() and not tekken.with_name("tokenizer.json").exists():
        from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

        return convert_tekken_tokenizer(str(tekken))
    tokenizer = AutoTokenizer.from_pretrained(**source(path), trust_remote_code=trust_remote_code)
    if type(tokenizer).__name__ != "MistralCommonBackend":
        return tokenizer
    return AutoTokenizer.from_pretrained(
        **source(path), trust_remote_code=trust_remote_code, mistral_format=False
    )


def end_of_turn_ids(section: ModelSection) -> list[int]:
    """The ids at which the model stops generating: eos_token_id of its generation config, else its config.

    Chat models name more of them there than the tokenizer's one EOS.
    """
    where, trust = source(base_of(section.path)), section.trust_remote_code
    name = where.pop("pretrained_model_name_or_path")  # GenerationConfig calls it otherwise
    try:
        ids = GenerationConfig.from_pretrained(name, **where).eos_token_id
    except (OSError, ValueError):
        ids = None
    if ids is None:
        try:
            config = AutoConfig.from_pretrained(name, **where, trust_remote_code=trust)
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
    keep_start: bool = False,
    follows: bool = False,
) -> ScoringModel:
    """The model of a section as a `ScoringModel`, without dropout.

    Under DeepSpeed's `HfDeepSpeedConfig` at stage 3 the weights are sharded while they load. What texts
    alone do not reach, such as a vision tower, is not trained, unless `images` and the options of its
    parts say so.

    keep_start: of an adapter that is trained further, also keep it as it is now.
    follows: keep a copy of new adapters as well, for a reference that follows them.
    """
    state = torch.get_rng_state()
    model = _load_causal_lm(section, attention, option)
    torch.set_rng_state(
        state
    )  # sharded loading draws numbers: new adapters begin alike at every stage
    if section.use_liger_kernel:
        use_liger_kernel(model)
    if section.fp8:
        use_fp8(model, section.fp8)
    if section.torch_compile:
        compile_layers(model)
    if section.tile_tokens:
        tile_layers(model, section.tile_tokens)
    scoring = ScoringModel(model, implementation=implementation, workspace_bytes=workspace_bytes)
    settle_parts(scoring, section)
    if is_adapter(section.path):
        load_adapter(scoring, section.path, option, keep_start)
    elif section.lora is not None:
        add_lora(scoring, section.lora, follows)
        for adapter in scoring.model.peft_config.values():  # what the export's base is
            adapter.revision = split_revision(base_of(section.path))[1]
    put_under(scoring, adapters_under(section.path), option)
    return scoring


def _load_causal_lm(section: ModelSection, attention: str, option: str) -> PreTrainedModel:
    """The model of transformers, of an adapter its base, with dropout off."""
    config = load_model_config(section, option)
    _without_dropout(config)
    _without_router_logits(config)
    quantised = {}
    if section.quantization is not None:
        quantised = loading_options(section, load_skeleton(section, option))
    with _told(section, option):
        model, found = auto_class(config, takes_whole(section)).from_pretrained(
            **source(base_of(section.path, option)),
            config=config,
            dtype=section.torch_dtype,
            attn_implementation=attention_of_parts(config, attention)
            if takes_whole(section)
            else attention,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            **quantised,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{option}={section.path} is an adapter on the hub: set model.adapter_path={section.path}, and "
            "model.path to its base model"
        )
    with _told(section, option):
        check_found(model, found["missing_keys"], section.path, option, section.images)
    if is_deepspeed_zero3_enabled():
        with unsharded():
            narrow_buffers(model, load_skeleton(section, option))
    settle(model)
    resize_for_adapter(model, section.path)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    keep_from_drawing(model)
    return model


def resize_for_adapter(model: PreTrainedModel, path: str) -> None:
    """Give a base model as many rows of embeddings as its adapter has. The adapter brings their values."""
    rows = adapter_vocabulary(path)
    if rows is not None and rows != model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)


def takes_whole(section: ModelSection) -> bool:
    """Whether a model is loaded with what sees images, of which there may be a class without."""
    return bool(section.images) or of_image_text_model(section.path)


def auto_class(config: PretrainedConfig, images: bool | None = False) -> type:
    """The class of transformers that loads a model with its language-model head.

    Some image-text models have no text-only class: their whole class scores texts as well.

    images: whether it is to be the whole class.
    """
    whole = AutoModelForImageTextToText
    known = type(config) in AutoModelForCausalLM._model_mapping and not images
    return whole if type(config) in whole._model_mapping and not known else AutoModelForCausalLM


def load_model_config(section: ModelSection, option: str = "model.path") -> PretrainedConfig:
    """The configuration of a section's model, without its weights."""
    check_model_path(section.path, option)
    where = source(base_of(section.path, option))
    with _told(section, option):
        config = AutoConfig.from_pretrained(**where, trust_remote_code=section.trust_remote_code)
    if section.output_router_logits is False:
        _without_router_logits(config)
    return config


def _without_router_logits(config: PretrainedConfig) -> None:
    """Have the model's own forward keep no logits of its routers: `Routers` hears them."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "output_router_logits"):
            part.output_router_logits = False


def load_skeleton(section: ModelSection, option: str = "model.path") -> PreTrainedModel:
    """The modules and shapes of a section's model on the meta device, without weights.

    Whole also where another model is being loaded at ZeRO-3.
    """
    config = load_model_config(section, option)
    check_weights(section.path, option)
    if is_adapter(section.path) and section.adapter != "merge":
        check_adapter(section.path, option)
    text = config.get_text_config()
    text.vocab_size = adapter_vocabulary(section.path) or text.vocab_size
    with _told(section, option), unsharded(), torch.device("meta"):
        return auto_class(config, takes_whole(section)).from_config(
            config, dtype=section.torch_dtype, trust_remote_code=section.trust_remote_code
        )


@contextlib.contextmanager
def _told(section: ModelSection, option: str):
    """Turns an error in loading into one that names the option and its value."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        # RWKV and xLSTM draw numbers for their first weights by shapes that sharded ones do not have.
        stage = ". It may load with parallel.zero_stage=2" if is_deepspeed_zero3_enabled() else ""
        raise UserError(
            f"{option}={section.path}: the model cannot be loaded: {_first(error)}{stage}"
            f"{_cached(section.path)}"
        ) from error


def _without_dropout(config: PretrainedConfig) -> None:
    """A preference loss compares two passes over the same tokens; dropout would be noise there.

    So would the jitter of experts' inputs. PhiMoE's `router_jitter_noise` is no noise, but a threshold.

    The configuration of an image-text model has others inside.
    """
    ends = ("dropout", "pdrop", "dropout_prob", "layerdrop", "input_jitter_noise", "jitter_eps")
    ends += () if config.model_type == "phimoe" else ("router_jitter_noise",)
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _without_dropout(value)
        elif name.endswith(ends) and isinstance(value, float):
            setattr(config, name, 0.0)


def _cached(path: str) -> str:
    """A sentence about the revisions in the cache, where a revision is asked for."""
    if split_revision(path)[1] is None:
        return ""
    return f". In the cache: {cached_revisions(path) or 'no revision of it'}"


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
