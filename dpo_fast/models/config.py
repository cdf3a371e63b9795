"""The sections `model` and `model.lora` of the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    field_validator,
    model_serializer,
    model_validator,
)

from dpo_fast.models.adapter_path import GIVEN, linked
from dpo_fast.models.checkpoint import is_adapter, read_adapter_config
from dpo_fast.models.hub import with_revision
from dpo_fast.models.lora_section import LoraSection
from dpo_fast.models.quantization_section import QuantizationSection

if TYPE_CHECKING:
    import torch

TILE_TOKENS = 4096  # products of so many rows run at a GPU's peak

ModelPath = Annotated[str, AfterValidator(os.path.expanduser)]  # a folder, or a hub id


class ModelSection(BaseModel):
    """Which model is trained, and how its forward runs."""

    model_config = ConfigDict(extra="forbid")

    path: ModelPath = Field(
        description="a model folder as written by save_pretrained, a hub id, also as org/name@revision, or "
        "the folder of an adapter (peft) whose adapter_config.json names its base"
    )
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of the hub id in path, and of its tokenizer; a run notes it as "
        "path: org/name@revision. Default: main",
        json_schema_extra={"refused": "where path is a folder, or names one"},
    )
    adapter: Literal["continue", "merge"] | None = Field(
        default=None,
        description="what becomes of the adapter in path. continue (default): it is trained further, and "
        "the reference is that adapter frozen; merge: it is merged into its base, and training starts anew "
        "from there, of the whole model or of new adapters (lora)",
        json_schema_extra={"refused": "where path is no adapter; continue with lora"},
    )
    adapter_path: ModelPath | None = Field(
        default=None,
        description="an adapter (peft), a folder or a hub id, on the model in path: in place of an adapter "
        "in path that names its base itself",
        json_schema_extra={"refused": "where path is an adapter; with lora, unless adapter=merge"},
    )
    adapters: dict[str, ModelPath] | None = Field(
        default=None,
        description="adapters (peft) that stay active and frozen under the one that is trained, {name: a "
        "folder or a hub id}; the reference has them, too, and each is exported by its name",
        json_schema_extra={"refused": "without an adapter to train; with adapter=merge"},
    )
    tokenizer: ModelPath | None = Field(
        default=None,
        description="tokenizer folder or hub id, also as org/name@revision; default: path",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="dtype of weights and activations; auto: bf16 on a GPU, and on a CPU that has "
        "instructions for its products (AVX512_BF16, AMX, Arm's BF16), else fp32",
    )
    attention: str = Field(
        default="auto",
        description="attention implementation of transformers (sdpa, eager, flash_attention_2, ...); "
        "auto: sdpa where every sequence has a row of its own; where sequences share a row, a varlen "
        "kernel or else flex_attention on a GPU, and SDPA sequence by sequence on a CPU",
    )
    gradient_checkpointing: bool | None = Field(
        default=None, description="recompute activations in backward; default: above 1e9 parameters"
    )
    checkpoint_layers: StrictInt | list[StrictInt] | None = Field(
        default=None,
        description="decoder layers whose activations are recomputed: a number means the first so "
        "many, a list the layers of these indices; default: all. Turns gradient_checkpointing on",
        json_schema_extra={"refused": "with gradient_checkpointing=false"},
    )
    activation_offloading: bool = Field(
        default=False,
        description="what is kept of recomputed layers, their inputs, waits in CPU memory until the "
        "backward pass. Turns gradient_checkpointing on",
        json_schema_extra={"refused": "with gradient_checkpointing=false"},
    )
    tiled_mlp: StrictBool | StrictInt = Field(
        default=False,
        description="run MLPs and norms in tiles of so many tokens, and recompute them in backward: for "
        "rows so long that these take most of the memory; true: 4096 tokens",
        json_schema_extra={"refused": "with torch_compile; for models with experts"},
    )
    use_liger_kernel: bool = Field(
        default=False,
        description="liger-kernel's RMSNorm, RoPE and MLP in place of the model's",
        json_schema_extra={"refused": "with torch_compile; without a GPU"},
    )
    torch_compile: bool = Field(
        default=False,
        description="compile the blocks of the decoder layers with torch.compile",
        json_schema_extra={"refused": "with use_liger_kernel; with parallel.zero_stage=3"},
    )
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = Field(
        default=None,
        description="compute the products of the decoder's linear layers in 8-bit floats, by this recipe "
        "of torchao's float8 training; head, log-probs and stored weights stay as they are; true: "
        "tensorwise",
        json_schema_extra={
            "refused": "below compute capability 8.9, rowwise ones below 9.0; without torchao; with "
            "model.dtype=fp32; with parallel.zero_stage=3 where layers are not recomputed"
        },
    )
    router_aux_loss_coef: float | None = Field(
        default=None,
        ge=0,
        description="weight of the balancing loss of experts, over all tokens of the global batch; "
        "default: that of the model's configuration where output_router_logits is true, else 0",
        json_schema_extra={"refused": "without experts; above 0 with output_router_logits=false"},
    )
    output_router_logits: bool | None = Field(
        default=None,
        description="true: add the balancing loss with the coefficient of the model's configuration; "
        "false: train without the one that it asks for; default: as there",
        json_schema_extra={"refused": "true without experts"},
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    images: bool | None = Field(
        default=None,
        description="load what sees images, the vision tower, beside the text model; default: where the "
        "data has images",
        json_schema_extra={
            "refused": "false for data with images; true for a model that sees none"
        },
    )
    freeze_vision_tower: bool = Field(
        default=True,
        description="do not train the vision tower; new adapters leave it and its projector out, too",
    )
    freeze_multi_modal_projector: bool = Field(
        default=True, description="do not train what leads from the vision tower to the text model"
    )
    lora: LoraSection | None = Field(
        default=None, description="train adapters instead of the model"
    )
    quantization: QuantizationSection | None = Field(
        default=None,
        description="load the base, and a reference model, with few bits a weight, for adapters on top "
        "(QLoRA)",
        json_schema_extra={
            "refused": "without adapters; with parallel.zero_stage=3 and parallel.offload_parameters"
        },
    )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained: new ones, or the one in `path`."""
        return self.lora is not None or (is_adapter(self.path) and self.adapter != "merge")

    @property
    def told(self) -> str:
        """`path` for people: what was given, where it is a folder of the cache."""
        if self._given is None or self.path != self._given[1]:
            return self.path
        return str(self._given[0]["adapter_path"] or self._given[0]["path"])

    @property
    def told_base(self) -> str | None:
        """The base for people and for files, as it was given, where `path` is a folder of the cache."""
        if self._given is None or self.path != self._given[1]:
            return None
        path = str(self._given[0]["path"])
        if not is_adapter(path):
            return path
        return read_adapter_config(path, "model.path")["base_model_name_or_path"]

    @property
    def whole_weights(self) -> str | None:
        """The option, if there is one, that needs every weight whole on each rank: ZeRO up to stage 2."""
        if self.quantization is not None:
            return "model.quantization"
        rows = self.lora is not None and self.lora.trainable_token_indices
        return "model.lora.trainable_token_indices" if rows else None

    @property
    def tile_tokens(self) -> int | None:
        """Tokens of a tile of MLPs and norms; None: they run whole."""
        return TILE_TOKENS if self.tiled_mlp is True else self.tiled_mlp or None

    @property
    def precision(self) -> str:
        """bf16 or fp32: `dtype`, or what `auto` means on this machine."""
        from dpo_fast.models.precision import choose_dtype

        return choose_dtype(self.dtype).name

    @property
    def torch_dtype(self) -> torch.dtype:
        """`precision` as PyTorch has it."""
        from dpo_fast.models.precision import DTYPES

        return DTYPES[self.precision]

    @field_validator("fp8", mode="before")
    @classmethod
    def _recipe(cls, value: Any) -> Any:
        """true and false are torchao's first recipe and none."""
        return {True: "tensorwise", False: None}[value] if isinstance(value, bool) else value

    # What was given for the options of `GIVEN`, and the folder that `path` is for it.
    _given: tuple[dict[str, Any], str] | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def _resolve(cls, values: Any, build: Callable[[Any], ModelSection]) -> ModelSection:
        """`path` is the folder of the cache that base and adapters are linked into."""
        given = with_revision(values)
        section = build(found := linked(given))
        if found is not given:
            section._given = {name: given.get(name) for name in GIVEN}, section.path
        return section

    @model_serializer(mode="wrap")
    def _as_given(self, dump: Callable[[ModelSection], dict[str, Any]]) -> dict[str, Any]:
        """What was given stands in a file: the cache may be another one, or empty, where it is read."""
        tree = dump(self)
        if self._given is None or tree.get("path") != self._given[1]:
            return tree
        return tree | {n: v for n, v in self._given[0].items() if n in tree or v is not None}

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        self._check_adapter()
        if self.router_aux_loss_coef and self.output_router_logits is False:
            raise ValueError(
                f"model.router_aux_loss_coef={self.router_aux_loss_coef} adds the balancing loss of "
                "experts, and model.output_router_logits=false leaves it out; remove one of them"
            )
        layers = self.checkpoint_layers
        if layers is not None and self.gradient_checkpointing is False:
            raise ValueError(
                f"model.checkpoint_layers={layers} chooses layers to recompute, but "
                "model.gradient_checkpointing=false; remove one of them"
            )
        if layers == [] or (
            min(layers) < 0 if isinstance(layers, list) else layers is not None and layers < 1
        ):
            raise ValueError(
                f"model.checkpoint_layers={layers}: expected how many layers, 1 or more, or a list of "
                "indices from 0; to recompute none set model.gradient_checkpointing=false"
            )
        if self.activation_offloading and self.gradient_checkpointing is False:
            raise ValueError(
                "model.activation_offloading=true moves the inputs of layers that are recomputed, but "
                "model.gradient_checkpointing=false; remove one of them"
            )
        self._check_tiles()
        if self.use_liger_kernel and self.torch_compile:
            raise ValueError(
                "model.use_liger_kernel=true and model.torch_compile=true fuse the same operations; "
                "choose one"
            )
        return self

    def _check_tiles(self) -> None:
        tiles = self.tiled_mlp
        if tiles is not False and tiles < 1:
            raise ValueError(
                f"model.tiled_mlp={tiles}: expected tokens in a tile, 1 or more; true means {TILE_TOKENS}, "
                "false that nothing is cut"
            )
        if tiles and self.torch_compile:
            raise ValueError(
                f"model.tiled_mlp={tiles} and model.torch_compile=true: a compiled block is not cut into "
                "tiles; choose one"
            )

    def _check_adapter(self) -> None:
        if self.quantization is not None and not self.has_adapters:
            raise ValueError(
                f"model.quantization.load_in_{self.quantization.bits}bit=true: quantised weights are not "
                "trained themselves; set model.lora to train adapters on them"
            )
        if self.adapter is not None and Path(self.path).is_dir() and not is_adapter(self.path):
            raise ValueError(
                f"model.adapter={self.adapter}, but model.path={self.path} holds no adapter_config.json; "
                "leave the option out"
            )
        if self.lora is not None and is_adapter(self.path) and self.adapter != "merge":
            raise ValueError(
                f"model.path={self.path} is an adapter and model.lora makes new ones: remove model.lora to "
                "train that adapter further, or set model.adapter=merge to merge it and start new ones"
            )
