"""A causal language model that scores tokens instead of making logits."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.data.image_batch import ImageBatch
from dpo_fast.data.tree import Spans
from dpo_fast.errors import UserError
from dpo_fast.models import recurrent
from dpo_fast.models.adapters import as_started
from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.by_sequence import serve_by_sequence
from dpo_fast.models.decoder import decoder_of, wants_beside_ids
from dpo_fast.models.handed import serve_handed
from dpo_fast.models.own_logits import check_own_logits
from dpo_fast.models.routers import Routers
from dpo_fast.models.ulysses import SequenceGroup
from dpo_fast.models.vision import Vision
from dpo_fast.modules.head import FusedHead, check_policy
from dpo_fast.ops.linear_logp.call import HeadOptions
from dpo_fast.ops.take import take

# Keys of configurations for what a model does to its logits.
SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_mup_width_multiplier",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class ScoringModel(nn.Module):
    """A transformers causal LM whose `lm_head` is a `FusedHead`.

    `forward` runs the backbone once over a `ScoredBatch`, and the head over its scored rows only. It
    is one call, so that DeepSpeed's hooks gather and release the weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        implementation: str = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, FSDPModule):
            raise UserError(
                f"{type(model).__name__} is sharded by fully_shard already, and would gather nothing when "
                "its parts are called: make the ScoringModel first, and shard that"
            )
        head = model.get_output_embeddings()
        if head is None or not hasattr(head, "weight"):
            raise UserError(
                f"{type(model).__name__} has no linear lm_head to score with; expected a "
                "decoder-only causal language model"
            )
        if (wanted := wants_beside_ids(decoder_of(model))) is not None:
            raise UserError(
                f"{type(model).__name__} cannot be scored: {wanted}; name another model"
            )
        self.routers = Routers(model)
        self.head = {"implementation": implementation, "workspace_bytes": workspace_bytes}
        self.group: SequenceGroup | None = None  # ranks that score every batch with this one
        self.vision: Vision | None = None  # what sees images; None: texts alone are scored
        fuse_head(model, **self.head)
        recurrent.serve(model)
        serve_by_sequence(model)
        serve_handed(model)
        self.model = model

    def set_adapted(self, model: nn.Module) -> None:
        """Take a PeftModel round the model for the model. Copies of the head are fused as well."""
        self.model = model
        fuse_head(self.causal_lm, **self.head)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, below peft's wrapper if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def as_started(self) -> contextlib.AbstractContextManager:
        """A context in which a model with adapters computes as before its first update."""
        return as_started(self.model)

    def forward(
        self, *arguments, copies_N: Tensor | None = None, balanced: bool = False, **options
    ) -> dict[str, Tensor]:
        """As `scoring_forward`; with the `copies_N` of the batch also what routers of experts gave.

        balanced: what the gradient of their balancing loss needs, too (`Heard.outputs`).
        """
        check_policy(self)
        if copies_N is not None and self.group is not None:
            copies_N = self.group.slice_of(copies_N)
        with self.routers.listening(copies_N, balanced) as heard:
            options |= {"group": self.group, "vision": self.vision}
            outputs = scoring_forward(self.causal_lm, *arguments, **options)
        if heard is None:
            return outputs
        of_routers = heard.outputs()
        return outputs | (of_routers if self.group is None else self.group.summed(of_routers))

    def train(self, mode: bool = True) -> ScoringModel:
        """As a module's; a vision tower that is frozen goes on as in evaluation."""
        super().train(mode)
        if getattr(self, "vision", None) is not None:
            self.vision.still()
        return self


