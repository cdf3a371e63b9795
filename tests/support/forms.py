"""A row of every form that people bring, and the same row by our own columns."""

from __future__ import annotations


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(role, value):
    return {"from": role, "value": value}


SYSTEM, U, A, B = (
    say("system", "be brief"),
    say("user", "why so?"),
    say("assistant", "because"),
    say("assistant", "no idea"),
)
BEFORE = [say("user", "hello"), say("assistant", "hi there")]
PAIR = {"prompt": [U], "chosen": [A], "rejected": [B]}
LONG = PAIR | {"prompt": [SYSTEM, *BEFORE, U]}
KEPT = {"prompt": [U], "completion": [A], "label": True}
LEARNT = {"prompt": [U], "completion": [A]}
LEARNT_LONG = {"prompt": [SYSTEM, *BEFORE, U], "completion": [A]}
THREE = {"prompt": [U], "completions": [[A], [B], [say("assistant", "ask")]]}
SCORED, RANKED = THREE | {"scores": [5.0, 1.0, 3.5]}, THREE | {"ranks": [1, 3, 2]}
TEXTS = ("because", "no idea", "ask")
ANSWERS = {"chosen": "because", "rejected": "no idea"}
SHAREGPT = [talk("human", "hello"), talk("gpt", "hi there"), talk("human", "why so?")]
HH = "\n\nHuman: hello\n\nAssistant: hi there\n\nHuman: why so?\n\nAssistant:"
HELPSTEER2 = "hello\n<extra_id_1>Assistant\nhi there\n<extra_id_1>User\nwhy so?"
NEW_BEFORE = PAIR | {"prompt": [*BEFORE, U]}
METADATA = {"id": 7, "source": "x", "score_chosen": 1.5, "lang": "en", "images": [], "system": ""}
REASONS = [{"rating": "5", "Rationale": "fine"}]


def aspects(*ratings):
    return {f"aspect {index}": {"Rating": each} for index, each in enumerate(ratings)}


