# SPDX-License-Identifier: Apache-2.0
"""All studies by name."""

from __future__ import annotations

from studies import (
    damping,
    fine_tuning,
    gradient_norm,
    label_noise,
    lazy,
    memory,
    minilm,
    robustness,
    two_layer,
    variants,
)
from studies.definition import Definition

STUDIES: dict[str, Definition] = {
    study.name: study
    for study in (
        damping.STUDY,
        lazy.MLP,
        lazy.VIT,
        variants.FISHER,
        variants.PAPER_MODE,
        gradient_norm.MLP,
        gradient_norm.RESNET,
        robustness.MLP,
        robustness.RESNET,
        label_noise.STUDY,
        fine_tuning.STUDY,
        minilm.LORA_PARTS,
        minilm.SCRATCH_RATES,
        memory.STUDY,
        two_layer.STUDY,
    )
}