def fuse_head(
    model: PreTrainedModel,
    implementation: str = "auto",
    workspace_bytes: int | None = None,
    temperature: float = 1.0,
) -> None:
    """Put a `FusedHead` over the weights of a model's `lm_head`; where peft trains a copy, over both.

    temperature: of the log-probabilities; logits stay as they are.

    Raises:
        UserError: a head that is not a plain linear layer: an adapter on it, or quantised. Or the model
            does something to its logits that is not known.
    """

    def fused(head: nn.Module) -> FusedHead:
        weight = getattr(head, "weight", None)
        adapted = hasattr(head, "base_layer") or hasattr(head, "token_adapter")
        plain = weight is not None and weight.is_floating_point() and weight.dim() <= 2
        if adapted or not plain:
            raise UserError(
                f"the lm_head of {type(model).__name__} is a {type(head).__name__}; expected a linear "
                "layer with no adapter and no quantisation: leave lm_head out of target_modules and "
                "trainable_token_indices (modules_to_save may have it), and out of quantisation"
            )
        settings = {
            "options": replace(head_options_of(model), temperature=temperature),
            "implementation": implementation,
            "workspace_bytes": workspace_bytes,
        }
        managed = getattr(head, "_is_fsdp_managed_module", False)
        # Where transformers ties weights over two units, one gathers a copy that no optimiser updates. A
        # new module is in no unit, and gathers the weight itself.
        if managed and weight is not getattr(model.get_input_embeddings(), "weight", None):
            # FSDP's DTensors lie as those of tensor parallelism; its plan marks the modules.
            planned = getattr(head, "_is_hooked", False)
            return FusedHead.in_place(head, tensor_parallel=planned, **settings)
        planned = isinstance(weight, DTensor) and Shard(0) in weight.placements and not managed
        return FusedHead(weight, getattr(head, "bias", None), tensor_parallel=planned, **settings)

    head = model.get_output_embeddings()
    copies = _trained_copies(head)
    if copies is None:
        model.set_output_embeddings(fused(head))
        check_own_logits(model, head_options_of(model))
        return
    head.original_module = fused(head.original_module)
    for name, copied in copies.items():
        copies[name] = fused(copied)


def scoring_head(model: PreTrainedModel, temperature: float = 1.0) -> nn.Module:
    """A model's head, which scores: one that took its place since, as after a resize, is fused as well.

    Raises:
        UserError: as `fuse_head`, such as for an adapter that was put on it since.
    """
    head = model.get_output_embeddings()
    if not all(
        isinstance(each, FusedHead) for each in (_trained_copies(head) or {"": head}).values()
    ):
        fuse_head(model, temperature=temperature)
    return model.get_output_embeddings()


def _trained_copies(head: nn.Module) -> nn.ModuleDict | None:
    """The copies of a head that peft trains whole, by adapter; None without."""
    return getattr(head, "_modules", {}).get("modules_to_save")


def scoring_forward(
    causal_lm: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    spans: Spans | None,
    rows_U: Tensor,
    targets_U: Tensor,
    predictions_T: Tensor,
    extras: tuple[str, ...] = (),
    group: SequenceGroup | None = None,
    images: ImageBatch | None = None,
    vision: Vision | None = None,
    own: bool = False,
) -> dict[str, Tensor]:
    """Token outputs, {"logp": fp32 [T], **extras}, of a model with a `FusedHead`.

    The head makes every prediction once, however many scored tokens are of it. The other arguments are
    the fields of a `ScoredBatch`; with a group of ranks, of the same one on each.

    vision: of the model, where there are images.
    own: of rows of their own, have transformers find positions (and with images masks) for itself.

    Raises:
        UserError: a batch with images, and a model that sees none or ranks that share its rows. Or states
            of another size than the head's.
    """
    decoder, count, own_U = decoder_of(causal_lm), len(rows_U), None
    images = _images(images, input_ids, group, vision)
    if group is not None:
        input_ids, position_ids, spans, own_U, rows_U = group.cut(
            input_ids, position_ids, spans, rows_U
        )
        attention_mask, targets_U = None, targets_U[own_U]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images is not None and own:
        forward, places = vision.own, {"images": images}
    elif images is not None:
        forward, places = vision.hidden, {"images": images, "spans": spans}
        places["position_ids"] = position_ids
    else:
        forward, places = partial(_decoded, decoder), {}
        if spans is not None:
            places["plan"] = AttentionPlan(spans, input_ids.device, group)
        if not own and _takes_places(decoder):
            places["position_ids"] = position_ids
    # Nothing holds on to the hidden states of all tokens while the head works.
    hidden_UD = take(forward(**batch, **places).flatten(0, 1), rows_U)
    head = causal_lm.get_output_embeddings()
    width = getattr(head.weight, "ds_shape", head.weight.shape)[-1]
    if width != hidden_UD.shape[-1]:
        raise UserError(
            f"{type(causal_lm).__name__} cannot be scored: its decoder gives states of size "
            f"{hidden_UD.shape[-1]}, and its head takes {width}, so that other layers stand between them; "
            "name another model in model.path"
        )
    outputs = head(_in_dtype_of(head, hidden_UD), targets_U, extras)
    if group is not None:
        outputs = group.joined(outputs, own_U, count)
    return {name: take(values_U, predictions_T) for name, values_U in outputs.items()}


