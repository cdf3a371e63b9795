"""The rules of health on made metrics, at both sides of their bounds; the monitor and the options."""

import json
import math

import pytest

from dpo_fast.errors import UserError
from dpo_fast.health import FINDINGS, History, Monitor, examine
from dpo_fast.health.courses import thinned
from dpo_fast.health.monitor import MOST_POINTS
from dpo_fast.report import write_report

LN2 = math.log(2)
TREE = {"loss": {"type": "sigmoid", "beta": 0.1}, "reference": {"provider": "cached"}}


def well(step: int, **values) -> dict:
    """A line of a run of 100 steps that is well."""
    share = step / 100
    return {
        "step": step,
        "loss": LN2 - 0.3 * share,
        "rewards/chosen": 0.5 * share,
        "rewards/rejected": -0.5 * share,
        "rewards/margins": share,
        "rewards/accuracies": 0.5 + 0.3 * share,
        "rewards/longer": 0.55,
        "logps/chosen": -100.0 + share,
        "logps/rejected": -100.0 - share,
        "entropy": 2.0 - share,
        "grad_norm": 2.0 + step % 3,
    } | values


FACTS = {
    "step": 0,
    "total_steps": 100,
    "data/rows": 1000,
    "data/answer_tokens": 50.0,
    "data/prompts_cut": 0.1,
    "data/answers_cut": 0.02,
    "data/duplicates": 0.01,
    "data/contradictory": 0.0,
    "data/unequal": 900,
    "data/chosen_longer": 0.55,
    "data/nearly_equal": 0.05,
    "data/leaked": 0.0,
}


def found(change=lambda line: {}, facts=(), last: int = 100, config=None) -> dict[str, str]:
    """What is found in a run that is well but for some metrics or facts, after so many steps."""
    run = History(config=config or TREE)
    run.add(FACTS | dict(facts))
    for step in range(1, last + 1):
        line = well(step)
        run.add(line | change(line))
    return {check.name: check.finding for check in examine(run) if check.finding}


def test_a_run_that_is_well_has_no_findings_at_any_step():
    monitor = Monitor(TREE)
    assert not monitor.look(FACTS)
    assert not any(monitor.look(well(step)) for step in range(1, 101))
    assert monitor.standing == ()


def late(name: str, value: float):
    """One metric is at a value in the second half."""
    return lambda line: {name: value if line["step"] > 50 else line[name]}


def at(step: int, name: str, value: float):
    return lambda line: {name: value if line["step"] == step else line[name]}


def course(name: str, first: float, last: float):
    return lambda line: {name: first + (last - first) * line["step"] / 100}


def sure(entropy: float, chosen: float):
    """The entropy falls from 2 to this, and the chosen log-prob goes from -100 to that."""
    one, other = course("entropy", 2, entropy), course("logps/chosen", -100.0, chosen)
    return lambda line: one(line) | other(line)


@pytest.mark.parametrize(
    ("name", "ill", "fine", "says"),
    [
        ("loss_flat", course("loss", LN2, LN2), course("loss", LN2, 0.69), "steps 1 to 100"),
        ("loss_rising", course("loss", LN2, 0.8), course("loss", LN2, 0.695), "steps 1 to 100"),
        (
            "always_rejected",
            late("rewards/accuracies", 0.0),
            late("rewards/accuracies", 0.01),
            "0 %",
        ),
        (
            "always_chosen",
            late("rewards/accuracies", 1.0),
            late("rewards/accuracies", 0.99),
            "100 %",
        ),
        (
            "margin_exploding",
            course("rewards/margins", 0, 14),
            course("rewards/margins", 0, 10),
            "12",
        ),
        ("entropy_collapse", sure(0.3, -110.0), sure(0.6, -110.0), "steps 1 to 100"),
        (
            "gradient_spikes",
            at(60, "grad_norm", 31.0),
            at(60, "grad_norm", 29.0),
            "31.00 at step 60",
        ),
        ("length_drift", late("rewards/longer", 0.8), late("rewards/longer", 0.74), "55 %"),
        ("length_drift", late("rewards/longer", 0.2), late("rewards/longer", 0.26), "shorter"),
        ("not_finite", at(60, "loss", math.nan), at(60, "loss", 0.5), "step 60"),
    ],
)
def test_curves_on_both_sides_of_a_bound(name, ill, fine, says):
    assert name in found(ill) and says in found(ill)[name]
    assert name not in found(fine)


