"""Which parts of a model texts and images come by: what is trained of them, and that none is missing."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from dpo_fast.errors import UserError
from dpo_fast.models.checkpoint import adapter_vocabulary
from dpo_fast.models.config import ModelSection
from dpo_fast.models.decoder import decoder_of, other_senses
from dpo_fast.models.scoring import ScoringModel
from dpo_fast.models.vision import Vision, multimodal_of, parts_of


def settle_parts(scoring: ScoringModel, section: ModelSection) -> None:
    """Freeze what nothing reaches, and of the parts that see images those that the section says.

    Raises:
        UserError: the model must see images and cannot.
    """
    freeze_unreached(scoring.causal_lm)
    if not section.images:
        return
    try:
        scoring.vision = Vision(scoring.causal_lm)
    except UserError as error:
        raise UserError(f"model.path={section.path}: {error}") from error
    scoring.vision.freeze(section.freeze_vision_tower, section.freeze_multi_modal_projector)


def check_found(
    model: PreTrainedModel,
    missing: Iterable[str],
    path: str,
    option: str,
    images: bool | None = False,
) -> None:
    """Raises UserError if texts, or images, reach weights that the checkpoint lacks: they are random."""
    reached = reached_by_texts(model) | (reached_by_images(model) if images else set())
    own = model.state_dict(keep_vars=True)
    # An adapter may bring its own embeddings and head, and nothing else.
    names = sorted(name for name in missing if id(own.get(name)) in reached)
    if names and adapter_vocabulary(path) is None:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"{option}={path}: the files lack {len(names)} of the weights of {type(model).__name__}, "
            f"{some}, which transformers would fill with random numbers; name the folder of a whole causal "
            "language model"
        )


def reached_by_texts(model: PreTrainedModel) -> set[int]:
    """The ids of the parameters that texts alone come by: of the decoder, the head and the embeddings."""
    decoder = decoder_of(model)
    parts = (decoder, model.get_output_embeddings(), model.get_input_embeddings())
    beside = {id(p) for part in other_senses(decoder) for p in part.parameters()}
    return {id(p) for part in parts if part is not None for p in part.parameters()} - beside


def reached_by_images(model: PreTrainedModel) -> set[int]:
    """The ids of the parameters that images come by, beside the decoder."""
    inner = multimodal_of(model)
    parts = {} if inner is None else parts_of(inner, decoder_of(model))
    return {id(parameter) for part in parts.values() for parameter in part.parameters()}


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze what is neither in the decoder nor in the head: weight decay alone would change it."""
    reached = reached_by_texts(model)
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)
