"""`train.optim`: AdamW as torch has it, and as bitsandbytes has it with states of 8 bits or in pages.

The names are those of transformers' TrainingArguments. All are AdamW with the same options; they differ in
how its states are stored and its step is computed. DeepSpeed gives them flat tensors of many parameters.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from dpo_fast.errors import UserError

TORCH = "adamw"  # the states of every one of torch's, which may go on with each other's


@dataclass(frozen=True)
class Optimiser:
    """One that `train.optim` may name.

    meaning: for docs/CONFIG.md.
    options: of torch's AdamW.
    theirs: the class of bitsandbytes.optim; None: torch's.
    state_bytes: of the two moments of an element.
    """

    meaning: str
    options: tuple[tuple[str, Any], ...] = ()
    theirs: str | None = None
    state_bytes: float = 8.0

    @property
    def paged(self) -> bool:
        """Whether its states may wait in CPU memory while the GPU has no room."""
        return self.theirs is not None and self.theirs.startswith("Paged")


BLOCK = 256  # elements of bitsandbytes that share a scale of fp32
EIGHT = 2 * (1 + 4 / BLOCK)
OPTIMISERS = {
    "auto": Optimiser("adamw_torch_fused on a GPU, adamw_torch in CPU memory"),
    "adamw_torch": Optimiser("torch's AdamW, as torch chooses to compute it"),
    "adamw_torch_fused": Optimiser("one kernel", (("fused", True),)),
    "adamw_torch_foreach": Optimiser(
        "an operation at a time over all tensors", (("foreach", True),)
    ),
    "adamw_bnb_8bit": Optimiser(
        "states of 8 bits, by bitsandbytes", (), "AdamW8bit", state_bytes=EIGHT
    ),
    "paged_adamw_8bit": Optimiser(
        "the same, which wait in CPU memory where the GPU is full",
        (),
        "PagedAdamW8bit",
        state_bytes=EIGHT,
    ),
    "paged_adamw_32bit": Optimiser("states of fp32 that do", (), "PagedAdamW32bit"),
}
ALIASES = {"adamw_8bit": "adamw_bnb_8bit"}  # of transformers


def family(name: str) -> str:
    """Optimisers of one family go on with each other's states."""
    return name if OPTIMISERS[name].theirs else TORCH


def check_optim(config: Any, device: torch.device) -> None:
    """Check `train.optim` of a run (`RunConfig`) on a device.

    Raises:
        UserError: it cannot be honoured here, or with another option.
    """
    name, parallel = config.train.optim, config.parallel
    chosen, option = OPTIMISERS[name], f"train.optim={name} cannot be honoured"
    if chosen.theirs is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{option}: bitsandbytes is not installed: pip install bitsandbytes, or set train.optim=auto"
        )
    if chosen.paged and device.type != "cuda":
        raise UserError(
            f"{option}: its pages move between a GPU and CPU memory, and this run has no GPU; set "
            "train.optim=adamw_bnb_8bit or auto"
        )
    if parallel.offload_optimizer:
        raise UserError(
            f"{option} with parallel.offload_optimizer={str(parallel.offload_optimizer).lower()}: "
            "DeepSpeed takes a step in CPU memory, where its states would save nothing of the GPU's; "
            "remove one of the two"
        )
    if config.train.optimizer_from is not None:
        raise UserError(
            f"{option} with train.optimizer_from={config.train.optimizer_from}: AdamW's states of a "
            "checkpoint go to another run by parameters, and those of bitsandbytes lie in blocks that "
            "several share; remove one of the two"
        )


def make(config: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of a run. groups: of parameters, with their weight decay."""
    # Classes of torch; the names above are read before torch is there.
    from dpo_fast.training.finite_step import FiniteAdamW, FiniteStep

    train = config.train
    chosen = OPTIMISERS[train.optim]
    common = {
        "lr": config.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
    }
    options = dict(chosen.options)
    if train.optim == "auto" and torch.cuda.is_available():
        options["fused"] = None if config.parallel.offload_optimizer else True
    # There DeepSpeed does not wrap it, and looks at no gradient.
    alone = config.zero_stage == 0 and config.model.precision == "fp32"
    if chosen.theirs is None:
        return (FiniteAdamW if alone else torch.optim.AdamW)(groups, **common, **options)
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, chosen.theirs)
    kind = type(f"Finite{chosen.theirs}", (FiniteStep, kind), {}) if alone else kind
    return kind(groups, **common)
