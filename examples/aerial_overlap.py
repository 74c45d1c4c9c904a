"""Run a model over an aerial picture that is too large for one pass, without seams.

What you learn: `predict_tiled` cuts overlapping tiles, leaves out what a model says near the edges of a tile, and
blends the rest. With the margin of the model's receptive field the result is that of the whole picture, at its borders,
too. Without overlap there are seams. The picture is generated and the weights are random; nothing is downloaded.

    python examples/aerial_overlap.py
"""

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv


def aerial(height: int, width: int) -> Tensor:
    """Fields, a river and roads, seen from above: (3, H, W) from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    fields = torch.rand(1, 3, height // 60, width // 80, generator=generator) * torch.tensor([0.5, 0.7, 0.3]).view(
        1, 3, 1, 1
    )
    ground = F.interpolate(fields, (height, width), mode="nearest")[0]
    grain = F.interpolate(torch.rand(1, 1, height // 2, width // 2, generator=generator), (height, width))[0]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    river = (y - height / 2 - height / 5 * torch.sin(x / width * 7)).abs() < 14
    road = ((x * 2 - y) % 330).float() < 9
    picture = torch.where(road, torch.tensor(0.6).view(1, 1, 1), ground + 0.12 * grain)
    return torch.where(river, torch.tensor([0.1, 0.3, 0.6]).view(3, 1, 1), picture).clamp(0, 1)


class Segmenter(nn.Module):
    """Three convolutions of 9 x 9: no score depends on pixels farther away than 12."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 9, padding=4),
            nn.GELU(),
            nn.Conv2d(8, 8, 9, padding=4),
            nn.GELU(),
            nn.Conv2d(8, classes, 9, padding=4),
        )

    def forward(self, tiles: Tensor) -> Tensor:
        """(T, 3, h, w) -> (T, classes, h, w)"""
        return self.layers(tiles)


def main() -> None:
    """Predict whole, with seams, and without; draw the classes and where the seams are."""
    torch.manual_seed(0)
    picture, model = aerial(480, 640), Segmenter(classes=5).eval()
    with torch.no_grad():
        whole = model(picture[None])[0]
    seams = dv.predict_tiled(model, picture, tile=(160, 160), batch_size=4)
    tiled = dv.predict_tiled(model, picture, tile=(160, 160), margin=12, batch_size=4)
    print(f"picture: {tuple(picture.shape)} (channels, height, width)")
    for name, scores in (("without overlap", seams), ("with margin 12", tiled)):
        wrong, far = (scores.argmax(0) != whole.argmax(0)).sum(), (scores - whole).abs().max()
        print(
            f"{name}: {wrong} pixels get another class than from the whole picture; scores differ by {far:.0e} at most"
        )
    palette = torch.tensor(
        [[70, 110, 60], [200, 190, 120], [60, 110, 170], [160, 90, 60], [220, 220, 220]], dtype=torch.uint8
    )
    classes = palette[tiled.argmax(0)]
    different = (seams.argmax(0) != whole.argmax(0))[..., None]
    marked = torch.where(different, torch.tensor([220, 30, 30], dtype=torch.uint8), classes)
    panels = [(picture * 255).byte().movedim(0, -1), classes, marked]
    Image.fromarray(torch.cat(panels, dim=1).numpy()).resize((960, 240)).save("aerial_overlap.png")
    print("wrote aerial_overlap.png: the picture, its classes, and in red where tiles without overlap differ")


if __name__ == "__main__":
    main()
