"""What can be seen of a text without understanding it: its form, how it opens, its script."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

TRAITS = {
    "a heading": re.compile(r"^#{1,6} \S", re.M),
    "bold text": re.compile(r"\*\*[^*\n]+\*\*"),
    "a list": re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+\S", re.M),
    "a block of code": re.compile(r"```"),
    "a table": re.compile(r"^\s*\|.+\|\s*$", re.M),
    "a link": re.compile(r"https?://"),
    "several paragraphs": re.compile(r"\S\s*\n\s*\n\s*\S"),
    "a digit": re.compile(r"\d"),
    "an exclamation mark": re.compile("!"),
    "an emoji": re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),
    "an opening that agrees": re.compile(
        r"^\W*(?:sure|certainly|of course|absolutely|great question|happy to)\b", re.I
    ),
    "an opening that refuses": re.compile(
        r"^\W*(?:(?:(?:i'?m|i am) (?:really |very |truly )?)?sorry|unfortunately|as an ai|i apologi[sz]e|"
        r"i(?: can'?t| cannot| can not| won'?t| am unable|'?m unable| am not able|'?m not able))\b",
        re.I,
    ),
    "a question at its end": re.compile(r"\?\W*$"),
    "no end of sentence": re.compile(r"[^.!?\u3002\uff01\uff1f:;)\]}\"'`\u201d*>|\s]\s*$"),
}
SCRIPTS = {  # by the first word of a letter's name in Unicode
    "LATIN": "Latin",
    "CYRILLIC": "Cyrillic",
    "CJK": "Han",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "HANGUL": "Korean",
    "ARABIC": "Arabic",
    "HEBREW": "Hebrew",
    "DEVANAGARI": "Devanagari",
    "BENGALI": "Bengali",
    "TAMIL": "Tamil",
    "THAI": "Thai",
    "GREEK": "Greek",
}
LETTERS = 400  # of a text that tell its script
NO_SCRIPT = "no letters"
_BLANKS = re.compile(r"[\W_]+")


def traits(text: str) -> list[bool]:
    """Whether the text has each of `TRAITS`."""
    straight = text.replace("\u2019", "'")
    return [pattern.search(straight) is not None for pattern in TRAITS.values()]


def script(text: str) -> str:
    """The script that most of the first letters are of. Japanese is told from Chinese by its kana."""
    counts: Counter[str] = Counter()
    for letter, count in Counter(text[:LETTERS]).items():
        if letter.isalpha():
            counts[_script_of(letter)] += count
    if not counts:
        return NO_SCRIPT
    if counts["Japanese"] * 10 > counts["Han"] > 0 and counts["Japanese"]:
        return "Japanese"
    return counts.most_common(1)[0][0]


_KNOWN: dict[str, str] = {}


def _script_of(letter: str) -> str:
    found = _KNOWN.get(letter)
    if found is None:
        name = unicodedata.name(letter, "").split(" ")[0]
        found = _KNOWN[letter] = SCRIPTS.get(name, "another")
    return found


def normalised(text: str) -> str:
    """Without case, blanks and punctuation: what is left of two answers that differ in form alone."""
    return _BLANKS.sub("", unicodedata.normalize("NFKC", text).casefold())
