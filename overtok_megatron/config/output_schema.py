"""The schema of the heads that predict later tokens than the next: over-decoding and multi-token prediction.

Both are off by default, and both may be on together. Rules across their keys are in output_rules.py.
"""

from typing import Annotated

from pydantic import Field

from overtok_megatron.config.section import FURTHEST, NonNegativeFloat, Section, Width


class OverDecodingConfig(Section):
    num_tokens: Annotated[int, Field(ge=1, le=FURTHEST)] = Field(
        1, description="n: output table j of n predicts the token j ahead; 1 = off, because the main head is table 1"
    )
    loss_weights: list[NonNegativeFloat] = Field(
        [0.1], description="weights in the objective of the losses of tables 2 to n: n - 1 numbers"
    )
    low_rank: Width | None = Field(
        None,
        description="r: tables 2 to n are r wide, each after a projection from hidden_size to r; none = hidden_size",
    )


class MultiTokenPredictionConfig(Section):
    depth: Annotated[int, Field(ge=0, le=FURTHEST)] = Field(
        0, description="D: blocks after the model, of which block d predicts the token d + 1 ahead; 0 = off"
    )
    loss_weight: NonNegativeFloat = Field(
        0.1, description="weight in the objective of the losses of all depths: each has this weight divided by depth"
    )
