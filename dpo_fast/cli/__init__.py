"""The command line.

app.py             commands and how their failures are told
bench.py           `bench`: the benchmarks of a checkout
config.py          `config`: the schema of configurations, and what one comes to
doctor.py          what this machine can run
doctor_run.py      what one run would use
doctor_memory.py   how much memory that takes, roughly
launch.py          --nproc: local ranks without torchrun
"""

from dpo_fast.cli.app import main

__all__ = ["main"]
