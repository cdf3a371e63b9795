"""`dpo-fast bench train`: whole training steps, ours and TRL's, of one model on the same pairs.

    options.py     the options of the command
    run.py         the run
    case.py        contenders, what all of them are given, models, and the work of a step
    pairs.py       the pairs: read or drawn, with a tokenizer
    ours.py, trl.py    a step of each
    measure.py     steps in turn; a contender with other losses has no time
    lines.py       rows in a file as soon as they are known
    results.py     columns, ingredients, printed tables, pictures

This benchmark and `kernels` do not import each other. What both use lies one folder up.
"""
