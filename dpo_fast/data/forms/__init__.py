"""Forms of rows that people bring, each with an adapter that makes a pair, a completion or a group of it.

    table.py          the forms by name, and which of them a row has
    merge.py          consecutive rows with one rated response each, as one row
    instructions.py   an instruction or a question, and answers: alpaca, orca, query and response
    conversations.py  ShareGPT, ms-swift, OpenAI, the arena, dialogues of Human: and Assistant: turns
    ratings.py        answers with scores, ranks or a preference: UltraFeedback, HelpSteer, Nectar, ...
    unused.py         columns that no form takes, and which of them may not be passed over

An adapter takes the columns that it uses out of the row and returns them under our names, `system` too.
Adding a form is one function and one line in the table.
"""
