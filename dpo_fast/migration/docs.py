"""docs/FROM_*.md, made of the tables: `python -m dpo_fast.migration.docs docs`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from dpo_fast.migration.importers import IMPORTERS, Importer
from dpo_fast.migration.option import Option, Table

NAMES = {
    "trl": "FROM_TRL",
    "llamafactory": "FROM_LLAMAFACTORY",
    "openrlhf": "FROM_OPENRLHF",
    "axolotl": "FROM_AXOLOTL",
}
HEAD = """# Coming from {trainer}

Made of the tables of `dpo-fast import` by `make docs`; a test holds it to the code.

{commands}
Every option of the file is carried over, needs nothing here, or is listed as without a counterpart;
`--strict` fails where there is one. Defaults of theirs that differ from ours are written out. The tables
have the options of {versions}.
{words}"""
VERSIONS = {
    "trl": "TRL 1.16 and, where it says so, of older versions",
    "llamafactory": "LLaMA-Factory 0.9.5",
    "openrlhf": "OpenRLHF 0.11.2, with the names up to 0.9 beside them",
    "axolotl": "Axolotl 0.19",
}
COMMANDS = {
    "trl": """    dpo-fast import trl dpo.yaml --out run.yaml --nproc 8  # DPOConfig, ..., YAML or JSON
    dpo-fast import trl train.sh --out run.yaml            # a script with `trl dpo --...`, or dpo.py
    dpo-fast import trl dpo.yaml --accelerate zero3.yaml   # and the file of `accelerate launch`
    dpo-fast import trl run.yaml --method kto              # where nothing else tells the trainer
""",
    "llamafactory": """    dpo-fast import llamafactory llama3_lora_dpo.yaml --out run.yaml --nproc 8
    dpo-fast import llamafactory train.sh --out run.yaml        # a script with llamafactory-cli train
""",
    "openrlhf": """    dpo-fast import openrlhf train_dpo.sh --out run.yaml
    dpo-fast import openrlhf train_sft.sh --out run.yaml
    dpo-fast import openrlhf train_kto.sh --out run.yaml
""",
    "axolotl": """    dpo-fast import axolotl dpo.yml --out run.yaml --nproc 8      # SFT, or rl: dpo, ...
    dpo-fast import axolotl grpo.yml --out rounds.yaml --nproc 8  # rl: grpo or gdpo
""",
}
WORDS = {
    "trl": """
| in code | |
|---|---|
| `trl.DPOTrainer` | that of `dpo_fast.integrations.trl` ([DROPINS.md](DROPINS.md)) |
| `DPOConfig(...)` | `dpo-fast import trl`, or by hand with the table below |
| `trl dpo --config dpo.yaml` | `dpo-fast train run.yaml` |
| `accelerate launch --num_processes 8` | `--nproc 8`, torchrun, srun ([OPERATIONS.md](OPERATIONS.md)) |
| `trainer.train(resume_from_checkpoint=True)` | `train.resume_from_checkpoint=true` |

Rows are those that TRL takes, and more ([FORMATS.md](FORMATS.md)). What differs without an option
for it:

- The reference is scored once and stored; TRL scores it in every step, or once with
  `precompute_ref_log_probs`.
- The loss is a mean over the rows of the global batch. TRL takes the mean of means of
  micro-batches, which are the same where all are of one size.
- A row that is too long keeps its prompt, and a completion loses its end, as with TRL's
  `keep_start`. Only a prompt of `max_length` tokens and more is another: TRL leaves it without a
  completion, and here a token of it stays.

GRPOTrainer samples while it trains, from the policy of each step. Here a round samples all prompts
from the policy before it, and trains on the groups ([ROUNDS.md](ROUNDS.md)). The file of GRPOConfig
becomes one of rounds, an epoch there a round here:

    dpo-fast import trl grpo.yaml --out rounds.yaml --nproc 8  # with reward_funcs, as `trl grpo` takes it
    dpo-fast iterate rounds.yaml --dry-run

Batches there count completions, and here groups. The scores of several functions are added with their
weights; beside a reward model functions are left out, and told. Reward models are not trained here:
RewardConfig is refused.

A script is read as a shell reads it: lines that go on, variables, arrays and what `accelerate launch`,
`torchrun` and `deepspeed` say of processes. A variable comes from the script, else from the environment,
as in `MODEL=org/model dpo-fast import trl train.sh`. An option that holds one that neither sets is told.
Of several commands `--method` chooses. Files of accelerate and DeepSpeed that are not here are told, too.
""",
    "llamafactory": """
Data sets go by `dataset_info.json`: file or hub id, `formatting`, `columns` and `tags` are read,
from `dataset_dir` as it
stands or from a folder above the YAML file. What differs without an option for it:

- Chats are written by the tokenizer's chat template, where LLaMA-Factory has templates of its own
  (`template`). For the model's own they are alike. `dpo-fast data run.yaml` shows what is written.
- The reference is scored once and stored; there it is scored in every step.
- `pref_ftx` weighs a mean over tokens, where it is a mean of the rows' means there.
- A row that is too long: `data.truncation` keeps the end of the prompt, and LLaMA-Factory cuts
  prompt and answer in proportion.
