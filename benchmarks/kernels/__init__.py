"""`dpo-fast bench kernels`: every implementation of an operation, checked and timed side by side.

    run.py          the run: setting by setting
    options.py      sizes and options
    measure.py      one setting: inputs, truth, check, memory, times
    isolation.py    a setting in a process that may be lost
    worker.py       such a process
    lines.py        what a run tells as it goes, and keeps
    rows.py         the columns, and rows from the lines
    results.py      printed table, pictures
    case.py         case, contender, operation, and inputs that look like a language model's
    operations.py   the table of operations
    linear_logp.py, logits_logp.py, preference.py    an operation each, with its contenders
    contenders.py   what contenders share, and the plain head
    peers.py        other people's heads
    checks.py       log-probs and gradients in fp64 or fp32, and how far a contender may be off
    meters.py       time and peak memory of a call

This benchmark and `train` do not import each other. What both use lies one folder up.
"""
