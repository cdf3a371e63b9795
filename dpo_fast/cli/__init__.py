"""The command line.

app.py             commands and how their failures are told
commands.py        how an option of a run is written, where someone writes it with dashes
bench.py           `bench`: the benchmarks of a checkout
config.py          `config`: the schema of configurations, and what one comes to
later.py           PyTorch, imported when it is first used
init.py            `init`: a configuration to begin with
evaluate.py        `evaluate`: metrics of a model on any data
export.py          `export`: the model out of a checkpoint
push.py            `push`: a model to the Hugging Face hub
doctor.py          what this machine can run
doctor_run.py      what one run would use, and its memory
launch.py          --nproc: local ranks without torchrun
streams.py         nothing that is said ends a command
system_errors.py   what the operating system refuses, in a sentence
"""

from __future__ import annotations

import gc
import os
import signal
import sys

from dpo_fast.cli.streams import give_up, own_arguments, survive

# Packages of the extra `train`, by the names that are imported.
EXTRA = (
    *("datasets", "deepspeed", "jinja2", "peft", "pydantic", "rich", "safetensors"),
    *("transformers", "typer", "yaml"),
)


# Imports make half a million objects that stay, and by default Python searches all of them for garbage
# again and again: a tenth of a start. New objects are searched as often as ever, old ones a tenth as often.
COLLECT = (700, 10, 100)


def main() -> None:
    """Entry point of `dpo-fast`. Without the extra `train` it says how to install it."""
    gc.set_threshold(*COLLECT)
    survive(own_arguments(sys.argv[1:]))
    try:
        from dpo_fast.cli.app import main as run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print(
            f"dpo-fast: the package {error.name} is missing, which the command line needs: "
            'pip install "dpo_fast[train]"',
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:  # while it imports, or when all is done
        _interrupted()
    finally:
        give_up()


def _interrupted() -> None:
    """End at once. An orderly end takes seconds once PyTorch is there, and a second Ctrl-C comes into it:
    a terminal sends it to every process, and a launcher passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("dpo-fast: interrupted", file=sys.stderr)
    give_up()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


__all__ = ["main"]
