# SPDX-License-Identifier: Apache-2.0
"""All studies by name."""

from __future__ import annotations

from studies import damping
from studies.definition import Definition

STUDIES: dict[str, Definition] = {study.name: study for study in (damping.STUDY,)}
