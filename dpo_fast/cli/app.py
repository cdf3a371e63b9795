"""Commands. A mistake that the user can mend is one paragraph on standard error and exit code 2."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpo_fast import __version__
from dpo_fast.cli import bench
from dpo_fast.cli.commands import Commands
from dpo_fast.cli.config import Config, Overrides, load
from dpo_fast.cli.config import app as config_app
from dpo_fast.cli.evaluate import evaluate
from dpo_fast.cli.export import export
from dpo_fast.cli.import_file import import_file
from dpo_fast.cli.iterate import iterate, load_rounds
from dpo_fast.cli.judge import judge
from dpo_fast.cli.push import fail, push
from dpo_fast.cli.sample import sample
from dpo_fast.cli.streams import own_arguments
from dpo_fast.cli.system_errors import explained
from dpo_fast.errors import Interrupted, LostPeer, UserError
from dpo_fast.training.config_file import read_tree

KEYS = (
    "Keys people change most: model.path, model.lora.r, data.train, data.eval_rows, data.max_length, "
    "loss.type, loss.beta, train.output_dir, train.num_train_epochs, train.global_batch_size, "
    "train.micro_batch_size, train.learning_rate, train.save_steps, train.resume_from_checkpoint, "
    "parallel.zero_stage. All: docs/CONFIG.md, or dpo-fast config schema."
)
Quiet = Annotated[
    bool, typer.Option("--quiet", help="show findings, errors and the result, nothing else")
]
app = typer.Typer(
    cls=Commands,
    help="Preference optimisation whose language-model head never materialises logits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(config_app, name="config")
app.command()(export)
app.command()(push)
app.command("import")(import_file)
app.command()(evaluate)
app.command()(sample)
app.command()(judge)
app.command()(iterate)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"dpo_fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show it and end")
    ] = False,
) -> None:
    """Options before a command."""
    from dpo_fast.training import environment

    environment.check()


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="file to write", metavar="OUT")] = Path("run.yaml"),
    model: Annotated[
        str | None, typer.Option(help="a model folder or hub id; default: the recipe's")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="a file, folder or hub id; default: the recipe's")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="dpo, lora, cdpo_sft, grpo or sft for a model and data of your own; or a published run of "
            "docs/RECIPES.md: zephyr_dpo, tulu3_8b, smollm3_apo, lora_24gb; in stages zephyr_ddpo, sdpo, "
            "iterated_dpo, dno"
        ),
    ] = "dpo",
) -> None:
    """Write a commented configuration for a model and data of your own."""
    from dpo_fast.cli.init import write_config

    write_config(out, recipe, model, data)
    typer.echo(f"{out}: look at the data with `dpo-fast data {out}`, then `dpo-fast train {out}`")


@app.command(epilog=KEYS)
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="do all that comes before the first step, then end")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train. Alone, with --nproc, or under torchrun, deepspeed or srun.

    Exit codes: 0 done; 2 bad input; 3 another rank was lost; 4 stopped by health.stop_on, 130 interrupted,
    both with the step finished and a checkpoint saved.
    """
    run = load(config, overrides)
    from dpo_fast.training.places import check_writable

    check_writable(run.train.output_dir)
    from dpo_fast.training import distributed
    from dpo_fast.training.config import check_batch_sizes

    distributed.adopt_slurm()
    _calm(quiet)
    if nproc > 1:
        check_batch_sizes(run, nproc)
        flags = ["--dry-run"] * dry_run + ["--quiet"] * quiet
        _launch(nproc, run, ["train", config, *(overrides or ()), *flags])
    from dpo_fast.api.ending import finish
    from dpo_fast.training.loop import train as train_run

    model = train_run(run, dry_run)
    if model is not None:
        if distributed.is_main():
            typer.echo(f"model: {model}")
        finish(run, model, typer.echo, fail)
    distributed.leave_distributed()


def _calm(quietly: bool) -> None:
    """Keep libraries to what matters; with --quiet us, too."""
    from dpo_fast.progress import hush
    from dpo_fast.training.console import quiet

    quiet()
    hush(quietly)


def _launch(nproc: int, run, arguments: list[str]) -> None:
    """Run the same command as local ranks and exit with their code."""
    from dpo_fast.cli.launch import launch
    from dpo_fast.training import distributed, signals

    if distributed.world_size() > 1:
        raise UserError(f"--nproc {nproc} starts ranks itself: leave it out under a launcher")
    with signals.stop_at_once("nothing is lost: the same command begins again"):
        _prepare_data(run)  # a mistake in the data is told once, before ranks start
    _leave(
        launch(nproc, arguments)
    )  # an orderly end would take seconds, and there is nothing to order


