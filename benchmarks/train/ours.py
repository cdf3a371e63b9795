"""Our training step: the trainer's own configuration, engine, batches and `train_step`."""

from __future__ import annotations

from unittest import mock

from benchmarks.train.case import Contender, Task


def watch(task: Task) -> None:
    """Time our head, from now on."""
    from dpo_fast.ops.linear_logp.op import _LinearLogp

    task.stopwatch.watch_autograd(_LinearLogp, "head")


def tree(contender: Contender, task: Task) -> dict:
    """The configuration of a run, as a YAML file would have it."""
    train = {
        "output_dir": str(task.folder / contender.name.replace(" ", "-").replace(",", "")),
        "overwrite_output_dir": True,
        "global_batch_size": task.global_batch_size,
        "layout": contender.layout,
        "seed": task.seed,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_grad_norm": task.max_grad_norm,
        "max_steps": task.steps,
        "micro_batch_size": task.micro_batch_size(contender.layout),
    }
    return {
        "model": {
            "path": str(task.model),
            "tokenizer": str(task.tokenizer),
            "dtype": task.dtype,
            "attention": task.attention_of(contender.layout),
            "gradient_checkpointing": contender.checkpointing,
            "use_liger_kernel": task.liger,
        },
        "data": {
            "train": str(task.data),
            "max_length": task.max_length,
            "truncation": "error",
            "cache_dir": str(task.folder / "cache"),
        },
        "reference": {"provider": "cached" if contender.stored else "frozen"},
        "train": train,
        "parallel": {"zero_stage": task.zero_stage},
    }


class Ours:
    """A run of our trainer. `step` takes one optimiser step and returns its loss.

    computed: token positions through the policy's backbone, by step.
    attention: implementation of the policy's attention, as transformers knows it.
    reference_seconds: to make the stored table; None if there is none to make.
    """

    def __init__(self, contender: Contender, task: Task) -> None:
        from dpo_fast.training import precompute
        from dpo_fast.training.config import build_config
        from dpo_fast.training.fit import check_run
        from dpo_fast.training.metrics import MetricSums
        from dpo_fast.training.prepare import prepare

        config = build_config(tree(contender, task), contender.name)
        choices = check_run(config)
        self.task, self.computed = task, {}
        self.attention = choices.attention.name
        compute = task.stopwatch.timed(precompute.compute_reference, "table")
        with mock.patch.object(precompute, "compute_reference", compute):
            self.run = prepare(config, choices)
        self.reference_seconds = task.stopwatch.take().get("table")
        self.reference = task.stopwatch.timed(self.run.references["train"], "reference")
        self.sums = MetricSums(self.run.engine.device)
        self._check_data()

    def _check_data(self) -> None:
        for index, row in enumerate(self.task.rows):
            pair = self.run.train.examples[index]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                if list(pair[name]) != row[name]:
                    raise ValueError(f"other token ids than in the data: {name} of pair {index}")
        for step, rows in enumerate(self.task.order):
            if sorted(self.run.train.sampler.global_batch(step)) != sorted(rows):
                raise ValueError(f"other pairs than in the task: step {step}")

    def step(self, number: int) -> float:
        from dpo_fast.training.step import train_step

        run = self.run
        totals = run.train.totals(run.train.sampler.global_batch(number))
        share = train_step(
            run.engine,
            self._counted(number),
            run.loss_pass,
            self.reference,
            totals,
            self.sums,
            run.statistics,
        )
        self.sums.step()
        return share.item()

    def _counted(self, number: int):
        self.computed[number] = 0
        for batch in self.run.train.batches(number):
            self.computed[number] += batch.input_ids.numel()
            yield batch

    def close(self) -> None:
        self.run.engine.destroy()
        self.run = self.reference = None
