"""Held-out prompts answered in the middle of a run: by the model of that step, and nothing else changes."""

import json
import shutil

import pytest
import torch

pytest.importorskip("deepspeed")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.errors import UserError
from dpo_fast.report import write_report
from dpo_fast.training.checkpoint_run import export_checkpoint
from dpo_fast.training.config import build_config
from tests.support import ranks
from tests.support.metrics import lines_of
from tests.support.models import run_tree, write_groups, write_model, write_pairs

STEPS, PROMPTS, NEW = 4, 5, 8
RULES = """
def letters(prompt, completion):
    return len(set(completion))

def tired(prompt, completion, where):
    with open("FOLDER/asked", "a+") as stream:
        stream.write("x")
        stream.seek(0)
        if len(stream.read()) > 3 * 5:
            raise RuntimeError("no more")
    return 1.0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answering")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 16)
    write_pairs(folder / "held-out.jsonl", 6, seed=1)
    lines = (folder / "held-out.jsonl").read_text().splitlines()
    (folder / "held-out.jsonl").write_text(
        "\n".join([*lines, lines[0], lines[1]])
    )  # two come twice
    write_groups(folder / "groups.jsonl", 12)
    (folder / "rules.py").write_text(RULES.replace("FOLDER", str(folder)))
    return folder


def tree_of(folder, name: str, *, rule: str = "letters", **sections) -> dict:
    tree = run_tree(folder, output_dir=str(folder / name), max_steps=STEPS, save_steps=2)
    tree["data"]["eval"] = str(folder / "held-out.jsonl")
    tree["generate"] = {
        "max_prompts": PROMPTS,
        "steps": 2,
        "max_new_tokens": NEW,
        "batch_size": 2,
        "judge": {"type": "rule", "function": f"{folder}/rules.py:{rule}", "max_failures": 1},
    }
    for section, options in sections.items():
        tree[section] = tree.get(section, {}) | options
    return tree


DROPOUT = {"lora": {"r": 2, "dropout": 0.2}}  # so that a number drawn by answers would show


@pytest.fixture(scope="module")
def runs(folder):
    """Whole runs in their folders, on one rank and on two."""
    silent = tree_of(folder, "silent", model=DROPOUT)
    del silent["generate"]
    trees = [
        tree_of(folder, "full", log={"report_to": ["tensorboard"], "log_completions": True}),
        tree_of(folder, "lora", model=DROPOUT),
        silent,
        tree_of(folder, "padded", train={"layout": "padded"}, generate={"temperature": 0}),
    ]
    best = {"metric_for_best_model": "generate/score", "load_best_model_at_end": True}
    against = {"temperature": 0, "first_answers": str(folder / "full" / "generations.jsonl")}
    best["greater_is_better"] = False  # fewer letters: training changes them, whichever way
    trees.append(tree_of(folder, "best", train=best, generate=against))
    groups = tree_of(folder, "groups", loss={"type": "grpo"})
    groups["data"] |= {"train": str(folder / "groups.jsonl"), "eval": None, "eval_rows": 4}
    ranks.train([*trees, groups])
    ranks.train([tree_of(folder, "sharded", parallel={"zero_stage": 3})], ranks=2)
    return folder


def generations(run) -> list[dict]:
    return [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]


def by_transformers(model, prompts: list[str]) -> list[str]:
    """Greedy answers, one by one, by a model that transformers has loaded."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    told = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = causal_lm.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        told.append(tokenizer.decode(new, skip_special_tokens=True))
    return told


@pytest.mark.processes
@pytest.mark.parametrize("name", ["full", "sharded", "padded"])
def test_answers_are_those_of_the_model_of_that_step(runs, name):
    first, middle, last = generations(runs / name)
    assert [line["step"] for line in (first, middle, last)] == [0, 2, STEPS]
    prompts = [each["prompt"] for each in first["answers"]]
    assert len(set(prompts)) == PROMPTS
    for line, model in ((first, runs / "model"), (last, runs / name / "final")):
        assert [each["prompt"] for each in line["answers"]] == prompts
        greedy = [each["greedy"]["text"] for each in line["answers"]]
        assert greedy == by_transformers(model, prompts)
    changed = [each["greedy"]["text"] for each in middle["answers"]]
    assert changed != [each["greedy"]["text"] for each in first["answers"]]  # training shows
    assert ("sampled" in first["answers"][0]) == (name != "padded")


@pytest.mark.processes
def test_loggers_get_the_answers_as_tables(runs):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = events.EventAccumulator(str(runs / "full/tensorboard/full"))
    reader.Reload()
    tables = reader.Tensors("answers/text_summary")
    assert [table.step for table in tables] == [0, 2, STEPS]
    for table, line in zip(tables, generations(runs / "full")):
        text = table.tensor_proto.string_val[0].decode()
        assert text.startswith("| where | prompt | greedy | sampled | score | chosen |")
        assert len(text.splitlines()) == 2 + PROMPTS == 2 + len(line["answers"])
        assert all(each["where"] in text for each in line["answers"])


