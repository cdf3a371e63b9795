"""One rank of tests/support/ranks.py: reads jobs from stdin, a JSON line each, until there are no more.

The answer to each is a line on the file descriptor that is the first argument: null, or a traceback.
It ends with the process that started it, in the middle of a job too.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from dpo_fast import durable
from dpo_fast.errors import Interrupted, Unhealthy, UserError
from dpo_fast.models import ScoringModel
from dpo_fast.rounds.config import RoundsConfig
from dpo_fast.rounds.iterate import iterate
from dpo_fast.rounds.judge import judge
from dpo_fast.training import data_ranks, distributed, evaluation, resume
from dpo_fast.training.config import build, build_config
from dpo_fast.training.console import quiet
from dpo_fast.training.evaluate_model import evaluate_model
from dpo_fast.training.evaluate_options import evaluation_of
from dpo_fast.training.exchanges import exchanges
from dpo_fast.training.loop import train, update
from dpo_fast.training.metrics import MetricSums
from dpo_fast.training.prepare import prepare
from dpo_fast.training.references import store_beforehand
from dpo_fast.training.saver import Saver
from dpo_fast.training.traffic import GATHER, traffic
from tests.support.aio import plain_files
from tests.support.engines import Engine
from tests.support.shards import compare_shards
from tests.support.slices import compare_slices

SCALARS = 16  # bytes of a collective that only agrees on numbers


def train_all(trees: list[dict]) -> None:
    for tree in trees:
        train(build_config(tree, "case"))


def train_with_files(trees: list[dict]) -> None:
    """Runs with states on "nvme", which any folder is here."""
    with plain_files():
        train_all(trees)


def held_by_runs(tree: dict, file: str) -> None:
    """Write the bytes of all tensors of this process before a run and after it."""
    import gc

    def held() -> int:
        gc.collect()
        tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    before = held()
    train(build_config(tree, "test"))
    Path(file).write_text(json.dumps([before, held()]))


def resaved(tree: dict, updates: int, file: str, by_parts: bool = False) -> None:
    """Load a checkpoint and save it anew in output_dir; then write the losses of steps that follow.

    by_parts: load it as one of other ranks.
    """
    config = build_config(tree, "case")
    data_ranks.join(config.parallel)
    run = prepare(config)
    sums = MetricSums(run.engine.device)
    moved, resume.moved = resume.moved, (lambda *_: True) if by_parts else resume.moved
    step = resume.restore(run, Path(tree["train"]["resume_from_checkpoint"]), sums)["step"]
    resume.moved = moved
    resume.save(run, step, sums)
    shares = [update(run, step + each, sums).item() for each in range(updates)]
    losses = data_ranks.sum_once(torch.tensor(shares, dtype=torch.float64)).tolist()
    run.engine.destroy()
    if distributed.is_main():
        Path(file).write_text(json.dumps(losses))


def iterate_all(trees: list[dict]) -> None:
    for tree in trees:
        iterate(build(RoundsConfig, tree, "case"), "case")


class PowerCut(BaseException):
    """No `except` of the library takes it for an error that it knows."""


def cut_off(tree: dict, first: int, more: int, file: str) -> None:
    """`iterate`, broken off after `first` files that come to the disk, then after `more` more, and so on.

    It comes through in the end: a checkpoint takes some files at once. The number of starts goes to a file.
    """
    flush, starts, through = durable.flush, 0, False
    while not through:
        left = [first + more * starts]

        def counted(path, left=left):
            left[0] -= 1
            if not left[0]:
                raise PowerCut
            flush(path)

        durable.flush, starts = counted, starts + 1
        try:
            iterate_all([tree])
            through = True
        except PowerCut:
            pass
        finally:
            durable.flush = flush
    if distributed.is_main():
        Path(file).write_text(str(starts))


def not_iterated(tree: dict, file: str) -> None:
    """A file of stages that must be refused; the message goes to a file."""
    try:
        iterate(build(RoundsConfig, tree, "case"), "case")
    except UserError as error:
        if distributed.is_main():
            Path(file).write_text(str(error))
        return
    raise AssertionError("it was not refused")


def dry_run(tree: dict) -> None:
    assert train(build_config(tree, "case"), dry_run=True) is None


def stopped_by_health(tree: dict) -> None:
    """A run that a finding must stop, on every rank."""
    try:
        train(build_config(tree, "case"))
    except Unhealthy as stop:
        assert stop.exit_code == 4 and "health.stop_on=" in str(stop), stop
    else:
        raise AssertionError("the run was not stopped")


def refused(tree: dict, file: str) -> None:
    """A run that must be refused; the message goes to a file."""
    try:
        train(build_config(tree, "case"))
    except UserError as error:
        if distributed.is_main():
            Path(file).write_text(str(error))
        return
    raise AssertionError("it was not refused")


def full_disk(folder: str, beside: bool) -> None:
    """Save where rank 1 cannot write: every rank must raise the same, with rank 1's reason."""
    saver, engine = Saver(folder, 2, beside, timedelta(seconds=30)), Engine()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        engine.weights = torch.zeros(1000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        saver.save(engine, {"step": 1}, {})
        while saver._pending:
            saver.check()
    except UserError as error:
        assert "model-1.pt cannot be written" in str(error) and "File too large" in str(error)
        return
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    raise AssertionError("nothing was told")


def first_steps(trees: dict[str, dict], file: str) -> None:
    results = {name: first_step(tree) for name, tree in trees.items()}
    if distributed.is_main():
        torch.save(results, file)


def first_step(tree: dict) -> tuple[float, dict]:
    """Loss of step 0 over all ranks, and the gradient of every parameter before clipping."""
    from deepspeed.utils import safe_get_full_grad

    config = build_config(tree, "case")
    data_ranks.join(config.parallel)
    run = prepare(config)
    gradients, step = {}, run.engine.step

    def capture():
        if run.engine.is_gradient_accumulation_boundary():
            for name, parameter in run.model.named_parameters():
                value = safe_get_full_grad(parameter) if parameter.requires_grad else None
                if value is not None:
                    gradients[name] = value.detach().float().clone()
        step()

    run.engine.step = capture
    share = data_ranks.sum_once(update(run, 0, MetricSums(run.engine.device)))
    run.engine.destroy()
    return share.item(), gradients


def train_faulty(cases: list[dict]) -> None:
    """Runs with a fault put in: {"tree", "faults"}. Each rank writes how its run ended.

    A fault is {"where", "value"}, and {"steps"}, {"rank"} or {"token"} if it is not at all of them: the
    gradient of a parameter, or the output of a module, is multiplied by `value` in these steps, counted
    from 0, and whenever they are looked at again. {"weight", "value"}: the parameter is, after every step.
    """
    from dpo_fast.errors import UserError
    from dpo_fast.training import loop

    for case in cases:
        folder = Path(case["tree"]["train"]["output_dir"])

        def with_faults(*arguments, faults=case["faults"]):
            run = prepare(*arguments)
            for fault in faults:
                put_in(run, **fault)
            return run

        loop.prepare, said = with_faults, "done"
        try:
            train(build_config(case["tree"], "case"))
        except UserError as error:
            said = str(error)
        finally:
            loop.prepare = prepare
        (folder / f"ended-{distributed.rank()}").write_text(said)


def put_in(
    run,
    value: float,
    where: str = "",
    rank: int | None = None,
    steps=None,
    token=None,
    weight: str = "",
) -> None:
    if rank is not None and distributed.rank() != rank:
        return
    engine, model = run.engine, run.model.causal_lm
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())

    def now() -> bool:
        again = engine._is_gradient_accumulation_boundary is False
        return steps is None or engine.global_steps - again in steps

    def change(module, arguments, output):
        if not now():
            return None
        if token is None:
            return output * value
        # A factor, and no choice between two outputs: the other tokens keep their gradients.
        return output * torch.where(arguments[0] == token, value, 1.0)[..., None].to(output)

    if weight:
        take = engine.step

        def step() -> None:
            last = engine.is_gradient_accumulation_boundary()
            take()
            parameters[weight].data.mul_(value if last else 1.0)

        engine.step = step
    elif where in parameters:
        parameters[where].register_hook(lambda gradient: gradient * value if now() else None)
    else:
        modules[where].register_forward_hook(change)


