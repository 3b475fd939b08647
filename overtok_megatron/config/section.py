"""What every section of the schema is made of: the base class, the bounds, and the types of numbers with these bounds.

Upper bounds are far above what anybody trains. They bound what follows from the sizes: lists with an item per layer,
searches for a number that fits, 32-bit indices in the libraries.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
LARGEST_FLOAT = 3.4e38  # of float32, in which models compute
WIDEST = 2**20  # of a layer, in values
MOST_PARTS = 2**16  # layers, heads, experts, slices, n-gram orders, threads
FURTHEST = 64  # tokens that heads look ahead

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Width = Annotated[int, Field(ge=1, le=WIDEST)]
Parts = Annotated[int, Field(ge=1, le=MOST_PARTS)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=LARGEST_FLOAT, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=LARGEST_FLOAT, allow_inf_nan=False)]


class Section(BaseModel):
    """A section: immutable, no unknown keys, no silent conversion between numbers, strings and booleans."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