def _prepare_data(run) -> dict:
    """The tokenizer, and the examples of each split by its name; of a stream its first chunk."""
    from dpo_fast.data.dataset import load_examples
    from dpo_fast.data.stream_mixture import open_stream
    from dpo_fast.models import end_of_turn_ids, load_tokenizer

    tokenizer, ends = load_tokenizer(run.model), end_of_turn_ids(run.model)

    def read(name: str):
        if name == "train" and run.data.streaming:
            return open_stream(run.data, tokenizer, ends).read()
        return load_examples(run.data, tokenizer, split=name, eos_ids=ends)

    names = ("train", "eval") if run.data.has_eval else ("train",)
    return {"tokenizer": tokenizer, **{name: read(name) for name in names}}


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="output_dir of a run, or one of its checkpoints")],
    step: Annotated[
        str | None,
        typer.Argument(help="a step, counted from 1; default: the one that ended the run"),
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="start this many local ranks; default: as many as the run had"),
    ] = None,
) -> None:
    """A step of a run once more, row by row: losses, log-probs, and what is not finite first.

    It goes from the last checkpoint before the step and changes nothing of the run. On as many ranks it
    repeats the step bit for bit, on others by rounding alike.
    """
    from dpo_fast.cli.replay import run_replay

    run_replay(run, step, overrides or [], nproc)


@app.command()
def reference(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="start this many local ranks")] = 1,
    quiet: Quiet = False,
) -> None:
    """Compute and store the reference log-probs of all rows, or go on after an interruption.

    A later `train` of the same configuration finds them. Another run finds them by reference.cache_dir.
    """
    run = load(config, overrides)
    from dpo_fast.training import distributed

    distributed.adopt_slurm()
    _calm(quiet)
    from dpo_fast.training.references import check_stores, store_beforehand

    check_stores(run)
    if nproc > 1:
        _launch(nproc, run, ["reference", config, *(overrides or ()), *["--quiet"] * quiet])
    for stored in store_beforehand(run):
        if distributed.is_main():
            _show_reference(stored)
    distributed.leave_distributed()


def _show_reference(stored) -> None:
    count, rows = len(stored.split.examples), stored.split.examples.kind.name
    done = "was there already"
    if stored.seconds is not None:
        done = f"computed at {stored.computed / stored.seconds:.1f} {rows}/s"
        if stored.computed < count:
            done = f"{stored.computed} of them {done}"
    typer.echo(f"{stored.split.name}: {count} {rows}, {done}")
    for folder in stored.folders:
        typer.echo(f'  pandas.read_parquet("{folder}")')


@app.command()
def data(
    config: Config,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    html: Annotated[
        Path | None, typer.Option(help="write a page with histograms to this file", metavar="FILE")
    ] = None,
) -> None:
    """Show what would be trained on: counts, lengths, drops, truncation, quality, marked examples.

    Quality: repetitions, contradictions, what gives labels away by form, languages, and labels to doubt
    where log-probs of a reference are stored.
    """
    run = load(config, overrides, trains=False)
    from dpo_fast.data.quality_notes import render_quality
    from dpo_fast.data.report import render_examples, render_report
    from dpo_fast.training.console import quiet

    quiet()
    prepared = _prepare_data(run)
    tokenizer = prepared.pop("tokenizer")
    console = Console()
    for name, pairs in prepared.items():
        console.rule(f"{name}: {len(pairs)} {pairs.kind.name}")
        if name == "train" or not pairs.report.held_out:  # a held-out split shares train's report
            render_report(pairs.report, console)
    quality = _quality(run, prepared, tokenizer)
    console.rule("quality")
    render_quality(quality, console)
    render_examples(prepared["train"], tokenizer, console, n=examples)
    if html is not None:
        from dpo_fast.report.data_page import write_data_page

        reports = {"train": prepared["train"].report}
        typer.echo(write_data_page(html, f"Data of {config}", reports, quality))


