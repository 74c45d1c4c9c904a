"""The Dual-perspective Enhancement Module (DEM), as the paper writes it and as the released weights need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from dualview.geometry import GridLike, Perspective, Size, TileGrid, check_size
from dualview.kernels.dispatch import Backend, use_backend
from dualview.ops.fusion import FUSIONS, LinearConcatFusion
from dualview.ops.gather import (
    Pooling,
    TileMap,
    mean_of_cells,
    on_full_map,
    put_back,
    surroundings,
    take_read,
)
from dualview.ops.operands import KeyMask, operands
from dualview.ops.plan import (
    SPEED_OF_ABSORBED,
    DirectionPlan,
    Enhance,
    EnhancePlan,
    LiveTiles,
    Pairing,
    Source,
    maps_of_role,
    plan_enhance,
    planning,
)
from dualview.ops.readout import Readout, check_readout, read_out
from dualview.ops.released_weights import LoadReport, load_released, released_state_dict
from dualview.ops.tile_attention import Init, TileAttention


class EnhancedMaps(NamedTuple):
    """Both maps before the fusion.

    Attributes:
        v_loc: V_loc, (B, rows*h, cols*w, D); None if it is not computed.
        v_glo: V_glo, likewise.
    """

    v_loc: Tensor | None
    v_glo: Tensor | None


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
        low_pass: Smooth the key map before it is cut by strides.
        device: Where to make the parameters.
        dtype: Type of the parameters.

    Shape:
        - local_tiles, stride_tiles: (B, rows*cols, h, w, D), the encoded sub-images of either perspective
        - key_mask: (B, rows*h, cols*w) or (rows*h, cols*w), True for cells that may be attended to; or a pair of them,
          for keys from the local and from the global map (a key that is a sum of both counts if either does). What a
          masked cell holds must still be finite
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
        low_pass: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("pairing", pairing, get_args(Pairing)),
            ("enhance", enhance, get_args(Enhance)),
            ("source", source, get_args(Source)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: must be one of {choices}.")
        self.dim, self.pairing, self.enhance, self.source = dim, pairing, enhance, source
        self.readout, self.low_pass = check_readout(readout), low_pass

        count = 2 if enhance == "both" and not share_weights else 1
        self.attentions = nn.ModuleList(  # global queries use the first, local queries the last
            TileAttention(
                dim,
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
        self.gate = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if gate else None

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
        name = fusion or "linear_concat"
        if name not in FUSIONS:
            raise ValueError(f"fusion={fusion!r}: must be a module or one of {tuple(FUSIONS)}.")
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

    def reset_parameters(self) -> None:
        """Draw all weights anew; a gate goes back to zero."""
        for module in (*self.attentions, self.fusion):
            if callable(reset := getattr(module, "reset_parameters", None)):  # a fusion of the user's own may have none
                reset()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: KeyMask = None,
        *,
        live: LiveTiles | None = None,
        backend: Backend | None = None,
    ) -> Tensor:
        if backend is not None:
            with use_backend(backend):
                return self.forward(local_tiles, stride_tiles, grid, key_mask, live=live)
        grid = TileGrid.of(grid)
        maps = self._maps(local_tiles, stride_tiles, grid, live)
        tokens = check_size(local_tiles.shape[2:4], "token map")
        plan = self.plan(grid, tokens)
        values = self._values_to_fold(plan, tokens[0] * tokens[1])
        folded = {a: a.query_key_matrix for a in dict.fromkeys(self._attention(d) for d in plan.directions if d.fold)}
        enhanced = [
            self._direction(d, plan, maps, key_mask, grid, tokens, folded, project=values is None)
            for d in plan.directions
        ]
        out = self._fuse(enhanced, plan, grid, tokens) if values is None else self.fusion(*enhanced, values=values)
        return out if self.gate is None else out * self.gate

    def plan(self, grid: GridLike, tokens: Size) -> EnhancePlan:
        """What is computed for a grid and the token map (h, w) of one tile.

        Example:
            >>> DualPerspectiveEnhance.released(1024).plan((3, 3), (24, 24)).live.stride
            (4,)
        """
        return self._plan(TileGrid.of(grid), tokens, full=not planning())

    def _plan(self, grid: TileGrid, tokens: Size, *, full: bool) -> EnhancePlan:
        attention = cast(TileAttention, self.attentions[0])
        plain = isinstance(self.fusion, nn.Linear)
        return plan_enhance(
            (grid.rows, grid.cols),
            tokens,
            readout=self.readout,
            pairing=self.pairing,
            enhance=self.enhance,
            source=self.source,
            low_pass=self.low_pass,
            radius=0 if plain else cast("int | None", getattr(self.fusion, "radius", None)),
            linear=attention.norm is None and (plain or bool(getattr(self.fusion, "linear", False))),
            dim=self.dim,
            num_heads=attention.num_heads,
            speed=SPEED_OF_ABSORBED.get(attention.q_proj.weight.device.type, 1.0),
            full=full,
        )

    def enhanced_maps(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: KeyMask = None,
    ) -> EnhancedMaps:
        """V_loc and V_glo in full, before fusion and readout; arguments and errors as for the call of the module."""
        grid = TileGrid.of(grid)
        maps = self._maps(local_tiles, stride_tiles, grid, None)
        tokens = check_size(local_tiles.shape[2:4], "token map")
        plan = self._plan(grid, tokens, full=True)
        found = {d.query: self._direction(d, plan, maps, key_mask, grid, tokens, {}) for d in plan.directions}
        return EnhancedMaps(found.get("local"), found.get("global"))

    def compute_direction(
        self, d: DirectionPlan, plan: EnhancePlan, make_tiles: Callable[[], Tensor], grid: TileGrid
    ) -> Tensor:
        """One direction of a plan on its own, as the call of the module computes it, on tiles that are made for it.

        A matrix W_q W_k^T that both directions share is made with the first.
        """
        local_tiles, stride_tiles = make_tiles(), make_tiles()
        tokens = check_size(local_tiles.shape[2:4], "token map")
        attention, earlier = self._attention(d), plan.directions[: plan.directions.index(d)]
        folded: dict[TileAttention, Tensor] = {}
        if d.fold:
            shared = any(other.fold and self._attention(other) is attention for other in earlier)
            folded[attention] = local_tiles.new_empty(self.dim, self.dim) if shared else attention.query_key_matrix
        values = self._values_to_fold(plan, tokens[0] * tokens[1])
        maps = self._maps(local_tiles, stride_tiles, grid, None)
        return self._direction(d, plan, maps, None, grid, tokens, folded, project=values is None)

    def _maps(
        self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid, live: LiveTiles | None
    ) -> dict[Perspective, list[TileMap]]:
        """The maps that play each role; where there are two, their tokens are added."""
        everything = tuple(range(grid.num_tiles))
        live = live or LiveTiles(everything, everything)
        self._check(local_tiles, stride_tiles, grid, live)
        given: dict[Perspective, TileMap] = {
            "local": TileMap(local_tiles, "local", {tile: place for place, tile in enumerate(live.local)}),
            "global": TileMap(stride_tiles, "global", {tile: place for place, tile in enumerate(live.stride)}),
        }
        return {role: [given[p] for p in maps_of_role(self.source, role)] for role in given}

    def _direction(
        self,
        d: DirectionPlan,
        plan: EnhancePlan,
        maps: dict[Perspective, list[TileMap]],
        key_mask: KeyMask,
        grid: TileGrid,
        tokens: Size,
        folded: Mapping[TileAttention, Tensor],
        *,
        project: bool = True,
    ) -> Tensor:
        """One enhanced map at the positions that the fusion reads, or pooled; without W_v unless ``project``."""
        query, key, key_at, mask = operands(d, maps, key_mask, grid, tokens, smooth=self.low_pass)
        pool = Pooling(d, grid, tokens) if plan.commutes else None
        attention = self._attention(d)
        matrix = folded.get(attention) if d.fold else None
        tiles = attention(query, key, mask, key_at=key_at, absorb=d.absorb, folded=matrix, pool=pool, project=project)
        return put_back(tiles, d.query_rows, d.query_cols, d.cut, grid) if pool is None else pool.arrange(tiles)

    def _values_to_fold(self, plan: EnhancePlan, pooled_tokens: int) -> tuple[Tensor, Tensor] | None:
        """W_v of the local and the global direction, where folding them into the fusion costs less than applying them.

        Per direction: d^3 / 2 + N d^2 / 2 folded, N d^2 + N d^2 / 2 one after the other, for N pooled tokens.
        """
        if not plan.commutes or not isinstance(self.fusion, LinearConcatFusion) or 2 * pooled_tokens <= self.dim:
            return None
        local, of_global = (self._attention(d).value_matrix for d in plan.directions)
        if local is None or of_global is None or not all(d.absorb for d in plan.directions):
            return None
        return local, of_global

    def _attention(self, d: DirectionPlan) -> TileAttention:
        return cast(TileAttention, self.attentions[0 if d.query == "global" else -1])

    def _fuse(self, enhanced: list[Tensor], plan: EnhancePlan, grid: TileGrid, tokens: Size) -> Tensor:
        """Fuse the maps, local first, and read the result out: by one call where the fusion averages cells itself."""
        size = grid.map_size(tokens)
        if plan.surround == "none" and planning() and self.readout != "none" and getattr(self.fusion, "cells", False):
            rows, cols = enhanced[0].shape[1:3]
            out: Tensor = self.fusion(*enhanced, cell=(rows // tokens[0], cols // tokens[1]))
            return out
        if plan.surround == "none":
            fused = self.fusion(*enhanced)
        elif plan.surround == "windows" and getattr(self.fusion, "windows", False):
            fused = self.fusion(*(surroundings(x, plan, cast(int, self.fusion.radius)) for x in enhanced), windows=True)
        else:
            fused = take_read(self.fusion(*(on_full_map(x, plan, size) for x in enhanced)), plan)
        if fused.shape[1:3] == size and self.readout != "none":
            return read_out(fused, grid, self.readout)
        return fused if self.readout == "none" else mean_of_cells(fused, tokens)

    def _check(self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid, live: LiveTiles) -> None:
        shapes = tuple(local_tiles.shape), tuple(stride_tiles.shape)
        counts = len(live.local), len(live.stride)
        if (
            any(
                len(shape) != 5 or shape[1] != n or shape[4] != self.dim
                for shape, n in zip(shapes, counts, strict=True)
            )
            or shapes[0][0] != shapes[1][0]
            or shapes[0][2:] != shapes[1][2:]
        ):
            raise ValueError(
                f"DualPerspectiveEnhance got local_tiles {shapes[0]} and stride_tiles {shapes[1]} for a grid of "
                f"{grid}: they must be (B, {counts[0]}, h, w, {self.dim}) and (B, {counts[1]}, h, w, {self.dim}), "
                "rows*cols tiles each unless `live` names those present. Flattened tokens need .unflatten(2, (h, w))."
            )

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
            f"readout={self.readout!r}, gate={self.gate is not None}, low_pass={self.low_pass}"
        )
