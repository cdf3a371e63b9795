"""The check of the first batches: before a pass over all examples, and of columns of the data."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from dpo_fast.errors import UserError
from dpo_fast.models import load_model, load_tokenizer
from dpo_fast.references import ColumnReference, FrozenReference
from dpo_fast.training.config import build_config
from dpo_fast.training.first_batches import check_before_pass, compare_at_start, score_first
from dpo_fast.training.fit import choose
from dpo_fast.training.load_data import load_split
from dpo_fast.training.loss_pass import LossPass
from dpo_fast.training.references import build_old, build_references
from dpo_fast.training.weights import identities
from tests.support import ranks
from tests.support.models import changed, run_tree, write_groups, write_model, write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    for name, seed in (("model", 0), ("same", 0), ("another", 1)):
        write_model(folder / name, seed=seed)
    write_pairs(folder / "pairs.jsonl", 24)
    write_groups(folder / "groups.jsonl", 12)
    return folder


class Here:
    """What `prepare` makes, in this process and without an engine."""

    def __init__(self, folder, output: str, **sections) -> None:
        tree = changed(run_tree(folder, micro_batch_size=2), folder / output, **sections)
        config = build_config(tree, "tree")
        choices = choose(config)
        self.config = choices.applied(config)
        self.attention = choices.attention.name
        self.train = load_split(self.config, load_tokenizer(self.config.model), "train", True)
        self.engine = self.load(None)
        self.loss_pass = LossPass(self.config.loss.objective)
        self.before = partial(
            check_before_pass, self.config, self.engine, self.train, self.loss_pass
        )

    def load(self, model):
        section = self.config.model if model is None else model.section(self.config.model)
        scoring = load_model(section, attention=self.attention)
        scoring.device = torch.device("cpu")
        return scoring

    def references(self, load=None) -> dict:
        arguments = (self.config, self.engine, self.engine, [self.train], load or self.load)
        return build_references(*arguments, self.before)


def unlike(scoring):
    """The model with other weights than its folder has."""
    scoring.causal_lm.model.norm.weight.data.mul_(1.3)
    return scoring


def stores(folder, output: str) -> bool:
    return (folder / output / "reference").exists()


@pytest.mark.processes
@pytest.mark.parametrize("command", ["train", "reference"])
def test_noise_is_refused_before_all_examples_are_scored(folder, command):
    tree = changed(
        run_tree(folder, max_steps=1, micro_batch_size=2, layout="padded"),
        folder / f"noise-{command}",
        parallel={"zero_stage": 3},
    )
    file = folder / f"{command}.refusal"
    ranks.group(2).do("with_noise", command, tree, str(file))
    for rank in range(2):
        refusal = file.with_name(f"{file.name}.{rank}").read_text()
        assert (
            "not give the same log-probs twice" in refusal
            and "noise in the model's forward" in refusal
        )
    assert not stores(folder, f"noise-{command}")


def test_a_reference_that_is_not_the_policy_is_refused_before_the_pass(folder):
    here = Here(folder, "unlike", reference={"path": str(folder / "same")})
    with pytest.raises(UserError, match="before the first update the loss is"):
        here.references(lambda model: unlike(here.load(model)))
    assert not stores(folder, "unlike")
    assert here.references()["train"] is not None and stores(folder, "unlike")


def test_another_reference_is_not_compared(folder):
    here = Here(folder, "another", reference={"path": str(folder / "another")})
    here.references()
    assert stores(folder, "another")


def test_what_wrote_the_completions_is_scored_after_the_check(folder):
    """grpo with a reference that needs no store: its own log-probs of all examples come after it."""
    here = Here(
        folder,
        "groups",
        data={"train": str(folder / "groups.jsonl")},
        loss={"type": "grpo", "grpo_beta": 0.04},
        reference={"provider": "frozen"},
    )
    frozen = dict.fromkeys(["train"], FrozenReference(unlike(here.load(None))))
    arguments = (here.config, here.engine, frozen, [here.train], here.load, here.before)
    with pytest.raises(UserError, match="before the first update the loss is"):
        build_old(*arguments)
    assert not stores(folder, "groups")
    frozen["train"] = FrozenReference(here.load(None))
    build_old(*arguments)
    assert stores(folder, "groups")


def test_the_first_examples_are_scored_in_other_batches(folder):
    here = Here(folder, "scored", train={"layout": "padded"})
    seen = []
    scorer = here.load(None)
    forward = scorer.forward
    scorer.forward = lambda **each: seen.append(len(each["input_ids"])) or forward(**each)
    few = score_first(here.config, scorer, here.train)
    first = next(here.train.batches(0))
    own = FrozenReference(here.engine)
    assert torch.allclose(few(first), own(first), atol=1e-4)
    assert sum(seen) == 2 * len(few.tokens) and len(few.tokens) >= first.num_examples
    assert torch.allclose(few.token_logps(first), own.token_logps(first), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("same", "are the policy's own log-probs"),
        ("another", "of another model or of other tokens"),
    ],
)
def test_what_columns_of_the_data_differ_by_is_said(folder, capsys, model, said):
    here = Here(folder, "columns")
    scorer = here.load(None)
    if model == "another":
        scorer = unlike(scorer)
    reference = FrozenReference(scorer)

    class Columns(ColumnReference):
        def __call__(self, batch):
            return reference(batch)

    config = here.config.model_copy(
        update={"reference": here.config.reference.model_copy(update={"provider": "columns"})}
    )
    config.reference.model_fields_set.add("provider")
    run = SimpleNamespace(
        config=config,
        weights=identities(config),
        train=here.train,
        engine=here.engine,
        loss_and_reference=lambda split: (here.loss_pass, Columns()),
    )
    assert compare_at_start(run) is None
    out = capsys.readouterr()
    assert said in out.out + out.err