def evaluate_all(cases: dict[str, dict], file: str) -> None:
    results = {name: evaluate_model(evaluation_of(**words)) for name, words in cases.items()}
    if distributed.is_main():
        Path(file).write_text(json.dumps(results))


def in_turn(folder: str) -> None:
    """The same work twice: each time the first rank does it, and the others get its result or its error."""

    def work(done: Path) -> list[str]:
        assert distributed.is_main(), "another rank does the work again"
        time.sleep(0.5)
        done.touch()
        return [str(done)]

    for done in (Path(folder) / "once", Path(folder) / "twice"):
        assert distributed.main_first("work", partial(work, done)) == [str(done)]
        assert done.exists(), f"rank {distributed.rank()} came too early"

    def refused() -> None:
        assert distributed.is_main(), "another rank does the work again"
        raise UserError("rows.jsonl:1: no prompt")

    for _ in range(2):  # a script may catch it, and go on on every rank
        try:
            distributed.main_first("refused", refused)
        except UserError as error:
            assert str(error) == "rows.jsonl:1: no prompt"
        else:
            raise AssertionError("nothing was raised")


def with_noise(command: str, tree: dict, file: str) -> None:
    """Train, or store the reference, with a model that draws noise; writes what the run is refused with."""
    forward = ScoringModel.forward

    def noisy(self, *arguments, **options):
        outputs = forward(self, *arguments, **options)
        return outputs | {"logp": outputs["logp"] + 0.1 * torch.randn_like(outputs["logp"])}

    ScoringModel.forward = noisy
    try:
        {"train": train, "reference": store_beforehand}[command](build_config(tree, "case"))
        refusal = ""
    except UserError as error:
        refusal = str(error)
    finally:
        ScoringModel.forward = forward
    Path(f"{file}.{distributed.rank()}").write_text(refusal)


