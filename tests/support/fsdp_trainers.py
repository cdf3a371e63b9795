"""Jobs of two ranks: trainers of transformers and TRL under accelerate's FSDP2 and ZeRO-3, against DDP."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import trl
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from dpo_fast.errors import UserError
from dpo_fast.integrations import trl as ours
from dpo_fast.integrations.transformers import PreferenceTrainer
from dpo_fast.losses import LossOptions, Objective
from tests.support.models import LIKE_SGD

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
WRAPPED = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
OBJECTIVE = Objective(("sigmoid", "sft"), (1.0, 0.5), LossOptions(beta=0.3))


def arguments(kind, output, fsdp: dict | None, as_gpus: bool = False, **options):
    """Two steps of two micro-batches. Without `fsdp` it is DDP.

    as_gpus: accelerate leaves FSDP out on CPUs without a word, and refuses tensor parallelism. It goes by
        the kind of processes alone, so it is told another.
    """
    forget()
    sharding = {} if fsdp is None else {"fsdp": True, "fsdp_config": WRAPPED | fsdp}
    defaults = {"max_steps": 2, "save_strategy": "no", "bf16": False}
    defaults |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = kind(
        output_dir=str(output),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **LIKE_SGD,
        **sharding,
        **defaults | options,
    )
    if args.device.type == "cpu" and (fsdp is not None or as_gpus):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def forget() -> None:
    """accelerate's states are one to a process, and here come several trainers."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def result(trainer) -> tuple[list[dict], dict]:
    """What is logged, and the weights."""
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.model.state_dict()
    full = {n: x.full_tensor() if isinstance(x, DTensor) else x.clone() for n, x in state.items()}
    return log, full


def same(found: tuple, expected: tuple, metrics=("loss", "grad_norm")) -> None:
    for mine, true in zip(found[0], expected[0], strict=True):
        for name in metrics:
            assert mine[name] == pytest.approx(true[name], rel=1e-5, abs=1e-6), name
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, **CLOSE)


def rows_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "pairs.jsonl").read_text().splitlines()]


def model_of(folder: str, name: str = "untied"):
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")


def preference_trainer(folder, fsdp, model=None, reference="other", name="untied", **options):
    if isinstance(reference, str):
        reference = model_of(folder, reference)
    return PreferenceTrainer(
        model or model_of(folder, name),
        arguments(TrainingArguments, f"{folder}/run", fsdp, **options),
        objective=OBJECTIVE,
        reference=reference,
        train_dataset=rows_of(folder)[:8],
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/{name}"),
    )


def ours_in_fsdp2(folder: str) -> None:
    """Tied or not, resharded or not, checkpointed, weights loaded by one rank: as under DDP."""
    expected = {}
    for name in ("untied", "tied"):
        expected[name] = result(preference_trainer(folder, None, name=name))
        assert expected[name][0][0]["loss"] != expected[name][0][1]["loss"]
    ways = [
        ("untied", {}),
        ("tied", {"reshard_after_forward": False}),
        ("untied", {"activation_checkpointing": True}),
        ("tied", {"cpu_ram_efficient_loading": True}),
    ]
    for name, fsdp in ways:
        trainer = preference_trainer(folder, fsdp, name=name)
        found = result(trainer)
        assert any(isinstance(p, DTensor) for p in trainer.model.parameters())
        assert all(isinstance(p, DTensor) for p in trainer.reference.scorer.func.parameters())
        same(found, expected[name], ("loss", "grad_norm", "rewards/margins", "entropy"))


def adapters_in_fsdp2(folder: str) -> None:
    """An adapter is its own reference when it is off."""
    log = []
    for fsdp in (None, {}):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model_of(folder), config)
        trainer = preference_trainer(folder, fsdp, model=model, reference=None)
        log.append(result(trainer))
    same(log[1], log[0])


def saved_in_fsdp2(folder: str) -> None:
    """A checkpoint goes on, and what is saved is a plain folder."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = preference_trainer(folder, {}, **options)
    expected = result(whole)
    whole.save_model(f"{folder}/saved")
    again = preference_trainer(folder, {}, **options)
    again.train(resume_from_checkpoint=f"{folder}/run/checkpoint-1")
    state = again.model.state_dict()
    saved = model_of(folder, "saved").state_dict()
    for name, value in expected[1].items():
        torch.testing.assert_close(state[name].full_tensor(), value, rtol=0, atol=0)
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    evaluated = again.evaluate(again.train_dataset)
    assert evaluated["eval_loss"] > 0


def mixed_precision_in_fsdp2(folder: str) -> None:
    """Log-probs are not rounded to bf16, though accelerate's policy says so of all outputs."""
    trainer = preference_trainer(folder, {}, bf16=True)
    seen = []
    score = trainer.loss_pass.token_outputs

    def watched(engine, batch):
        seen.append(score(engine, batch))
        return seen[-1]

    object.__setattr__(trainer.loss_pass, "token_outputs", watched)
    log, _ = result(trainer)
    logps = seen[0]["logp"].detach()
    assert logps.dtype == torch.float32 and (logps != logps.bfloat16().float()).any()
    expected = preference_trainer(folder, None)
    assert log[0]["loss"] == pytest.approx(result(expected)[0][0]["loss"], rel=0.02)


