"""TRL's training step: its own trainer, set up by its own `train`.

It is stepped from outside, so that others can take a step in between. Callbacks, logging, checkpoints and
the count of flops are left out, in TRL's favour.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import torch
from transformers import TrainerCallback

from benchmarks.cli import TRL
from benchmarks.train.case import Contender, Task

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Unavailable(RuntimeError):
    """This TRL accepts an option and ignores it."""


def watch(task: Task) -> None:
    """Time TRL's head, from now on."""
    from trl.kernels import ChunkedLogProbFunction

    task.stopwatch.watch_autograd(ChunkedLogProbFunction, "head")


def why_not(contender: Contender, task: Task) -> str | None:
    if missing := TRL.missing():
        return missing
    if contender.options.get("padding_free") and task.device == "cpu":
        return "padding_free needs flash-attn, which needs a GPU"
    return None


class _ReadyError(Exception):
    """The trainer is set up, and would take its first step."""


class _StopBeforeTheFirstStep(TrainerCallback):
    def on_train_begin(self, *arguments, **options):
        raise _ReadyError


class Trl:
    """A DPOTrainer, with the attributes and methods of `Ours`."""

    def __init__(self, contender: Contender, task: Task) -> None:
        from trl import DPOTrainer

        self.task, self.computed = task, {}
        compute = task.stopwatch.timed(DPOTrainer.compute_ref_log_probs, "table")
        # Our engine has joined a group of one process: TRL would wrap its model in DDP.
        with (
            _without_launcher(),
            _without_hash(task),
            mock.patch.object(DPOTrainer, "compute_ref_log_probs", compute),
        ):
            self.trainer = DPOTrainer(
                model=str(task.model),
                args=_arguments(contender, task),
                train_dataset=_dataset(task),
                processing_class=_tokenizer(task),
                callbacks=[_StopBeforeTheFirstStep()],
            )
            if contender.options.get("padding_free") and not self.trainer.padding_free:
                raise Unavailable(f"{TRL.version()} has padding_free in name only: it pads")
            with contextlib.suppress(_ReadyError):
                self.trainer.train()
        if self.trainer.accelerator.num_processes != 1 or self.trainer.model_wrapped is not (
            self.trainer.model
        ):
            raise ValueError("TRL wrapped its model: run this in one process, without a launcher")
        if self.trainer.model.is_gradient_checkpointing is not contender.checkpointing:
            raise ValueError(f"TRL's gradient checkpointing is not {contender.checkpointing}")
        if (self.trainer.ref_model is None) is not contender.stored:
            raise ValueError(f"TRL's stored reference is not {contender.stored}")
        if not contender.stored:
            model = self.trainer.ref_model
            model.forward = task.stopwatch.timed(model.forward, "reference")
        self.attention = self.trainer.model.config._attn_implementation
        # None if TRL finds the table of an earlier contender.
        self.reference_seconds = task.stopwatch.take().get("table")
        self._check_data()
        self.batches = iter(self.trainer.get_train_dataloader())

    def _check_data(self) -> None:
        expected = [self.task.rows[row] for rows in self.task.order for row in rows]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            if list(self.trainer.train_dataset[name]) != [row[name] for row in expected]:
                raise ValueError(f"other token ids than in the data: {name}")

    def step(self, number: int) -> float:
        trainer, model = self.trainer, self.trainer.model_wrapped
        count = trainer.args.gradient_accumulation_steps
        batches, items = trainer.get_batch_samples(self.batches, count, trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        self.computed[number] = sum(batch["input_ids"].numel() for batch in batches)
        loss = torch.zeros((), device=trainer.args.device)
        for index, inputs in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(index == len(batches) - 1)
            loss += trainer.training_step(model, inputs, items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        return loss.item()

    def close(self) -> None:
        self.trainer.accelerator.free_memory()
        self.trainer = self.batches = None


def _arguments(contender: Contender, task: Task):
    """TRL's defaults, apart from what the task sets. Its bf16 is autocast round fp32 weights."""
    from trl import DPOConfig

    options = dict(contender.options)
    if not contender.checkpointing:
        options["gradient_checkpointing"] = False
    if task.liger:
        options["use_liger_kernel"] = True
    if contender.stored:
        options["precompute_ref_log_probs"] = True
    return DPOConfig(
        output_dir=str(task.folder / "trl"),
        per_device_train_batch_size=task.padded_pairs,
        gradient_accumulation_steps=task.global_batch_size // task.padded_pairs,
        max_steps=task.steps,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        seed=task.seed,
        max_grad_norm=task.max_grad_norm,
        max_length=task.max_length,
        bf16=task.dtype == "bf16",
        use_cpu=task.device == "cpu",
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def _dataset(task: Task):
    """The task's pairs in the order of its steps, as texts."""
    from datasets import Dataset

    names = ("prompt", "chosen", "rejected")
    rows = [task.rows[row] for rows in task.order for row in rows]
    return Dataset.from_list([{name: row[name] for name in names} for row in rows])


def _tokenizer(task: Task):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(task.tokenizer)


def _without_hash(task: Task):
    """TRL keeps a table under a hash of all weights: ten seconds for 1.5 billion. The folder will do."""
    from trl.trainer import dpo_trainer

    return mock.patch.object(dpo_trainer, "hash_module", lambda module: str(task.model))


@contextlib.contextmanager
def _without_launcher():
    with mock.patch.dict(os.environ, {"TQDM_DISABLE": "1"}):
        for name in LAUNCHER:
            os.environ.pop(name, None)
        yield
