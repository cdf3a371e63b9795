"""What attention is not told by its call: windows, chunks, and temperatures by place."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.models.attention_plan import AttentionPlan
from dpo_fast.models.attention_untold import Local, local_of, with_temperature

CPU = torch.device("cpu")
MIXED = {
    "layer_types": ["full_attention", "sliding_attention", "chunked_attention"],
    "sliding_window": 7,
    "attention_chunk_size": 5,
}


def layer(place: int | None = 0, **config) -> SimpleNamespace:
    return SimpleNamespace(layer_idx=place, config=SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (layer(), Local()),
        (SimpleNamespace(), Local()),
        (layer(sliding_window=7), Local(window=7)),
        (layer(sliding_window=None), Local()),
        (layer(0, **MIXED), Local()),
        (layer(1, **MIXED), Local(window=7)),
        (layer(2, **MIXED), Local(chunk=5)),
        (layer(3, **MIXED), Local()),  # such as a layer that predicts further tokens
        (layer(None, **MIXED), Local()),
    ],
)
def test_how_far_a_layer_looks_by_its_configuration(module, expected):
    assert local_of(module) == expected


def test_temperatures_go_by_the_place_in_the_sequence():
    spans = ((6, 0, -1), (2, 3, 0), (5, 0, -1))
    plan = AttentionPlan(spans, CPU)
    module = SimpleNamespace(
        attn_temperature_tuning=True, use_rope=False, floor_scale=2, attn_scale=0.5
    )

    def factor(places):
        return torch.log1p(torch.floor((places + 1.0) / 2)) * 0.5 + 1

    query = torch.randn(1, 3, 13, 4, dtype=torch.float64)
    along_the_row = query * factor(torch.arange(13))[:, None]
    places = torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 4])
    expected = query * factor(places)[:, None]
    torch.testing.assert_close(with_temperature(module, along_the_row, plan), expected)
    for off in ({"use_rope": True}, {"attn_temperature_tuning": False}):
        other = SimpleNamespace(**(vars(module) | off))
        assert with_temperature(other, query, plan) is query


def test_temperatures_of_a_slice():
    """A rank that has the second half of a row counts from 0, too."""
    group = SimpleNamespace(slice_of=lambda values: values[4:])
    plan = AttentionPlan(((3, 0, -1), (5, 0, -1)), CPU, group)
    module = SimpleNamespace(
        attn_temperature_tuning=True, use_rope=False, floor_scale=1, attn_scale=1.0
    )
    whole = AttentionPlan(plan.spans, CPU)
    query = torch.ones(1, 1, 8, 1, dtype=torch.float64)
    along = torch.log1p(torch.arange(8) + 1.0).double()[:, None] + 1
    expected = with_temperature(module, query * along, whole)[:, :, 4:]
    got = with_temperature(module, query[:, :, 4:] * along[:4], plan)
    torch.testing.assert_close(got, expected)
