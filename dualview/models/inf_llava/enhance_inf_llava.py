"""The enhancement module as a layer of transformers."""

from transformers.modeling_layers import GradientCheckpointingLayer

from dualview.ops.enhance import DualPerspectiveEnhance


class InfLlavaEnhance(GradientCheckpointingLayer, DualPerspectiveEnhance):
    """A [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] that gradient checkpointing takes for a layer.

    After ``model.gradient_checkpointing_enable()`` its maps are not kept for the backward pass, but computed again.
    """
