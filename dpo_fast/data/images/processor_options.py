"""data.images_kwargs: what an image processor knows, and how it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_fast.errors import UserError

# Two options of processors that know images by their pixels, and their names in `size`.
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def check_kwargs(processor: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises UserError for options that the image processor passes over."""
    pictures = processor.image_processor
    known = _known(pictures)
    if known is None:
        return  # one of another library: it refuses what it does not know, or not
    known = {*known, *(getattr(processor, "images_kwargs", None) or ())}
    known -= {"return_tensors", "device"}
    for name, value in kwargs.items():
        if name not in known:
            raise UserError(
                f"data.images_kwargs.{name}={value!r}: {type(pictures).__name__} has "
                f"no such option; choose from {', '.join(sorted(known))}"
            )
    _check_bounds(pictures, kwargs)


def _check_bounds(pictures: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises UserError for one bound that the other one, the processor's own, contradicts."""
    given = {name: kwargs[name] for name in EDGES if kwargs.get(name) is not None}
    if not given or token_side(pictures) is None:
        return
    own = {name: value for name, value in pixel_bounds(pictures.size).items() if value}
    bounds = own | given
    if len(bounds) == 2 and bounds["min_pixels"] > bounds["max_pixels"]:
        (name, value), (other,) = next(iter(given.items())), own.keys() - given.keys() or {""}
        kind = type(pictures).__name__
        whose = f"the {other} of {kind}" if other else "max_pixels"
        limit = own[other] if other else given["max_pixels"]
        raise UserError(
            f"data.images_kwargs.{name}={value} cannot be honoured: {whose} is {limit}; set "
            f"data.images_kwargs.{other or 'max_pixels'} too, so that min_pixels is not the larger"
        )


def call_kwargs(processor: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a call of the processor takes them.

    `min_pixels` and `max_pixels` are deprecated names there, for what `size` has.
    """
    found, size = dict(kwargs), getattr(processor.image_processor, "size", None)
    edges = {EDGES[name]: found.pop(name) for name in EDGES if name in found and _has_edges(size)}
    if edges:
        given = kwargs.get("size") if isinstance(kwargs.get("size"), Mapping) else {}
        found["size"] = {edge: size[edge] for edge in EDGES.values()} | dict(given) | edges
    return found


def token_side(pictures: Any) -> int | None:
    """Pixels of a token's side, of image processors that know images by their pixels; None of others."""
    if not _has_edges(getattr(pictures, "size", None)):
        return None
    sides = [getattr(pictures, name, None) for name in ("patch_size", "merge_size")]
    return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else None


def pixel_bounds(size: Any) -> dict[str, Any]:
    """`min_pixels` and `max_pixels` by their names in `size`."""
    return {ours: size[edge] for ours, edge in EDGES.items()} if _has_edges(size) else {}


def _has_edges(size: Any) -> bool:
    try:
        return all(size[edge] for edge in EDGES.values())
    except (TypeError, KeyError, AttributeError):
        return False


def _known(pictures: Any) -> Any:
    return getattr(getattr(pictures, "valid_kwargs", None), "__annotations__", None)