def interrupted(tree: dict, signal_name: str, number: int, batch: int) -> None:
    """A run to whose last rank a signal comes in its n-th evaluation, counted from 0, at that batch."""
    seen, last = [], distributed.rank() == distributed.world_size() - 1
    evaluate = evaluation.evaluate

    def hit(batches):
        for place, each in enumerate(batches):
            if last and (len(seen) - 1, place) == (number, batch):
                signal.raise_signal(getattr(signal, signal_name))
            yield each

    def counted(engine, batches, *rest):
        seen.append(1)
        return evaluate(engine, hit(batches), *rest)

    evaluation.evaluate = counted
    try:
        train(build_config(tree, "case"))
    except Interrupted:
        return
    finally:
        evaluation.evaluate = evaluate
    raise AssertionError("not interrupted")


def judge_rows(tree: dict) -> None:
    judge(build(RoundsConfig, tree, "case"))


def traffic_of(trees: dict[str, dict], file: str) -> None:
    """What DeepSpeed's own log counts in the fourth step of runs, beside what we count."""
    found = {name: logged_and_counted(tree) for name, tree in trees.items()}
    if distributed.is_main():
        Path(file).write_text(json.dumps(found))


def logged_and_counted(tree: dict) -> dict:
    """Bytes by kind of collective, of tensors of more than a few numbers.

    DeepSpeed logs what a rank puts in: its part of what is gathered, the whole of what is reduced.
    """
    import deepspeed.comm
    from deepspeed.comm.comm import comms_logger

    config = build_config(tree, "case")
    data_ranks.join(config.parallel)
    run = prepare(config)
    sums = MetricSums(run.engine.device)
    for step in range(3):  # in which DeepSpeed records the order of modules
        update(run, step, sums)
    deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False)
    comms_logger.reset_data()
    update(run, 3, sums)
    logged = {}
    for name, calls in comms_logger.get_raw_data().items():
        sizes = {size: times for size, (times, *_) in calls.items() if size > SCALARS}
        logged[name] = sum(size * times for size, times in sizes.items())
    deepspeed.comm.configure(enabled=False)
    ranks, batches = distributed.world_size(), len(list(run.train.batches(3)))
    checkpointed = tree["model"].get("checkpoint_layers", [])
    zero = run.engine.config["zero_optimization"]
    scorer = getattr(run.references["train"], "scorer", run.engine)
    beside = [] if scorer is run.engine else [scorer.module]
    lines = traffic(run.config, zero, run.model, checkpointed, ranks, batches, beside)
    size = run.config.parallel.sequence_parallel
    micro = list(run.train.batches(3))
    tokens = sum(-(-each.input_ids.numel() // size) for each in micro)
    predictions = sum(len(each.targets_U) for each in micro)
    outputs = 1 + len(run.loss_pass.extras)
    lines += exchanges(run.config, run.model, checkpointed, tokens, predictions, outputs)
    counted = {}
    for line in lines:
        payload = line.payload / (line.ranks if line.kind == GATHER else 1)
        counted[line.kind] = counted.get(line.kind, 0) + payload
    run.engine.destroy()
    return {"logged": logged, "counted": counted, "micro_batches": batches}


def sharded(name: str, *arguments) -> None:
    """A job of tests/support/sharded.py."""
    from tests.support.sharded import JOBS

    JOBS[name](*arguments)


def in_trainers(name: str, *arguments) -> None:
    """A job of tests/support/fsdp_trainers.py."""
    from tests.support.fsdp_trainers import JOBS, forget

    try:
        JOBS[name](*arguments)
    finally:
        forget()


def trl_stored(folder: str, models: list[str]) -> None:
    """Steps of TRL's trainer with our head, as tests/support/trl_stored.py takes them."""
    from tests.support.trl_stored import write_first_losses

    write_first_losses(folder, models)


def preference_losses(cases: dict[str, dict], file: str) -> None:
    """What `PreferenceTrainer` loses in cases of tests/support/preference_cases.py."""
    from tests.support.preference_cases import write_losses

    write_losses(cases, file)


JOBS = {
    "traffic": traffic_of,
    "preference_losses": preference_losses,
    "trl_stored": trl_stored,
    "compare_shards": compare_shards,
    "sharded": sharded,
    "in_trainers": in_trainers,
    "with_noise": with_noise,
    "train": train_all,
    "train_with_files": train_with_files,
    "train_faulty": train_faulty,
    "stopped_by_health": stopped_by_health,
    "dry_run": dry_run,
    "iterate": iterate_all,
    "cut_off": cut_off,
    "not_iterated": not_iterated,
    "held_by_runs": held_by_runs,
    "resaved": resaved,
    "first_steps": first_steps,
    "compare_slices": compare_slices,
    "evaluate": evaluate_all,
    "in_turn": in_turn,
    "interrupted": interrupted,
    "refused": refused,
    "full_disk": full_disk,
    "judge": judge_rows,
}


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    answers = os.fdopen(int(sys.argv[1]), "w")
    quiet()
    distributed.init_distributed()
    for line in sys.stdin:
        job, *arguments = json.loads(line)
        try:
            JOBS[job](*arguments)
            error = None
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps(error), file=answers, flush=True)
    os._exit(0)  # gloo's threads may still hold tensors, and then tearing down aborts


main()
