"""Sizes of experts that make configurations with different gates equal in parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertSizes:
    """Routed experts of a layer."""

    num_experts: int
    width: int
    """hidden size of one expert"""

    @property
    def hidden_units(self) -> int:
        """Hidden units of all experts together; the total parameters are proportional to them."""
        return self.num_experts * self.width

    def active_units(self, experts_per_token: float) -> float:
        """Return the hidden units that a token uses with this mean number of experts."""
        return experts_per_token * self.width


def matched_sizes(
    reference: ExpertSizes,
    reference_experts_per_token: float,
    experts_per_token: float,
    multiple: int = 1,
) -> ExpertSizes:
    """Return the experts with which a gate of another mean number is equal to the reference.

    A token uses `experts_per_token` experts of the width w' = w k / k', so that the active
    parameters are those of k experts of the width w; N' = N w / w' of them have the same total.
    Both are rounded, the width first: the active parameters match more closely than the total.
    Routers, whose sizes depend on N', are not taken into account.

    Args:
        reference: experts of the reference.
        reference_experts_per_token: mean number of its computing experts, k.
        experts_per_token: mean number of computing experts of the gate, k'.
        multiple: the width is a multiple of this number, such as 8 for matrix kernels.

    Raises:
        ValueError: a mean is not positive, or no width or number of experts fits.
    """
    for name, mean in (
        ("reference_experts_per_token", reference_experts_per_token),
        ("experts_per_token", experts_per_token),
    ):
        if not 0 < mean < math.inf:
            raise ValueError(f"{name} is {mean}; allowed: a positive number")
    exact = reference.active_units(reference_experts_per_token) / experts_per_token
    width = multiple * round(exact / multiple)
    num_experts = round(reference.hidden_units / width) if width else 0
    if num_experts < experts_per_token:
        raise ValueError(
            f"experts_per_token is {experts_per_token:g}; with the {reference.hidden_units} hidden "
            f"units of the reference, of which a token uses {exact * experts_per_token:g}, there "
            f"would be {num_experts} experts of width {width}. Choose a mean between those, or a "
            "smaller multiple"
        )
    return ExpertSizes(num_experts, width)