def _takes_places(decoder: nn.Module) -> bool:
    """Whether a decoder's own forward takes position_ids; another may stand round it (`handed`)."""
    return "position_ids" in inspect.signature(type(decoder).forward).parameters


def _decoded(decoder: nn.Module, **arguments) -> Tensor:
    return decoder(use_cache=False, **arguments).last_hidden_state


def _images(
    images: ImageBatch | None, input_ids: Tensor, group: SequenceGroup | None, vision: Vision | None
) -> ImageBatch | None:
    """The images that the model sees: where it must see some on every rank, none of a blank one."""
    if images is None:
        return None if vision is None else vision.no_images(input_ids)
    if vision is None:
        raise UserError(
            "a batch has images, and the model is loaded without what sees them: set model.images=true"
        )
    if group is not None:
        raise UserError(
            f"parallel.sequence_parallel={group.size} cannot be honoured for rows with images; set it to 1"
        )
    return images


def _in_dtype_of(head: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states as a head wants them: Mamba's decoder adds up in fp32, and the model casts them."""
    kind = hidden.device.type
    if hidden.dtype != torch.float32 or (kind != "meta" and torch.is_autocast_enabled(kind)):
        return hidden
    return hidden.to(next(head.parameters()).dtype)


def forward_arguments(batch: ScoredBatch) -> dict:
    """The arguments of `ScoringModel.forward` for a batch."""
    names = ("input_ids", "position_ids", "attention_mask", "spans")
    names += ("rows_U", "targets_U", "predictions_T")
    names += () if batch.images is None else ("images",)
    return {name: getattr(batch, name) for name in names}


def head_options_of(model: PreTrainedModel) -> HeadOptions:
    """What a model's own forward does to its logits, read from its configuration.

    Gemma 2 and 3 cap them (`final_logit_softcapping`; RecurrentGemma and xLSTM have other names for it).
    Cohere, Falcon-H1 and Muse multiply them (`SCALES`). Inkling divides them (`DIVISORS`). By
    `logits_scaling` Granite divides them and HyperCLOVA X multiplies them.

    A key counts where the model's own code names it: whole image-text models may leave out what the class
    of their text model does.
    """
    text, named = model.config.get_text_config(), _named_by(model)
    scale = _first_of(text, SCALES, named) or 1.0
    scale /= _first_of(text, DIVISORS, named) or 1.0
    scaling = _first_of(text, ("logits_scaling",), named) or 1.0
    return HeadOptions(
        logit_scale=scale * scaling if text.model_type == "hyperclovax" else scale / scaling,
        softcap=_first_of(text, CAPS, named),
    )


def _first_of(config, names: tuple[str, ...], named: set[str]) -> float | None:
    """The first of these keys that a configuration has a value for, and a model's code names."""
    known = (name for name in names if name in named)
    return next((value for name in known if (value := getattr(config, name, None))), None)


def _named_by(model: PreTrainedModel) -> set[str]:
    """Names and strings in the methods of a model, and of the part of it that holds the head."""
    head = model.get_output_embeddings()
    holders = (part for part in model.modules() if any(each is head for each in part.children()))
    kinds = {kind for part in (model, *holders) for kind in type(part).__mro__}
    kinds -= set(PreTrainedModel.__mro__)
    codes = [
        code
        for kind in kinds
        for method in vars(kind).values()
        if (code := getattr(inspect.unwrap(method), "__code__", None)) is not None
    ]
    named: set[str] = set()
    for code in codes:  # functions inside of others are among their constants
        codes += [each for each in code.co_consts if inspect.iscode(each)]
        named.update(code.co_names, (each for each in code.co_consts if isinstance(each, str)))
    return named
