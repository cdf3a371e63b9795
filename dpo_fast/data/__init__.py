"""Preference data, from files to token ids.

    config.py      DataConfig: every option, checked
    sources.py     the files, folders and hub data sets a name stands for, and their hashes
    files.py       JSON, JSON Lines, Parquet and Arrow as a stream of (where, row)
    kinds.py       pairs, or completions by themselves; data is one or the other
    rows.py        a raw row becomes a typed PairRow or CompletionRow, or a BadRow that says why
    messages.py    checks and splits lists of chat messages
    prompts.py     finds the prompt that two whole texts share
    verdicts.py    BadRow and Dropped, and their tally
    tokenise.py    a row becomes the ids of its prompt and answers
    boundary.py    where the prompt's tokens end
    endings.py     one BOS, one end of turn
    truncate.py    how a row is made to fit
    build.py       reads, checks and tokenises into a work folder
    dataset.py     load_examples: all of it, cached on disk by content
    cache.py       cache keys, atomic publication
    report.py      what was read, dropped and cut; length statistics
    preview.py     the report and a few rows, on a terminal
    mismatched.py  completions after the prompts of other rows, for the kl of KTO
    batch.py, layouts.py, sampler.py    token ids to the batches of each rank

Nothing is imported here, so that a part can be used without `datasets` or `transformers`.
"""
