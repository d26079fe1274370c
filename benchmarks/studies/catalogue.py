# SPDX-License-Identifier: Apache-2.0
"""All studies by name."""

from __future__ import annotations

from studies import (
    damping,
    fine_tuning,
    gradient_norm,
    label_noise,
    lazy,
    lora_parts,
    memory,
    robustness,
    scratch_rates,
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
        lora_parts.STUDY,
        scratch_rates.STUDY,
        memory.STUDY,
        two_layer.STUDY,
    )
}
