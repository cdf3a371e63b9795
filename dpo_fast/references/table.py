"""The table of reference providers: what each stores, needs and can score, and how it is built.

The configuration, its checks, the trainer, `dpo-fast doctor` and docs/CONFIG.md read it. A new provider
is an entry here and a class in `providers.py`, which is imported where it is built: the table is read
without PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dpo_fast.data.kinds import Kind
    from dpo_fast.models.scoring import ScoringModel
    from dpo_fast.references.providers import Provider, Scorer


@dataclass(frozen=True)
class Materials:
    """What the trainer offers to build a provider from.

    section: options of the section `reference`.
    kinds: the kind of each split's examples, by the split's name.
    engine: the policy as it is trained, a scorer.
    policy: its model.
    second_model: loads the reference model, a frozen scorer.
    stored: opens the stored log-probs of each split; computes them first where they are not there.
    """

    section: Any
    kinds: Mapping[str, Kind]
    engine: Scorer
    policy: ScoringModel
    second_model: Callable[[], Scorer]
    stored: Callable[[], dict[str, Provider]]

    def for_every_split(self, provider: Provider) -> dict[str, Provider]:
        """One provider that serves all splits."""
        return dict.fromkeys(self.kinds, provider)


@dataclass(frozen=True)
class ProviderSpec:
    """One value of `reference.provider`.

    name: the value.
    meaning: one line for people.
    build: makes the provider of each split, by the split's name.
    options: the options of the section that it uses.
    stores: the log-probs of what training will draw are computed before it, and kept on disk.
    second_model: whether a model is loaded beside the policy; `path`: only where reference.path names one.
    tokens: whether it gives the log-prob of every token; `stored`: only with reference.per_token.
    any_sequence: it scores any sequence, not only those of the data. KTO's kl needs that.
    columns: it reads columns of the data.
    compares: it gives something to compare with.
    follows: it changes with the policy, so that checkpoints hold its state.
    needs_adapters: it is the policy with other adapters, or none, so that there is no second model.
    """

    name: str
    meaning: str
    build: Callable[[Materials], dict[str, Provider]]
    options: tuple[str, ...] = ()
    stores: bool = False
    second_model: Literal["never", "path", "always"] = "never"
    tokens: Literal["never", "stored", "always"] = "never"
    any_sequence: bool = False
    columns: bool = False
    compares: bool = True
    follows: bool = False
    needs_adapters: bool = False

    @property
    def scores(self) -> bool:
        """Whether a model scores the sequences: without `reference.path` the policy as it starts."""
        return self.stores or self.any_sequence

    def loads_second_model(self, path: str | None) -> bool:
        """Whether a model is loaded beside the policy, given `reference.path`."""
        return self.second_model == "always" or (self.second_model == "path" and path is not None)

    def gives_tokens(self, per_token: bool) -> bool:
        """Whether there is a log-prob of every token, given `reference.per_token`."""
        return self.tokens == "always" or (self.tokens == "stored" and per_token)


def _frozen(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import FrozenReference

    return materials.for_every_split(FrozenReference(materials.second_model()))


def _adapter_off(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import AdapterOffReference

    reference = AdapterOffReference(materials.engine, materials.policy.as_started)
    return materials.for_every_split(reference)


def _columns(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import ColumnReference

    return {name: ColumnReference(kind) for name, kind in materials.kinds.items()}


def _none(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import NoReference

    return materials.for_every_split(NoReference())


def _ema(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import EmaReference

    section = materials.section
    reference = EmaReference(
        materials.second_model(), materials.policy, section.mixup_alpha, section.sync_steps
    )
    return materials.for_every_split(reference)


def _ema_adapters(materials: Materials) -> dict[str, Provider]:
    from dpo_fast.references.providers import EmaAdapterReference

    section, policy = materials.section, materials.policy
    reference = EmaAdapterReference(
        materials.engine, policy, section.mixup_alpha, section.sync_steps, policy.as_started
    )
    return materials.for_every_split(reference)


_SPECS = (  # the first is the default
    ProviderSpec(
        "cached",
        "computed once before training, then read from a table",
        lambda materials: materials.stored(),
        options=("path", "cache_dir", "per_token"),
        stores=True,
        second_model="path",
        tokens="stored",
    ),
    ProviderSpec(
        "frozen",
        "a second model beside the policy",
        _frozen,
        options=("path",),
        second_model="always",
        tokens="always",
        any_sequence=True,
    ),
    ProviderSpec(
        "adapter_off",
        "the policy with its adapters off, or as they were where it goes on with an adapter: no second "
        "copy of the weights",
        _adapter_off,
        tokens="always",
        any_sequence=True,
        needs_adapters=True,
    ),
    ProviderSpec(
        "ema",
        "a second model that follows the policy (TR-DPO); with adapters a copy of these alone",
        _ema,
        options=("path", "mixup_alpha", "sync_steps"),
        second_model="always",
        tokens="always",
        any_sequence=True,
        follows=True,
    ),
    ProviderSpec(
        "columns",
        "sums that come with the data, in the columns reference_chosen_logps and "
        "reference_rejected_logps, or reference_completion_logps",
        _columns,
        columns=True,
    ),
    ProviderSpec(
        "none", "nothing, for losses that compare with no reference", _none, compares=False
    ),
)
PROVIDERS = {spec.name: spec for spec in _SPECS}
EMA_ADAPTERS = ProviderSpec(
    "ema",
    "a copy of the adapters that follows them (TR-DPO)",
    _ema_adapters,
    options=("mixup_alpha", "sync_steps"),
    tokens="always",
    any_sequence=True,
    follows=True,
    needs_adapters=True,
)
DEFAULT = _SPECS[0].name


def spec_of(name: str, adapters: bool) -> ProviderSpec:
    """The entry of a provider. adapters: whether the policy has some."""
    return EMA_ADAPTERS if adapters and name == EMA_ADAPTERS.name else PROVIDERS[name]


def default_provider(compares: bool, any_sequence: bool, adapters: bool) -> str:
    """The provider of a run that names none.

    compares: some loss compares with a reference.
    any_sequence: some loss scores sequences that are not in the data.
    adapters: the policy has adapters, and no other model is named.
    """
    if not compares:
        return "none"
    if not any_sequence:
        return DEFAULT
    return "adapter_off" if adapters else "frozen"


def alternatives(fits: Callable[[ProviderSpec], object]) -> str:
    """The providers that fit, for an error message."""
    names = [
        f"{spec.name} with LoRA" if spec.needs_adapters else spec.name
        for spec in PROVIDERS.values()
        if fits(spec)
    ]
    return ", or ".join(names)


def refusals() -> str:
    """When each provider is refused, in words, for docs/CONFIG.md."""
    reasons: dict[str, Callable[[ProviderSpec], object]] = {
        "with a loss that compares with a reference": lambda spec: not spec.compares,
        "without model.lora": lambda spec: spec.needs_adapters,
        "with data.streaming": lambda spec: spec.stores,
        "with a loss that estimates kl": lambda spec: spec.compares and not spec.any_sequence,
        "with groups": lambda spec: spec.columns,
        "with losses that compare token by token": lambda spec: (
            spec.compares and spec.tokens == "never"
        ),
        "without per_token, with losses that compare token by token": lambda spec: (
            spec.tokens == "stored"
        ),
    }
    found = {
        reason: [spec.name for spec in PROVIDERS.values() if applies(spec)]
        for reason, applies in reasons.items()
    }
    return "; ".join(f"{' and '.join(names)} {reason}" for reason, names in found.items() if names)