def _quality(run, prepared: dict, tokenizer):
    """What `dpo_fast.data.quality` finds, with the log-probs of a reference where some are there."""
    from dpo_fast.data.quality import measure
    from dpo_fast.references.at_hand import logps_at_hand

    folder = Path(run.reference.cache_dir or Path(run.train.output_dir) / "reference")
    train = prepared["train"]
    return measure(
        train,
        prepared.get("eval"),
        tokenizer,
        logps_at_hand(Path(os.path.expanduser(folder)), train),
    )


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="YAML file of a run to look at, too", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="how many ranks the run will have")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="try options until the run fits into the device's memory")
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            min=1, help="GiB of the GPU that memory is counted for; default: this machine"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="a model to look at, a folder or hub id: which layouts it gets, and why"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print all of it as JSON, for programs")
    ] = False,
) -> None:
    """What this machine can run and why; with CONFIG also what that run would use, and its memory.

    Of a file of stages what each of them would use. No weights are read.
    """
    for option, given in (("--plan", plan), ("--memory", memory)):
        if given and config is None:
            raise UserError(f"doctor {option} is about a run: name its CONFIG too")
    if plan and as_json:
        raise UserError("doctor --plan prints a table as it is found: leave out --json, or --plan")
    if model is not None and config is not None:
        raise UserError(f"doctor --model is for a model alone: leave it out, or CONFIG={config}")
    stages = config is not None and "stages" in read_tree(config, overrides or ())
    if stages and (plan or memory):
        raise UserError("doctor --plan and --memory are for one run, and this is a file of stages")
    run = None if config is None or stages else load(config, overrides, places=False)
    rounds = load_rounds(config, overrides) if stages else None
    from dpo_fast.cli import doctor_show

    if nproc is not None and config is not None:
        os.environ["WORLD_SIZE"] = str(nproc)
    show = doctor_show.Shown(Console(), as_json)
    show.machine()
    if model is not None:
        show.model(model)
    elif rounds is not None:
        show.stages(rounds, config)
    elif run is not None:
        show.run(run, memory, plan)
    show.end()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="output_dir of a run, or of several")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="file or folder to write; default: report.html in the run's folder, of several runs "
            "comparison.html beside the first"
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML file about a run, or about several over one another."""
    from dpo_fast.report import COMPARISON_FILE, write_comparison, write_report

    if out is not None and not out.is_dir() and out.suffix != ".html":
        raise UserError(
            f"--out {out} does not end in .html: name a page, or a folder that is there"
        )
    # `runs/*` names the comparison of the last time, too.
    runs = [run for run in runs if run.name != COMPARISON_FILE or run.is_dir()] or runs
    typer.echo(write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out))


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            help="folder for all that it makes; default: in runs/, demo, real or real-rounds"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    real: Annotated[
        bool, typer.Option("--real", help="a real 135M chat model and real pairs, in 20 minutes")
    ] = False,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="with --real: a rule learned from its own answers")
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(help="with --real: a file of HH rows; default: Anthropic/hh-rlhf of the hub"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="with --real: a chat model; default: SmolLM2-135M-Instruct from PyPI"),
    ] = None,
) -> None:
    """The whole story on a CPU: a tiny model, SFT, DPO under ZeRO-3, a report."""
    from dpo_fast.training.console import quiet
    from dpo_fast.training.distributed import leave_distributed

    for name, value in (("--rows", rows), ("--model", model)):
        if value is not None and not real:
            raise UserError(f"{name} {value} is for the real model: add --real, or leave it out")
    if rounds and not real:
        raise UserError("--rounds is for the real model: add --real, or leave it out")
    quiet()
    if real and rounds:
        from dpo_fast.demo.real_rounds import run_rounds

        run_rounds(output or Path("runs/real-rounds"), model=model, rows=rows, seed=seed)
        return
    if real:
        from dpo_fast.demo.real import run_real

        run_real(output or Path("runs/real"), model=model, rows=rows, seed=seed)
        return
    from dpo_fast.demo.run import run_demo

    run_demo(output or Path("runs/demo"), seed=seed)
    leave_distributed()


def main() -> None:
    """Entry point of `dpo-fast`."""
    try:
        app(own_arguments(sys.argv[1:]), prog_name="dpo-fast")
    except (UserError, Interrupted) as error:
        reason = " ".join(str(error).split())
        _end(reason, 2 if isinstance(error, UserError) else error.exit_code)
    except Exception as error:
        if (reason := explained(error)) is not None:
            _end(reason, 2)
        if (peers := _peers()) is None:
            raise
        _end_among(peers, error)


def _end_among(peers, error: Exception) -> None:
    """After an error that nobody has foreseen, or that follows from the loss of another rank."""
    from dpo_fast.training import distributed

    try:
        with distributed.collective_errors():
            raise error
    except LostPeer as lost:
        peers.await_verdict(5.0)  # it knows which, and ends the process
        _end(str(lost), lost.exit_code)
    except Exception:
        pass
    trace = "".join(traceback.format_exception(error)).rstrip()
    _end(f"{type(error).__name__}: {error}", 1, trace)


def _peers():
    """The watch over the other ranks, if this process is one of several."""
    distributed = sys.modules.get("dpo_fast.training.distributed")
    return distributed and distributed.peers()


def _end(reason: str, code: int, trace: str = "") -> None:
    """Tell why, once on each machine, and end.

    trace: told in place of the reason.
    """
    rank, local = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    with _deaf():
        peers = _peers()
        if peers and local != "0":
            time.sleep(0.3)  # most errors come to all ranks, and then the first shall tell
        # Before ranks know each other, those of a machine fail on the same files and options.
        if peers.first_to_tell(reason) if peers else local == "0":
            place = "" if rank == "0" else f" (rank {rank})"
            print(f"dpo-fast{place}: {trace or reason}", file=sys.stderr, flush=True)
        if peers:
            peers.fail(reason, code)
        _leave(code)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore that a launcher passes on the Ctrl-C that a rank had, or that a user presses it again."""
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(code: int) -> None:
    """End at once. Other ranks may be inside a collective, and an orderly shutdown would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
