"""The balancing loss of experts over a global batch, whatever its micro-batches, layout and ranks.

F_e: tokens that have expert e among their K greatest logits. M_e: sum over tokens of its softmax. Both are
over all routers, and R is tokens times routers. The loss is E * sum_e (F_e / R) * (M_e / R).

F has no gradient, but it is of the whole global batch, so it must be known before the first backward pass.
Where a rank has one micro-batch in a step, its own forward tells. Else a forward of the backbone goes
before, without gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_fast.data.batch import ScoredBatch
from dpo_fast.models.routers import LOAD, MASS, PICKS, TOKENS
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.training.data_ranks import sum_once


@dataclass(frozen=True)
class Routing:
    """What a run asks of the routers of its model.

    coefficient: weight of the balancing loss; 0 where the routers are only measured.
    """

    coefficient: float = 0.0

    def heard(self, batch: ScoredBatch) -> dict:
        """The arguments of `ScoringModel.forward` for it."""
        return {
            "copies_N": batch.copies_N,
            "balanced": self.coefficient > 0 and torch.is_grad_enabled(),
        }


class Balance:
    """The balancing loss of one step.

    coefficient: its weight.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self._picks: Tensor | None = None  # F, and R behind it, fp64 [E + 1]
        self._known = False

    @torch.no_grad()
    def count(self, token_outputs: Mapping[str, Tensor]) -> None:
        """Count the choices of a micro-batch of this rank. token_outputs: with those of its routers."""
        picks_E = token_outputs["router_experts"][:, PICKS].sum(0)
        rows = token_outputs["router_layers"][:, TOKENS].sum()
        counted = torch.cat([picks_E, rows[None]])
        self._picks = counted if self._picks is None else self._picks + counted

    def close(self) -> None:
        """All micro-batches are counted. Collective."""
        self._picks, self._known = sum_once(self._picks), True

    def share(self, token_outputs: Mapping[str, Tensor]) -> Tensor:
        """What a micro-batch adds to the loss of the global batch, with its weight, [] fp32.

        Collective where nothing was counted before: then it is the only micro-batch of each rank.
        """
        if not self._known:
            self.count(token_outputs)
            self.close()
        picks_E, rows = self._picks[:-1], self._picks[-1].clamp_min(1)
        slopes_E = (self.coefficient * len(picks_E) * picks_E / rows**2).float()
        return slopes_E @ token_outputs["router_mass"]


@torch.no_grad()
def count_choices(engine, batches: Iterable[ScoredBatch], balance: Balance) -> None:
    """Count the experts that the tokens of this rank's micro-batches choose. Collective."""
    for batch in batches:
        batch = batch.to(engine.device)
        nothing = {
            name: getattr(batch, name)[:0] for name in ("rows_U", "targets_U", "predictions_T")
        }
        batch = replace(batch, **nothing)  # the head has nothing to do
        balance.count(engine(**forward_arguments(batch), copies_N=batch.copies_N))
    balance.close()


def router_metrics(experts: Tensor, layers: Tensor) -> dict[str, float]:
    """Metrics of sums over all ranks, as `Heard.outputs` gives them; fp64 [routers, 3, E] and
    [routers, 4].

    aux_loss: the balancing loss without its weight, of all these tokens.
    router/load_max: tokens of the busiest expert of a layer over the mean; 1 is balance. Mean of layers.
    router/unused: share of the experts that no token came to.
    router/entropy: of a token's softmax over the experts, nats.
    router/dropped: share of the choices that have weight 0 and compute nothing.
    """
    loads, picks_E, mass_E = experts[:, LOAD], experts[:, PICKS].sum(0), experts[:, MASS].sum(0)
    tokens, entropy, choices, dropped = layers.sum(0).tolist()
    if not tokens:
        return {}
    busiest = loads.max(-1).values / loads.mean(-1).clamp_min(1e-9)  # of each layer
    return {
        "aux_loss": len(picks_E) * float(picks_E @ mass_E) / tokens**2,
        "router/load_max": busiest.mean().item(),
        "router/unused": (loads == 0).double().mean().item(),
        "router/entropy": entropy / tokens,
        "router/dropped": dropped / choices,
    }
