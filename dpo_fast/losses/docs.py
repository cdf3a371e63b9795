"""docs/LOSSES.md, made from the table: `python -m dpo_fast.losses.docs > docs/LOSSES.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields

from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.table import LOSSES, LossSpec

HEAD = """# Losses

Made from the table in `dpo_fast/losses/` by `make docs`; a test holds it to the code.
[Choosing a loss](CHOOSING_A_LOSS.md) says which to take, and how to read the pictures.

```yaml
loss:
  type: [sigmoid, sft]   # one name, or several
  weights: [1.0, 0.1]    # one each; all 1 if left out
  beta: 0.1              # and any option of the table at the end
```

An option that none of the losses uses is an error. So is an option that changes what all losses see, such
as `ld_alpha`, if one of them does not use it; `sft` is allowed beside any.

| letter | meaning |
|---|---|
| `lw`, `ll` | summed log-probs of the chosen and the rejected completion of a pair |
| `rw`, `rl` | the same under the reference |
| `nw`, `nl` | their scored tokens |
| `a`, `b` | log-ratios: a = lw - rw, b = ll - rl |
| `s` | shapes a log-ratio by `f_divergence_type`; the identity by default |
| `d` | s(a) - s(b) |
| `m` | the column `margin`; 0 without it |
| `S`, `LS` | sigmoid, its logarithm |
| `eps` | `label_smoothing` |
| `r` | log-ratio of a completion that is not part of a pair |
| `wd`, `wu` | `desirable_weight`, `undesirable_weight` |

Values are summed and divided by the number of pairs (or completions) in the global batch, however it is
split. `sft` is minus the chosen log-probs divided by the chosen tokens of the global batch.

| column of the data | meaning |
|---|---|
| `weight` | factor on the loss of an example |
| `margin` | reward margin that a pair should reach |
| `soft_label` | probability that the chosen answer is the better one |
"""
REWARDS = """
`rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies` follow the loss: where it
divides log-probs by lengths, so do its rewards, and an answer that it prefers has the higher reward.
Several losses log means only if all of them divide; `sft` beside others does not count. ipo with
length_average=false logs sums. TRL's DPOTrainer logs sums for ipo and sigmoid_norm as well, its
CPOTrainer means for ipo.

| reward of the chosen answer | losses |
|---|---|
"""
SECTIONS = {  # title: which losses stand below it
    "Pairs, with a reference": lambda spec: spec.paired and spec.needs_reference,
    "Pairs, without a reference": lambda spec: spec.paired and not spec.needs_reference,
    "Completions that are desirable or undesirable by themselves": lambda spec: (
        spec.kind == "completions"
    ),
    "Groups of scored completions": lambda spec: spec.grouped,
}
NOTES = {  # by `LossSpec.kind`
    "completions": "\nPairs are accepted too, each as one desirable and one undesirable completion.\n",
    "groups": """
A group is a `prompt` and two lists of one length, `completions` and `scores` (or `ranks`; 1 is the best).
`old` are log-probs of the model that wrote the completions: `reference.old_path`, by default the policy as
it starts. They are computed once and stored. `ref` are log-probs of the reference.

Values are summed and divided by a count of the global batch: its groups for plackett_luce, its completions
for grpo, its scored tokens for dapo.
""",
}
SINGLE = "also demonstrations, and of completions the desirable ones"
STATISTICS = {"kl": "kl estimated over all ranks", "delta": "delta averaged over all ranks"}


def page() -> str:
    """The page as markdown: every loss of the table, every option."""
    parts = [HEAD, rewards_table()]
    for title, belongs in SECTIONS.items():
        specs = [spec for spec in LOSSES.values() if belongs(spec)]
        note = NOTES.get(specs[0].kind, "")
        parts += [f"\n## {title}\n{note}", *map(section, specs)]
    return "".join([*parts, options_table()])


def rewards_table() -> str:
    """What each loss logs as rewards."""
    losses: dict[str, list[str]] = {}
    for spec in LOSSES.values():
        losses.setdefault(_reward(spec), []).append(spec.name)
    lines = [f"| {reward} | {named(names)} |\n" for reward, names in losses.items()]
    return REWARDS + "".join(lines)


def _reward(spec: LossSpec) -> str:
    """The reward of the chosen answer, or of any that is not part of a pair."""
    policy, ratio = ("lw", "a") if spec.paired else ("r", "r")
    reward = f"beta {ratio if spec.needs_reference else policy}"
    return f"`{reward} / nw`" if spec.divides(LossOptions()) else f"`{reward}`"


def section(spec: LossSpec) -> str:
    """One loss: its formula and a list of facts."""
    lines = {
        "For": spec.when,
        "Source": spec.source,
        "Options": named(spec.options),
        "Columns": named(spec.columns),
        "Needs": ", ".join(needs(spec)),
        "Takes": SINGLE if spec.single else "",
    }
    told = "".join(f"- {what}: {text}\n" for what, text in lines.items() if text)
    picture = f"![{spec.name}: loss and slope](pictures/losses/{spec.name}.svg)"
    return f"\n### `{spec.name}`\n\n    {spec.formula}\n\n{told}\n{picture}\n"


def needs(spec: LossSpec) -> list[str]:
    """What the loss cannot do without, in words."""
    return [
        *(["a reference"] if spec.needs_reference else []),
        *(
            [f"a reference if `{spec.reference_option}` is above 0"]
            if spec.reference_option
            else []
        ),
        *(["log-probs under the model that wrote the completions"] if spec.by_token else []),
        *(f"the column `{column}`" for column in spec.needs_columns),
        *(f"`{option}` ({why})" for option, why in spec.needs_options.items()),
        *(STATISTICS[name] for name in spec.statistics),
        *(["all pairs of the global batch at once"] if spec.coupled else []),
    ]


def named(names: Iterable[str]) -> str:
    """The names as code, joined by commas."""
    return ", ".join(f"`{name}`" for name in names)


def options_table() -> str:
    """Every field of `LossOptions`."""
    lines = [
        f"| `{field.name}` | {json.dumps(field.default)} | {field.metadata['meaning']} |\n"
        for field in fields(LossOptions)
    ]
    return "".join(["\n## Options\n\n| option | default | meaning |\n|---|---|---|\n", *lines])


if __name__ == "__main__":
    print(page(), end="")
