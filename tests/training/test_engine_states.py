"""Parts of parameters, metrics and other states put together: without engines."""

import pytest
import torch

pytest.importorskip("deepspeed")

from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.engine_parts import Parts
from dpo_fast.training.engine_states import Shard, States, cut_parameters
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.reshard import load_part, merged_metrics

COUNTS = {"a": 7, "b": 1, "c": 6}


def sharded(ranks: int) -> States:
    """Three parameters at ZeRO 3, padded with -1."""
    flat = {name: torch.arange(float(count)) for name, count in COUNTS.items()}
    shards = []
    for rank in range(ranks):
        places = cut_parameters([COUNTS], rank, ranks)
        held = torch.full((sum(place.count for place in places.values()),), -1.0)
        for name, place in places.items():
            part = flat[name][place.offset : place.offset + place.count]
            held[place.start : place.start + len(part)] = part
        state = {"exp_avg": held + 100, "exp_avg_sq": held + 200, "step": torch.tensor(3.0)}
        shards.append(Shard([held], [state], places))
    return States(shards)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_padded_shards_are_joined_without_their_padding(ranks):
    states = sharded(ranks)
    for name, count in COUNTS.items():
        assert torch.equal(states.fp32(name, count), torch.arange(float(count)))
        assert torch.equal(states.moment(name, "exp_avg_sq", count), torch.arange(count) + 200.0)
        assert states.step(name) == 3
    with pytest.raises(ValueError, match="a has .* elements and not 99"):
        states.fp32("a", 99)


def test_parameters_without_a_step_have_no_moments():
    states = sharded(2)
    for shard in states.shards:
        shard.moments[0].clear()
    assert states.step("a") is None
    assert torch.equal(states.moment("a", "exp_avg", 7), torch.zeros(7))


def test_steps_that_differ_are_one_tensor_nowhere():
    states = sharded(1)
    parts = object.__new__(Parts)
    parts.states, parts.places = states, states.shards[0].places
    assert parts._step(0) == 3
    places = dict(parts.places)
    other = {**states.shards[0].moments[0], "step": torch.tensor(1.0)}
    shard = states.shards[0]
    shard.moments.append(other)
    shard.fp32.append(shard.fp32[0])
    shard.places["b"] = type(places["b"])(1, 0, 1)
    parts.places = places
    with pytest.raises(UserError, match=r"AdamW has taken \[1, 3\] steps"):
        parts._step(0)


@pytest.mark.parametrize("now", [1, 2, 3])
def test_an_open_window_of_metrics_reads_the_same_on_any_ranks(monkeypatch, now):
    """Sums go to rank 0. Steps and milliseconds are of every rank."""
    saved = []
    for rank in range(2):
        sums = MetricSums(torch.device("cpu"))
        for step in range(3):
            sums._add("loss", torch.tensor(0.25 + rank), 0)
            sums._add("rewards/chosen", torch.tensor([1.0 + step, 3.0 * rank]))
            sums._count("num_tokens", 10, 0)
            sums._count("perf/head_ms", 6 + rank, 0)
            sums.step()
        saved.append(sums.values)
    total = {}
    for rank in range(now):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for name, pair in merged_metrics(saved, torch.device("cpu")).items():
            total[name] = total.get(name, 0) + pair
    assert total["loss"].tolist() == [3 * (0.25 + 1.25), 0]
    assert total["num_tokens"][0] == 60
    assert (total["rewards/chosen"][0] / total["rewards/chosen"][1]).item() == 21 / 12
    assert total["steps"][0].item() == pytest.approx(3 * now)  # `read` divides by the ranks
    assert total["perf/head_ms"][0].item() == pytest.approx(3 * 6.5 * now)


class Part:
    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_state_that_differs_from_rank_to_rank_is_refused_by_name():
    saved = [{"rewards": torch.tensor([1.0, rank])} for rank in range(2)]
    with pytest.raises(UserError, match=r"the state of the statistics \(rewards\) differs"):
        load_part(Part(rewards=torch.zeros(2)), "statistics", saved, 3, False)
    part = Part(rewards=torch.zeros(2))
    load_part(part, "statistics", saved[:1] * 2, 3, False)
    assert part.state["rewards"].tolist() == [1, 0]


@pytest.mark.parametrize(("stage", "expected"), [(0, [[0, 1], [2, 3]]), (3, [3, 0, 0])])
def test_shards_of_a_reference_are_cut_anew(monkeypatch, stage, expected):
    """Four numbers of two ranks, on one rank, or on the second of two that hold three places."""
    saved = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 3.0])}]
    monkeypatch.setattr(distributed, "rank", lambda: int(stage == 3))
    part = Part(w=torch.ones(2, 2) if stage == 0 else torch.ones(3))
    load_part(part, "reference", saved, stage, True)
    assert part.state["w"].tolist() == expected
