"""Features in the output of a tower: read, and replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dualview.models.adapter.hosts import Place

LARGE = "_dualview_large"
"""The attribute by which a reduced image carries the one that it was reduced from, from one hook to the other."""


def features_at(output: Any, place: Place) -> Tensor:
    """The features that stand at a place.

    Raises:
        ValueError: There are none, because the call asked for other layers.
    """
    value = getattr(output, place.field, None)
    if place.position is not None and value is not None:
        value = value[place.position] if -len(value) <= place.position < len(value) else None
    if not isinstance(value, Tensor):
        index = "" if place.position is None else f"[{place.position}]"
        raise ValueError(
            f"the tower returned no {place.field}{index}, which the attached module enhances: call the model without "
            "vision_feature_layer and return_dict, or attach with the layers that you read (layers=...)."
        )
    return value


def put_features(output: Any, place: Place, value: Tensor) -> None:
    """Replace the features that stand at a place."""
    if place.position is None:
        setattr(output, place.field, value)
        return
    sequence = list(getattr(output, place.field))
    sequence[place.position] = value
    setattr(output, place.field, type(getattr(output, place.field))(sequence))
