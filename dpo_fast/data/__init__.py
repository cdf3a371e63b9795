"""Preference data, from files to batches of token ids.

    config.py      DataConfig: every option, checked
    entries.py     the options of one source of several
    kinds.py       pairs, completions with labels, groups with scores; how many tokens they have
    sources.py     the files, folders and hub data sets a name stands for, and their hashes
    folders.py     the splits of a folder of files
    files.py       JSON, JSON Lines, CSV, Parquet and Arrow as a stream of (where, row)
    rows.py        a raw row becomes a PairRow, CompletionRow or GroupRow, or a BadRow that says why
    forms/         forms of rows that people bring, as rows by our own columns
    images/        images of rows, from their columns to the pixel values of a batch
    values.py      single values of a row: texts, numbers, labels, optional columns
    messages.py    chat messages in the forms that people write them
    plain.py       nested values, the same from every container
    prompts.py     the prompt that whole texts or conversations share
    prefill.py     prompts that end with the beginning of an answer
    chat.py        a chat becomes texts: the generation prompt, and what the model would write after it
    template_file.py  the file of data.chat_template: read, checked, exported
    continuation.py  finished turns, as they go on from the generation prompt
    turns.py       answers of several turns, and what the assistant wrote in them
    dialects.py    the forms in which templates take messages, and what they leave out
    thinking.py    the marks of thinking, family by family
    boundary.py    where the prompt's tokens end
    endings.py     what begins a sequence; one end of turn
    tokenise.py    a row becomes token ids that fit max_length
    verdicts.py    BadRow and Dropped, and their tally
    parts.py       sources that are read with the same options; which of their rows
    build.py       reads, checks and tokenises into a work folder
    dataset.py     load_examples: all of that, cached on disk by content
    several.py     several stored parts as one data set
    mixture.py     shares of sources, and what an epoch has of each
    stream.py      the same while a run trains; nothing is stored
    stream_mixture.py  a stream of sources with weights
    report.py      what was read, dropped and cut; the report and a few examples on a terminal
    batch.py       examples to ScoredBatch, the one batch type
    image_batch.py the images of a batch
    layouts.py     the table of layouts: how the tokens of a batch lie
    packing.py     examples into micro-batches of at most so many tokens
    sampler.py     the examples of every step and rank
    mismatched.py  completions after the prompts of other examples, for the kl of KTO

A *row* is what a file holds; an *example* is what training sees of it, as token ids.

Nothing is imported here, so that a part can be used without `datasets` or `transformers`.
"""
