"""docs/LOSSES.md, made of the table: `python -m dpo_fast.losses.docs > docs/LOSSES.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields

from dpo_fast.losses.options import LossOptions
from dpo_fast.losses.table import LOSSES, LossSpec

HEAD = """# Losses

Made of the table in `dpo_fast/losses/` by `make docs`; a test holds it to the code.

```yaml
loss:
  type: [sigmoid, sft]   # one name, or several
  weights: [1.0, 0.1]    # one each; all 1 if left out
  beta: 0.1              # and any option of the table at the end
```

An option is refused where none of the losses uses it. One that changes what all losses see, as
`ld_alpha`, is refused where one of them does not use it; `sft` may always stand beside.

Of a pair, `lw` and `ll` are the summed log-probs of the chosen and the rejected completion, `rw` and
`rl` those of the reference, `nw` and `nl` their scored tokens; a = lw - rw and b = ll - rl are the
log-ratios, `s` their score by `f_divergence_type`, d = s(a) - s(b). S is the sigmoid, LS its logarithm,
`eps` is `label_smoothing`, `m` the column `margin` (0 without it). Of a completion by itself, `r` is the
log-ratio, `wd` and `wu` are `desirable_weight` and `undesirable_weight`.

Values are summed and divided by the pairs of the global batch, however it is split. `sft` stands for
minus the chosen log-probs divided by the chosen tokens of the global batch.

| column of the data | what |
|---|---|
| `weight` | factor on the loss of a row |
| `margin` | reward margin that a pair should reach |
| `soft_label` | probability that the chosen answer is the better one |
"""
GROUPS = {  # title: of which losses
    "Pairs, with a reference": lambda spec: spec.paired and spec.needs_reference,
    "Pairs, without a reference": lambda spec: spec.paired and not spec.needs_reference,
    "Completions that are desirable or undesirable by themselves": lambda spec: (
        spec.rows == "completions"
    ),
    "Groups of scored completions": lambda spec: spec.grouped,
}
NOTES = {
    "completions": "\nPairs are taken as well, each as one desirable and one undesirable completion.\n",
    "groups": """
Rows have `prompt` and two lists of one length, `completions` and `scores` (or `ranks`, of which 1 is the
best). `old` are the log-probs that
the completions were written with: those of `reference.old_path`, by default of the policy as it starts,
computed once and stored. `ref` are the reference's. Values are summed over a group and divided by the
groups of the global batch, but for grpo, by its completions, and dapo, by their tokens.
""",
}
STATISTICS = {"kl": "kl estimated over all ranks", "delta": "delta averaged over all ranks"}


def page() -> str:
    """The page as markdown: every loss of the table, every option."""
    parts = [HEAD]
    for title, belongs in GROUPS.items():
        specs = [spec for spec in LOSSES.values() if belongs(spec)]
        note = NOTES.get(specs[0].rows, "")
        parts += [f"\n## {title}\n{note}", *map(section, specs)]
    return "".join([*parts, options_table()])


def section(spec: LossSpec) -> str:
    lines = {
        "For": spec.when,
        "Source": spec.source,
        "Options": named(spec.options),
        "Columns": named(spec.columns),
        "Needs": ", ".join(needs(spec)),
    }
    told = "".join(f"- {what}: {text}\n" for what, text in lines.items() if text)
    return f"\n### `{spec.name}`\n\n    {spec.formula}\n\n{told}"


def needs(spec: LossSpec) -> list[str]:
    """What must be there for the loss, in words."""
    return [
        *(["a reference"] if spec.needs_reference else []),
        *(
            [f"a reference where `{spec.reference_option}` is above 0"]
            if spec.reference_option
            else []
        ),
        *(["the log-probs that the completions were written with"] if spec.by_token else []),
        *(f"the column `{column}`" for column in spec.needs_columns),
        *(f"`{option}` ({why})" for option, why in spec.needs_options.items()),
        *(STATISTICS[name] for name in spec.statistics),
        *(["all rows of the global batch at once"] if spec.coupled else []),
    ]


def named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def options_table() -> str:
    rows = [
        f"| `{field.name}` | {json.dumps(field.default)} | {field.metadata['meaning']} |\n"
        for field in fields(LossOptions)
    ]
    return "".join(["\n## Options\n\n| option | default | what |\n|---|---|---|\n", *rows])


if __name__ == "__main__":
    print(page(), end="")
