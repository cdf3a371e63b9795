"""Which tensors of a checkpoint a model was loaded from, and what they are called there.

transformers renames tensors while it loads them, and joins some: the experts of a layer into one, for
example. The text part of an image-text model has other names again. What goes back into a checkpoint
has the names that were found there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from dpo_fast.errors import UserError

# Names of a checkpoint by the model's tensor that they were loaded into.
Places = dict[str, list[str]]


def as_stored(
    model: PreTrainedModel,
    names: Iterable[str],
    state: Mapping[str, Tensor],
    untouched: Collection[str] = (),
) -> tuple[set[str], dict[str, Tensor]]:
    """Trained tensors under the names of a checkpoint.

    model: gives the names of its parameters; its weights are not read.
    names: of all tensors of the checkpoint.
    state: the trained tensors by their names in the model, whole.
    untouched: names of those that nothing has changed: what the checkpoint has of them stays, in its dtype.
        Where it is joined with others, all of them are needed to split it again.

    Returns:
        The names of the checkpoint that these tensors take the place of, and the tensors by name. What
        the checkpoint lacks has the name that transformers gives it.

    Raises:
        UserError: transformers does not know how to give them back.
    """
    names = list(names)
    renamed, converted = _places(model, names)
    as_they_are = {state[name].data_ptr() for name in untouched if name in renamed}
    state = {k: v for k, v in state.items() if v.data_ptr() not in as_they_are}
    own = {source: state[name] for name in state for source in renamed.get(name, ())}
    rest = {name: tensor for name, tensor in state.items() if name not in renamed}
    sources = {source for name in rest for source in converted.get(name, ())}
    others = revert_weight_conversion(model, rest)
    if lost := sorted(sources - others.keys()):
        raise UserError(
            f"the checkpoint has {len(lost)} tensors that transformers joins while it loads them and does "
            f"not split again, such as {lost[0]}: load the model with transformers, save it with "
            "save_pretrained to another folder and train that"
        )
    return {*own, *sources}, own | _without_copies(others, own, sources)


def _places(model: PreTrainedModel, names: list[str]) -> tuple[Places, Places]:
    """Where tensors were loaded: those under another name or the same, and those that were converted.

    It also leaves in the model the conversions that these names need: the ones that `from_pretrained`
    leaves there at ZeRO stage 3 may be of other forms of the checkpoint.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    own = dict.fromkeys(model.state_dict(keep_vars=True), True)
    prefix = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": own}
    renamed, converted = defaultdict(list), defaultdict(list)
    # In the order of `from_pretrained`: a renaming may depend on those before.
    for name in sorted(names, key=dot_natural_key):
        found, pattern = rename_source_key(name, renamings, converters, **prefix)
        if found not in own and name in own:
            found, pattern = rename_source_key(name, [], [], **prefix)
        if found in own:
            (renamed if pattern is None else converted)[found].append(name)
    model._weight_conversions = [each for each in conversions if each.was_used()]
    return renamed, converted


def _without_copies(
    others: dict[str, Tensor], own: dict[str, Tensor], sources: set[str]
) -> dict[str, Tensor]:
    """One name for each tensor: of tied ones those that the checkpoint has."""
    present = {tensor.data_ptr() for tensor in own.values()}
    present |= {tensor.data_ptr() for name, tensor in others.items() if name in sources}
    kept = {}
    for name, tensor in others.items():
        if name in sources or tensor.data_ptr() not in present:
            kept[name] = tensor
            present.add(tensor.data_ptr())
    return kept
