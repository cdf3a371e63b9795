"""`dpo-fast bench kernels`: every implementation of an operation, checked and timed side by side.

    run.py          group by group: measured, printed, written
    options.py      the command's options
    suite.py        named heads, default points, the curve against T
    registry.py     the operations
    linear_logp.py, logits_logp.py, preference.py    each with its contenders, inputs and work
    peers.py        other people's heads
    head.py         what contenders for the head share
    case.py         what a row is about, what a contender is, what an operation is
    inputs.py       logits that look like a language model's
    measure.py      one group: inputs, truth, check, memory, times
    truth.py        log-probs and gradients in fp64 or fp32
    gates.py        how far a contender may be off
    peak.py         peak memory of one call
    timing.py       launches in turn
    rows.py, table.py, plot.py    the file, the table, the pictures

This benchmark and `train` know nothing of each other: what both use lies one folder up.
"""