def test_chosen_log_probs_that_fall_by_little_or_without_a_margin_are_no_finding():
    def falling(by: float):
        return lambda line: {
            "logps/chosen": -100.0 - by * line["step"] / 100,
            "rewards/chosen": -line["step"] / 100,
        }

    assert set(found(falling(5.0))) == {"chosen_falling"} and not found(falling(2.0))
    still = lambda line: falling(5.0)(line) | {"rewards/margins": 0.0}  # noqa: E731
    assert not found(still)


@pytest.mark.parametrize(
    ("name", "fact", "ill", "fine"),
    [
        ("length_shortcut", "data/chosen_longer", 0.75, 0.72),
        ("length_shortcut", "data/chosen_longer", 0.25, 0.28),
        ("duplicates", "data/duplicates", 0.06, 0.05),
        ("contradictory", "data/contradictory", 0.02, 0.01),
        ("truncated", "data/answers_cut", 0.06, 0.05),
        ("truncated", "data/prompts_cut", 0.21, 0.2),
        ("nearly_equal", "data/nearly_equal", 0.21, 0.2),
        ("eval_in_train", "data/leaked", 0.02, 0.01),
    ],
)
def test_data_on_both_sides_of_a_bound(name, fact, ill, fine):
    seen = found(facts={fact: ill})
    assert set(seen) == {name} and "%" in seen[name] and "people usually" in seen[name]
    assert not found(facts={fact: fine})
    few = {"data/rows": 49, "data/unequal": 49}
    assert not found(facts={fact: ill} | few), "a few rows say nothing"


def test_a_reference_that_is_far_away_at_the_start():
    def apart(nats: float):
        reward = nats * 50 * 0.1  # tokens, beta
        return at(1, "rewards/chosen", reward), at(1, "rewards/rejected", -reward)

    for nats, expected in ((0.6, {"reference_mismatch"}), (0.4, set())):
        chosen, rejected = apart(nats)
        seen = found(lambda line, c=chosen, r=rejected: c(line) | r(line))
        assert set(seen) == expected, nats
    none = TREE | {"reference": {"provider": "none"}}
    chosen, rejected = apart(9.0)
    assert not found(lambda line: chosen(line) | rejected(line), config=none)


def test_the_first_training_loss_stands_in_for_an_evaluation():
    start = {"start/expected": LN2, "start/rewards": 1e-5}
    assert set(found(at(1, "loss", 0.75), facts=start)) == {"start_loss"}
    assert not found(at(1, "loss", LN2 + 5e-4), facts=start)
    assert not found(at(1, "loss", 0.75), facts=start | {"start/expected": 0.75})


def test_rewards_without_a_reference_say_what_changed_and_not_where_they_began():
    """As with sft, slic and cpo, whose sums of log-probs prefer the shorter answer from the first step."""
    none = TREE | {"reference": {"provider": "none"}}
    from_the_start = {"rewards/margins": -30.0, "rewards/accuracies": 0.0, "rewards/longer": 0.05}
    less = course("rewards/margins", -30.0, -4.0)
    assert not found(lambda line: from_the_start | less(line), config=none)
    for name, value in (("rewards/accuracies", 0.0), ("rewards/longer", 0.05)):
        assert found(late(name, value), config=none), name
    assert found(course("rewards/margins", -5.0, 20.0), config=none)

    def batches(by: float):
        return lambda line: {
            "logps/chosen": -100.0 - by * line["step"] / 100 + 25 * (line["step"] % 2),
            "rewards/chosen": -by * line["step"] / 100,
        }

    assert not found(batches(5.0), config=none) and found(batches(60.0), config=none)
    assert set(found(batches(5.0))) == {"chosen_falling"}, "a reference takes the noise away"


def test_a_loss_against_a_reference_that_follows_need_not_fall():
    follows = TREE | {"reference": {"provider": "ema"}}
    for last in (LN2, 0.8):
        assert found(course("loss", LN2, last)) and not found(
            course("loss", LN2, last), config=follows
        )


