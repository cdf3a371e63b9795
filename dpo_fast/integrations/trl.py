"""TRL's trainers with our head: import `DPOTrainer` from here, and nothing else changes.

The same goes for KTO, SFT, GRPO and RLOO, all trainers of TRL that score with a fused head.

Configuration, data, reference models, metrics, checkpoints and TRL's own losses stay TRL's code. So every
option of a DPOConfig works as it does there, and a loss is a mean over the micro-batch. One thing changes:
where TRL calls `add_fused_lm_head` on the policy and the reference, `add_linear_logp` runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
import trl
from torch import Tensor, nn

from dpo_fast.errors import UnavailableError, UserError
from dpo_fast.integrations.fsdp import prepare_fsdp
from dpo_fast.integrations.saving import WholeFolders
from dpo_fast.integrations.trl_forward import add_linear_logp
from dpo_fast.integrations.trl_losses import our_loss, share_losses
from dpo_fast.models.scoring import scoring_head

WRITTEN_FOR = ("1.15", "1.16")  # the oldest and the newest
HEAD = "add_fused_lm_head"


def check_version(version: str) -> None:
    """Raises UnavailableError for another TRL: its trainers may ask other things of their model."""
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    oldest, newest = (tuple(map(int, known.split("."))) for known in WRITTEN_FOR)
    if not oldest <= found <= newest:
        major, minor = newest
        raise UnavailableError(
            f"trl {version} is installed, and dpo_fast.integrations.trl is written for trl "
            f"{WRITTEN_FOR[0]} to {WRITTEN_FOR[1]}: pip install "
            f"'trl>={WRITTEN_FOR[0]},<{major}.{minor + 1}'. Trainers of TRL up to 1.12 take the classes of "
            "dpo_fast.integrations.liger (docs/DROPINS.md)"
        )


check_version(trl.__version__)


class FastHeadMixin(WholeFolders):
    """Goes before a TRL trainer that scores with a fused head."""

    def __init__(self, *args, **kwargs) -> None:
        # Within __init__: a stored reference is computed there, and wrappers come after it.
        with _replaced(self._trl_module(), HEAD, self.add_head):
            super().__init__(*args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        # peft comes after our head, and may have put an adapter on it.
        scoring_head(policy.get_base_model() if hasattr(policy, "peft_config") else policy)

    def add_head(self, model: nn.Module, *args, **kwargs) -> None:
        """As `add_linear_logp`. TRL calls it on the policy and on the reference, before wrapping them.

        Raises:
            UserError: FSDP1, FSDP on a CPU, or a head that cannot score.
        """
        prepare_fsdp(self)
        add_linear_logp(model, *args, **kwargs)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        # TRL names its table by data and model. Our head has other last bits, and ld_alpha gives other
        # sums, so they need names of their own.
        key = f"dpo_fast ld_alpha={getattr(self, 'ld_alpha', None)} "
        if not str(self._precompute_model_hash).startswith(key):
            # Under ZeRO-3 TRL hashes empty tensors, which are the same for every model.
            sharded = hash_sharded(self.ref_model or self.model)
            self._precompute_model_hash = f"{key}{sharded or self._precompute_model_hash}"
        return super()._precompute_ref_logps(dataset, name, batch_size)

    @classmethod
    def _trl_module(cls) -> ModuleType:
        for base in cls.__mro__:
            module = sys.modules[base.__module__]
            if hasattr(module, HEAD):
                return module
        raise UserError(
            f"{cls.__name__} has no base among TRL's trainers with a fused head: derive it from "
            "FastHeadMixin and trl.DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer or RLOOTrainer"
        )


def hash_sharded(model: nn.Module) -> str | None:
    """sha256 of all parameters of a model that ZeRO-3 has sharded; None of another. Collective.

    They are gathered one after the other, and every rank finds the same.
    """
    parameters = dict(getattr(model, "module", model).named_parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return None
    import deepspeed

    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class DPOTrainer(FastHeadMixin, trl.DPOTrainer):
    """`trl.DPOTrainer` whose log-probabilities come from `linear_logp`.

    Arguments are TRL's. `args.loss_type` also takes losses of `dpo_fast.losses` that TRL lacks (simpo, cpo,
    orpo, slic, dpop, apo_zero_unpaired), alone or beside TRL's.

    loss_options: fields of `LossOptions` for them that a DPOConfig lacks, such as {"simpo_gamma": 0.5}.

    The reference is computed for losses without one as well: TRL's reward metrics need it.

    Raises:
        UserError: an option that TRL accepts and would not use.
    """

    def __init__(
        self, model, ref_model=None, args=None, *rest, loss_options: dict | None = None, **kwargs
    ) -> None:
        self._objective, shares = None, None
        if args is not None:
            _check_arguments(args)
            shares = share_losses(args, loss_options or {})
        elif loss_options:
            raise UserError(
                f"loss_options={loss_options} belong to a loss_type in args, which is None"
            )
        super().__init__(model, ref_model, args, *rest, **kwargs)
        if shares is not None:
            self.loss_types, self.loss_weights = shares.names, shares.weights
            self._objective = shares.objective

    def _compute_loss(self, model, inputs, return_outputs: bool):
        if self._objective is None:
            return super()._compute_loss(model, inputs, return_outputs)
        with _recorded(self.model, self.ref_model) as outputs:
            theirs = super()._compute_loss(model, inputs, return_outputs)
        policy, reference = outputs[0], None if self.precompute_ref_logps else outputs[1]
        ours: Tensor = our_loss(self._objective, inputs, policy, reference)
        return (theirs[0] + ours, *theirs[1:]) if return_outputs else theirs + ours


class KTOTrainer(FastHeadMixin, trl.KTOTrainer):
    """`trl.KTOTrainer` whose log-probabilities come from `linear_logp`. Arguments are TRL's."""


class SFTTrainer(FastHeadMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` whose log-probabilities come from `linear_logp`. Arguments are TRL's.

    With label smoothing or a `compute_loss_func` the loss wants logits, as it does there, and our head
    gives the metrics.
    """


class GRPOTrainer(FastHeadMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose log-probabilities come from `linear_logp`. Arguments are TRL's."""


class RLOOTrainer(FastHeadMixin, trl.RLOOTrainer):
    """`trl.RLOOTrainer` whose log-probabilities come from `linear_logp`. Arguments are TRL's."""


def _check_arguments(args: trl.DPOConfig) -> None:
    if args.padding_free:
        raise UserError(
            f"padding_free=True: trl {trl.__version__} pads all the same; set it to False, or train "
            "with dpo-fast train, whose layouts have no padding"
        )


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextlib.contextmanager
def _recorded(*models: nn.Module | None) -> Iterator[list]:
    """The outputs of these models, in the order of their calls: the policy's, then the reference's."""
    outputs: list = []
    hooks = [
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
        for model in models
        if model is not None
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
