"""How towers that take images of their own size pack them.

What enters a tower and what leaves it differs between four kinds of towers, each described by one class: images from
the arguments of a call, arguments from images, and the token maps of images in a tensor of features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dualview.geometry import Size
from dualview.models.adapter.patches import from_blocks, from_rows, to_blocks, to_rows


class Packing(Protocol):
    """How a kind of towers packs images. An image is (C, H, W), its size (H, W) in pixels."""

    @property
    def token(self) -> int:
        """Height and width of what one token of the tower's output stands for, in pixels."""

    def images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The images of a call of the tower; of a video, its temporal steps."""

    def arguments(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments for images."""

    def maps(self, features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """The token map (h, w, D) of each image."""

    def put(self, features: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The features with other token maps."""


class Flat(NamedTuple):
    """Qwen-VL and GLM-V: patches of all images in one sequence, in blocks that the tower merges to one token each."""

    patch: int
    merge: int

    @property
    def token(self) -> int:
        """A merged token."""
        return self.patch * self.merge

    def images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The temporal steps of all images and videos."""
        patches, grid = given(args, kwargs, "hidden_states", "grid_thw")
        grids = grid.tolist()
        pieces = patches.split([steps * rows * cols for steps, rows, cols in grids])
        return [
            frame
            for piece, thw in zip(pieces, grids, strict=True)
            for frame in from_blocks(piece, tuple(thw), self.patch, self.merge)
        ]

    def arguments(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Each image as one temporal step."""
        grid = [[1, image.shape[1] // self.patch, image.shape[2] // self.patch] for image in images]
        patches = torch.cat([to_blocks(image[None], self.patch, self.merge) for image in images])
        return {"hidden_states": patches, "grid_thw": torch.tensor(grid, device=patches.device)}

    def maps(self, features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Of merged tokens, which are in the order of rows."""
        return _split(features, sizes, self.token)

    def put(self, features: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """One after the other."""
        return torch.cat([one.flatten(0, 1) for one in maps])


class Pixtral(NamedTuple):
    """Pixtral: images padded to one size, a token for each patch, those of all images in one sequence."""

    token: int

    def images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Without the padding, and without what is left of a patch."""
        pixels, sizes = given(args, kwargs, "pixel_values", "image_sizes")
        if sizes is None:
            sizes = [pixels.shape[-2:]] * len(pixels)
        whole = [[int(side) // self.token * self.token for side in size] for size in sizes]
        return [image[:, :h, :w] for image, (h, w) in zip(pixels, whole, strict=True)]

    def arguments(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Padded at the bottom and at the right."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        high, wide = (max(side) for side in zip(*sizes, strict=True))
        padded = [nn.functional.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image in images]
        return {"pixel_values": torch.stack(padded), "image_sizes": sizes}

    def maps(self, features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Of a batch of one sequence."""
        return _split(features[0], sizes, self.token)

    def put(self, features: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """One after the other, as a batch of one."""
        return torch.cat([one.flatten(0, 1) for one in maps])[None]


class NaFlex(NamedTuple):
    """SigLIP 2: patches of each image in a row, padded to one number; a token for each."""

    token: int

    def images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Without the padding."""
        patches, shapes = given(args, kwargs, "pixel_values", "spatial_shapes")
        grids = shapes.tolist()
        return [from_rows(p[: h * w], (h, w), self.token) for p, (h, w) in zip(patches, grids, strict=True)]

    def arguments(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Padded with zeros, which the mask hides."""
        patches = [to_rows(image, self.token) for image in images]
        shapes = [[image.shape[1] // self.token, image.shape[2] // self.token] for image in images]
        mask = [torch.ones(len(p), dtype=torch.int32, device=p.device) for p in patches]
        return {
            "pixel_values": pad_sequence(patches, batch_first=True),
            "spatial_shapes": torch.tensor(shapes, device=patches[0].device),
            "pixel_attention_mask": pad_sequence(mask, batch_first=True),
        }

    def maps(self, features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Of what comes before the padding."""
        grids = [(height // self.token, width // self.token) for height, width in sizes]
        return [f[: h * w].unflatten(0, (h, w)) for f, (h, w) in zip(features, grids, strict=True)]

    def put(self, features: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """The padding stays."""
        flat = [one.flatten(0, 1) for one in maps]
        return torch.stack([torch.cat([new, old[len(new) :]]) for new, old in zip(flat, features, strict=True)])


class Gemma4(NamedTuple):
    """Gemma 4: patches as SigLIP 2 has them, with their positions; pooled tokens of all images in one sequence."""

    patch: int
    pool: int

    @property
    def token(self) -> int:
        """A pooled token."""
        return self.patch * self.pool

    def images(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Without the padding, whose positions are -1."""
        patches, positions = given(args, kwargs, "pixel_values", "pixel_position_ids")
        grids = (positions.amax(1) + 1).tolist()
        return [from_rows(p[: h * w], (h, w), self.patch) for p, (w, h) in zip(patches, grids, strict=True)]

    def arguments(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Padded with zeros at positions -1."""
        patches = [to_rows(image, self.patch) for image in images]
        positions = [
            torch.cartesian_prod(
                torch.arange(image.shape[1] // self.patch, device=image.device),
                torch.arange(image.shape[2] // self.patch, device=image.device),
            ).flip(1)
            for image in images
        ]
        return {
            "pixel_values": pad_sequence(patches, batch_first=True),
            "pixel_position_ids": pad_sequence(positions, batch_first=True, padding_value=-1),
        }

    def maps(self, features: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
        """Of pooled tokens, which are in the order of rows."""
        return _split(features, sizes, self.token)

    def put(self, features: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """One after the other."""
        return torch.cat([one.flatten(0, 1) for one in maps])


def packing_of(layout: str, tower: nn.Module) -> Packing:
    """What describes a kind of towers, for the sizes of this one."""
    config = cast(Any, tower).config
    match layout:
        case "flat":
            return Flat(config.patch_size, config.spatial_merge_size)
        case "pixtral":
            return Pixtral(config.patch_size)
        case "naflex":
            return NaFlex(config.patch_size)
        case _:
            return Gemma4(config.patch_size, config.pooling_kernel_size)


def _split(features: Tensor, sizes: Sequence[Size], stride: int) -> list[Tensor]:
    """The token maps (h, w, D) of images that stand one after the other in (tokens, D)."""
    grids = [(height // stride, width // stride) for height, width in sizes]
    pieces: tuple[Tensor, ...] = features.split([h * w for h, w in grids])
    return [piece.unflatten(0, grid) for piece, grid in zip(pieces, grids, strict=True)]


def given(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> list[Any]:
    """Arguments of a call, by position or by name; None where they are not given."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
