"""Train the enhancement module inside a small model of your own, with a loss on the answers alone.

What you learn: `DualViewEncoder` is a layer like any other, and gradients reach the encoder and the enhancement module.
Image tokens and the question are context: their labels are -100, which `cross_entropy` leaves out, as the models of
transformers do. With the tokens as labels the model would be trained to predict image placeholders, too.

The task: an image of 2 x 3 tiles holds one small bright mark; the answer is the number of the tile that it lies in.

    python examples/train_with_masked_labels.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualview as dv

TILE, PATCH, GRID, DIM = 28, 7, (2, 3), 32
TILES = GRID[0] * GRID[1]
IMAGE_TOKENS = (TILE // PATCH) ** 2
IMAGE, QUESTION = TILES, TILES + 1  # tokens 0 to 5 are the answers
VOCABULARY = TILES + 2


class TinyVisionLanguageModel(nn.Module):
    """Patches, the enhancement module, a projector, and a causal transformer of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, kernel_size=PATCH, stride=PATCH)
        dem = dv.DualPerspectiveEnhance.released(DIM, num_heads=4)
        # By default a CPU encodes one sub-image at a time, which suits large encoders.
        self.vision = dv.DualViewEncoder(self.encode, dem, tile=(TILE, TILE), grid=GRID, max_tiles_per_pass=1024)
        self.projector = nn.Linear(DIM, DIM)
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(IMAGE_TOKENS + 2, DIM))
        layer = nn.TransformerEncoderLayer(DIM, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.language = nn.TransformerEncoder(layer, num_layers=1)
        self.head = nn.Linear(DIM, VOCABULARY)

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) -> (T, h', w', D)"""
        return self.patches(pixels).movedim(1, -1)

    def forward(self, tokens: Tensor, pixels: Tensor) -> Tensor:
        """(B, N), (B, 3, H, W) -> (B, N, V)"""
        image = self.projector(self.vision(pixels)).flatten(1, 2)
        states = self.embed(tokens).masked_scatter((tokens == IMAGE)[..., None], image) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.language(states, mask=mask, is_causal=True))


def examples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, pixels, labels: image, question, answer, and a loss on the answer alone."""
    rows, cols = GRID
    y, x = torch.randint(rows * TILE // PATCH, (count,)), torch.randint(cols * TILE // PATCH, (count,))
    pixels = 0.1 * torch.randn(count, 3, rows * TILE, cols * TILE)
    for image, row, col in zip(pixels, y * PATCH, x * PATCH, strict=True):
        image[:, row : row + PATCH, col : col + PATCH] += 1
    answer = (y * PATCH // TILE) * cols + x * PATCH // TILE
    tokens = torch.full((count, IMAGE_TOKENS + 2), IMAGE)
    tokens[:, -2], tokens[:, -1] = QUESTION, answer
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = answer
    return tokens, pixels, labels


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Each position predicts the next; labels of -100 do not count."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def main() -> None:
    """Train for a few steps, and test on images that were not trained on."""
    torch.manual_seed(0)
    model = TinyVisionLanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    tokens, pixels, labels = examples(1)
    print(f"sequence: {IMAGE_TOKENS} image tokens, 1 question, 1 answer; image of {tuple(pixels.shape[-2:])} pixels")
    print(
        f"labels:   {(labels != -100).sum().item()} of {labels.numel()} positions count; tokens as labels: all of them"
    )

    for step in range(101):
        tokens, pixels, labels = examples(32)
        loss = loss_of(model(tokens, pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3d}: loss {loss.item():.3f}")
    assert all(weight.grad is not None for weight in model.vision.dem.parameters())

    model.eval()
    tokens, pixels, labels = examples(256)
    with torch.inference_mode():
        answer = model(tokens, pixels)[:, -2].argmax(-1)
    right = (answer == labels[:, -1]).float().mean().item()
    print(f"new images: {right:.0%} right; guessing gives {1 / TILES:.0%}")


if __name__ == "__main__":
    main()
