"""The readout that answers: a question's two queries look at the map, and a small MLP gives the answer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualview.probe.questions import ANSWERS, NAMED, PATCHES, TASKS, allowed_answers
from dualview.probe.scenes import CELL

WAVES = 5
"""Of a place along each axis."""
QUADRANT, PATCH = list(TASKS).index("read a large glyph"), list(TASKS).index("direction of a grating")
"""Tasks whose place is no cell."""


class Readout(nn.Module):
    """Questions and a token map to logits of answers.

    A question is two queries: one of the task, its first place and its first name, one of the task and the second of
    both. Two layers of attention to the map, each followed by an MLP; then both queries together give the logits. A
    place has the same code in a question and on the map, and the first layer starts by looking there, so that no arm
    spends its steps on learning where places are.

    Args:
        dim: Width of the map.
        pixels: Height and width of the page.
        width: Inside the readout.
        heads: Of its attention.

    Shape:
        - tokens: (B, h, w, D); questions: (B, Q, 10)
        - result: (B, Q, ANSWERS), -1e4 for what the task cannot have as an answer
    """

    def __init__(self, dim: int, pixels: int = 336, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.norm = nn.LayerNorm(width)
        self.place = nn.Linear(4 * WAVES, width, bias=False)
        self.nowhere = nn.Parameter(0.3 * torch.randn(width))
        self.nothing = nn.Parameter(0.3 * torch.randn(1, 1, width))
        self.task, self.named = nn.Embedding(2 * len(TASKS), width), nn.Embedding(NAMED, width)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(2))
        self.answer = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, ANSWERS))
        nn.init.orthogonal_(self.place.weight, 3)
        for embedding in (self.task, self.named):
            nn.init.normal_(embedding.weight, std=0.3)
        first = cast(_Layer, self.layers[0])
        nn.init.orthogonal_(first.query.weight)
        with torch.no_grad():
            first.keys.weight[:width].copy_(first.query.weight)
        cells = [pixels // CELL] * len(TASKS)
        cells[QUADRANT], cells[PATCH] = 2, PATCHES
        self.second: Tensor
        self.register_buffer("second", torch.tensor([0, len(TASKS)]), persistent=False)
        self.cells: Tensor
        self.register_buffer("cells", torch.tensor(cells), persistent=False)
        self.allowed: Tensor
        self.register_buffer("allowed", torch.from_numpy(allowed_answers()), persistent=False)

    def forward(self, tokens: Tensor, questions: Tensor) -> Tensor:
        rows, cols = ((torch.arange(n, device=tokens.device) + 0.5) / n for n in tokens.shape[1:3])
        keys = self.norm(self.enter(tokens)) + self._code(rows[:, None], cols[None])
        keys = torch.cat([keys.flatten(1, 2), self.nothing.expand(len(keys), -1, -1)], 1)
        task = questions[..., :1]
        row, col = questions[..., 1:4:2], questions[..., 2:5:2]
        places = self._code(*((of - 0.5) / self.cells[task] for of in (row, col)))
        queries = self.task(task + self.second) + self.named(questions[..., 5:7])
        queries = (queries + torch.where(row[..., None] > 0, places, self.nowhere)).flatten(1, 2)
        for layer in self.layers:
            queries = layer(queries, keys)
        logits = self.answer(queries.unflatten(1, (-1, 2)).flatten(2))
        return cast(Tensor, logits.masked_fill(~self.allowed[questions[..., 0]], -1e4))

    def _code(self, y: Tensor, x: Tensor) -> Tensor:
        """Of places in a page of height and width 1: waves of half a period to eight."""
        angles = [torch.stack([2**k * torch.pi * of for k in range(WAVES)], -1) for of in torch.broadcast_tensors(y, x)]
        waves = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], -1)
        return cast(Tensor, self.place(waves))


class _Layer(nn.Module):
    """Cross-attention and an MLP, with norms before both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.keys, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.norms[0](x)), *self.keys(keys).chunk(2, -1))
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + cast(Tensor, self.mlp(self.norms[1](x)))
