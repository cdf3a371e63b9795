"""Whether a configuration, its models, the tokenizer and the data fit together.

check              everything that configuration files alone can tell
choose             the layout of a run and the attention of its models
check_vocabulary   tokenizer against model
check_positions    data against model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.errors import UserError
from dpo_fast.models import ScoringModel
from dpo_fast.models.architecture import (
    Architecture,
    architecture_of,
    choose_attention,
    choose_layout,
)
from dpo_fast.models.attention import NAMES
from dpo_fast.models.checkpoint import is_folder
from dpo_fast.models.fp8 import check_fp8
from dpo_fast.models.layers import check_layers
from dpo_fast.models.load import load_skeleton
from dpo_fast.models.own_losses import balancing_coefficient, check_own_losses
from dpo_fast.models.precision import choose_dtype
from dpo_fast.models.quantised import check_whole_weights
from dpo_fast.models.quantization import check_quantization
from dpo_fast.models.tiles import check_tiles
from dpo_fast.models.ulysses import check_heads
from dpo_fast.ops.dispatch import Choice, choose_implementation
from dpo_fast.references import ReferenceModel
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import find_checkpoint
from dpo_fast.training.config import RunConfig, check_batch_sizes
from dpo_fast.training.console import say
from dpo_fast.training.hub import check_hub
from dpo_fast.training.loggers import check_loggers
from dpo_fast.training.optimisers import check_optim
from dpo_fast.training.splits import Split
from dpo_fast.training.zero_checks import check_zero

Skeletons = Mapping[str | None, PreTrainedModel]


@dataclass(frozen=True)
class Choices:
    """What a run uses.

    attentions: of each model, by its path; of the policy under None.
    balancing: weight of the balancing loss of experts.
    """

    dtype: Choice
    layout: Choice
    attentions: Mapping[str | None, Choice]
    balancing: float = 0.0

    @property
    def attention(self) -> Choice:
        """The attention of the policy."""
        return self.attentions[None]

    def attention_of(self, model: ReferenceModel) -> Choice:
        """The attention of a reference, whose architecture may be another one."""
        return self.attentions[model.path]

    def applied(self, config: RunConfig) -> RunConfig:
        """The configuration with dtype, layout and ZeRO stage that were chosen in place of `auto`.

        And with the coefficient of the balancing loss that the model's own configuration asks for.
        """
        model = config.model.model_copy(update={"dtype": self.dtype.name})
        if self.balancing:
            model = model.model_copy(update={"router_aux_loss_coef": self.balancing})
        train = config.train.model_copy(update={"layout": self.layout.name})
        config = config.model_copy(update={"model": model, "train": train})
        parallel = config.parallel.model_copy(update={"zero_stage": config.zero_stage})
        return config.model_copy(update={"parallel": parallel})

    def tell(self) -> None:
        """A line for each choice. Collective.

        Raises:
            UserError: ranks chose different dtypes.
        """
        if distributed.any_rank(self.dtype.name == "bf16") and distributed.any_rank(
            self.dtype.name == "fp32"
        ):
            raise UserError(
                "model.dtype=auto means bf16 on some ranks and fp32 on others, whose CPUs have no "
                "instructions for bf16; name one of them"
            )
        say(f"dtype {self.dtype.name}: {self.dtype.reason}")
        say(f"layout {self.layout.name}: {self.layout.reason}")
        say(f"attention {self.attention.name}: {self.attention.reason}")
        if self.balancing:
            say(f"balancing loss of the experts: {self.balancing:g} times, over the global batch")


def check_run(config: RunConfig) -> Choices:
    """Check what can be told without a process group, a tokenizer or a weight.

    Raises:
        UserError: naming the option, its value and the remedy.
    """
    check_batch_sizes(config, distributed.world_size())
    if config.model.tokenizer is not None:
        is_folder(config.model.tokenizer, "model.tokenizer")
    skeletons = load_skeletons(config)
    choices, device = choose(config, skeletons), distributed.device()
    check_layers(config.model, skeletons[None], device)
    check_tiles(config.model, skeletons[None])
    check_fp8(config.model, skeletons[None], device)
    check_recomputed(config)
    check_own_losses(skeletons[None].config)
    check_quantization(config.model, device)
    merged = config.train.merge_lora or config.model.adapter == "merge"
    check_whole_weights(skeletons[None].config, config.model, merged)
    for model in config.second_models:
        check_layers(model.section(config.model), skeletons[model.path], device)
        check_tiles(model.section(config.model), skeletons[model.path])
        check_fp8(model.section(config.model), skeletons[model.path], device)
    dtype = config.model.torch_dtype
    choose_implementation("linear_logp", device, dtype, config.train.implementation)
    check_loggers(config)
    check_hub(config)
    check_optim(config, device)
    check_zero(config)
    find_checkpoint(config.train.resume_from_checkpoint, config.train.output_dir)
    return choices


def check_recomputed(config: RunConfig) -> None:
    """Raises UserError if products in fp8 would keep weights that ZeRO 3 lets go of.

    Theirs keep the weights that they have gathered until the backward pass. Where layers are recomputed
    these are those of one layer.
    """
    model = config.model
    if model.fp8 is None or config.zero_stage < 3:
        return
    named = {"gradient_checkpointing": False, "checkpoint_layers": model.checkpoint_layers}
    for option, value in named.items():
        if getattr(model, option) == value and value is not None:
            raise UserError(
                f"model.fp8={model.fp8} with parallel.zero_stage=3 keeps the weights that a layer has "
                f"gathered until its backward pass, unless it is recomputed, and model.{option}="
                f"{str(value).lower()} says that not all are: remove that, or set parallel.zero_stage=2"
            )


def load_skeletons(config: RunConfig) -> Skeletons:
    """Every model of a run on the meta device, by its path; the policy stands under None."""
    skeletons = {None: load_skeleton(config.model)}
    for model in config.second_models:
        if model.path is not None:
            skeletons[model.path] = load_skeleton(model.section(config.model), model.option)
    return skeletons


def choose(config: RunConfig, skeletons: Skeletons | None = None) -> Choices:
    """Choose the layout of a run and the attention of each model. No weight is read.

    skeletons: the models of the run, if they are there already.

    Raises:
        UserError: an option that cannot be honoured for one of the models, with the remedy.
    """
    skeletons = load_skeletons(config) if skeletons is None else skeletons
    architectures = {path: architecture_of(model) for path, model in skeletons.items()}
    if config.parallel.sequence_parallel > 1:
        check_sequence_parallel(config, skeletons, architectures)
    # All models score the same batches, so the layout is one that all of them allow.
    layouts = [choose_layout(config.train.layout, each) for each in architectures.values()]
    layout = min(layouts, key=lambda choice: list(LAYOUTS).index(choice.name))
    # Slices are of one row, whatever the layout.
    laid_out = layout.name if config.parallel.sequence_parallel == 1 else "packed"
    common = (laid_out, distributed.device(), config.model.torch_dtype)
    attentions = {
        path: choose_attention(config.model.attention, *common, architecture)
        for path, architecture in architectures.items()
    }
    balancing = balancing_coefficient(config.model, skeletons[None])
    return Choices(choose_dtype(config.model.dtype), layout, attentions, balancing)


def check_sequence_parallel(
    config: RunConfig, skeletons: Skeletons, architectures: Mapping[str | None, Architecture]
) -> None:
    """Raises UserError for a model whose rows the ranks of a group cannot share."""
    size, attention = config.parallel.sequence_parallel, config.model.attention
    for path, skeleton in skeletons.items():
        check_heads(skeleton.config, size)
        if (obstacle := architectures[path].alone) is not None:
            raise UserError(
                f"parallel.sequence_parallel={size} cannot be honoured for {architectures[path].name}: "
                f"{obstacle}. Set parallel.sequence_parallel=1"
            )
    if attention not in ("auto", *NAMES):
        raise UserError(
            f"model.attention={attention} cannot be honoured with parallel.sequence_parallel={size}, for "
            f"which all sequences of a micro-batch stand in one row: set model.attention=auto, "
            f"{', '.join(list(NAMES)[:-1])} or {list(NAMES)[-1]}"
        )


def check_vocabulary(
    model: ScoringModel, tokenizer: PreTrainedTokenizerBase, option: str = "model.path"
) -> None:
    """Raises UserError if the tokenizer makes ids that the model has no row for.

    option: the configuration key that names the model.
    """
    rows = model.causal_lm.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of {rows}: they do not "
            f"belong together; check {option} and model.tokenizer"
        )


def check_positions(model: ScoringModel, splits: Iterable[Split]) -> None:
    """Check that the model can place every token of the longest sequence.

    Raises:
        UserError: a sequence is longer than the model has positions for. Or it is so long that longrope
            switches its factors: they go by the longest sequence of a batch, so the other sequences of
            that batch would get other log-probs than elsewhere.
    """
    config = model.causal_lm.config.get_text_config()
    longest = max(split.longest for split in splits)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserError(
            f"the longest sequence has {longest} tokens, but the model has {limit} positions "
            f"(max_position_embeddings); set data.max_length={limit} or less"
        )
    switch = min(_longrope_switches(config), default=longest)
    if longest > switch:
        raise UserError(
            f"the longest sequence has {longest} tokens; beyond {switch} "
            "(original_max_position_embeddings) longrope changes the positions of every sequence in the "
            "batch, so that log-probs would depend on what shares a batch and a stored reference would "
            f"not fit; set data.max_length={switch} or less"
        )


def _longrope_switches(config: PreTrainedConfig) -> Iterator[int]:
    """Lengths at which rotary factors switch; a model may have one set for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    for rope in kinds:
        if rope.get("rope_type") == "longrope":
            yield rope["original_max_position_embeddings"]