@pytest.mark.processes
def test_one_rank_and_two_give_the_same_answers(runs):
    one, two = (generations(runs / name)[0]["answers"] for name in ("full", "sharded"))
    assert one == two  # the sampled ones too


@pytest.mark.processes
def test_a_run_is_the_same_with_answers_and_without(runs):
    weights = [
        load_file(runs / name / "final/adapter_model.safetensors") for name in ("lora", "silent")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (runs / "silent/generations.jsonl").exists()
    texts = {line["answers"][0]["sampled"]["text"] for line in generations(runs / "lora")}
    assert texts  # adapters answer as well


@pytest.mark.processes
def test_a_judge_compares_with_the_start_and_with_the_chosen_answers(runs):
    lines = generations(runs / "full")
    start = [each["scores"]["greedy"] for each in lines[0]["answers"]]
    for line in lines:
        for each in line["answers"]:
            for kind in ("greedy", "sampled"):
                assert each["scores"][kind] == len(set(each[kind]["text"]))
        now = [each["scores"]["greedy"] for each in line["answers"]]
        chosen = [each["scores"]["chosen"] for each in line["answers"]]
        assert line["metrics"]["score"] == sum(now) / PROMPTS
        for name, other in (("start", start), ("chosen", chosen)):
            wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(now, other)) / PROMPTS
            if name == "chosen" or line["step"]:
                assert line["metrics"][f"win_rate_{name}"] == wins
    assert "win_rate_start" not in lines[0]["metrics"]
    logged = [line for line in lines_of(runs / "full") if "eval_generate/score" in line]
    assert [line["step"] for line in logged] == [0, 2, STEPS]
    assert logged[-1]["eval_generate/win_rate_start"] == lines[-1]["metrics"]["win_rate_start"]


