"""The table of judges: what makes each the same one, and how it is opened.

What a judge needs is imported where it is used: a rule needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_fast.judging.config import JudgeSection

if TYPE_CHECKING:
    import torch

    from dpo_fast.data.config import DataConfig
    from dpo_fast.judging.verdict import Judge
    from dpo_fast.models.config import ModelSection


@dataclass(frozen=True)
class Materials:
    """What a judge is made of.

    model: the section `model`. data: gives the section `data`. Both are for the implicit reward.
    folder: where answers are kept. rank: of this process. device: gives that of this rank.
    identity: the hash of a model's weights, by its path and the option that names it.
    """

    section: JudgeSection
    model: ModelSection
    data: Callable[[], DataConfig]
    folder: Path
    rank: int
    device: Callable[[], torch.device]
    identity: Callable[[str, str], str]


@dataclass(frozen=True)
class JudgeSpec:
    """identity: what decides its scores; two that are equal give the same. open: makes it."""

    identity: Callable[[Materials], dict[str, Any]]
    open: Callable[[Materials], Judge]


def _rule_identity(materials: Materials) -> dict[str, Any]:
    from dpo_fast.judging.programs import rule_identity

    return rule_identity(materials.section)


def _rule(materials: Materials) -> Judge:
    from dpo_fast.judging.programs import RuleJudge

    return RuleJudge(materials.section)


def _command_identity(materials: Materials) -> dict[str, Any]:
    from dpo_fast.judging.programs import command_identity

    return command_identity(materials.section)


def _command(materials: Materials) -> Judge:
    from dpo_fast.judging.programs import CommandJudge

    return CommandJudge(materials.section)


def _server_identity(materials: Materials) -> dict[str, Any]:
    from dpo_fast.judging.server import server_identity

    return server_identity(materials.section)


def _server(materials: Materials) -> Judge:
    from dpo_fast.judging.answers import Answers
    from dpo_fast.judging.server import ServerJudge

    folder = materials.folder if materials.section.cache else None
    return ServerJudge(materials.section, Answers(folder, materials.rank))


def _dtype(materials: Materials) -> str:
    """The dtype that judge.dtype means on this machine."""
    from dpo_fast.models.precision import choose_dtype

    return choose_dtype(materials.section.dtype).name


def _reward_model_identity(materials: Materials) -> dict[str, Any]:
    names = ("label", "input", "apply_chat_template", "max_length")
    options = {name: getattr(materials.section, name) for name in names}
    options["dtype"] = _dtype(materials)
    return {"model": materials.identity(materials.section.path, "judge.path"), **options}


def _reward_model(materials: Materials) -> Judge:
    from dpo_fast.judging.reward_model import RewardModelJudge

    return RewardModelJudge(materials.section, materials.device())


def _implicit_identity(materials: Materials) -> dict[str, Any]:
    from dpo_fast.data.dataset import APART

    section = materials.section
    options = {"beta": section.beta, "per_token": section.per_token, "dtype": _dtype(materials)}
    options["data"] = materials.data().model_dump(mode="json", exclude=APART)
    models = {"model.path": materials.model.path, "judge.reference": section.reference}
    return {name: materials.identity(path, name) for name, path in models.items()} | options


def _implicit(materials: Materials) -> Judge:
    from dpo_fast.judging.implicit import ImplicitJudge

    section, model, data = materials.section, materials.model, materials.data()
    return ImplicitJudge(section, model, data, materials.device())


JUDGES = {
    "rule": JudgeSpec(_rule_identity, _rule),
    "command": JudgeSpec(_command_identity, _command),
    "openai": JudgeSpec(_server_identity, _server),
    "reward_model": JudgeSpec(_reward_model_identity, _reward_model),
    "implicit": JudgeSpec(_implicit_identity, _implicit),
}
