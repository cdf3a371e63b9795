"""The check before the first update: rounding passes in every layout, wrong references stop the run."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from dpo_fast.errors import UserError
from dpo_fast.losses import LossOptions, Objective
from dpo_fast.models.attention import NAMES
from dpo_fast.models.config import LoraSection
from dpo_fast.models.lora import add_lora
from dpo_fast.models.precision import DTYPES
from dpo_fast.models.scoring import ScoringModel
from dpo_fast.references import FrozenReference
from dpo_fast.training.config import build_config
from dpo_fast.training.first_batches import starts_at_reference
from dpo_fast.training.start import first_batches, last_bits_changed
from dpo_fast.training.weights import identities
from tests.support import start as support
from tests.support.models import run_tree, write_model
from tests.support.start import WRONG, depends_on_the_batch, stored

LAYOUTS = ("padded", "packed", "shared_prefix")
VOCABULARY, EOS = 96, 2


def draw_pairs(count: int, longest: int) -> list[dict]:
    """Pairs of random ids and very unequal lengths."""
    generator = torch.Generator().manual_seed(1)

    def ids(least: int) -> list[int]:
        size = int(torch.randint(least, longest, (), generator=generator))
        return torch.randint(5, VOCABULARY, (size,), generator=generator).tolist()

    return [
        {"prompt_ids": ids(3), "chosen_ids": [*ids(1), EOS], "rejected_ids": [*ids(1), EOS]}
        for _ in range(count)
    ]


PAIRS = draw_pairs(12, 40)
FIRST = [[7, 2, 11, 0], [5, 9, 1, 4], [3, 10, 6, 8]]  # micro-batches of the first step
SORTED = [[i, i + 1, i + 2] for i in range(0, 12, 3)]  # other batches, that a store was made in
stored_sums = partial(support.stored_sums, examples=PAIRS, batches=SORTED)
check = partial(support.check, examples=PAIRS, first=FIRST)


def make_model(layout: str, dtype: str = "fp32", layers: int = 3, seed: int = 0) -> ScoringModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
        attn_implementation="sdpa" if layout == "padded" else NAMES["sdpa"],
    )
    scoring = ScoringModel(transformers.LlamaForCausalLM(config).to(DTYPES[dtype]))
    scoring.device = torch.device("cpu")
    return scoring


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stored_in", ["its batches", "other batches", "one by one"])
def test_the_policy_as_its_own_reference_passes(dtype, layout, stored_in):
    model = depends_on_the_batch(make_model(layout, dtype))
    batches = {
        "its batches": FIRST,
        "other batches": SORTED,
        "one by one": [[i] for i in range(12)],
    }
    sums = stored_sums(model, layout, batches=batches[stored_in])
    start = check(model, layout, stored(sums))
    assert start.expected == pytest.approx(0.6931472, abs=1e-7)
    assert start.sequences == 24
    if stored_in == "its batches":
        assert start.difference < 1e-5
    elif dtype == "bf16":
        assert start.difference > 1e-5  # or nothing was tried


def test_rounding_that_moves_the_mean_loss_passes_at_any_beta():
    model = depends_on_the_batch(make_model("packed", "bf16", layers=8))
    sums = stored_sums(model, "packed")
    moved = []
    for beta in (0.1, 1.0, 10.0):
        objective = Objective(options=LossOptions(beta=beta))
        start = check(model, "packed", stored(sums), objective)
        moved.append(abs(start.loss - start.expected))
        assert start.rewards == pytest.approx(
            beta * check(model, "packed", stored(sums)).rewards * 10
        )
    assert moved[1] > 1e-3  # nothing is wrong, and yet the loss is off by more than bf16's last bit


@pytest.mark.parametrize(
    ("layout", "other"), [("shared_prefix", "packed"), ("packed", "shared_prefix")]
)
def test_a_reference_stored_in_another_layout_passes(layout, other):
    model = make_model(layout, "bf16")
    check(model, layout, stored(stored_sums(model, other)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fresh_adapters_change_nothing(dtype, layout):
    pytest.importorskip("peft")
    model = make_model(layout, dtype)
    sums = stored_sums(model, layout)
    add_lora(model, LoraSection(r=4, alpha=8))
    check(model, layout, stored(sums))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with pytest.raises(UserError, match="rounding explains"):
        check(model, layout, stored(sums))


def test_a_second_model_in_the_same_batches_is_exact():
    start = check(
        make_model("packed", "bf16"), "packed", FrozenReference(make_model("packed", "bf16"))
    )
    assert start.difference == 0 and start.loss == start.expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("sigmoid",), 0.6931472), (("hinge",), 1.0), (("ipo",), 25.0), (("robust",), 0.6931472)],
)
def test_other_losses_are_compared_with_their_own_value(names, expected):
    model = make_model("padded")
    objective = Objective(names, (1.0,), LossOptions(beta=0.1))
    sums = stored_sums(model, "padded")
    start = check(model, "padded", stored(sums), objective)
    assert start.loss == pytest.approx(expected, rel=1e-5)
    assert start.expected == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match=f"should be {expected:.4f}"):
        check(model, "padded", stored(sums - 0.5), objective)


def refusal_of(model, layout: str, sums) -> str:
    with pytest.raises(UserError) as refusal:
        check(model, layout, stored(sums))
    return str(refusal.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_reference_of_other_tokens_stops_the_run(wrong, dtype, layout):
    model = depends_on_the_batch(make_model(layout, dtype))
    text = refusal_of(model, layout, stored_sums(model, layout, examples=wrong(PAIRS)))
    assert "should be 0.69314" in text and "reference.cache_dir" in text
    assert "24 sequences differ by" in text and "two evaluations of the policy differ by" in text


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_reference_of_another_checkpoint_stops_the_run(dtype, layout):
    model, other = make_model(layout, dtype), make_model(layout, dtype)
    other.causal_lm.model.norm.weight.data.mul_(1.1)  # no other tensor tells the two apart
    assert "should be" in refusal_of(model, layout, stored_sums(other, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_answers_wrong_alike_are_seen_though_the_loss_is_right(layout):
    model = make_model(layout)
    with pytest.raises(UserError, match="should be"):
        check(model, layout, stored(stored_sums(model, layout) + 1.0))


@pytest.mark.parametrize(("dtype", "nats"), [("fp32", 1e-3), ("bf16", 2.0)])
def test_one_wrong_row_of_a_small_batch_stops_the_run(dtype, nats):
    model = make_model("padded", dtype)
    sums = stored_sums(model, "padded")
    sums[FIRST[0][0], 0] += nats
    with pytest.raises(UserError, match="should be"):
        check(model, "padded", stored(sums), first=[FIRST[0][:2]])


def test_a_reference_of_another_dtype_stops_an_fp32_run():
    model = make_model("packed")
    sums = stored_sums(make_model("packed", "bf16"), "packed")
    with pytest.raises(UserError, match="should be"):
        check(model, "packed", stored(sums))


def test_sums_that_agree_hide_no_exchanged_tokens():
    model = make_model("packed")

    class Exchanged(FrozenReference):
        def token_logps(self, batch):
            parts = super().token_logps(batch).split(batch.lengths_S.tolist())
            return torch.cat([part.flip(0) for part in parts])

    objective = Objective(options=LossOptions(token_clamp=5.0))
    check(model, "packed", FrozenReference(model), objective)
    with pytest.raises(UserError, match="should be"):
        check(model, "packed", Exchanged(model), objective)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_small_first_batch_is_judged_with_more_allowance(size):
    model = depends_on_the_batch(make_model("packed", "bf16"))
    sums = stored_sums(model, "packed")
    for first in range(12 - size):
        indices = list(range(first, first + size))
        start = check(model, "packed", stored(sums), first=[indices])
        assert start.accepted / start.rounding == pytest.approx(2 + 4 / (2 * size) ** 0.5)


def test_what_rounding_makes_does_not_depend_on_how_the_first_batch_is_split():
    model = make_model("packed", "bf16")
    provider = stored(stored_sums(model, "packed"))
    whole = check(model, "packed", provider, first=[list(range(8))])
    halves = check(model, "packed", provider, first=[list(range(8)), [8, 9]])
    assert halves.rounding == pytest.approx(whole.rounding, rel=1e-3)


def test_an_empty_micro_batch_takes_part():
    model = make_model("packed")
    provider = stored(stored_sums(model, "packed"))
    assert check(model, "packed", provider, first=[[4], []]).sequences == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_last_bit_is_changed_and_nothing_stays_behind(dtype):
    embeddings = nn.Embedding(50, 16).to(dtype)
    ids = torch.arange(50)
    before = embeddings(ids)
    with last_bits_changed(embeddings):
        changed = embeddings(ids)
    moved = ((changed - before).float() / before.float()).abs()
    assert moved.min() > 0 and moved.max() <= torch.finfo(dtype).eps
    assert torch.equal(embeddings(ids), before)


def test_as_many_micro_batches_are_compared_as_hold_sixteen_examples(monkeypatch):
    monkeypatch.setattr("dpo_fast.training.distributed.world_size", lambda: 2)
    batches = {
        0: [[0, 1, 2], [6, 7, 8], [12, 13], [17]],
        1: [[3, 4, 5], [9, 10, 11], [14, 15, 16], []],
    }
    sampler = SimpleNamespace(micro_batches=lambda step, rank: batches[rank])
    count, indices = first_batches(SimpleNamespace(sampler=sampler), 0)
    assert count == 3 and sorted(indices) == list(range(17))


def test_the_check_is_for_runs_that_start_at_their_reference(tmp_path):
    def starts(reference: dict, **loss) -> bool:
        tree = run_tree(tmp_path) | {"reference": reference, "loss": loss}
        config = build_config(tree, "tree")
        return starts_at_reference(config, identities(config))

    model = write_model(tmp_path / "model")
    for name, seed in (("same", 0), ("another", 1)):
        write_model(tmp_path / name, seed=seed)
    assert starts({}) and starts({"provider": "frozen"}) and starts({"path": f"{model}/"})
    assert starts({"path": str(tmp_path / "same")}), "the weights count, not where they lie"
    assert not starts({"path": str(tmp_path / "another")})
    assert not starts({"provider": "columns"})
    assert not starts({}, type="sft")


def test_a_reference_that_is_not_finite_is_told_with_its_row():
    model = make_model("packed")
    sums = stored_sums(model, "packed")
    row = FIRST[0][1]
    sums[row, 1] = float("nan")
    with pytest.raises(UserError, match=f"log-probs of the reference are not finite in {row}$"):
        check(model, "packed", stored(sums))


def test_a_policy_that_is_not_finite_is_no_wrong_reference():
    model = make_model("packed")
    sums = stored_sums(model, "packed")
    with torch.no_grad():
        model.causal_lm.model.norm.weight.fill_(3e38)
    with pytest.raises(UserError, match="log-probs of the policy are not finite in .* and 4 more"):
        check(model, "packed", stored(sums))


def test_a_loss_that_overflows_is_told_as_such():
    model = make_model("packed")
    sums = stored_sums(model, "packed")
    sums[:, 0] += 1e18
    objective = Objective(("ipo",), (1e18,), LossOptions())
    with pytest.raises(UserError, match="the loss is inf, though all log-probs are finite"):
        check(model, "packed", stored(sums), objective)
