# SPDX-License-Identifier: Apache-2.0
"""Acts, lines, passages and sentences of plays and poems."""

from __future__ import annotations

import re

# The ten plays of the passages task, in the order of its labels; their files end in _gut.txt.
PLAYS = (
    "hamlet",
    "lear",
    "macbeth",
    "othello",
    "romeo_and_juliet",
    "julius_caesar",
    "merchant_of_venice",
    "midsummer_nights_dream",
    "tempest",
    "twelfth_night",
)
PASSAGE_LINES = 4
_FIRST_ACT = re.compile(r"^\s*ACT (I|1)\b.*$", re.MULTILINE | re.IGNORECASE)
# One file opens some of its stage directions with a brace.
_STAGE_DIRECTION = re.compile(r"[\[{][^\]}]*[\]}]")
_HEADING = re.compile(r"(ACT|SCENE|Scene|Act|Enter|Exit|Exeunt|Re-enter|THE END)\b")
_BLANK_LINES = re.compile(r"\n{3,}")
_FEWEST_WORDS_OF_LINE = 3
_SPEAKER_WORDS = 4
_VERSE_NUMBER = re.compile(r"\s+\d+\s*$", re.MULTILINE)
_DOTS = re.compile(r"\.{2,}")
_SENTENCE_END = re.compile(r"(?<=[.?!])[\"')]*\s+")
_SENTENCE_WORDS = range(6, 61)


def from_first_act(play: str) -> str:
    """A play from the heading of its first act on, with its stage directions and speakers.

    Args:
        play: The whole text.

    Returns:
        The text with no spaces at the ends of its lines and no two blank lines in a row.
    """
    start = _FIRST_ACT.search(play)
    body = play[start.start() :] if start else play
    lines = "\n".join(line.rstrip() for line in body.split("\n"))
    return _BLANK_LINES.sub("\n\n", lines).strip()


def spoken_lines(play: str) -> list[str]:
    """What is said in a play, line by line.

    Left out: everything before the first act, stage directions, headings, names of speakers
    (they would give the play away), and lines of one or two words.

    Args:
        play: The whole text.

    Returns:
        The lines, each with single spaces.
    """
    start = _FIRST_ACT.search(play)
    body = _STAGE_DIRECTION.sub(" ", play[start.end() :] if start else play)
    found = []
    is_after_blank = True
    for raw in body.split("\n"):
        line = " ".join(raw.split())
        words = len(line.split())
        is_speaker = is_after_blank and words <= _SPEAKER_WORDS and line.endswith((".", ":"))
        is_after_blank = not line
        is_short = words < _FEWEST_WORDS_OF_LINE
        if not (is_speaker or is_short or _HEADING.match(line) or line.upper() == line):
            found.append(line)
    return found


def passages(play: str) -> list[str]:
    """Passages of four lines each that follow one another and share no line.

    Args:
        play: The whole text.

    Returns:
        The passages; lines at the end that fill none are left out.
    """
    lines = spoken_lines(play)
    ends = range(PASSAGE_LINES, len(lines) + 1, PASSAGE_LINES)
    return [" ".join(lines[end - PASSAGE_LINES : end]) for end in ends]


def sentences(text: str) -> list[str]:
    """Sentences of 6 to 60 words.

    Args:
        text: Verse or prose. Numbers at the ends of verses and rows of dots are left out.

    Returns:
        The sentences in order, each with single spaces.
    """
    joined = " ".join(_DOTS.sub(" ", _VERSE_NUMBER.sub("", text)).split())
    parts = [part.strip() for part in _SENTENCE_END.split(joined)]
    # What is written in capitals alone is a title.
    return [p for p in parts if len(p.split()) in _SENTENCE_WORDS and p.upper() != p]
