"""The Dual-perspective Enhancement Module (DEM), as the paper writes it and as the released weights need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from dualview.arguments import MOST_WIDTH, check_choice, check_count, check_flags
from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles, groups_of
from dualview.geometry import (
    READOUTS,
    GridLike,
    LiveTiles,
    Perspective,
    Readout,
    Size,
    SizeLike,
    TileGrid,
    check_live,
    check_needed,
    check_tokens,
)
from dualview.kernels.dispatch import Backend, use_backend
from dualview.ops.fusion import FUSIONS, declared, fuse
from dualview.ops.planned.live import (
    CROP_OF_QUERY,
    KEYS_OF_QUERY,
    MAPS_OF_ROLE,
    Enhance,
    EnhancePlan,
    EnhanceSpec,
    Pairing,
    Source,
    plan_enhance,
)
from dualview.ops.planned.products import Products, products_of
from dualview.ops.planned.run import TileMap, enhance_live
from dualview.ops.readout import read_out
from dualview.ops.released_weights import LoadReport, load_released, released_state_dict
from dualview.ops.tile_attention import Init, TileAttention
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import crop, recombine
from dualview.records import Record, short_repr
from dualview.switches import planning
from dualview.tensors import check_base, check_mask, check_tensors
from dualview.views import check_tile_pair, in_order

KeyMask: TypeAlias = Tensor | tuple[Tensor, Tensor] | None
"""True for tokens that may be attended to; of both maps or, as a pair, of the local and of the global map."""


class EnhancedMaps(NamedTuple):
    """Both maps before the fusion.

    Attributes:
        v_loc: V_loc, (B, rows*h, cols*w, D); None if it is not computed.
        v_glo: V_glo, likewise.
    """

    v_loc: Tensor | None
    v_glo: Tensor | None

    def __repr__(self) -> str:
        return short_repr(self)


class DualPerspectiveEnhance(nn.Module):
    """Let the local and the global map enhance each other by cross-attention between their tiles, and fuse them.

    For each direction both maps are cut in the same way, the tiles of one ask the tiles of the other, and the result is
    put back: V_glo = softmax(G W_q (L W_k)^T / sqrt(d)) L W_v for global queries G and local keys L, and V_loc with the
    roles exchanged (Eq. 18-25 of arXiv 2407.16198). A fusion merges V_glo and V_loc (Eq. 26-27), a readout brings the
    map down to the size of one tile (Eq. 7).

    The paper's equations and the released weights differ; `paper()` and `released()` build either. Every option between
    them is an argument.

    Args:
        dim: Width D of the tokens.
        num_heads: Heads of the attention; a divisor of ``dim``.
        pairing: How both maps are cut: "paper" cuts by strides where the global map asks and by blocks where the local
            one does; "released" the other way round.
        share_weights: One set of attention weights for both directions, or one for each.
        bias: Whether the attention's projections have biases.
        out_proj: Whether a linear layer follows the attention.
        residual: Whether the query is added to the attended tile.
        norm: Whether a LayerNorm ends each direction.
        init: Start of the attention's projections: "xavier", or "identical" as the released training code does.
        fusion: A name of the paper's Table 5 ("linear_concat", "bottleneck_concat", "addition", "weighted_addition",
            "multiplication", "max_pool", "conv3x3") or a module called with (V_loc, V_glo).
        readout: "average", "bilinear", "centre" or "none".
        enhance: "both", or only "global" (V_glo alone) or "local" (V_loc alone), as in Table 4: the one map goes
            through a linear layer D -> D (our reading) in place of the fusion.
        source: Which maps play the two roles: "dual", or "local" / "global" / their "sum" in both roles, the second
            reading of Table 6.
        gate: Multiply the output by a learnt per-channel gate that starts at zero, so that a host that adds the output
            to its own features is unchanged at step 0.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        - local_tiles, stride_tiles: (B, rows*cols, h, w, D), the encoded sub-images of either perspective; or, in place
          of both and of the grid and the mask, the result of [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop]
          ``with_data``
        - key_mask: (B, rows*h, cols*w) or (rows*h, cols*w), True for tokens that may be attended to; or a pair of them,
          for keys from the local and from the global map (a key that is a sum of both counts if either does). What a
          masked token holds must still be finite
        - result: (B, h, w, D), or (B, rows*h, cols*w, D) with readout "none"

    Raises:
        ValueError: An option is none of its choices, sizes do not fit each other, or a fusion is given where only one
            direction is enhanced.

    Example:
        >>> dem = DualPerspectiveEnhance.paper(dim=32)
        >>> local_tiles, stride_tiles = torch.randn(2, 1, 6, 5, 7, 32)
        >>> dem(local_tiles, stride_tiles, (2, 3)).shape
        torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 1,
        pairing: Pairing = "paper",
        share_weights: bool = True,
        bias: bool = False,
        out_proj: bool = False,
        residual: bool = False,
        norm: bool = False,
        init: Init = "xavier",
        fusion: str | nn.Module | None = None,
        readout: Readout = "average",
        enhance: Enhance = "both",
        source: Source = "dual",
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_flags(share_weights=share_weights, gate=gate)
        self.dim, self.pairing = (
            check_count(dim, "dim", high=MOST_WIDTH),
            check_choice(pairing, "pairing", CROP_OF_QUERY),
        )
        self.enhance = check_choice(enhance, "enhance", get_args(Enhance))
        self.source = check_choice(source, "source", MAPS_OF_ROLE)
        self.readout = check_choice(readout, "readout", READOUTS)

        count = 2 if enhance == "both" and not share_weights else 1
        self.attentions = nn.ModuleList(  # global queries use the first, local queries the last
            TileAttention(
                self.dim,
                num_heads=num_heads,
                bias=bias,
                out_proj=out_proj,
                residual=residual,
                norm=norm,
                init=init,
                device=device,
                dtype=dtype,
            )
            for _ in range(count)
        )
        self.fusion = self._build_fusion(fusion, device, dtype)
        self.gate = nn.Parameter(torch.zeros(self.dim, device=device, dtype=dtype)) if gate else None

    def _build_fusion(
        self, fusion: str | nn.Module | None, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Module:
        if self.enhance != "both":
            if fusion is not None:
                raise ValueError(
                    f"fusion={fusion!r} with enhance={self.enhance!r}: a fusion merges two maps, and only one is "
                    'computed. Omit fusion (the map goes through one linear layer), or use enhance="both".'
                )
            return nn.Linear(self.dim, self.dim, bias=False, device=device, dtype=dtype)
        if isinstance(fusion, nn.Module):
            return fusion
        name = check_choice("linear_concat" if fusion is None else fusion, "fusion", tuple(FUSIONS), also="a module")
        return FUSIONS[name](self.dim, device=device, dtype=dtype)

    @classmethod
    def paper(cls, dim: int, **overrides: Any) -> DualPerspectiveEnhance:
        """Eq. 18-27 and 7: one head, 4 d^2 weights, no biases, residuals or norms, linear concat, average pooling.

        Args:
            dim: Width D of the tokens, even.
            **overrides: Any argument of the class, in place of the preset's.
        """
        return cls(dim, **overrides)

    @classmethod
    def released(cls, dim: int = 1024, **overrides: Any) -> DualPerspectiveEnhance:
        """The module that the released weights belong to: 4,400,256 parameters in 20 tensors at dim = 1024.

        Args:
            dim: Width D of the tokens, a multiple of 16.
            **overrides: Any argument of the class, in place of the preset's.
        """
        preset: dict[str, Any] = {
            "num_heads": 8,
            "pairing": "released",
            "bias": True,
            "out_proj": True,
            "residual": True,
            "norm": True,
            "readout": "bilinear",
        }
        if overrides.get("enhance", "both") == "both":
            preset["fusion"] = "bottleneck_concat"
        return cls(dim, **(preset | overrides))

    @property
    def low_res(self) -> Literal["mean", "add"]:
        """How an encoder mixes the low-resolution view in unless told otherwise: "add" (paper), "mean" (released).

        It goes by the pairing, which tells the two presets apart.
        """
        return "add" if self.pairing == "paper" else "mean"

    def reset_parameters(self) -> None:
        """Draw all weights anew; a gate goes back to zero."""
        for module in (*self.attentions, self.fusion):
            if callable(reset := getattr(module, "reset_parameters", None)):  # a fusion of the user's own may have none
                reset()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(
        self,
        local_tiles: Tensor | TileBatch | DualPerspectiveTiles | DualPerspectiveTileBatch,
        stride_tiles: Tensor | TileBatch | None = None,
        grid: GridLike | Sequence[GridLike] | None = None,
        key_mask: KeyMask = None,
        base: Tensor | None = None,
        *,
        live: LiveTiles | None = None,
        backend: Backend | None = None,
    ) -> Tensor:
        """Enhance two sets of encoded tiles by each other, fuse them, and read the result out.

        Plain tensors cannot show that they were exchanged, or that they belong to another grid with as many tiles.
        Records of tiles, as [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] makes them, can: both mistakes are
        errors then, and padding is not attended to.

        Args:
            local_tiles: Encoded tiles of the local perspective. Or those of both in one record, alone: the result of
                [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] ``with_data``. Or a `TileBatch`.
            stride_tiles: Encoded tiles of the global perspective; a `TileBatch` beside one.
            grid: Rows and columns of tiles; records know it.
            key_mask: True for tokens that may be attended to, of both maps or, as a pair, of the local and the global
                map; records know it.
            base: What is subtracted from the result before the gate, beside plain tensors: of features of a host, so
                that to add the result leads from them (gate 0) to the enhanced ones (gate 1).
            live: Which tiles are given, where not all are: those of ``plan(grid, (h, w)).live`` are enough.
            backend: "auto", "torch" or "triton"; None for what [`use_backend`][dualview.use_backend] says.

        Shape:
            - local_tiles, stride_tiles: (B, rows*cols, h, w, D), or as many tiles as ``live`` names
            - key_mask: (B, rows*h, cols*w) or (rows*h, cols*w)
            - base: as the result
            - result: (B, h, w, D), or (B, rows*h, cols*w, D) with readout "none"

        Raises:
            ValueError: Sizes, grid and mask do not fit each other.
            TypeError: The tiles are no tensors.
            RuntimeError: "triton" was asked for and cannot run.
        """
        if backend is not None:
            with use_backend(backend):
                return self.forward(local_tiles, stride_tiles, grid, key_mask, base, live=live)
        if isinstance(local_tiles, Record) or not isinstance(stride_tiles, Tensor):
            if base is not None:
                raise ValueError("base goes with plain tensors of tiles: subtract it from the result of records.")
            images, tiles = zip(*groups_of(local_tiles, stride_tiles, grid, key_mask), strict=True)
            return in_order(images, [of[2] for of in tiles], [self.forward(*of, live=live) for of in tiles])
        grid = TileGrid.of(grid)  # type: ignore[arg-type]  # None is refused
        present = check_live(live, grid)
        if planning() or present != check_live(None, grid):
            out = self._planned(local_tiles, stride_tiles, grid, key_mask, present)
        else:
            out = self._as_written(local_tiles, stride_tiles, grid, key_mask)
        if base is not None:
            out = out - check_base(base, out)
        return out if self.gate is None else out * self.gate

    def _as_written(self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid, key_mask: KeyMask) -> Tensor:
        """The equations, on all tokens. Everything faster must give the same."""
        maps = self.enhanced_maps(local_tiles, stride_tiles, grid, key_mask)
        fused = fuse(self.fusion, *(v for v in maps if v is not None))  # Eq. 26-27
        return read_out(fused, grid, self.readout)  # Eq. 7

    def enhanced_maps(
        self, local_tiles: Tensor, stride_tiles: Tensor, grid: GridLike, key_mask: KeyMask = None
    ) -> EnhancedMaps:
        """V_loc and V_glo in full, before fusion and readout; arguments and errors as for the call of the module."""
        grid = TileGrid.of(grid)
        tokens = check_tile_pair(local_tiles, stride_tiles, grid, check_live(None, grid), self, self.dim)
        masks = self._masks(key_mask, local_tiles, grid.map_size(tokens))
        maps: dict[Perspective, Tensor] = {
            "local": recombine(local_tiles, grid, "local", data_format="channels_last"),  # Eq. 5
            "global": recombine(stride_tiles, grid, "global", data_format="channels_last"),  # Eq. 6
        }

        def tiles(role: Perspective, cut: Perspective) -> Tensor:
            of_role = reduce(torch.add, (maps[perspective] for perspective in MAPS_OF_ROLE[self.source][role]))
            return crop(of_role, grid, cut, data_format="channels_last").flatten(2, 3)

        enhanced: dict[str, Tensor] = {}
        for asks, answers in KEYS_OF_QUERY.items():
            if self.enhance not in ("both", asks):
                continue
            cut = CROP_OF_QUERY[self.pairing][asks]
            mask = masks[answers]
            if mask is not None:
                mask = crop(mask[..., None], grid, cut, data_format="channels_last", backend="torch").flatten(2)
            attended = self._attention(asks)(tiles(asks, cut), tiles(answers, cut), mask)  # Eq. 18-21, 22-25
            enhanced[asks] = recombine(attended.unflatten(2, tokens), grid, cut, data_format="channels_last")
        return EnhancedMaps(enhanced.get("local"), enhanced.get("global"))

    def _planned(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: TileGrid,
        key_mask: KeyMask,
        present: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Tensor:
        """The same from the live tokens alone, with the products arranged for the device."""
        tokens = check_tile_pair(local_tiles, stride_tiles, grid, present, self, self.dim)
        spec = self._spec(grid, tokens, self.readout)
        plan = plan_enhance(*spec)
        check_needed(present, plan.live[0], plan.live[1])
        given: dict[Perspective, TileMap] = {
            "local": TileMap(local_tiles, "local", present[0]),
            "global": TileMap(stride_tiles, "global", present[1]),
        }
        maps = {role: [given[p] for p in MAPS_OF_ROLE[self.source][role]] for role in given}
        masks = self._masks(key_mask, local_tiles, grid.map_size(tokens))
        attentions = [self._attention(d.query) for d in plan.directions]
        products = products_of(spec, attentions, self.fusion, local_tiles)
        return enhance_live(plan, grid, products, attentions, self.fusion, maps, masks)

    def plan(self, grid: GridLike, tokens: SizeLike) -> EnhancePlan:
        """What is computed for a grid and the token map (h, w) of one tile.

        Example:
            >>> DualPerspectiveEnhance.released(1024).plan((3, 3), (24, 24)).live.stride
            (4,)
        """
        return plan_enhance(*self._spec(grid, tokens, self.readout if planning() else "none"))

    def products(self, grid: GridLike, tokens: SizeLike, like: Tensor) -> Products:
        """How the live tokens are computed by the module as it is, for tokens like ``like``.

        That is for both passes where a gradient of ``like`` or of an attention's weights would be recorded, and for a
        forward pass otherwise.

        Example:
            >>> dem = DualPerspectiveEnhance.released(1024)
            >>> dem.products((3, 3), (24, 24), torch.empty(0)).directions[1].absorb
            True
        """
        check_tensors(like=like)
        spec = self._spec(grid, tokens, self.readout)
        attentions = [self._attention(d.query) for d in plan_enhance(*spec).directions]
        return products_of(spec, attentions, self.fusion, like) if planning() else Products.as_written(len(attentions))

    def _spec(self, grid: GridLike, tokens: SizeLike, readout: Readout) -> EnhanceSpec:
        grid, radius = TileGrid.of(grid), 0 if type(self.fusion) is nn.Linear else declared(self.fusion, "radius")
        return (
            (grid.rows, grid.cols),
            check_tokens(tokens, grid),
            readout,
            self.pairing,
            self.enhance,
            self.source,
            radius,
        )

    def _attention(self, asks: Perspective) -> TileAttention:
        return cast(TileAttention, self.attentions[0 if asks == "global" else -1])

    def _masks(self, key_mask: KeyMask, like: Tensor, size: Size) -> dict[Perspective, Tensor | None]:
        """The mask of the map in each role, (B or 1, H, W). A token of a sum counts if it counts in either map."""
        if key_mask is None:
            return {"local": None, "global": None}
        pair = key_mask if isinstance(key_mask, tuple) and len(key_mask) == 2 else (key_mask, key_mask)
        shapes, means = ((like.shape[0], *size), size), "real tokens"
        local, of_global = (check_mask(mask, "key_mask", shapes, like, means) for mask in pair)
        of_map: dict[Perspective, Tensor] = {"local": local.reshape(-1, *size), "global": of_global.reshape(-1, *size)}
        return {
            role: reduce(torch.bitwise_or, (of_map[p] for p in of)) for role, of in MAPS_OF_ROLE[self.source].items()
        }

    def load_released(self, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
        """Load the weights of a released checkpoint, copied into this module's parameters.

        Args:
            state_dict: Tensors named `model.spatial_embed.*` (other names of a whole checkpoint are passed over),
                `spatial_embed.*`, or the bare names.
            strict: Raise where a tensor is missing or unexpected, before anything is changed.

        Returns:
            What is missing and what is unexpected, by released names; both empty unless ``strict`` is False.

        Raises:
            ValueError: Tensors are missing, unexpected or of another shape, or this module has parameters that no
                released checkpoint has (a gate excepted), or none in memory. Nothing has been loaded then.

        Example:
            >>> dem = DualPerspectiveEnhance.released(dim=32)
            >>> weights = {f"model.spatial_embed.{name}": t for name, t in dem.released_state_dict().items()}
            >>> DualPerspectiveEnhance.released(dim=32).load_released(weights)
            LoadReport(missing=(), unexpected=())
        """
        return load_released(self, state_dict, strict=strict)

    def released_state_dict(self) -> dict[str, Tensor]:
        """This module's parameters under the names of a released checkpoint, without a prefix.

        Raises:
            ValueError: The module has parameters that a released checkpoint has no name for.
        """
        return released_state_dict(self)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, pairing={self.pairing!r}, enhance={self.enhance!r}, source={self.source!r}, "
            f"readout={self.readout!r}, gate={self.gate is not None}"
        )
