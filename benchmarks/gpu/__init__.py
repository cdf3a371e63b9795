"""`make gpu`: everything that needs a card, in one command that may be cut off at any moment.

    python3 -m benchmarks.gpu.run [--minutes M] [--out FOLDER] [--only STEP,...] [--resume] [--rehearse]

It needs the machine's own python3 with torch and triton, and nothing from the internet. Packages that are
absent are named. Every result is a line of JSON in FOLDER/lines.jsonl, flushed at once.

    run.py          the steps in their order, the clock, the options
    steps.py        what is done: a table
    pool.py         processes that work on items, are killed when one hangs, and begin again behind it
    worker.py       such a process
    machine.py      step: versions, and the ceilings: bare products and a copy
    faults.py       step of a rehearsal: items that hang, crash and raise
    smoke.py        step: every kernel and schedule against fp64
    csrc.py         step: csrc built, and against fp64
    suites.py       step: the tests that run on a card as well
    features.py     step: tiny runs with options that only a card runs as they are meant
    precompile.py   step: the tiles of rows.py, compiled before anything is timed
    targets.py      step: the shapes of the targets
    rows.py         step: the row pass alone, each tile of the table beside the bare product
    peers.py        step: the peers at two of the shapes
    trace.py        step: one training step under PyTorch's profiler
    train.py        step: whole training steps
    profile.py      step: one look at the row kernel with ncu
    sanitize.py     step: compute-sanitizer over small calls
    shapes.py       the shapes
    clock.py        how long an item may still take
    summary.py      the table of targets, from the lines
"""