def trl_in_fsdp2(folder: str) -> None:
    cases = [
        ("DPO", {"loss_type": ["sigmoid", "simpo"]}),
        ("DPO", {"precompute_ref_log_probs": True}),
        *((kind, {}) for kind in ("KTO", "SFT", "GRPO", "RLOO")),
    ]
    for kind, options in cases:
        results = [result(trainer_of_trl(folder, kind, fsdp, **options)) for fsdp in (None, {})]
        same(results[1], results[0])


def trl_in_zero_3(folder: str) -> None:
    """And what is saved is a plain folder."""
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    kinds = ("DPO", "SFT", "GRPO", "RLOO")
    expected = {kind: result(trainer_of_trl(folder, kind, None)) for kind in kinds}
    saved = {}
    for kind in kinds:
        trainer = trainer_of_trl(folder, kind, None, deepspeed=config)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model(f"{folder}/{kind}")
        saved[kind] = log, f"{folder}/{kind}"
    forget()
    torch.distributed.barrier()
    for kind, (log, place) in saved.items():
        same((log, AutoModelForCausalLM.from_pretrained(place).state_dict()), expected[kind])


def trainer_of_trl(folder: str, kind: str, fsdp: dict | None, **options):
    """One of our TRL trainers."""
    single = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows_of(folder)
        for side in ("chosen", "rejected")
    ]
    given = {}
    if kind == "DPO":  # a file, because TRL caches what it computes beside the data, for all ranks
        data = Dataset.from_json(f"{folder}/pairs.jsonl", cache_dir=f"{folder}/cache")
    elif kind in ("GRPO", "RLOO"):
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of(folder)])
        given["reward_funcs"] = lambda completions, **_: [sum(map(ord, x)) % 7 for x in completions]
        options = {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.1} | options
        options |= {"gradient_accumulation_steps": 1, "max_completion_length": 6}
    else:
        data = Dataset.from_list(single)
        data = data.remove_columns("label") if kind == "SFT" else data
    config, trainer = getattr(trl, f"{kind}Config"), getattr(ours, f"{kind}Trainer")
    args = arguments(config, f"{folder}/run", fsdp, gradient_checkpointing=False, **options)
    if kind in ("DPO", "KTO"):
        given["ref_model"] = model_of(folder, "other")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/untied")
    return trainer(
        model_of(folder), args=args, train_dataset=data, processing_class=tokenizer, **given
    )


def tensor_parallel(folder: str) -> None:
    """Ranks that share a model have the same pairs: as one pair to each rank under DDP."""
    for name in ("untied", "tied"):
        expected = result(
            preference_trainer(folder, None, name=name, per_device_train_batch_size=1)
        )
        model = loaded(folder, name, tp_size=2, tp_plan="auto")
        trainer = preference_trainer(folder, None, model=model, name=name, as_gpus=True)
        assert trainer.model.get_output_embeddings().tensor_parallel
        same(result(trainer), expected, ("loss", "grad_norm", "num_tokens", "examples"))


def loaded_sharded(folder: str) -> None:
    """Models that transformers shards while it loads them, the reference too."""
    for name in ("untied", "tied"):
        expected = result(preference_trainer(folder, None, name=name))
        trainer = preference_trainer(
            folder,
            None,
            model=loaded(folder, name, fsdp_size=2),
            reference=loaded(folder, "other", fsdp_size=2),
            name=name,
        )
        same(result(trainer), expected)


def loaded(folder: str, name: str, **sizes):
    plan = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=plan)


def refused(folder: str) -> None:
    with pytest.raises(UserError, match="fsdp_version=1 is not supported"):
        preference_trainer(folder, {"version": 1, "sync_module_states": "false"})
    args = arguments(TrainingArguments, f"{folder}/run", {})
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    with pytest.raises(UserError, match="fsdp=True cannot be honoured"):
        PreferenceTrainer(model_of(folder), args, reference=model_of(folder, "other"))


JOBS = {
    "ours_in_fsdp2": ours_in_fsdp2,
    "adapters_in_fsdp2": adapters_in_fsdp2,
    "saved_in_fsdp2": saved_in_fsdp2,
    "mixed_precision_in_fsdp2": mixed_precision_in_fsdp2,
    "trl_in_fsdp2": trl_in_fsdp2,
    "trl_in_zero_3": trl_in_zero_3,
    "tensor_parallel": tensor_parallel,
    "loaded_sharded": loaded_sharded,
    "refused": refused,
}
