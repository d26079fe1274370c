# SPDX-License-Identifier: Apache-2.0
"""Whether a sentence is by Shakespeare (0) or by Milton (1)."""

from __future__ import annotations

from collections.abc import Sequence

from grng.tasks import token_ids
from grng.tasks.data import ClassificationData, LoadRequest
from grng.tasks.shakespeare_text import PLAYS, sentences, spoken_lines
from grng.tasks.splits import hashed_order

VALIDATION = 400
_TEST = 800
# The other Milton texts of the archive repeat these, are translations, or are mostly an editor's.
_MILTON = (
    "paradise_lost_(no_introduction)",
    "paradise_regained",
    "lallegro_il_penseroso_comus_and_lycidas",
    "areopagitica",
)


def _label(texts: Sequence[str]) -> list[tuple[str, int]]:
    """Equally many sentences of both; Milton, of whom there are fewer, says how many."""
    plays, works = texts[: len(PLAYS)], texts[len(PLAYS) :]
    milton = list(dict.fromkeys(s for work in works for s in sentences(work)))
    spoken = ("\n".join(spoken_lines(play)) for play in plays)
    shakespeare = list(dict.fromkeys(s for play in spoken for s in sentences(play)))
    kept = hashed_order(shakespeare)[: len(milton)]
    return [(shakespeare[index], 0) for index in kept] + [(s, 1) for s in milton]


CORPUS = token_ids.Corpus(
    name="authors",
    files=(
        *(f"shksprdata/texts/{name}_gut.txt" for name in PLAYS),
        *(f"miltondata/texts/{name}_gut.txt" for name in _MILTON),
    ),
    label=_label,
    test_samples=_TEST,
)


def load(request: LoadRequest) -> ClassificationData:
    """Sentences of both authors as token ids, half of each; 800 for testing.

    Args:
        request: Device, folder and numbers of samples.

    Returns:
        Token ids ``[n, 48]`` and 0 for Shakespeare, 1 for Milton.
    """
    return token_ids.load(CORPUS, request)