# (data.format, the row, the row by our own columns)
CASES = {
    "sharegpt": (
        "sharegpt",
        {
            "conversations": SHAREGPT,
            "chosen": talk("gpt", "because"),
            "rejected": talk("gpt", "no idea"),
            "system": "be brief",
        },
        LONG,
    ),
    "sharegpt, system among the messages": (
        "sharegpt",
        {"conversations": [talk("system", "be brief"), *SHAREGPT], **ANSWERS},
        LONG,
    ),
    "sharegpt with a label": (
        "sharegpt",
        {"conversations": [talk("human", "why so?"), talk("gpt", "because")], "kto_tag": True},
        KEPT,
    ),
    "openai messages with two answers": (
        "sharegpt",
        {"messages": [SYSTEM, *BEFORE, U], "chosen": A, "rejected": B},
        LONG,
    ),
    "openai's preference rows": (
        "openai",
        {
            "input": {"messages": [SYSTEM, *BEFORE, U], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [A],
            "non_preferred_output": [B],
        },
        LONG,
    ),
    "openai's rows for SFT": (
        "sharegpt",
        {"messages": [SYSTEM, U, A], "parallel_tool_calls": False},
        {"prompt": [SYSTEM, U], "completion": [A]},
    ),
    "ultrachat": ("sharegpt", {"prompt": "why so?", "prompt_id": "0f", "messages": [U, A]}, LEARNT),
    "sharegpt alone": (
        "sharegpt",
        {"conversations": [talk("human", "why so?"), talk("gpt", "because")], "system": ""},
        LEARNT,
    ),
    "sharegpt alone, several turns": (
        "sharegpt",
        {"conversations": [*SHAREGPT, talk("gpt", "because")]},
        {"prompt": SHAREGPT[:1], "completion": [*BEFORE[1:], U, A]},
    ),
    "swift, messages alone": ("swift", {"messages": [U, A]}, LEARNT),
    "swift, one answer": (
        "swift",
        {
            "query": "why so?",
            "response": "because",
            "history": [["hello", "hi there"]],
            "system": "be brief",
        },
        LEARNT_LONG,
    ),
    "orca, question and answer": ("orca", {"question": "why so?", "answer": "because"}, LEARNT),
    "alpaca, one answer": (
        "alpaca",
        {"instruction": "why so?", "input": "", "output": "because", "text": "all of it: why so?"},
        LEARNT,
    ),
    "text": ("text", {"text": "because"}, {"prompt": "", "completion": "because"}),
    "alpaca, output of two": (
        "alpaca",
        {"instruction": "why so?", "input": "", "output": ["because", "no idea"]},
        PAIR,
    ),
    "alpaca, chosen and rejected": (
        "alpaca",
        {
            "instruction": "why",
            "input": "so?",
            "system": "be brief",
            "history": [["hello", "hi there"]],
            **ANSWERS,
        },
        LONG | {"prompt": [SYSTEM, *BEFORE, say("user", "why\nso?")]},
    ),
    "alpaca with a label": (
        "alpaca",
        {"instruction": "why so?", "input": None, "output": "because", "kto_tag": True},
        KEPT,
    ),
    "alpaca, a ranking": (
        "alpaca",
        {"instruction": "why so?", "output": [TEXTS[0], TEXTS[2], TEXTS[1]]},
        RANKED | {"completions": [[A], [say("assistant", "ask")], [B]], "ranks": [1, 2, 3]},
    ),
    "alpaca, a group": (
        "alpaca",
        {"instruction": "why so?", "completions": list(TEXTS), "scores": [5.0, 1.0, 3.5]},
        SCORED,
    ),
    "argilla's answers": (
        "alpaca",
        {"instruction": "why so?", "chosen_response": TEXTS[0], "rejected_response": TEXTS[1]},
        PAIR,
    ),
    "swift": ("swift", {"messages": [SYSTEM, *BEFORE, U, A], "rejected_response": "no idea"}, LONG),
    "swift, whole rejected conversation": (
        "swift",
        {"messages": [SYSTEM, *BEFORE, U, A], "rejected_messages": [SYSTEM, *BEFORE, U, B]},
        LONG,
    ),
    "swift, query and response": (
        "swift",
        {
            "query": "why so?",
            "response": "because",
            "rejected_response": "no idea",
            "history": [["hello", "hi there"]],
            "system": "be brief",
        },
        LONG,
    ),
    "swift with a label": ("swift", {"messages": [U, A], "label": True}, KEPT),
    "openrlhf, messages": ("openrlhf", {"chosen": [U, A], "rejected": [U, B]}, PAIR),
    "openrlhf, a prompt of messages": ("openrlhf", {"prompt": [U], **ANSWERS}, PAIR),
    "orca": (
        "orca",
        {"system": "be brief", "question": "why so?", **ANSWERS},
        PAIR | {"prompt": [SYSTEM, U]},
    ),
    "orca, no system": ("orca", {"system": "", "question": "why so?", **ANSWERS}, PAIR),
    "orca, argilla's": ("orca", {"system": None, "input": "why so?", **ANSWERS}, PAIR),
    "ultrafeedback": (
        "ultrafeedback",
        {
            "instruction": "why so?",
            "completions": [
                {"response": text, "overall_score": score, "custom_system_prompt": "be honest"}
                for text, score in zip(TEXTS, (5.0, 1.0, 3.5))
            ],
        },
        SCORED,
    ),
    "ultrafeedback, ratings of aspects": (
        "ultrafeedback",
        {
            "instruction": "why so?",
            "completions": [
                {"response": TEXTS[0], "annotations": aspects("5", "5")},
                {"response": TEXTS[1], "annotations": aspects("1", "N/A")},
                {"response": TEXTS[2], "annotations": aspects("3", "4")},
            ],
        },
        SCORED,
    ),
    "ultrafeedback, generations": (
        "ultrafeedback",
        {"instruction": "why so?", "generations": list(TEXTS), "ratings": [5.0, 1.0, 3.5]},
        SCORED,
    ),
    "nectar": (
        "nectar",
        {
            "prompt": HH + " ",
            "answers": [
                {"answer": text, "model": "m", "rank": rank}
                for text, rank in zip(TEXTS, (1.0, 3.0, 2.0))
            ],
            "turns": 2,
            "num_responses": 3,
            "good_natured": True,
            "source": ["x"],
        },
        RANKED | {"prompt": [*BEFORE, U]},
    ),
    "nemo_rl": (
        "nemo_rl",
        {
            "context": [SYSTEM, *BEFORE, U],
            "completions": [{"rank": 1, "completion": [B]}, {"rank": 0, "completion": [A]}],
        },
        LONG,
    ),
    "nemo_rl, three": (
        "nemo_rl",
        {
            "context": [U],
            "completions": [
                {"rank": rank, "completion": answer}
                for answer, rank in zip(THREE["completions"], (1, 3, 2))
            ],
        },
        RANKED,
    ),
    "helpsteer2": (
        "helpsteer2",
        {"prompt": HELPSTEER2, "response": ["no idea", "because"], "helpfulness": [1, 4]},
        NEW_BEFORE,
    ),
    "helpsteer2, preference": (
        "helpsteer2",
        {
            "prompt": "why so?",
            "response_1": "no idea",
            "response_2": "because",
            "preference_strength": 2,
            "split": "train",
            "preference_statement": "2 is right",
        },
        PAIR,
    ),
    "helpsteer3": (
        "helpsteer3",
        {
            "context": [SYSTEM, *BEFORE, U],
            "response1": "because",
            "response2": "no idea",
            "overall_preference": -1,
            "domain": "general",
            "individual_preference": REASONS,
        },
        LONG,
    ),
    "safe_rlhf": (
        "safe_rlhf",
        {
            "prompt": "why so?",
            "response_0": "no idea",
            "response_1": "because",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        PAIR,
    ),
    "query with a label": ("orca", {"query": "why so?", "response": "because", "label": 1}, KEPT),
    "shp": (
        "shp",
        {"history": "why so?", "human_ref_A": "because", "human_ref_B": "no idea", "labels": 1},
        PAIR,
    ),
    "arena": (
        "arena",
        {"conversation_a": [U, B], "conversation_b": [U, A], "winner": "model_b", "turn": 1},
        PAIR,
    ),
    "hh": ("hh", {"chosen": HH + " because", "rejected": HH + " no idea"}, NEW_BEFORE),
}
