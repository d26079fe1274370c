# SPDX-License-Identifier: Apache-2.0
"""Which of ten plays of Shakespeare a passage of four lines is from."""

from __future__ import annotations

from collections.abc import Sequence

from grng.tasks import token_ids
from grng.tasks.data import ClassificationData, LoadRequest
from grng.tasks.shakespeare_text import PLAYS, passages

VALIDATION = 500
_TRAIN, _TEST = 5090, 1000


def _label(plays: Sequence[str]) -> list[tuple[str, int]]:
    return [(text, label) for label, play in enumerate(plays) for text in passages(play)]


CORPUS = token_ids.Corpus(
    name="plays",
    files=tuple(f"shksprdata/texts/{name}_gut.txt" for name in PLAYS),
    label=_label,
    test_samples=_TEST,
    most_samples=_TEST + VALIDATION + _TRAIN,
)


def load(request: LoadRequest) -> ClassificationData:
    """Passages of ten plays as token ids; 1,000 for testing, 5,590 for training and validation.

    Args:
        request: Device, folder and numbers of samples.

    Returns:
        Token ids ``[n, 48]`` and the number of the play.
    """
    return token_ids.load(CORPUS, request)