@pytest.mark.processes
def test_a_metric_of_answers_chooses_the_best_checkpoint(runs):
    scores = {line["step"]: line["metrics"]["score"] for line in generations(runs / "best")}
    found = json.loads((runs / "best/best.json").read_text())
    assert found["metric"] == "eval_generate/score" and found["step"] in (2, STEPS)
    assert found["value"] == min(scores[2], scores[STEPS])
    export_checkpoint(runs / "best" / found["checkpoint"], runs / "best-exported", [])
    weights = (runs / "best/final/model.safetensors", runs / "best-exported/model.safetensors")
    one, other = map(load_file, weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.processes
def test_answers_are_compared_with_the_first_of_another_run(runs):
    """The other run began with the same model, so its first answers are those of the start."""
    first, *later = (line["metrics"] for line in generations(runs / "best"))
    assert first["win_rate_first"] == 0.5 and "win_rate_start" not in first
    assert all(line["win_rate_first"] == line["win_rate_start"] for line in later)
    assert "win_rate_first" not in generations(runs / "full")[-1]["metrics"]
    tree = tree_of(runs, "never", generate={"first_answers": str(runs / "nothing.jsonl")})
    assert "generate.first_answers=" in (told := ranks.refusal(tree)) and "No such file" in told


@pytest.mark.processes
def test_prompts_that_are_held_out_of_groups_have_their_best_answer(runs):
    rows = [json.loads(line) for line in (runs / "groups.jsonl").read_text().splitlines()]
    best = {
        row["prompt"]: row["completions"][row["scores"].index(max(row["scores"]))] for row in rows
    }
    answers = generations(runs / "groups")[0]["answers"]
    assert len(answers) == 4
    assert all(each["chosen"] == best[each["prompt"]].strip() for each in answers)


@pytest.mark.processes
def test_a_resumed_run_has_the_same_answers(runs):
    """Killed after the answers of step 4, it goes on from step 2; and once they were not yet written."""
    whole = generations(runs / "full")
    for name, kept in (("killed", whole), ("interrupted", whole[:1])):
        shutil.copytree(runs / "full", runs / name)
        shutil.rmtree(runs / name / f"checkpoint-{STEPS}")
        shutil.rmtree(runs / name / "final")
        text = "".join(f"{json.dumps(line)}\n" for line in kept) + '{"step": 4, "ans'
        (runs / name / "generations.jsonl").write_text(text)
        latest = runs / name / "latest"
        latest.write_text("checkpoint-2\n" if latest.exists() else "")
        tree = tree_of(runs, name)
        tree["train"]["resume_from_checkpoint"] = str(runs / name / "checkpoint-2")
        ranks.train([tree])
        assert generations(runs / name) == whole
    tree["generate"]["max_new_tokens"] = NEW + 1
    told = ranks.refusal(tree)
    assert "has answers to other prompts, or with other options of generate" in told


@pytest.mark.processes
def test_a_judge_that_fails_later_ends_no_run(folder):
    """It answers for three answers to each of five prompts, and fails from then on."""
    ranks.train([tree_of(folder, "tired-run", rule="tired")])
    first, *later = generations(folder / "tired-run")
    assert first["metrics"]["score"] == 1.0 and first["metrics"]["unjudged"] == 0
    assert "score" not in later[-1]["metrics"] and later[-1]["metrics"]["unjudged"] == PROMPTS
    assert (folder / "tired-run/final").exists()
    said = ranks.group(1).said()
    assert "the answers of step 2 are not judged: " in said and "no more" in said
    told = ranks.refusal(tree_of(folder, "refused", rule="tired"))  # at the start a slip is told
    assert told.startswith("generate") and "no more" in told
    patient = tree_of(folder, "refused", rule="tired")
    patient["generate"]["judge"]["max_failures"] = 99  # more than there are answers
    told = ranks.refusal(patient)
    assert told.startswith("generate.judge.type=rule gave none of 15 answers a score, at last")


@pytest.mark.processes
def test_the_report_shows_what_changed(runs):
    page = write_report(runs / "full").read_text()
    section = page[page.index("<h2>Answers</h2>") : page.index("<h2>Answers before and after</h2>")]
    assert "5 held-out prompts" in section and "wins against the start" in section
    assert " to " in section and page.count("<h4>Chosen answer</h4>") == PROMPTS
    assert "<h4>Before</h4>" in page and "<h4>After</h4>" in page
    (runs / "full/generations.jsonl").rename(runs / "full/aside")
    try:
        (runs / "full/generations.jsonl").write_text('{"step": 1}\n{}\n')
        with pytest.raises(UserError, match=r"generations\.jsonl is damaged"):
            write_report(runs / "full")
    finally:
        (runs / "full/aside").rename(runs / "full/generations.jsonl")


def test_the_resolved_configuration_is_one(folder):
    """As `config show` prints it, and as export, replay and iterate read it."""
    run = build_config(tree_of(folder, "never"), "tree")
    tree = run.resolved()
    assert tree["generate"]["judge"]["max_failures"] == 1
    assert build_config(tree, "again").resolved() == tree


@pytest.mark.processes
def test_a_checkpoint_of_such_a_run_is_exported(runs, tmp_path):
    export_checkpoint(runs / "full" / f"checkpoint-{STEPS}", tmp_path / "model", [])
    weights = (runs / "full/final/model.safetensors", tmp_path / "model/model.safetensors")
    one, other = map(load_file, weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


REFUSED = {
    "generate.steps is not used: set generate.max_prompts": {"generate": {"max_prompts": 0}},
    "there are none: set data.eval or data.eval_rows": {"data": {"eval": None}},
    "log.eval_texts=0 says that texts may not lie there": {"log": {"eval_texts": 0}},
    "torch_compile=true would compile": {"model": {"torch_compile": True}},
    "max_new_tokens=128 leaves no room": {"generate": {"max_new_tokens": 128}},
    "generate.top_p=0.9 is not used": {"generate": {"temperature": 0, "top_p": 0.9}},
    "implicit is the reward of a policy": {
        "generate": {"judge": {"type": "implicit", "reference": "m"}}
    },
    "generate.first_answers=f is not used without generate.judge": {
        "generate": {"first_answers": "f", "judge": None}
    },
    "generate.judge.samples=s is not used": {
        "generate": {"judge": {"type": "rule", "function": "a:b", "samples": "s"}}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused(folder, message):
    tree = tree_of(folder, "never", **REFUSED[message])
    if message.startswith("generate.steps"):
        tree["generate"] = {"steps": 2}
    with pytest.raises(UserError, match=message):
        build_config(tree, "tree")


SCORE = {"metric_for_best_model": "generate/score"}


@pytest.mark.parametrize(
    "train, generate, message",
    [
        (SCORE, None, "no prompt is answered: set generate.max_prompts"),
        (SCORE, {"steps": None}, "one after the last step alone: set generate.steps"),
        (SCORE | {"save_steps": 3}, {}, "no multiple of generate.steps=2.*train.save_steps=4"),
        (SCORE | {"save_steps": None}, {}, "the last one alone is written: set train.save_steps=2"),
        (SCORE, {"judge": None}, "there is no such metric|did you mean"),
        ({"metric_for_best_model": "generate/win_rate_first"}, {}, "did you mean"),
        ({"metric_for_best_model": "generate/scoer"}, {}, "did you mean generate/score"),
    ],
)
def test_a_metric_of_answers_needs_answers(folder, train, generate, message):
    tree = tree_of(folder, "never", train=train, generate=generate or {})
    if generate is None:
        del tree["generate"]
    with pytest.raises(UserError, match=message):
        build_config(tree, "tree")
