"""The section `generate` of a file of stages: every stage has it, with the judge of the file."""

from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.rounds import records
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.plan import Plan
from dpo_fast.rounds.progress import progress_of
from dpo_fast.rounds.rows import check_server
from dpo_fast.rounds.stage import judge_of_the_file
from dpo_fast.training.config import build

RULE = {"type": "rule", "function": "rules.py:score", "max_failures": 3}
TREE = {
    "output_dir": "runs/rounds",
    "model": {"path": "m"},
    "data": {"eval": "held-out.jsonl", "columns": {"prompt": "ask"}},
    "sample": {"prompts": "prompts.jsonl"},
    "judge": RULE,
    "generate": {"max_prompts": 8},
    "stages": [{"prompts": "prompts.jsonl"}, {"data": "pairs.jsonl"}],
}


def plan_of(**sections) -> Plan:
    return Plan(build(RoundsConfig, TREE | sections, "file"), "file")


def test_every_stage_answers_and_is_judged_as_the_file_says():
    plan = plan_of()
    for step in plan.steps:
        generate = plan.rehearsal(step).generate
        assert generate.max_prompts == 8
        assert (generate.judge.function, generate.judge.max_failures) == ("rules.py:score", 3)
    own = {"max_prompts": 8, "judge": {"type": "command", "command": "mine"}}
    assert plan_of(generate=own).rehearsal(plan.steps[1]).generate.judge.type == "command"
    silent = plan_of(generate={})
    assert silent.rehearsal(silent.steps[0]).generate.max_prompts == 0


def test_later_stages_compare_with_the_answers_of_the_start(tmp_path):
    plan = plan_of(output_dir=str(tmp_path))
    runs = [plan.rehearsal(step) for step in plan.steps]

    def first_answers() -> list[str | None]:
        told = (plan._with_first_answers(*each) for each in zip(plan.steps, runs))
        return [run.generate.first_answers for run in told]

    assert first_answers() == [None, None]  # there are none yet
    file = plan.steps[0].run / "generations.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert first_answers() == [None, str(file)]
    assert not [name for name in records.options(plan, plan.steps[1]) if "generate" in name]


def test_the_status_names_what_was_edited_since(tmp_path):
    plan = plan_of(output_dir=str(tmp_path))
    first, second = plan.steps
    for name, step in ((records.DONE, first), (records.BEGUN, second)):
        made = {"options": records.options(plan, step), "data": {}, "models": {}, "judge": {}}
        records.write(step, name, {"made_with": made})
    assert not [each for each in progress_of(plan) if "edited" in each.told]
    edited = plan_of(output_dir=str(tmp_path), loss={"beta": 0.2})
    assert [each.told for each in progress_of(edited)] == ["edited since: loss.beta"] * 2


def test_an_error_of_a_judge_names_the_section_that_has_it():
    for own, name in (({}, "judge.type=rule"), ({"judge": RULE}, "generate.judge.type=rule")):
        plan = plan_of(generate={"max_prompts": 8} | own)
        with pytest.raises(UserError, match=f"^{name}: x"), judge_of_the_file(plan):
            raise UserError("generate.judge.type=rule: x")


def test_one_name_on_a_server_is_not_the_policy_of_two_rounds():
    served = {"type": "openai", "url": "http://here/v1", "model": "served"}
    stages = [{"prompts": "p.jsonl", "rounds": 2}]
    for engine in (served, {**served, "model": None}):
        plan = plan_of(stages=stages, sample={"engine": engine})
        first, second = (plan.rounds(step, plan.config.model) for step in plan.steps)
        check_server(plan, plan.steps[0], first)
        if engine["model"]:
            with pytest.raises(
                UserError, match="stage-1-round-1 has its answers from the same name"
            ):
                check_server(plan, plan.steps[1], second)
        else:
            check_server(plan, plan.steps[1], second)


def test_columns_of_prompts_are_not_those_of_pairs():
    sampled, given = plan_of().steps
    assert plan_of().rehearsal(sampled).data.columns == {}
    assert plan_of().rehearsal(given).data.columns == {"prompt": "ask"}
    assert plan_of().rounds(sampled).data["columns"] == {"prompt": "ask"}


def test_evaluation_data_of_a_round_are_known_before_its_pairs_are_there(tmp_path):
    for name in ("held-out", "prompts", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    plan = plan_of(
        output_dir=str(tmp_path / "out"),
        data={"eval": str(tmp_path / "held-out.jsonl")},
        stages=[{"prompts": str(tmp_path / "prompts.jsonl")}],
    )
    found = records.data(plan, plan.steps[0])
    names = {role: Path(sources[0]["source"]).name for role, sources in found.items()}
    assert names == {"train": "prompts.jsonl", "eval": "held-out.jsonl"}
    (tmp_path / "held-out.jsonl").write_text("{}\n")
    changed = records.data(plan, plan.steps[0])
    assert [role for role in found if found[role] != changed[role]] == ["eval"]


def test_a_slip_names_the_stage():
    with pytest.raises(UserError, match=r"file: stage-1-round-1: .*generate\.max_prompt\b"):
        plan_of(generate={"max_prompt": 8})
