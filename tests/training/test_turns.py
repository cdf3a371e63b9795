"""Answers of several turns in a run: only what the assistant wrote is scored.

Plain transformers in fp64 scores each conversation alone, and `{% generation %}` in the template says
which of its tokens count.
"""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.data.batch import collate
from dpo_fast.data.dataset import load_examples
from dpo_fast.data.kinds import COMPLETIONS
from dpo_fast.data.layouts import LAYOUTS
from dpo_fast.data.mismatched import mismatched
from dpo_fast.data.sampler import Sampler
from dpo_fast.data.stream import ExampleStream
from dpo_fast.models import ScoringModel
from dpo_fast.models.attention import NAMES
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.ops.segments import sum_sequences
from dpo_fast.training.config import build_config
from tests.support import ranks
from tests.support.metrics import series
from tests.support.models import run_tree, write_model
from tests.support.plain_torch import assert_same_step, token_logps

ROWS, GLOBAL, STEPS, MAX_LENGTH = 12, 8, 6, 400
HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
TEMPLATE = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def say(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def talk(draw: random.Random, good: bool, turns: int) -> list[dict]:
    """An answer of some turns, of very unequal lengths."""
    messages = []
    for turn in range(turns):
        number = draw.randint(0, 999)
        words = f"{number} it is" if good else f"no{'!' * draw.randint(0, 7)}"
        messages += [say("assistant", words)]
        messages += [say(draw.choice(["user", "tool"]), f"{number + turn}?")]
    return messages[:-1]


def write_talks(folder: Path) -> None:
    """The same conversations as pairs that share their beginning, completions and groups."""
    draw = random.Random(0)
    files = {
        name: (folder / f"{name}.jsonl").open("w") for name in ("pairs", "completions", "groups")
    }
    for index in range(ROWS):
        prompt = [say("user", f"{index}?"), say("assistant", "which"), say("user", "this")]
        chosen = talk(draw, True, draw.randint(1, 3))
        rejected = talk(draw, False, draw.randint(1, 3))
        rows = {
            "pairs": {"chosen": prompt + chosen, "rejected": prompt + rejected},
            "completions": {"prompt": prompt, "completion": chosen, "label": True},
            "groups": {
                "prompt": prompt,
                "completions": [chosen, rejected, talk(draw, False, 1)],
                "scores": [2.0, 1.0, 0.0],
            },
        }
        if index % 2:
            rows["completions"] |= {"completion": rejected, "label": False}
        for name, row in rows.items():
            files[name].write(json.dumps(row) + "\n")
    for file in files.values():
        file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    write_model(folder / "model", seed=0)
    write_model(folder / "near", seed=2)
    write_talks(folder)
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


def tree_of(folder: Path, loss: dict, file: str = "pairs", **changes) -> dict:
    sections = {name: changes.pop(name, {}) for name in ("data", "parallel", "reference")}
    tree = run_tree(folder, global_batch_size=GLOBAL, seed=1, **changes)
    tree["data"] |= {
        "train": str(folder / f"{file}.jsonl"),
        "chat_template": str(folder / "chat.jinja"),
        "max_length": MAX_LENGTH,
    }
    tree["loss"] = loss
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return tree


def step_case(folder: Path, loss: dict, data: str = "pairs", stage: int = 0, **changes) -> dict:
    reference = {"provider": "frozen", "path": str(folder / "near")}
    options = {"reference": {} if loss["type"] in ALONE else reference} | changes
    return tree_of(folder, loss, data, max_steps=1, parallel={"zero_stage": stage}, **options)


# One step against plain PyTorch

ALONE = ("simpo", "sft")  # without a reference
CASES = {
    "sigmoid": {"type": "sigmoid", "beta": 0.3},
    "sigmoid_norm": {"type": "sigmoid_norm", "beta": 3.0},
    "ipo": {"type": "ipo", "beta": 0.2},
    "simpo": {"type": "simpo", "beta": 2.0, "simpo_gamma": 0.7},
    "sft": {"type": "sft"},
    "ld": {"type": "sigmoid", "beta": 0.3, "ld_alpha": 0.3},
    "clamp": {"type": "sigmoid", "beta": 0.3, "token_clamp": 0.5},
    "kto": {"type": "kto", "beta": 0.03},
    "completions, kto": {"type": "kto", "beta": 0.03},
    "groups, plackett_luce": {"type": "plackett_luce", "beta": 0.3},
}


class Plain:
    """The rows of step 0, scored by transformers alone."""

    def __init__(self, folder: Path, data: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.policy, self.reference = (
            AutoModelForCausalLM.from_pretrained(
                folder / name, dtype=torch.float64, attn_implementation="eager"
            )
            for name in ("model", "near")
        )
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        self.tokenizer.chat_template = TEMPLATE
        lines = (folder / f"{data}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        self.rows = [rows[i] for i in Sampler(ROWS, GLOBAL, 4, seed=1).global_batch(0)]

    def answers(self, row: dict) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """The prompt's ids, and ids and marks of each answer, up to the last that is marked."""
        if "chosen" in row:
            prompt = row["chosen"][:3]
            answers = [row["chosen"][3:], row["rejected"][3:]]
        else:
            prompt = row["prompt"]
            answers = row.get("completions") or [row["completion"]]
        before = self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
        found = []
        for answer in answers:
            whole = self.tokenizer.apply_chat_template(
                prompt + answer, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, marks = whole["input_ids"], whole["assistant_masks"]
            assert ids[: len(before)] == before
            end = len(marks) - marks[::-1].index(1)
            found.append((ids[len(before) : end], marks[len(before) : end]))
        return before, found

    def tokens(self, prompt: list[int], answer: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the scored tokens of an answer, of policy and reference."""
        ids, marks = (part[: MAX_LENGTH - len(prompt)] for part in answer)
        kept = torch.tensor(marks, dtype=torch.bool)
        own, _ = token_logps(self.policy, prompt, ids)
        with torch.no_grad():
            other, _ = token_logps(self.reference, prompt, ids)
        return own[kept], other[kept]

    def step(self, o: dict) -> tuple[float, dict]:
        rows = [self.answers(row) for row in self.rows]
        scored = [[self.tokens(prompt, each) for each in answers] for prompt, answers in rows]
        loss = {"kto": self.kto, "plackett_luce": ranking}.get(o["type"], pairs)
        value = loss(o, scored, rows) if o["type"] == "kto" else loss(o, scored)
        value.backward()
        return value.item(), {f"model.{n}": p.grad for n, p in self.policy.named_parameters()}

    def kto(self, o: dict, scored: list, rows: list) -> torch.Tensor:
        with torch.no_grad():
            moved = [
                self.tokens(prompt, answer)
                for (prompt, _), (_, others) in zip(rows, [rows[-1], *rows])
                for answer in others
            ]
            kl = torch.stack([(own - ref).sum() for own, ref in moved]).mean().clamp(min=0)
        terms = []
        for row, answers in zip(self.rows, scored):
            for good, (own, ref) in zip(
                [row["label"]] if "label" in row else [True, False], answers
            ):
                sign = 1 if good else -1
                terms.append(1 - torch.sigmoid(sign * o["beta"] * ((own - ref).sum() - kl)))
        return torch.stack(terms).mean()


def pairs(o: dict, scored: list) -> torch.Tensor:
    """Losses on pairs from the papers' formulas."""
    values, words, count = [], 0.0, 0
    for (chosen, chosen_ref), (rejected, rejected_ref) in scored:
        beta, nw, nl = o.get("beta"), len(chosen), len(rejected)
        a, b = chosen - chosen_ref, rejected - rejected_ref
        if "token_clamp" in o:
            a, b = (x.clamp(-o["token_clamp"], o["token_clamp"]) for x in (a, b))
        if "ld_alpha" in o:
            a, b = (torch.cat([x[: min(nw, nl)], x[min(nw, nl) :] * o["ld_alpha"]]) for x in (a, b))
        a, b, words, count = a.sum(), b.sum(), words - chosen.sum(), count + nw
        if o["type"] == "ipo":
            values.append((a / nw - b / nl - 1 / (2 * beta)) ** 2)
        elif o["type"] != "sft":
            margins = {"sigmoid": a - b, "sigmoid_norm": a / nw - b / nl}
            margins["simpo"] = chosen.mean() - rejected.mean() - o.get("simpo_gamma", 0) / beta
            values.append(-torch.nn.functional.logsigmoid(beta * margins[o["type"]]))
    return words / count if o["type"] == "sft" else torch.stack(values).mean()


def ranking(o: dict, scored: list) -> torch.Tensor:
    """Plackett and Luce: the best first, then the best of the others."""
    total = 0.0
    for answers in scored:
        x = o["beta"] * torch.stack([(own - ref).sum() for own, ref in answers])
        total = total - sum(x[i] - x[i:].logsumexp(0) for i in range(len(x)))
    return total / len(scored)


def data_of(name: str) -> str:
    return name.split(",")[0] if "," in name else "pairs"


@pytest.mark.processes
def test_every_kind_of_loss_equals_plain_pytorch(folder):
    cases = {
        name: step_case(folder, loss, data_of(name), layout="shared_prefix")
        for name, loss in CASES.items()
    }
    results = ranks.first_steps(cases)
    for name, loss in CASES.items():
        truth = Plain(folder, data_of(name)).step(loss)
        assert_same_step(results[name], truth, 2e-5, name)


@pytest.mark.processes
def test_the_split_does_not_matter(folder):
    """Any micro-batch, number of ranks, ZeRO stage and layout."""
    names = ("sigmoid_norm", "completions, kto")
    truths = {name: Plain(folder, data_of(name)).step(CASES[name]) for name in names}
    for count, splits in (
        (1, [(0, 1, "padded"), (0, 4, "packed")]),
        (2, [(3, 1, "padded"), (3, 4, "shared_prefix"), (2, 2, "packed")]),
    ):
        cases = {
            f"{name}/{count} ranks, zero {stage}, micro {micro}, {layout}": step_case(
                folder, CASES[name], data_of(name), stage, layout=layout, micro_batch_size=micro
            )
            for name in names
            for stage, micro, layout in splits
        }
        for what, result in ranks.first_steps(cases, count).items():
            assert_same_step(result, truths[what.split("/")[0]], 2e-5, what)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_scored_has_no_gradient(folder, layout):
    """At the head's input, exactly none; and each sum is that of plain transformers."""
    plain = Plain(folder, "pairs")
    config = build_config(tree_of(folder, CASES["sigmoid"]), "test")
    examples = load_examples(config.data, plain.tokenizer, split="train")
    batch = collate([examples[i] for i in range(len(examples))], layout)
    assert len(batch.targets_T) == batch.lengths_S.sum() == examples.lengths.scored_S.sum()
    assert len(batch.targets_T) < examples.lengths.answers_S.sum() * 0.7
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    alone = [plain.answers(json.loads(line)) for line in lines]
    expected = [
        plain.tokens(prompt, each)[0].sum() for prompt, answers in alone for each in answers
    ]
    if LAYOUTS[layout].shares_rows:
        plain.policy.set_attn_implementation(NAMES["sdpa"])
    model, hidden = ScoringModel(plain.policy.float()), []
    model.causal_lm.model.norm.register_forward_hook(lambda _, __, out: hidden.append(out))
    logp_T = model(**forward_arguments(batch))["logp"]
    sums_S = sum_sequences(logp_T, batch.lengths_S).double()
    torch.testing.assert_close(sums_S, torch.stack(expected), rtol=1e-5, atol=1e-4)
    (slopes,) = torch.autograd.grad(logp_T.sum(), hidden)
    slopes = slopes.flatten(0, 1).abs().sum(-1)
    scored = torch.zeros(len(slopes), dtype=torch.bool)
    scored[batch.rows_T] = True
    assert (slopes[~scored] == 0).all()
    assert (slopes[scored] > 0).all()


# What is stored


def examples_of(folder: Path, data: str, **options):
    plain = Plain(folder, data)
    config = build_config(tree_of(folder, CASES["sigmoid"], data, data=options), "test")
    return load_examples(config.data, plain.tokenizer, split="train"), plain, config


@pytest.mark.parametrize("data", ["pairs", "completions", "groups"])
def test_the_stored_flags_are_those_of_the_template(folder, data):
    examples, plain, config = examples_of(folder, data)
    lines = [json.loads(line) for line in (folder / f"{data}.jsonl").read_text().splitlines()]
    kind, sizes = examples.kind, []
    for index, row in enumerate(lines):
        prompt, answers = plain.answers(row)
        example = examples[index]
        assert example["prompt_ids"] == prompt
        flags = kind.answer_flags(example)
        for ids, told, (expected, marks) in zip(kind.answer_ids(example), flags, answers):
            assert ids == expected
            assert (told or [True] * len(ids)) == [mark == 1 for mark in marks]
            sizes.append(sum(marks))
    assert examples.lengths.scored_S.tolist() == sizes
    assert examples.report.tokens["scored"] == sum(sizes)
    assert any("tokens of answers are not scored" in note for note in examples.report.notes())
    stream = ExampleStream(
        config.data.model_copy(update={"streaming": True, "stream_buffer": ROWS}), plain.tokenizer
    )
    chunk = stream.read()
    names = (*kind.ids, *kind.scored)
    for index in range(ROWS):
        streamed, stored = chunk[index], examples[index]
        assert all(streamed.get(name) == stored[name] for name in names)
    assert chunk.lengths.scored_S.tolist() == sizes


def test_flags_are_stored_only_where_some_token_is_not_scored(folder):
    examples, _, _ = examples_of(folder, "pairs")
    whole, _, _ = examples_of(folder, "pairs", scored="all")
    last, _, _ = examples_of(folder, "pairs", scored="last")
    assert not {"chosen_scored", "rejected_scored"} & set(whole[0])
    assert (whole.lengths.scored_S == whole.lengths.answers_S).all()
    assert whole.lengths.answers_S.tolist() == examples.lengths.answers_S.tolist()
    assert examples.fingerprint != whole.fingerprint
    for index in range(ROWS):  # a stored reference is found by the digest
        for other in (whole, last):
            alike = other.kind.answer_flags(other[index]) == examples.kind.answer_flags(
                examples[index]
            )
            assert (other.digests[index] == examples.digests[index]) == alike, index


def test_mismatched_completions_keep_their_flags(folder):
    examples, _, _ = examples_of(folder, "completions")
    flagged = next(i for i in range(ROWS) if examples[i]["completion_scored"])
    plain = next(i for i in range(ROWS) if not examples[i]["completion_scored"])
    room = len(examples[plain]["prompt_ids"])
    whole = mismatched(examples[plain], examples[flagged], COMPLETIONS, 10_000)
    assert whole["completion_scored"] == examples[flagged]["completion_scored"]
    cut = mismatched(examples[plain], examples[flagged], COMPLETIONS, room + 9)
    assert cut["completion_scored"] == examples[flagged]["completion_scored"][:9]
    assert (
        mismatched(examples[flagged], examples[plain], COMPLETIONS, 10_000)["completion_scored"]
        is None
    )
    batch = collate([whole, cut], "packed", kind=COMPLETIONS)
    assert batch.lengths_S.tolist() == [sum(each["completion_scored"]) for each in (whole, cut)]


# Whole runs


@pytest.fixture(scope="module")
def runs(folder):
    common = {"max_steps": STEPS, "micro_batch_size": 2, "save_steps": 3}
    sections = {
        "pairs": (CASES["sigmoid"], {"data": {"eval_rows": 2}}),
        "tokens": (CASES["clamp"], {"reference": {"per_token": True}}),
        "groups": ({"type": "grpo"}, {}),
        "completions": (CASES["kto"], {}),
        "stream": (
            CASES["sigmoid"],
            {"data": {"streaming": True, "stream_buffer": 8}, "reference": {"provider": "frozen"}},
        ),
    }
    trees = {
        name: tree_of(
            folder,
            loss,
            name if name in ("groups", "completions") else "pairs",
            output_dir=str(folder / "runs" / name),
            parallel={"zero_stage": 0},
            **(common | more),
        )
        for name, (loss, more) in sections.items()
    }
    ranks.train(list(trees.values()))
    resumed = []
    for name in trees:
        again, place = copy.deepcopy(trees[name]), folder / "runs" / f"{name}-resumed"
        again["train"] |= {"output_dir": str(place), "resume_from_checkpoint": True}
        shutil.copytree(folder / "runs" / name / "checkpoint-3", place / "checkpoint-3")
        resumed.append(again)
    ranks.train(resumed)
    return folder / "runs"


@pytest.mark.processes
def test_the_first_loss_is_known(runs):
    """A stored reference is the policy at step 0. That the two agree is also checked by the run."""
    for name, first in {"pairs": 0.6931472, "tokens": 0.6931472, "stream": 0.6931472}.items():
        loss = series(runs / name)
        assert loss[1] == pytest.approx(first, abs=1e-6), name
        assert loss[STEPS] < first - 0.01, (name, loss)
    assert series(runs / "completions")[1] == pytest.approx(0.5, abs=1e-6)
    assert series(runs / "pairs", "eval_loss")[0] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.processes
def test_resume_is_bitwise(runs):
    from safetensors.torch import load_file

    for name in ("pairs", "tokens", "groups", "completions", "stream"):
        whole, resumed = (runs / each for each in (name, f"{name}-resumed"))
        expected, found = series(whole), series(resumed)
        assert found and found == {step: expected[step] for step in found}, name
        a, b = (load_file(run / "final" / "model.safetensors") for run in (whole, resumed))
        assert all(torch.equal(a[key], b[key]) for key in a), name