def test_a_run_that_goes_on_is_not_judged_too_early():
    """Warm-up, and lines of few examples: only what is over may be judged by little."""
    flat = course("loss", LN2, LN2)
    assert not found(flat, last=24) and "loss_flat" in found(flat, last=25)
    pinned = lambda line: {"rewards/accuracies": 1.0}  # noqa: E731
    assert not found(pinned, last=19) and "always_chosen" in found(pinned, last=20)
    run = History(config=TREE)
    for step in (0, 4, 8):
        run.add({"step": step, "total_steps": 100, "eval_rewards/accuracies": 1.0})
        run.add(
            {"step": step, "eval_logps/chosen": -50.0 - step, "eval_rewards/margins": 0.1 * step}
        )
    assert not any(check.finding for check in examine(run)), "evaluations neither"
    for steps, names in ((4, set()), (8, {"always_chosen"})):  # runs that are over
        assert set(found(pinned, last=steps, facts={"total_steps": steps})) == names


def test_a_model_that_becomes_sure_of_the_chosen_answers_is_well():
    assert "entropy_collapse" in found(sure(0.3, -101.0))
    assert "entropy_collapse" not in found(sure(0.3, -90.0))


def test_each_thing_is_told_once_also_after_a_resumption():
    monitor, lines = Monitor(TREE), []
    for step in range(1, 101):
        line = well(step, entropy=2.0 if step < 50 else 0.1, **{"logps/chosen": -100.0})
        told = monitor.look(line)
        lines.append(line | ({"health": told} if told else {}))
    told = [line for line in lines if "health" in line]
    assert len(told) == 1 and set(told[0]["health"]) == {"entropy_collapse"}
    assert monitor.standing == ("entropy_collapse",)
    assert all(ord(letter) < 128 for letter in told[0]["health"]["entropy_collapse"])
    again = Monitor(TREE, lines)
    assert not again.look(
        well(101, entropy=0.1, **{"logps/chosen": -100.0})
    ) and again.standing == ("entropy_collapse",)


def test_long_curves_are_thinned_and_say_the_same():
    monitor = Monitor(TREE)
    for step in range(3 * MOST_POINTS):
        monitor.history.add({"step": step, "loss": 1.0})
    monitor.look({"step": 3 * MOST_POINTS, "loss": 1.0})
    points = monitor.history.train["loss"]
    assert thinned([(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]) == [(2.0, 3.0), (5.0, 6.0)]
    assert len(points) <= 1.5 * MOST_POINTS + 1 and {value for _, value in points} == {1.0}
    assert points == sorted(points) and points[-1][0] == 3 * MOST_POINTS


def test_the_report_tells_again_what_the_run_told(tmp_path):
    lines = [well(step) for step in range(1, 101)]
    lines[30]["health"] = {"always_chosen": "The accuracy stayed at <b>100 %</b>"}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "At step 31 the run said" in page and "&lt;b&gt;100 %" in page


def config(**sections):
    from dpo_fast.training.config import build_config

    tree = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"output_dir": "o"}}
    return build_config(tree | sections, "run.yaml")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"health": {"stop_on": ["loss_flatt"]}},
            "health.stop_on=loss_flatt: choose from not_finite",
        ),
        (
            {"health": {"stop_on": ["entropy_collapse"]}, "log": {"token_metrics": False}},
            "health.stop_on=entropy_collapse needs the entropy, but log.token_metrics=false",
        ),
        (
            {"health": {"stop_on": "overfitting"}},
            "data.eval or data.eval_rows, or leave overfitting",
        ),
        (
            {"health": {"stop_on": "reference_mismatch"}, "loss": {"type": "simpo"}},
            "reference.provider=none",
        ),
        ({"health": {"stop_on": "start_loss"}, "loss": {"type": "ipo"}}, "loss.type=sigmoid alone"),
        (
            {"health": {"stop_on": "loss_rising"}, "reference": {"provider": "ema"}},
            "reference.provider=ema moves with the policy",
        ),
        ({"health": {"stop": "x"}}, "did you mean stop_on"),
    ],
)
def test_what_cannot_stop_a_run_is_refused(sections, message):
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError) as caught:
        config(**sections)
    assert message in str(caught.value)


def test_every_finding_may_stop_a_run_that_can_make_it():
    pytest.importorskip("deepspeed")
    from dpo_fast.data.kinds import COMPLETIONS, GROUPS, PAIRS
    from dpo_fast.training.watch import check_kind_of_findings

    data = {"train": "d", "eval_rows": 4}
    run = config(health={"stop_on": list(FINDINGS)}, data=data)
    check_kind_of_findings(run, PAIRS)
    for kind, name in ((COMPLETIONS, "always_rejected"), (GROUPS, "length_drift")):
        with pytest.raises(UserError, match=f"health.stop_on={name} needs pairs.*{kind.name}"):
            check_kind_of_findings(run, kind)
