"""The model that samples: its tokenizer, its limits, its weights when they are needed, its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_fast.data.config import DataConfig
from dpo_fast.data.dataset import tokenizer_hash
from dpo_fast.data.template_file import read_template
from dpo_fast.errors import UserError
from dpo_fast.generation.config import SampleSection
from dpo_fast.generation.encode import Encoded, PromptCodec, encode_all
from dpo_fast.generation.engine import Engine
from dpo_fast.generation.prompts import Prompt
from dpo_fast.generation.with_server import ServerEngine, check_images
from dpo_fast.generation.with_transformers import TransformersEngine, positions_of
from dpo_fast.generation.with_vllm import VllmEngine
from dpo_fast.models import end_of_turn_ids, load_model, load_tokenizer
from dpo_fast.models.architecture import architecture_of, choose_attention
from dpo_fast.models.config import ModelSection
from dpo_fast.models.layer_kinds import carried_state
from dpo_fast.models.load import load_skeleton
from dpo_fast.models.scoring import ScoringModel
from dpo_fast.models.vision import why_no_images
from dpo_fast.training import distributed
from dpo_fast.training.console import say
from dpo_fast.training.finite import check_loaded
from dpo_fast.training.fit import check_vocabulary
from dpo_fast.training.weights import identity_of

# Options of the section model that are for training, and change nothing that is sampled.
TRAINING_ONLY = (
    "lora",
    "gradient_checkpointing",
    "checkpoint_layers",
    "activation_offloading",
    "fp8",
)


@dataclass(frozen=True)
class _Run:
    """What `identity_of` reads of a run."""

    model: ModelSection
    data: DataConfig


class Sampler:
    """The model of a configuration, as it is sampled from.

    Adapters that a run would add (model.lora) change nothing before its first step, and are left out.
    """

    def __init__(self, model: ModelSection, section: SampleSection, data: DataConfig) -> None:
        unused = dict.fromkeys(TRAINING_ONLY) | {"torch_compile": False, "tiled_mlp": False}
        self.model = model.model_copy(update=unused)
        self.section, self.data = section, data
        self.engine_type = section.engine.type

    def see(self, prompts: Sequence[Prompt]) -> None:
        """Have the model see images, if prompts have some. Raises UserError where they cannot be."""
        first = next((each for each in prompts if each.images), None)
        if first is None:
            return
        where, engine = f"{first.where}: the prompt has images", self.section.engine
        if self.engine_type == "vllm":
            raise UserError(
                f"{where}, which sample.engine.type=vllm is not given: set type=transformers, or start "
                "vLLM as a server and set type=openai with api=chat"
            )
        if self.engine_type == "openai":
            check_images(engine, prompts)
        if self.model.images is False:
            raise UserError(f"{where}: model.images=false cannot be honoured; leave it out")
        if not self.is_here:
            return
        self.model = self.model.model_copy(update={"images": True})
        if (obstacle := why_no_images(self._skeleton)) is not None:
            raise UserError(
                f"{where}, and model.path={self.model.path} cannot take them: {obstacle}. Name a model "
                "that sees images, or leave the images out: data.ignore_columns=[images]"
            )

    def facts(self) -> dict[str, Any]:
        """What identifies it, for a manifest. Collective."""
        facts = {"template": read_template(self.data)}
        if self.codec is not None:
            facts["tokenizer"] = tokenizer_hash(self.codec.tokenizer)
        if not self.is_here:
            return facts | {"model": self.section.engine.model or self.model.path}
        _ = self._skeleton  # tells what is wrong with the model's folder, or with its name
        identity = identity_of(_Run(self.model, self.data), self.model.path)
        return facts | {"model": identity, "dtype": self.model.precision}

    @property
    def is_here(self) -> bool:
        """Whether its weights are loaded in these processes."""
        return self.engine_type != "openai" or self.section.scores

    @property
    def shares_model(self) -> bool:
        """Whether completions are written and scored with one copy."""
        return self.engine_type == "transformers"

    @cached_property
    def codec(self) -> PromptCodec | None:
        """None where a server has the chat template and nothing is scored."""
        if self.section.engine.api == "chat" and not self.is_here:
            return None
        return PromptCodec(load_tokenizer(self.model), self.data, end_of_turn_ids(self.model))

    @cached_property
    def _skeleton(self) -> Any:
        return load_skeleton(self.model)

    @property
    def needs_equal_lengths(self) -> bool:
        """Whether padding would change what it writes: state is carried along it."""
        return self.shares_model and bool(carried_state(self._skeleton))

    def encode(self, prompts: Sequence[Prompt]) -> Encoded:
        """Token ids of the prompts that fit. Raises UserError."""
        if self.codec is None:
            return Encoded(list(range(len(prompts))), [[] for _ in prompts], [])
        self.codec.check(prompts)
        most, limits = self.data.max_length, f"data.max_length={self.data.max_length}"
        positions = positions_of(self._skeleton) if self.is_here else None
        if positions is not None and positions < most:
            most, limits = positions, f"the model's {positions} positions"
        new = self.section.max_new_tokens
        if new >= most:
            raise UserError(
                f"sample.max_new_tokens={new} leaves no room for a prompt within {limits}: lower it"
                + ("" if positions == most else f", or set data.max_length={2 * new} or more")
            )
        limits = f"{limits} and sample.max_new_tokens={new}"
        refuse, skip = self.section.long_prompts == "error", self.data.on_bad_row == "skip"
        return encode_all(self.codec, prompts, most - new, limits, refuse, skip)

    def stop_ids(self, prompt: Prompt) -> list[int]:
        return [] if self.codec is None else self.codec.stop_ids(prompt)

    def engine(self) -> Engine:
        """What writes completions, its model loaded. Raises UserError."""
        if self.engine_type == "openai":
            return ServerEngine(self.section, self.model.path, self.codec)
        if self.engine_type == "vllm":
            return VllmEngine(self.model, self.codec, self.section)
        return TransformersEngine(self.scoring, self.codec, self.section)

    @cached_property
    def scoring(self) -> ScoringModel:
        """The model, whole on this rank. Raises UserError."""
        device = distributed.device()
        attention = self._attention(device)
        scoring = load_model(self.model, attention=attention).to(device)
        check_vocabulary(scoring, self.codec.tokenizer)
        check_loaded(scoring.causal_lm, self.model.path, "model.path", alone=True)
        return scoring.requires_grad_(False).eval()

    def _attention(self, device) -> str:
        """The one that is asked for where it can generate; else the one that suits a padded batch."""
        architecture, dtype = architecture_of(self._skeleton), self.model.torch_dtype
        try:
            return choose_attention(
                self.model.attention, "padded", device, dtype, architecture
            ).name
        except UserError:
            chosen = choose_attention("auto", "padded", device, dtype, architecture)
            say(
                f"model.attention={self.model.attention} is for training; sampling uses {chosen.name}"
            )
            return chosen.name

    def close(self) -> None:
        """Give back the model's memory."""
        self.__dict__.pop("scoring", None)
