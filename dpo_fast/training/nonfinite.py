"""How a run ends whose numbers are not finite: what it says, and the file that tells every row."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from dpo_fast.durable import write_file
from dpo_fast.errors import UserError
from dpo_fast.training import distributed
from dpo_fast.training.checkpoints import checkpoints, saving
from dpo_fast.training.earlier_run import NONFINITE
from dpo_fast.training.examine import Row, examine
from dpo_fast.training.finite import Place, not_finite, some, weights_of
from dpo_fast.training.prepare import Run

# Of torch's AdamW, and of bitsandbytes': in 8 bits their scales tell.
AVERAGES = ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")
TOLD = 4  # rows of a message


def settle(run: Run, step: int, last: bool) -> None:
    """See how the steps before `step` went. Where something is written now, the newest too. Collective.

    Raises:
        UserError: as many steps in a row as end the run were not finite.
    """
    config = run.config
    every = (config.log.logging_steps, config.train.eval_steps, config.train.save_steps)
    waits = last or any(n is not None and step % n == 0 for n in every)
    place = run.guard.look(ahead=0 if waits else 1)
    if place is not None:
        rows = examine(run, place)
        file = write_rows(run, place, rows)
        raise UserError(message(run, place, rows, file))


def check_weights(run: Run, step: int) -> None:
    """What a checkpoint would hold after `step` steps is finite. Collective.

    Raises:
        UserError: it is not, though every gradient was: the updates were too large.
    """
    found = not_finite(weights_of(run.model.causal_lm))
    if not found:  # their averages are of no use with such weights
        found = not_finite(averages_of(run.engine.optimizer))
    names = list(dict.fromkeys(distributed.joined(found)))
    if names:
        verb = "is" if len(names) == 1 else "are"
        raise UserError(
            f"after step {step} {some(names, TOLD)} {verb} not finite, though every gradient was: the "
            f"updates were too large (train.learning_rate={run.config.learning_rate:g}). Nothing of this "
            f"step is saved. {way_on(run, [])}"
        )


def averages_of(optimizer):
    """What this rank holds of AdamW's averages; DeepSpeed may wrap the optimiser."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for state in optimizer.state.values():
        for name in AVERAGES:
            if name in state:
                yield f"AdamW's {name}", state[name]


def write_rows(run: Run, place: Place, rows: list[Row], name: str = NONFINITE) -> Path:
    """nonfinite-step-N.json in the folder of the run, with all rows."""
    file = Path(run.config.train.output_dir) / f"{name}{place.step + 1}.json"
    told = {"step": place.step + 1, "rows": [row.as_json() for row in rows]}
    if distributed.is_main():
        with saving(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False))
    return file


def message(run: Run, place: Place, rows: list[Row], file: Path) -> str:
    """What is said at the end of the run."""
    limit = run.guard.limit
    many = f"steps {place.step + 2 - limit} to {place.step + 1} were"
    many = many if limit > 1 else f"step {place.step + 1} was"
    faulty = [row.where for row in rows if row.fault]
    diverged = len(faulty) == len(rows) and place.step > 0
    cause = "All rows have them, so the weights have probably diverged. " if diverged else ""
    few = faulty if 2 * len(faulty) <= len(rows) else []
    return (
        f"{many} not taken, because the loss or the gradient is not finite. {findings(place, rows)}. "
        f"{cause}{file} has all rows, and `dpo-fast replay {shlex.quote(str(file.parent))}` takes the step "
        "again. "
        f"{way_on(run, few)}"
    )


def findings(place: Place, rows: list[Row]) -> str:
    """Which rows were not finite, by what was not."""
    faults: dict[str, list[str]] = {}
    for row in rows:
        if row.fault:
            faults.setdefault(row.fault, []).append(row.where)
    if not faults:
        most = max(rows, key=lambda row: row.largest)
        return (
            f"Each of the {len(rows)} rows of its batch alone gives finite numbers, so their sum or its "
            f"norm overflows, or the fault does not repeat. {most.where} has the largest gradient, "
            f"{most.largest:.3g}. The rows are {some(place.rows)}"
        )
    count = sum(map(len, faults.values()))
    told = "; ".join(
        f"{some(where, TOLD)}: {fault}" for fault, where in list(faults.items())[:TOLD]
    )
    give = "gives" if count == 1 else "give"
    return f"{count} of the {len(rows)} rows of its batch {give} such numbers alone. {told}"


def way_on(run: Run, rows: list[str]) -> str:
    """How to train on: from the last checkpoint, or again. Options as a shell takes them.

    rows: those to blame, if they are few; earlier ones stay out, too.
    """
    saved = checkpoints(Path(run.config.train.output_dir))
    begin, rate = "Start again", "a lower train.learning_rate"
    if saved:
        begin = f"{saved[-1]} is whole: go on with train.resume_from_checkpoint=true"
        rate += " and 'train.change_on_resume=[learning_rate]' (from an earlier checkpoint, if any)"
    ways = [f"with {rate}", "past such steps with train.nonfinite=skip"]
    if rows:
        left_out = list(dict.fromkeys([*run.config.train.skip_rows, *rows]))
        option = f"train.skip_rows={json.dumps(left_out, ensure_ascii=False)}"
        ways.insert(0, f"without them, {shlex.quote(option)}")
    return f"{begin}, {'; or '.join(ways)}"
