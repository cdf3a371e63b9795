"""Every layout of the table keeps what the table says of it. A new entry is tested by being there."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from dpo_fast.data.batch import collate
from dpo_fast.data.kinds import COMPLETIONS, DEMONSTRATIONS, GROUPS, KINDS, PAIRS, ExampleLengths
from dpo_fast.data.layouts import LAYOUTS, layouts_with
from dpo_fast.models import ScoringModel, architecture_of, choose_attention, choose_layout
from dpo_fast.models.scoring import forward_arguments
from dpo_fast.models.separation import check_separation
from dpo_fast.training.sections import TrainSection
from tests.support.architectures import alone, make

PROMPTS = [[1, 5, 6, 7], [1], [1, 5, 6, 7], [1, 90, 11]]  # the third is the first again
ANSWERS = [[[8, 9, 2], [10, 2]], [[2], [12, 13, 14, 2]], [[9, 9, 9, 2], [2]], [[50], [51, 2]]]
EXAMPLES = {
    PAIRS: [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in zip(PROMPTS, ANSWERS)
    ],
    COMPLETIONS: [
        {"prompt_ids": prompt, "completion_ids": answer, "label": bool(number)}
        for prompt, answers in zip(PROMPTS, ANSWERS)
        for number, answer in enumerate(answers)
    ],
    GROUPS: [
        {"prompt_ids": prompt, "completions_ids": [*answers, [3, 2]], "scores": [1.0, 0.0, 0.5]}
        for prompt, answers in zip(PROMPTS, ANSWERS)
    ],
}
EXAMPLES[DEMONSTRATIONS] = [
    {name: each[name] for name in ("prompt_ids", "completion_ids")}
    for each in EXAMPLES[COMPLETIONS]
]
BY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def sequences(batch, examples, kind) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every sequence, in the order of the batch."""
    return [
        (examples[index]["prompt_ids"], answer)
        for index in batch.indices_P.tolist()
        for answer in kind.answer_ids(examples[index])
    ]


@BY_KIND
@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probs_are_those_of_each_sequence_alone(name, kind):
    examples = EXAMPLES[kind]
    model = make("llama")
    batch = collate(examples, name, kind=kind, pad_id=3)
    one_by_one = [(prompt, [answer]) for prompt, answer in sequences(batch, examples, kind)]
    expected = alone(model, one_by_one)
    attention = choose_attention(
        "auto", name, torch.device("cpu"), torch.float32, architecture_of(model)
    )
    model.set_attn_implementation(attention.name)
    scoring = ScoringModel(model)
    found = scoring(**forward_arguments(batch))["logp"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    check_separation(scoring, name, 97, torch.device("cpu"), torch.float32)


@BY_KIND
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_batch_is_what_the_table_says(name, kind):
    layout, examples = LAYOUTS[name], EXAMPLES[kind]
    batch = collate(examples, name, kind=kind, pad_id=3)
    assert (batch.attention_mask is None) == (batch.spans is not None) == layout.shares_rows
    assert layout.shares_rows == (len(batch.input_ids) == 1)
    every = sequences(batch, examples, kind)
    assert batch.targets_T.tolist() == [token for _, answer in every for token in answer]
    assert batch.lengths_S.tolist() == [len(answer) for _, answer in every]
    before = [token for prompt, answer in every for token in [prompt[-1], *answer[:-1]]]
    assert batch.input_ids.flatten()[batch.rows_T].tolist() == before
    prompts = {tuple(prompt) for prompt, _ in every}
    distinct = {(*prompt, *answer[:-1]) for prompt, answer in every}
    ones = int((batch.input_ids == 1).sum())  # every prompt begins with the only 1s there are
    assert ones == len(prompts if layout.shares_prompts else distinct)
    predictions = set(zip(batch.rows_U.tolist(), batch.targets_U.tolist()))
    assert len(predictions) == len(batch.rows_U) == len(batch.targets_U)


@BY_KIND
@pytest.mark.parametrize("name", LAYOUTS)
def test_costs_are_the_tokens_of_the_batch(name, kind):
    examples = EXAMPLES[kind]
    costs = LAYOUTS[name].costs(ExampleLengths.of(examples, kind))
    for index, example in enumerate(examples):
        tokens = collate([example], name, kind=kind).input_ids.numel()
        assert costs.alone_P[index] == costs.of([index]) == tokens
    different = [0, 2, 6] if kind.single else [0, 1, 3]  # no two of one prompt
    batch = collate([examples[index] for index in different], name, kind=kind)
    assert costs.of(different) == batch.input_ids.numel()
    budget = int(costs.alone_P.max())
    bins = costs.bins(budget, range(len(examples)))
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(examples)))
    assert all(costs.of(some) <= budget for some in bins)


def test_auto_takes_the_last_that_the_architecture_allows():
    free = architecture_of(make("llama"))
    bound = type(free)("Recurrent", "it has a state", softcap=False, sinks=False)
    assert choose_layout("auto", free).name == list(LAYOUTS)[-1]
    for name, layout in LAYOUTS.items():
        assert free.allows(layout) and bound.allows(layout) != layout.shares_rows
        assert choose_layout(name, free).name == name
    rows_of_their_own = [name for name, each in LAYOUTS.items() if not each.shares_rows]
    assert choose_layout("auto", bound).name == rows_of_their_own[-1]


def test_the_configuration_takes_every_layout_and_says_what_it_is():
    told = TrainSection.model_fields["layout"].description
    for name, layout in LAYOUTS.items():
        assert TrainSection(output_dir="runs/a", layout=name).layout == name
        assert f"{name}: {layout.meaning}" in told
        assert name in layouts_with(shares_rows=layout.shares_rows)
    with pytest.raises(ValueError, match="layout"):
        TrainSection(output_dir="runs/a", layout="sideways")
