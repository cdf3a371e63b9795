"""`dpo-fast bench train`: whole training steps, ours and TRL's, of one model on the same pairs.

    run.py          pairs, model, everybody's steps, tables
    options.py      the command's options
    case.py         who takes part, and what all of them are given
    data.py         the pairs: read or drawn, with a tokenizer
    model.py        configurations, weights drawn at random
    ours.py, trl.py    a step of each
    measure.py      steps in turn; who has other losses has no time
    spans.py        seconds inside chosen functions
    work.py         flops of a step, and the fastest product: the two sides of MFU
    shares.py       what each ingredient is worth
    rows.py, table.py, plot.py    the file, the tables, the pictures

This benchmark and `kernels` know nothing of each other: what both use lies one folder up.
"""
