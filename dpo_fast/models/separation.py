"""A trial of the loaded model: no sequence may change the log-probs of others in its row or its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpo_fast.data.batch import collate_trees
from dpo_fast.data.layouts import LAYOUTS, layouts_with
from dpo_fast.errors import UserError
from dpo_fast.models import handed, recurrent
from dpo_fast.models.fp8 import in_fp8
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.ulysses import cause

# A product gives the same row whatever the other rows are, but experts that get other rows may round
# differently. A layer that mixes sequences moves log-probs by far more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# In 8 bits all rows may share a scale, which follows from the largest number of all: others round anew.
TOLERANCE_IN_FP8 = 0.5


@torch.no_grad()
def check_separation(
    scorer: Callable[..., Mapping[str, Tensor]],
    layout: str,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Score two trees, then again with other tokens in one completion; the rest must stay the same.

    The trial finds layers that no configuration tells of: recurrence, convolution, attention of
    their own. Where layers carry a state, or get the plan in a mask's place, one sequence is scored alone
    as well. It is collective where weights are sharded. Where every sequence has a row of its own, padding
    and later tokens are tried.

    scorer: a `ScoringModel`, or an engine round one.

    Raises:
        UserError: a log-prob of an untouched sequence moved, or one by padding or a later token.
    """
    group = getattr(getattr(scorer, "module", scorer), "group", None)
    if not LAYOUTS[layout].shares_rows and group is None:
        check_padding(scorer, layout, vocabulary, device, dtype)
        return
    layout = layout if LAYOUTS[layout].shares_rows else "packed"
    tokens = torch.randint(vocabulary, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    other = [(token + 1) % vocabulary for token in tokens]

    def logps(first: list[int]) -> Tensor:
        trees = [(tokens[:3], [first, tokens[7:10]]), (tokens[10:13], [tokens[13:16], tokens[15:]])]
        batch = collate_trees(trees, layout).to(device)
        return scorer(**forward_arguments(batch))["logp"]

    if group is not None:
        check_slices(scorer, lambda: logps(tokens[3:7]), dtype)

    before, after = logps(tokens[3:7]), logps(other[3:7])
    odd = int((~before.isfinite()).sum())
    if odd:
        raise UserError(
            f"the model's log-probs of {odd} of {len(before)} tokens of a trial are not finite, though "
            f"its weights are: numbers overflow in {str(dtype).removeprefix('torch.')}; look at "
            "model.dtype and at how the checkpoint was made"
        )
    moved = (after - before)[4:].abs().max().item()
    model = getattr(scorer, "func", scorer)  # it may be a call of a model with some arguments
    modules = list(getattr(model, "module", model).modules())
    tolerance = TOLERANCE_IN_FP8 if any(map(in_fp8, modules)) else TOLERANCE[dtype]
    if not moved <= tolerance:
        option, remedy = cause(layout, layouts_with(shares_rows=False), group)
        raise UserError(
            f"{option} cannot be honoured: another completion in the row moved the "
            f"log-probs of untouched ones by {moved:.2g}, so some layer of this model mixes tokens "
            f"by other means than its attention. Set {remedy}"
        )
    if any(recurrent.served(each) or handed.served(each) for each in modules):
        last = collate_trees([(tokens[10:13], [tokens[15:]])], layout).to(device)
        check_states(scorer(**forward_arguments(last))["logp"], before[-3:], layout, dtype)


def check_padding(
    scorer: Callable[..., Mapping[str, Tensor]],
    layout: str,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Score a sequence alone, beside a longer one, with more tokens behind it, and by the model's places.

    Its log-probs must stay the same. Models that look ahead, or count places from a row's end or from
    what is no padding, have others.

    Raises:
        UserError: they moved.
    """
    tokens = torch.randint(vocabulary, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    short = (tokens[:3], [tokens[3:8]])

    def logps(*trees, **options) -> Tensor:
        batch = collate_trees(list(trees), layout).to(device)
        return scorer(**forward_arguments(batch), **options)["logp"][:5]

    alone = logps(short)
    if not alone.isfinite().all():
        return  # the numbers of a run have checks of their own
    model = getattr(scorer, "func", scorer)
    in_8_bits = any(map(in_fp8, getattr(model, "module", model).modules()))
    tolerance = TOLERANCE_IN_FP8 if in_8_bits else TOLERANCE[dtype]
    if not (logps(short) - alone).abs().mean().item() <= tolerance:
        return  # noise has a check of its own, which says so
    longer = (tokens[:3], [tokens[3:8] + tokens[10:]])
    for what, trees, options in (
        ("beside a longer sequence", [short, (tokens[:2], [tokens[4:]])], {}),
        ("with more tokens behind it", [longer], {}),
        ("by places that the model finds for itself", [short], {"own": True}),
    ):
        moved = (logps(*trees, **options) - alone).abs().mean().item()
        # A mean, and as of states more than for rows of the same shape.
        if not moved <= (tolerance if options else 5 * tolerance):
            causal_lm = getattr(getattr(model, "module", model), "causal_lm", model)
            raise UserError(
                f"{type(causal_lm).__name__} cannot be trained here: log-probs of a completion {what} "
                f"differ by {moved:.2g} from those it has alone, so some layer of this model looks at "
                "padding, ahead or at other places; name a causal language model in model.path"
            )


def check_states(alone: Tensor, shared: Tensor, layout: str, dtype: torch.dtype) -> None:
    """Check that a layer's state goes from a prompt to its completions as in a sequence alone.

    alone, shared: log-probs of a completion by itself, and of the same in a row with others.

    Raises:
        UserError: they differ.
    """
    # A mean, and five times as much: rows of other lengths are rounded in another way, and where experts
    # are chosen, rounding may choose another one. A state that is lost moves log-probs by about one.
    moved = (alone - shared).abs().mean().item()
    if not moved <= 5 * TOLERANCE[dtype]:
        raise UserError(
            f"train.layout={layout} cannot be honoured: log-probs of a completion in a row with others "
            f"differ by {moved:.2g} from those it has alone, so some layer of this model carries its state "
            f"along the row in another way. Set train.layout={layouts_with(shares_rows=False)}"
        )


def check_slices(scorer, logps: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Check that ranks that share a row give the log-probs that each gives alone. Collective.

    What a layer knows of a token's place is wrong in a slice, if it counts tokens for itself.

    scorer: a `ScoringModel` with a group, or an engine round one. logps: scores a trial with it.

    Raises:
        UserError: they differ.
    """
    scoring = getattr(scorer, "module", scorer)
    group, sliced = scoring.group, logps()
    scoring.group = None
    try:
        whole = logps()
    finally:
        scoring.group = group
    # A mean: where experts are chosen, rounding may choose another one for some token.
    moved = (sliced - whole).abs().mean().item()
    if whole.isfinite().all() and not moved <= TOLERANCE[dtype]:
        raise UserError(
            f"parallel.sequence_parallel={group.size} cannot be honoured: log-probs of slices of a row "
            f"differ by {moved:.2g} from those of the whole row, so some layer of this model goes by more "
            "of the row than its slice. Set parallel.sequence_parallel=1"
        )