- With `packing` a batch of SFT counts packs of `cutoff_len` tokens, and here rows: multiply
  `train.global_batch_size` by the rows of a pack.
- Where `dataset_info.json` is not found, the names of its data sets are told, and no run can read them.

The stages sft, dpo and kto are read; rm, ppo and pt are refused, and so are files of its v1.
""",
    "openrlhf": """
The command is read with its variables, from a here-document as well; a variable that the script does
not set comes from the environment. Options may have their names of either time. Commands that sample
(`train_ppo_ray`) or train reward models are refused. What differs without an option for it:

- The reference is scored once and stored; there it is scored in every step.
- Rows whose prompt fills `max_len` are left out there; here they keep a token of the answer, and
  are counted.
- A key of W&B in `--logger.wandb.key` is written nowhere.
- Prompts of `train_sft` and `train_kto` without a chat template are written as `User: ...` there; here
  they are text as it stands, and the import says so.
""",
    "axolotl": """
A data set's `type` becomes `data.format` and `data.columns`. A file without `rl` is for SFT. One with
`rl: grpo` becomes a file of rounds ([ROUNDS.md](ROUNDS.md)), as that of GRPOConfig does
([FROM_TRL.md](FROM_TRL.md)); its options stand in the section `trl`. What differs without an option for
it:

- With `sample_packing` a batch of SFT counts packs of `sequence_len` tokens, and here rows: multiply
  `train.global_batch_size` by the rows of a pack.
- `type: alpaca` writes Alpaca's own prompts; here the rows are chats.
- Types such as `chatml.intel` and `llama3.ultra` write a template by themselves; here the
  tokenizer's chat template does, or a Jinja file in `data.chat_template`. `dpo-fast data run.yaml`
  shows what is written.
- The reference is scored once and stored.
- `rl: simpo` is TRL's CPOTrainer with `cpo_alpha: 1.0`, an SFT term that the paper's SimPO has not:
  it is written out.
""",
}
GROUPS = {  # title: whether an option stands below it
    "Options that are carried over": lambda option: option.here,
    "Options without a counterpart": lambda option: option.lost,
    "Options that need nothing here": lambda option: not option.here and not option.lost,
}
EXPLAINED = {
    "Options that are carried over": "",
    "Options without a counterpart": "\nAt its default nothing is lost. Else the import "
    "names it, in the file and on the terminal.\n",
    "Options that need nothing here": "",
}


def page(kind: str) -> str:
    """The page of one trainer, as markdown."""
    importer = IMPORTERS[kind]
    head = HEAD.format(
        trainer=importer.title, commands=COMMANDS[kind], versions=VERSIONS[kind], words=WORDS[kind]
    )
    options = _options(_as_written(importer))
    return head + "".join(_group(title, options) for title in GROUPS)


def _as_written(importer: Importer) -> dict[str, Table]:
    """The tables of a trainer by the names that its files have, with those that they had before."""
    made: dict[str, Table] = {}
    for method, options in importer.tables.items():
        names = importer.names(method)
        made[method] = {}
        for name, option in options.items():
            newer = names.get(name, name)
            before = f"`, was `{name}" if importer.renamed and newer != name else ""
            made[method][newer] = replace(option, name=newer + before)
    return made


def _options(tables: dict[str, Table]) -> dict[str, tuple[Option, list[str]]]:
    """Options by name, with the methods that have them; nothing where all have."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for method, options in tables.items():
        for name, option in options.items():
            key = name if name not in found or found[name][0] == option else f"{name} {method}"
            found.setdefault(key, (option, []))[1].append(method)
    return {
        key: (option, [] if len(methods) == len(tables) else methods)
        for key, (option, methods) in found.items()
    }


def _group(title: str, options: dict[str, tuple[Option, list[str]]]) -> str:
    own = [each for each in options.values() if GROUPS[title](each[0])]
    lines = [f"\n## {title}\n{EXPLAINED[title]}\n"]
    if title == "Options that need nothing here":
        notes: dict[str, list[str]] = {}
        for option, _ in own:
            notes.setdefault(option.note, []).append(f"`{option.name}`")
        lines.append("| options | why |\n|---|---|\n")
        lines += [
            f"| {', '.join(dict.fromkeys(names))} | {note} |\n" for note, names in notes.items()
        ]
        return "".join(lines)
    where = "here" if own and own[0][0].here else "why"
    lines.append(f"| option | its default | {where} | |\n|---|---|---|---|\n")
    lines += [_row(option, methods) for option, methods in own]
    return "".join(lines)


def _row(option: Option, methods: list[str]) -> str:
    name = f"`{option.name}`" + (f" ({', '.join(methods)})" if methods else "")
    name += ", of older versions" if option.older else ""
    keys = ", ".join(f"`{key}`" for key in option.here.split(", ")) if option.here else option.note
    note = option.note if option.here else ""
    default = "" if option.default is None else f"`{json.dumps(option.default)}`"
    return f"| {name} | {default} | {keys} | {note} |\n"


def write(folder: Path) -> None:
    """All pages."""
    for kind, name in NAMES.items():
        (folder / f"{name}.md").write_text(page(kind), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
