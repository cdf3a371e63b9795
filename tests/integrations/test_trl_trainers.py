"""TRL's trainers beside DPO and KTO with our head, against TRL's own: SFT, and those that sample."""

import json

import pytest

pytest.importorskip("trl")

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast.integrations import trl as fast
from dpo_fast.integrations.trl_forward import add_linear_logp
from tests.support.models import LIKE_SGD, write_architecture, write_model, write_pairs

pytestmark = pytest.mark.peers

PASSING = ("time", "runtime", "per_second")  # in the names of what no two runs share


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    write_model(folder / "model", tied=True)
    write_pairs(folder / "pairs.jsonl", count=8)
    return folder


def rows(place) -> list[dict]:
    return [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]


def trained(kind, config, place, output, rest, *, model=None, **options):
    """Logged steps, and final weights."""
    args = config(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        **LIKE_SGD,
        **{"max_steps": 2, "bf16": False, "gradient_checkpointing": False} | options,
    )
    trainer = kind(
        model=str(model or place / "model"),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        **rest,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return log, trainer.model


def assert_same(theirs, ours, tolerance=1e-5):
    assert len(theirs[0]) == len(ours[0]) > 0
    for a, b in zip(theirs[0], ours[0]):
        assert set(a) == set(b)
        for name in (n for n in a if not any(part in n for part in PASSING)):
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=2 * tolerance), name
    weights = ours[1].state_dict()
    for name, value in theirs[1].state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)


SFT = {
    "packed": {"packing": True, "max_length": 64},
    "dft, accumulation": {"loss_type": "dft", "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", SFT)
def test_sft(name, place, tmp_path):
    data = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(place)]
    )
    options = {"per_device_train_batch_size": 2, "model_init_kwargs": {"dtype": "float32"}}
    options |= SFT[name]
    rest = {"train_dataset": data}
    theirs = trained(trl.SFTTrainer, trl.SFTConfig, place, tmp_path / "a", rest, **options)
    ours = trained(fast.SFTTrainer, trl.SFTConfig, place, tmp_path / "b", rest, **options)
    assert_same(theirs, ours)
    with pytest.raises(AssertionError):  # it is trained at all
        assert_same(theirs, (ours[0], AutoModelForCausalLM.from_pretrained(place / "model")))


def of_commas(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]


SAMPLED = {
    "grpo, divergence and temperature": ("GRPO", {"beta": 0.2, "temperature": 0.7}),
    "grpo, two iterations": ("GRPO", {"num_iterations": 2, "loss_type": "dr_grpo"}),
    "grpo, head in fp32": ("GRPO", {"cast_lm_head_to_fp32": True, "bf16": True}),
    "rloo": ("RLOO", {"temperature": 0.7}),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_trainers_that_sample(name, place, tmp_path):
    """They sample the same completions, because logits stay as they are."""
    kind, options = SAMPLED[name]
    rest = {
        "reward_funcs": of_commas,
        "train_dataset": Dataset.from_list([{"prompt": row["prompt"]} for row in rows(place)]),
    }
    options = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "model_init_kwargs": {"dtype": "bfloat16" if "bf16" in options else "float32"},
        **options,
    }
    config = getattr(trl, f"{kind}Config")
    theirs = trained(getattr(trl, f"{kind}Trainer"), config, place, tmp_path / "a", rest, **options)
    ours = trained(getattr(fast, f"{kind}Trainer"), config, place, tmp_path / "b", rest, **options)
    assert theirs[0][0]["reward_std"] > 0
    assert_same(theirs, ours, 2e-2 if "bf16" in options else 1e-5)


def scored(add, name, tmp_path, **options):
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
    add(model, **options, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


@pytest.mark.parametrize("name", ["gemma2, caps and windows", "mixtral, experts"])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_field_is_trls(name, shifted, tmp_path):
    """With a temperature, labels that are shifted already, counts of a batch, a mixture's own loss."""
    write_architecture(tmp_path / name, name)
    ids = torch.randint(5, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    arguments = {"shift_labels" if shifted else "labels": labels, "num_items_in_batch": 11}
    if "mixtral" in name:
        arguments["output_router_logits"] = True
    outputs = [
        scored(add, name, tmp_path, temperature=0.7)(ids, fused_lm_head=True, **arguments)
        for add in (trl.trainer.utils.add_fused_lm_head, add_linear_logp)
    ]
    assert set(outputs[0]) == set(outputs[1])
    for field, value in outputs[0].items():
        torch.testing.assert_close(outputs[1][field], value, rtol=1e-4, atol=1e-5, msg=field)


def test_a_head_in_fp32_over_a_backbone_of_16_bits(tmp_path):
    """Which GRPO's cast_lm_head_to_fp32 leaves behind for the next trainer."""
    name, ids = "gemma2, caps and windows", torch.arange(5, 23).view(2, 9)
    write_architecture(tmp_path / name, name)
    outputs = []
    for add in (trl.trainer.utils.add_fused_lm_head, add_linear_logp):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().float())
        add(model)
        outputs.append(model(ids, labels=ids, fused_lm_head=True).log_probs)
        assert outputs[-1].requires_grad
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.02)
