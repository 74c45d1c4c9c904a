"""A vision encoder of fixed input size, made to take larger images at its own number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dualview.arguments import check_callable, check_choice, check_count, check_flags, check_size
from dualview.geometry import GridLike, Size, SizeLike, TileGrid
from dualview.models.encode_views import encode_dual_view
from dualview.models.parts import DualView, Encoder, LowRes, Pixels, ViewOptions, low_res_of
from dualview.models.view_plan import ViewPlan, plan_encoder
from dualview.switches import planning


class DualViewEncoder(nn.Module):
    """Any vision encoder, given images of rows x cols times its input size at its own token count.

    1. The image is cut into local blocks and global strides, and reduced to one low-resolution view.
    2. All sub-images of the batch go through the encoder together, in passes of ``max_tiles_per_pass``.
    3. ``dem`` recombines both sets of features, lets them enhance each other, and reads out h' x w' tokens.
    4. The result is mixed with the features of the low-resolution view.

    The encoder's token count and width are kept, so what follows it in a pretrained model still fits.

    Args:
        encoder: Any callable (T, 3, h, w) -> (T, h', w', D): `HfEncoder`, `TimmEncoder`, `OpenClipEncoder`, or one of
            your own.
        dem: A `DualPerspectiveEnhance` or `DirectReadout`, or a module of your own that is called as they are and may
            declare which tiles it needs (see ``dualview.models.parts.DeclaresTiles``), or None for the encoder's
            features of the low-resolution view alone.
        tile: The encoder's input size (h, w) in pixels, or one number for a square.
        grid: Rows and columns of tiles. None: each image's size must be a whole number of tiles and gives its grid.
        low_res: How the low-resolution view is mixed in: "mean" (the released model), "add" (the paper), None (not at
            all: the single-resolution rows of Table 3), or "auto": what ``dem.low_res`` says, "mean" where it says
            nothing. A ``dem`` with a gate moves from the features of that view alone (gate 0, the encoder as it was) to
            the mixed ones (gate 1).
        resize: Accept images of any size and interpolate them (bicubic, no antialiasing, in at least float32) to the
            grid's canvas and to the low-resolution view, each from the image as given. The released model does this.
            Needs ``grid``.
        low_pass: Smooth the image before the stride crop.
        max_tiles_per_pass: Most sub-images in one call of the encoder. None: 1 on a CPU, where single tiles were
            measured to be faster, and 128 elsewhere, which bounds the memory. Under `torch.compile` with varying batch
            sizes, give a number that holds a whole batch: passes are unrolled. An encoder whose batch norms take their
            statistics from the batch, as in training, gets all sub-images in one pass.

    Shape:
        - pixels: (B, 3, rows*h, cols*w), or a list of (3, H, W) images, each with a grid of its own, or the tiles of
          such images: what [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] made, or local tiles as a
          [`TileBatch`][dualview.TileBatch]
        - valid: (B, rows*h, cols*w) booleans, or a list of (H, W): False where pixels are padding. The dem then attends
          to no token of padding alone. Images must already have the size of the grid's canvas.
        - result: (B, h', w', D); with readout "none" of a uniform batch, (B, rows*h', cols*w', D)

    Raises:
        ValueError: Sizes, grid and options do not fit each other, the encoder returns something that is no token map,
            or ``max_tiles_per_pass`` would change the statistics of its batch norms.
        TypeError: The encoder or the dem cannot be called.

    Example:
        >>> import torch
        >>> from dualview import DualPerspectiveEnhance
        >>> encoder = nn.Sequential(nn.Conv2d(3, 32, 14, stride=14), nn.Flatten(2), nn.Unflatten(2, (4, 5)))
        >>> model = DualViewEncoder(lambda x: encoder(x).movedim(1, -1), DualPerspectiveEnhance.paper(32),
        ...                         tile=(56, 70), grid=(2, 3))
        >>> model(torch.randn(1, 3, 112, 210)).shape
        torch.Size([1, 4, 5, 32])
    """

    def __init__(
        self,
        encoder: Encoder,
        dem: nn.Module | None,
        *,
        tile: SizeLike = (336, 336),
        grid: GridLike | None = None,
        low_res: LowRes | Literal["auto"] = "auto",
        resize: bool = False,
        low_pass: bool = False,
        max_tiles_per_pass: int | None = None,
    ) -> None:
        super().__init__()
        check_callable(encoder, "encoder", "a callable (T, 3, h, w) -> (T, h', w', D), such as HfEncoder(tower)")
        if dem is not None:
            check_callable(dem, "dem", "a module such as DualPerspectiveEnhance.released(dim), or None")
        check_flags(resize=resize, low_pass=low_pass)
        check_choice(low_res, "low_res", ("auto", "mean", "add", None))
        if low_res == "auto":
            low_res = low_res_of(dem)
        if resize and grid is None:
            raise ValueError("resize=True needs a grid: it says to which size images are brought.")
        if getattr(dem, "readout", None) == "none" and low_res is not None:
            raise ValueError(
                f"low_res={low_res!r} cannot be mixed with a full map: use low_res=None, or a dem with a readout other "
                'than "none".'
            )
        if max_tiles_per_pass is not None:
            max_tiles_per_pass = check_count(max_tiles_per_pass, "max_tiles_per_pass", why="Or None.")
        self.encoder, self.dem = encoder, dem
        self.tile, self.grid = check_size(tile, "tile"), None if grid is None else TileGrid.of(grid)
        self.low_res, self.resize, self.low_pass = low_res, resize, low_pass
        self.max_tiles_per_pass = max_tiles_per_pass

    def forward(self, pixels: Pixels, valid: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Encode images from both perspectives.

        Args:
            pixels: Images of one size, a list of images, or tiles of images: the result of
                [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop], or local tiles as a
                [`TileBatch`][dualview.TileBatch].
            valid: False where pixels are padding; what `DualPerspectiveCrop` made knows it.

        Shape:
            - pixels: (B, 3, rows*h, cols*w), a list of (3, H, W), or tiles
            - valid: (B, rows*h, cols*w) booleans, or a list of (H, W)
            - result: (B, h', w', D); with readout "none" of a uniform batch, (B, rows*h', cols*w', D)

        Raises:
            ValueError: Images, masks and grid do not fit each other, the encoder returns something that is no token
                map, or ``max_tiles_per_pass`` would change the statistics of its batch norms.
            TypeError: An image is no floating-point tensor.
        """
        return encode_dual_view(self.dual_view(), pixels, valid)

    def dual_view(self, grid: GridLike | None = None) -> DualView:
        """Encoder, dem and options as they are now.

        Args:
            grid: The grid of the images, where this encoder has no fixed one.

        Raises:
            ValueError: ``grid`` is not the fixed one.
        """
        chosen = self.grid if grid is None else TileGrid.of(grid)
        if self.grid is not None and chosen != self.grid:
            raise ValueError(
                f"grid={chosen} was asked for, but this encoder has a fixed grid of {self.grid}: omit the argument."
            )
        options = ViewOptions(self.tile, chosen, self.low_res, self.resize, self.low_pass, self.max_tiles_per_pass)
        return DualView(self.encoder, self.dem, options)

    def plan(self, size: Size, grid: GridLike | None = None, tokens: Size | None = None) -> ViewPlan:
        """What is computed for an image of ``size`` = (H, W) pixels.

        Args:
            size: Image size in pixels.
            grid: Rows and columns of tiles, where neither the encoder nor the size says them.
            tokens: Token map (h', w') of one tile, for the plan of the dem, where the encoder does not say it. The
                sub-images do not depend on it.

        Raises:
            ValueError: A size is not positive, the image is smaller than a tile, or ``grid`` is not the fixed one.

        Example:
            >>> from dualview import DualPerspectiveEnhance
            >>> model = DualViewEncoder(lambda x: x, DualPerspectiveEnhance.released(16), grid=(3, 3))
            >>> len(model.plan((1008, 1008)).views)
            10
        """
        parts = self.dual_view(grid)
        chosen = parts.options.grid or TileGrid.for_image(size, self.tile)
        return plan_encoder(*parts, chosen, size, full=not planning(), tokens=tokens)

    def extra_repr(self) -> str:
        return (
            f"tile={self.tile}, grid={self.grid and tuple(self.grid)}, low_res={self.low_res!r}, resize={self.resize}, "
            f"low_pass={self.low_pass}, max_tiles_per_pass={self.max_tiles_per_pass}"
        )
