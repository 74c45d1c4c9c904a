"""Give an encoder of your own images of six times its input size, at its own number of tokens.

What you learn: `DualViewEncoder` takes anything that turns pixels (T, 3, h, w) into tokens (T, h', w', D). Here this is
a small network of convolutions and, where timm is installed, a vision transformer of timm. The number of tokens stays
that of one tile. Only the sub-images that the result depends on are encoded. All weights are random.

    python examples/own_encoder.py
"""

import importlib.util

import torch
from torch import Tensor, nn

import dualview as dv


class ConvEncoder(nn.Module):
    """One token per 16 x 16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=4, stride=4),
            nn.GELU(),
            nn.Conv2d(32, dim, kernel_size=4, stride=4),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) -> (T, h/16, w/16, D): channels come last."""
        return self.layers(pixels).movedim(1, -1)


def try_out(name: str, encoder: nn.Module, tile: int) -> None:
    """Encode an image of one tile directly, and one of 2 x 3 tiles from both perspectives."""
    with torch.inference_mode():
        tokens = encoder(torch.rand(1, 3, tile, tile))
        dem = dv.DualPerspectiveEnhance.released(dim=tokens.shape[-1])
        model = dv.DualViewEncoder(encoder, dem, tile=(tile, tile), grid=(2, 3)).eval()
        large = model(torch.rand(1, 3, 2 * tile, 3 * tile))
    assert large.shape == tokens.shape

    plan = model.plan((2 * tile, 3 * tile))
    print(f"{name}")
    print(f"  alone:          {tile} x {tile} pixels -> {tuple(tokens.shape)}")
    print(f"  with dualview:  {2 * tile} x {3 * tile} pixels -> {tuple(large.shape)}")
    print(f"  sub-images encoded: {len(plan.views)} of 13 (6 local, 6 stride, 1 low-resolution)")


def main() -> None:
    """Try two encoders."""
    torch.manual_seed(0)
    try_out("a network of convolutions", ConvEncoder(dim=64), tile=96)

    if importlib.util.find_spec("timm"):
        import timm

        vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=96)
        try_out("timm's vit_tiny_patch16_224", dv.TimmEncoder(vit, layer=10), tile=96)


if __name__ == "__main__":
    main()
