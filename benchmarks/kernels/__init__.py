"""`dpo-fast bench kernels`: every implementation of an operation, checked and timed side by side.

    run.py          sizes, options, and the run: setting by setting
    measure.py      one setting: inputs, truth, check, memory, times
    case.py         case, contender, operation, and inputs that look like a language model's
    operations.py   the table of operations
    linear_logp.py, logits_logp.py, preference.py    an operation each, with its contenders
    contenders.py   what contenders share, the plain head, and other people's heads
    checks.py       log-probs and gradients in fp64 or fp32, and how far a contender may be off
    meters.py       time and peak memory of a call
    results.py      columns, printed table, pictures

This benchmark and `train` do not import each other. What both use lies one folder up.
"""
