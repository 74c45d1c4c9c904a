"""Cut a page of text from both perspectives, and put it back.

What you learn: a local tile keeps every pixel of one part of the page, so small print stays legible. A stride tile
shows the whole page at a lower rate, so the layout is seen, and small print is not. Both are cut without loss. The
picture that is written shows the page, one local tile and one stride tile. Needs pillow.

    python examples/document_page.py [PICTURE.png]
"""

import sys

import torch
from PIL import Image, ImageDraw, ImageFont

import dualview as dv

TILE = 336  # the input size of CLIP ViT-L/14-336


def draw_page(height: int, width: int) -> Image.Image:
    """A page with a headline, two columns of small print, and a diagram."""
    page = Image.new("RGB", (width, height), "white")
    pen, headline, small = ImageDraw.Draw(page), ImageFont.load_default(56), ImageFont.load_default(13)
    pen.text((40, 24), "Tiles of two perspectives", fill="black", font=headline)
    for column in (40, width // 2 + 20):
        for line in range(30):
            words = f"{line + 1:2d}  Every pixel lies in one local and in one stride tile."
            pen.text((column, 120 + 17 * line), words, fill="black", font=small)
    pen.rectangle((40, height - 300, width - 40, height - 40), outline="black", width=3)
    for bar in range(8):
        left, top = 90 + bar * (width - 180) // 8, height - 70 - 25 * (bar + 1)
        pen.rectangle((left, top, left + 60, height - 60), fill=(40, 90, 30 * bar))
    return page


def main() -> None:
    """Draw a page, cut it, put it back, and write a picture."""
    output = sys.argv[1] if len(sys.argv) > 1 else "document_page.png"

    pixels = dv.load_image(draw_page(3 * TILE, 2 * TILE))
    grid = dv.TileGrid.for_image(pixels.shape[-2:], tile=(TILE, TILE))
    print(f"page:         {tuple(pixels.shape)} (channels, height, width), {pixels.dtype}")
    print(f"grid:         {grid.rows} rows x {grid.cols} columns of tiles")

    local = dv.local_crop(pixels, grid)
    stride = dv.global_stride_crop(pixels, grid)
    print(f"local tiles:  {tuple(local.shape)}; tile 1 is the top right block of the page")
    print(f"stride tiles: {tuple(stride.shape)}; tile 1 is every third row and second column, from (0, 1) on")

    assert torch.equal(local[1], pixels[:, :TILE, TILE:])
    assert torch.equal(stride[1], pixels[:, 0::3, 1::2])
    assert torch.equal(dv.recombine(local, grid, "local"), pixels)
    assert torch.equal(dv.recombine(stride, grid, "global"), pixels)
    print("round trip:   both sets of tiles give the page back, bit for bit")

    # The page reduced, one local tile and one stride tile, side by side.
    canvas = Image.new("RGB", (224 + 2 * TILE + 80, TILE + 40), (200, 200, 200))
    reduced = Image.fromarray(pixels.movedim(0, -1).numpy()).resize((224, TILE))
    canvas.paste(reduced, (20, 20))
    for position, tile in enumerate((local[1], stride[1])):
        canvas.paste(Image.fromarray(tile.movedim(0, -1).numpy()), (264 + position * (TILE + 20), 20))
    canvas.save(output)
    print(f"picture:      {output}: the page, local tile 1, stride tile 1")


if __name__ == "__main__":
    main()
