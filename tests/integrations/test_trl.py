"""TRL's trainers with our head, against TRL's own: the same losses, metrics and weights."""

import copy
import json
import math
import shutil

import pytest

pytest.importorskip("trl")

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.errors import UnavailableError, UserError
from dpo_fast.integrations import trl as fast
from dpo_fast.integrations.trl_forward import add_linear_logp
from dpo_fast.losses import LossOptions, Objective, Totals, custom, preference, register_loss
from dpo_fast.ops.linear_logp import op
from tests.support import ranks
from tests.support.adapters import write_adapter
from tests.support.architectures import make
from tests.support.models import LIKE_SGD, write_architecture, write_model, write_pairs

pytestmark = pytest.mark.peers

STEPS = 3
METRICS = (
    "loss",
    "grad_norm",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=8)
    return folder


def pairs(place) -> Dataset:
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    return Dataset.from_list(rows)


def build(
    kind, place, output, *, model=None, rest=None, config=trl.DPOConfig, data=None, **options
):
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        **LIKE_SGD,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    } | options
    args = config(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        **options,
    )
    return kind(
        model=model or str(place / "model"),
        args=args,
        train_dataset=data or pairs(place),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        **(rest or {}),
    )


def trained(*arguments, **options):
    """Logged steps and final weights."""
    trainer = build(*arguments, **options)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(theirs, ours, tolerance=1e-5):
    (their_trainer, their_log), (our_trainer, our_log) = theirs, ours
    assert len(our_log) == len(their_log) == their_trainer.state.global_step
    for theirs, ours in zip(their_log, our_log):
        assert set(ours) == set(theirs)
        for name in METRICS:
            # Trainers log rounded numbers, and sums of a hundred log-probs are large.
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=2 * tolerance), name
    weights = dict(their_trainer.model.state_dict())
    assert list(weights) == list(our_trainer.model.state_dict())
    for name, value in our_trainer.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=tolerance, atol=tolerance, msg=name)


