"""Exported to ONNX and run by onnxruntime: the same as torch."""

from itertools import product

import pytest
import torch
from torch import nn

import dualview as dv
from tests.strategies import ALL, some
from tests.tiny import prompt, tiny_model

RELEASED, PAPER = (
    pytest.mark.parametrize("preset", presets[: 1 + ALL]) for presets in (["released", "paper"], ["paper", "released"])
)
pytestmark = [pytest.mark.more, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


def same_in_onnxruntime(module, args, others, folder, **options):
    """Of the arguments that it was exported with, and of others."""
    import onnxruntime

    path = folder / "model.onnx"
    torch.onnx.export(module, args, path, dynamo=True, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for given in (args, others):
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found[0]), module(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "preset, options", some(product(["released", "paper"], [{}, {"fusion": "conv3x3", "gate": True}]), 3)
)
def test_the_enhancement_module(preset, options, tmp_path):
    dem = getattr(dv.DualPerspectiveEnhance, preset)(32, **options).eval()
    for parameter in dem.parameters():
        nn.init.normal_(parameter, std=0.3)

    class Enhanced(nn.Module):
        def __init__(self):
            super().__init__()
            self.dem = dem

        def forward(self, local, stride):
            return self.dem(local, stride, (2, 3))

    args, others = (tuple(torch.randn(2, batch, 6, 4, 6, 32)) for batch in (2, 3))
    batch = torch.export.Dim("batch", min=1, max=64)
    same_in_onnxruntime(Enhanced(), args, others, tmp_path, dynamic_shapes=({0: batch}, {0: batch}))


class ImagePath(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values).pooler_output

    def __call__(self, *args):
        out = super().__call__(*args)
        return torch.stack(out) if isinstance(out, list) else out


class Prefill(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False)
        return (
            out.logits * attention_mask[..., None]
        )  # what padding itself attends to is nothing, which engines differ in


def images(count):
    return torch.randn(count, 3, 56, 84)


def tokens(count):
    mask = torch.ones_like(prompt(count))
    mask[0, 0] = 0
    return prompt(count), mask


@PAPER
def test_the_image_path(preset, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    module = ImagePath(tiny_model(dem={"preset": preset}))
    same_in_onnxruntime(module, (images(2),), (images(3),), tmp_path, dynamic_shapes=({0: batch},))


@RELEASED
def test_the_whole_model(preset, tmp_path):
    """The first pass, from the tokens and the pixels to logits."""
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    module = Prefill(tiny_model(dem={"preset": preset}))
    same_in_onnxruntime(
        module, (*tokens(2), images(2)), (*tokens(3), images(3)), tmp_path, dynamic_shapes=(batch, batch, batch)
    )


@PAPER
def test_the_exporter_of_transformers(preset, tmp_path):
    """It finds the enhancement module, and what it exports runs."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = tiny_model(dem={"preset": preset})
    ids, mask = tokens(2)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": images(2)}
    exported = OnnxExporter().export(model, dict(given), config=OnnxConfig(dynamic=True))
    given["pixel_values"] = images(2)
    with torch.no_grad():
        expected = model(**given)
    found = exported(**given)
    real = mask[..., None]
    torch.testing.assert_close(torch.as_tensor(found.logits) * real, expected.logits * real, rtol=1e-4, atol=1e-5)