LOSSES = {
    "sigmoid": {},
    "weighted sum": {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [1.0, 0.3, 0.2]},
    "ipo": {"loss_type": "ipo"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "js": {"f_divergence_type": "js_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "weighting": {"use_weighting": True},
    "accumulation": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "stored": {"precompute_ref_log_probs": True},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_training_as_trl(name, place, tmp_path):
    options = LOSSES[name]
    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", **options)
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", **options)
    assert_same(theirs, ours)


def test_bf16_is_as_near_as_its_rounding(place, tmp_path):
    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", bf16=True)
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", bf16=True)
    for name in ("loss", "logps/chosen", "rewards/margins"):
        for a, b in zip(theirs[1], ours[1]):
            assert b[name] == pytest.approx(a[name], rel=0.02, abs=0.02), name


@pytest.mark.parametrize("stored", [False, True])
def test_lora_with_the_adapters_off_as_reference(stored, place, tmp_path):
    from peft import LoraConfig

    def lora():
        return {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}

    options = {"precompute_ref_log_probs": stored, "learning_rate": 1.0}
    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", rest=lora(), **options)
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", rest=lora(), **options)
    assert ours[1][-1]["rewards/margins"] != 0
    assert_same(theirs, ours)


def test_a_mixture_of_experts_keeps_its_aux_loss(place, tmp_path):
    write_architecture(tmp_path / "model", "mixtral, experts")
    options = {"model": str(tmp_path / "model"), "router_aux_loss_coef": 0.1}
    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", **options)
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", **options)
    assert [e["aux_loss"] for e in ours[1]] == pytest.approx(
        [e["aux_loss"] for e in theirs[1]], rel=1e-5
    )
    assert ours[1][0]["aux_loss"] > 0
    assert_same(theirs, ours)


def test_every_log_prob_is_ours(place, tmp_path, monkeypatch):
    """Policy, live and stored reference: our function is called, and TRL's is not."""
    calls = []
    forward = op._LinearLogp.forward

    def counted(*arguments):
        calls.append(len(arguments[4]))
        return forward(*arguments)

    monkeypatch.setattr(op._LinearLogp, "forward", staticmethod(counted))

    def forbidden(*arguments):
        raise AssertionError("TRL's head was used")

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "forward", forbidden)
    trained(fast.DPOTrainer, place, tmp_path / "live")
    assert len(calls) == 2 * STEPS
    calls.clear()
    trained(fast.DPOTrainer, place, tmp_path / "stored", precompute_ref_log_probs=True)
    assert len(calls) == 4 + STEPS  # 8 pairs by 2 for the table
    with pytest.raises(AssertionError, match="TRL's head"):
        trained(trl.DPOTrainer, place, tmp_path / "theirs")


def test_a_table_made_by_another_head_is_not_taken(place, tmp_path):
    """TRL names its table by data and model alone; ours must have another name."""
    pairs(place).save_to_disk(tmp_path / "data")
    data = Dataset.load_from_disk(str(tmp_path / "data"))
    options = {"precompute_ref_log_probs": True, "data": data, "max_steps": 1}
    keys = set()
    for kind, alpha in ((trl.DPOTrainer, None), (fast.DPOTrainer, None), (fast.DPOTrainer, 0.5)):
        trainer = build(kind, place, tmp_path / "run", ld_alpha=alpha, **options)
        keys.add(trainer._precompute_model_hash)
    assert len(keys) == 3


@pytest.mark.processes
@pytest.mark.slow
def test_a_table_of_another_model_is_not_taken_under_zero_3(place, tmp_path):
    """TRL hashes the sharded tensors, which are empty: its table of one model serves any other.

    On two ranks TRL 1.16 itself ends in an error of DeepSpeed when it stores a reference.
    """
    shutil.copy(place / "pairs.jsonl", tmp_path / "pairs.jsonl")
    models = [
        str(place / "model"),
        str(write_model(tmp_path / "other", seed=1)),
        str(place / "model"),
    ]
    ranks.group(1).do("trl_stored", str(tmp_path), models)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses == pytest.approx([0.693147] * 3, abs=1e-5)


def test_a_checkpoint_goes_on_in_trl(place, tmp_path):
    """Saved by ours after two steps, resumed by TRL's own: as if ours had never stopped."""
    whole = trained(fast.DPOTrainer, place, tmp_path / "whole", max_steps=4)
    half = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    trained(fast.DPOTrainer, place, tmp_path / "ours", **half)
    checkpoint = tmp_path / "ours" / "checkpoint-2"
    assert type(AutoModelForCausalLM.from_pretrained(checkpoint)).__name__ == "LlamaForCausalLM"
    other = build(trl.DPOTrainer, place, tmp_path / "theirs", **half)
    other.train(resume_from_checkpoint=str(checkpoint))
    for name, value in whole[0].model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "gemma2, caps and windows",
        "phi, bias in the head",
        "cohere, logit scale",
        "granite, logits scaling",
        "qwen2, tied",
    ],
)
def test_what_a_model_does_to_its_logits_is_done(name):
    model = make(name)
    ids = torch.randint(5, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    labels[2] = -100  # a row of nothing
    logp_BLV = model(ids).logits[:, :-1].log_softmax(-1)
    add_linear_logp(model, outputs=("log_probs", "is_top1", "entropy"))
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = logp_BLV.gather(2, ids[:, 1:, None])[..., 0]
    expected = expected.where(labels[:, 1:] != -100, 0.0)
    torch.testing.assert_close(output.log_probs, expected)
    assert output.is_top1.dtype is torch.bool and output.mean_logits is None
    assert not output.entropy.requires_grad and output.log_probs.requires_grad


def test_the_model_still_generates_and_scores_alike(place, tmp_path):
    trainer = build(fast.DPOTrainer, place, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(trainer.model(ids).logits, plain(ids).logits)
    assert torch.equal(
        trainer.model.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5)
    )


def test_a_copy_of_the_model_runs_on_its_own_weights(place):
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    add_linear_logp(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    ids = torch.arange(5, 15)[None]
    assert copied(ids).logits.abs().max() == 0 < model(ids).logits.abs().max()
    scored = copied(ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(scored, torch.full_like(scored, -math.log(copied.config.vocab_size)))


def resized(model):
    model.resize_token_embeddings(model.config.vocab_size + 7)


def cut(model):
    model.resize_token_embeddings(60)


def replaced(model):
    head = model.get_output_embeddings()
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features)


def merged(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted(IDS, labels=IDS).loss.backward()
    with pytest.raises(UserError, match="lm_head of LlamaForCausalLM is a Linear; .* no adapter"):
        adapted(IDS, labels=IDS, fused_lm_head=True)
    adapted.merge_and_unload()


IDS = torch.arange(5, 23).view(2, 9)


@pytest.mark.parametrize("change", [resized, cut, replaced, merged])
def test_the_head_is_as_others_to_transformers_and_peft(change, place):
    """What is done to it after our head is in is scored."""
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    add_linear_logp(model, temperature=0.7)
    before = model(IDS).logits
    change(model)
    logits = model(IDS).logits
    assert logits.shape != before.shape or (logits - before).abs().max() > 0.01
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    scored = model(IDS, labels=IDS, fused_lm_head=True).log_probs
    torch.testing.assert_close(scored, expected)
    model.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("stored", [False, True])
def test_losses_that_trl_does_not_have(stored, place, tmp_path):
    """simpo beside sigmoid is what `preference` gives for the batch, plus what TRL gives."""
    options = {"precompute_ref_log_probs": stored, "max_steps": 1, "ld_alpha": 0.5}
    _, plain = trained(fast.DPOTrainer, place, tmp_path / "plain", **options)
    _, both = trained(
        fast.DPOTrainer,
        place,
        tmp_path / "both",
        loss_type=["sigmoid", "dpop"],
        loss_weights=[1.0, 0.5],
        rest={"loss_options": {"dpop_lambda": 3.0}},
        **options,
    )
    _, alone = trained(
        fast.DPOTrainer,
        place,
        tmp_path / "alone",
        loss_type="dpop",
        rest={"loss_options": {"dpop_lambda": 3.0}},
        **options,
    )
    assert both[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.5 * alone[0]["loss"], abs=1e-6)
    assert alone[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def test_a_loss_of_ones_own_trains_in_trls_trainer(place, tmp_path, monkeypatch):
    """sigmoid written by hand and registered: TRL's own sigmoid, metrics and steps."""
    monkeypatch.setattr(custom, "CUSTOM", {})

    @register_loss(options=("beta", "label_smoothing"))
    def by_hand(logps, options):
        margin = options.beta * (logps.chosen_ratio - logps.rejected_ratio)
        return torch.nn.functional.softplus(-margin) + options.label_smoothing * margin

    _, theirs = trained(fast.DPOTrainer, place, tmp_path / "theirs")
    _, own = trained(fast.DPOTrainer, place, tmp_path / "own", loss_type="by_hand")
    assert [line["loss"] for line in own] == pytest.approx([line["loss"] for line in theirs], 1e-5)
    # Its options are its own: label_smoothing is read, discopop_tau is not.
    build(fast.DPOTrainer, place, tmp_path / "read", loss_type="by_hand", label_smoothing=0.1)
    with pytest.raises(UserError, match="discopop_tau"):
        build(fast.DPOTrainer, place, tmp_path, loss_type="by_hand", discopop_tau=0.1)
    with pytest.raises(UserError, match="loss_type=nobodys is not known; .*by_hand"):
        build(fast.DPOTrainer, place, tmp_path, loss_type="nobodys")


def test_simpo_is_the_loss_of_the_table(place, tmp_path):
    trainer, log = trained(
        fast.DPOTrainer,
        place,
        tmp_path,
        loss_type="simpo",
        beta=2.0,
        max_steps=1,
        rest={"loss_options": {"simpo_gamma": 1.0}},
    )
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    logp, lengths = [], []
    for row in trainer.train_dataset.select(range(2)):
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logp_L = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])
            logp.append(logp_L.flatten()[len(row["prompt_ids"]) - 1 :])
            lengths.append(len(row[side]))
    expected = preference(
        torch.cat(logp),
        torch.tensor(lengths),
        None,
        Objective(("simpo",), (1.0,), LossOptions(beta=2.0, simpo_gamma=1.0)),
        Totals(2, lengths[0] + lengths[2]),
    )
    assert log[0]["loss"] == pytest.approx(expected.loss.item(), abs=1e-5)


def test_kto(place, tmp_path):
    rows = []
    for row in pairs(place):
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    options = {"config": trl.KTOConfig, "data": Dataset.from_list(rows)}
    theirs = trained(trl.KTOTrainer, place, tmp_path / "theirs", **options)
    ours = trained(fast.KTOTrainer, place, tmp_path / "ours", **options)
    for a, b in zip(theirs[1], ours[1]):
        for name in ("loss", "kl", "rewards/chosen", "logps/rejected", "logits/chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=2e-5), name
    for a, b in zip(theirs[0].model.parameters(), ours[0].model.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


REFUSED = {
    "padding_free": {"padding_free": True},
    "label_smoothing": {"label_smoothing": 0.1},
    "discopop_tau": {"discopop_tau": 0.1},
    "f_alpha_divergence_coef": {"f_alpha_divergence_coef": 0.7},
    "loss_type=nothing .*orpo, slic, apo_zero_unpaired": {"loss_type": "nothing"},
    "loss_type=soft": {"loss_type": "soft"},
    "loss_type=kto": {"loss_type": ["sigmoid", "kto"]},
    "loss_type=grpo needs the scores of groups.* or GRPOTrainer": {"loss_type": "grpo"},
    "ld_alpha": {"loss_type": "simpo", "ld_alpha": 0.5},
    "simpo_gamma": {"loss_type": "sigmoid", "rest": {"loss_options": {"simpo_gamma": 0.5}}},
    "cpo_alpha": {"loss_type": "simpo", "rest": {"loss_options": {"cpo_alpha": 0.5}}},
    "beta": {"loss_type": "simpo", "rest": {"loss_options": {"beta": 0.5}}},
    "token_clamp": {
        "loss_type": "dpop",
        "precompute_ref_log_probs": True,
        "rest": {"loss_options": {"token_clamp": 0.5}},
    },
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_would_not_be_used_is_refused_by_name(option, place, tmp_path):
    with pytest.raises(UserError, match=option):
        build(fast.DPOTrainer, place, tmp_path, **REFUSED[option])


ADAPTERS = {
    "lora": ({}, False),
    "lora and head": ({"modules_to_save": ["lm_head"]}, False),
    "lora, embeddings and head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "lora and tied embeddings": (
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("stored", [False, True])
def test_on_top_of_a_trained_adapter(name, stored, place, tmp_path):
    """The reference is a frozen copy of the adapter, whole modules included."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options, tied = ADAPTERS[name]
    write_model(tmp_path / "model", tied=tied)
    write_adapter(tmp_path / "sft", tmp_path / "model", lora_dropout=0.0, **options)

    def policy():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        return PeftModel.from_pretrained(base, tmp_path / "sft", is_trainable=True)

    options = {"precompute_ref_log_probs": stored}
    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", model=policy(), **options)
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", model=policy(), **options)
    assert ours[1][0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert ours[1][-1]["rewards/margins"] != 0
    assert_same(theirs, ours)


def test_new_adapters_with_a_head_that_is_trained_whole(place, tmp_path):
    from peft import LoraConfig

    def lora():
        whole = ["lm_head", "embed_tokens"]
        config = LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM"
        )
        return {"peft_config": config}

    theirs = trained(trl.DPOTrainer, place, tmp_path / "theirs", rest=lora())
    ours = trained(fast.DPOTrainer, place, tmp_path / "ours", rest=lora())
    assert_same(theirs, ours)


@pytest.mark.parametrize(
    "option", [{"target_modules": ["lm_head"]}, {"trainable_token_indices": [3]}]
)
def test_a_head_that_peft_changes_is_refused(option, place, tmp_path):
    """Tied, so that tokens which are trained in the embeddings are trained in the head as well."""
    from peft import LoraConfig

    model = str(write_model(tmp_path / "tied", tied=True))
    config = LoraConfig(
        **({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | option)
    )
    with pytest.raises((UserError, ValueError), match="lm_head"):
        build(fast.DPOTrainer, place, tmp_path, model=model, rest={"peft_config": config})
    assert trl.trainer.dpo_trainer.add_fused_lm_head is trl.trainer.utils.add_fused_lm_head


@pytest.mark.parametrize("version", ["1.17.2", "1.14.2", "2.0.0.dev0", "0.29.1"])
def test_another_trl_is_refused(version):
    with pytest.raises(UnavailableError, match=f"trl {version}.*'trl>=1.15,<1.17'"):
        fast.check_version(version)


@pytest.mark.parametrize("version", ["1.15.0", "1.16.0", "1.16.9", "1.16.0.dev0"])
def test_this_trl_is_taken(version):
    fast.check_version(version)
