"""The Dual-perspective Enhancement Module (DEM), as the paper writes it and as the released weights need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from dualview.geometry import GridLike, Perspective, TileGrid
from dualview.ops.fusion import FUSIONS
from dualview.ops.low_pass import low_pass
from dualview.ops.readout import Readout, check_readout, read_out
from dualview.ops.tile_attention import Init, TileAttention
from dualview.ops.tiling import crop, recombine, retile

Pairing: TypeAlias = Literal["paper", "released"]
Enhance: TypeAlias = Literal["both", "global", "local"]
Source: TypeAlias = Literal["dual", "local", "global", "sum"]

CROP_OF_QUERY: dict[Pairing, dict[Perspective, Perspective]] = {
    "paper": {"global": "global", "local": "local"},
    "released": {"global": "local", "local": "global"},
}
"""How both maps are cut when the map of a perspective asks: Eq. 18-25, and the released code (the other way round)."""

RELEASED_NAMES = {
    "attention.linears.0": "attentions.0.q_proj",
    "attention.linears.1": "attentions.0.k_proj",
    "attention.linears.2": "attentions.0.v_proj",
    "attention.linears.3": "attentions.0.out_proj",
    "attention.ln": "attentions.0.norm",
    "ffn_crop.0": "fusion.local_bottleneck.0",
    "ffn_crop.2": "fusion.local_bottleneck.2",
    "ffn_stride.0": "fusion.global_bottleneck.0",
    "ffn_stride.2": "fusion.global_bottleneck.2",
    "ln_fuse": "fusion.norm",
}
"""Layer names in a released checkpoint and here."""


class EnhancedMaps(NamedTuple):
    """The maps V_loc and V_glo, (B, rows*h, cols*w, D) each; None for one that is not computed."""

    local: Tensor | None
    stride: Tensor | None


class LoadReport(NamedTuple):
    """Tensors that a checkpoint lacks, and those that it has but the module does not, by their released names."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


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
          for keys from the local and from the global map
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
            cast(TileAttention, module).reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        grid = TileGrid.of(grid)
        v_local, v_stride = self.enhanced_maps(local_tiles, stride_tiles, grid, key_mask)
        if v_local is None or v_stride is None:
            fused = self.fusion(v_stride if v_local is None else v_local)
        else:
            fused = self.fusion(v_local, v_stride)
        out = read_out(fused, grid, self.readout)
        return out if self.gate is None else out * self.gate

    def enhanced_maps(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> EnhancedMaps:
        """V_loc and V_glo before fusion and readout; arguments and errors as for the call of the module."""
        grid = TileGrid.of(grid)
        self._check(local_tiles, stride_tiles, grid)
        maps = self._roles(local_tiles, stride_tiles, grid)
        masks = key_mask if isinstance(key_mask, tuple) else (key_mask, key_mask)

        def direction(query: Perspective, attention: nn.Module) -> Tensor:
            cut = CROP_OF_QUERY[self.pairing][query]
            key: Perspective = "local" if query == "global" else "global"
            q, k = (retile(*maps[role], cut, grid) for role in (query, key))
            if self.low_pass and cut == "global":
                k = _smooth(k, grid)
            mask = masks[0 if key == "local" else 1]
            token_mask = None if mask is None else _cut_mask(mask, local_tiles, grid, cut)
            enhanced = attention(q.flatten(2, 3), k.flatten(2, 3), token_mask).unflatten(2, q.shape[2:4])
            return recombine(enhanced, grid, cut, data_format="channels_last")

        return EnhancedMaps(
            local=direction("local", self.attentions[-1]) if self.enhance != "global" else None,
            stride=direction("global", self.attentions[0]) if self.enhance != "local" else None,
        )

    def _roles(
        self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid
    ) -> dict[Perspective, tuple[Tensor, Perspective]]:
        """The tiles that play each role, and how they are cut now."""
        maps: dict[Perspective, tuple[Tensor, Perspective]] = {
            "local": (local_tiles, "local"),
            "global": (stride_tiles, "global"),
        }
        if self.source == "dual":
            return maps
        if self.source == "sum":
            both = local_tiles + retile(stride_tiles, "global", "local", grid)
            return {"local": (both, "local"), "global": (both, "local")}
        return {"local": maps[self.source], "global": maps[self.source]}

    def _check(self, local_tiles: Tensor, stride_tiles: Tensor, grid: TileGrid) -> None:
        shape = tuple(local_tiles.shape)
        if shape != tuple(stride_tiles.shape) or len(shape) != 5 or shape[1] != grid.num_tiles or shape[4] != self.dim:
            raise ValueError(
                f"DualPerspectiveEnhance got local_tiles {shape} and stride_tiles {tuple(stride_tiles.shape)} for a "
                f"grid of {grid}: both must be (B, rows*cols, h, w, D) = (B, {grid.num_tiles}, h, w, {self.dim}). "
                "Flattened tokens need .unflatten(2, (h, w)) first."
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
            ValueError: Tensors are missing, unexpected or of another shape, or this module is not built as
                [`released`][dualview.DualPerspectiveEnhance.released] is. Nothing has been loaded then.

        Example:
            >>> dem = DualPerspectiveEnhance.released(dim=32)
            >>> weights = {f"model.spatial_embed.{name}": t for name, t in dem.released_state_dict().items()}
            >>> DualPerspectiveEnhance.released(dim=32).load_released(weights)
            LoadReport(missing=(), unexpected=())
        """
        given = _strip_prefix(state_dict)
        own = self.released_state_dict()
        report = LoadReport(tuple(sorted(own.keys() - given.keys())), tuple(sorted(given.keys() - own.keys())))
        shared = own.keys() & given.keys()
        wrong = [
            f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(own[name].shape)} here"
            for name in sorted(shared)
            if given[name].shape != own[name].shape
        ]
        if wrong or (strict and any(report)):
            raise ValueError(
                "the checkpoint does not fit this module, and nothing was loaded. "
                f"Missing: {list(report.missing)}. Unexpected: {list(report.unexpected)}. Wrong shape: {wrong}. "
                "Released weights need DualPerspectiveEnhance.released(dim) with the checkpoint's dim (1024 on the "
                "hub); strict=False loads what fits by name."
            )
        with torch.no_grad():
            for name in shared:
                own[name].copy_(given[name])
        return report

    def released_state_dict(self) -> dict[str, Tensor]:
        """This module's parameters under the names of a released checkpoint, without a prefix.

        Raises:
            ValueError: The module has parameters that a released checkpoint has no name for.
        """
        names = {new: old for old, new in RELEASED_NAMES.items()}
        renamed: dict[str, Tensor] = {}
        for name, tensor in self.named_parameters():
            layer, _, leaf = name.rpartition(".")
            if layer not in names:
                raise ValueError(
                    f"parameter {name!r} has no name in a released checkpoint: only a module built as "
                    "DualPerspectiveEnhance.released(dim) exchanges weights with one."
                )
            renamed[f"{names[layer]}.{leaf}"] = tensor
        return renamed

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, pairing={self.pairing!r}, enhance={self.enhance!r}, source={self.source!r}, "
            f"readout={self.readout!r}, gate={self.gate is not None}, low_pass={self.low_pass}"
        )


class DirectReadout(nn.Module):
    """No enhancement: recombine, add, read out. The first reading of "DCM local / global / both" in Table 6.

    Stands wherever a [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] can stand, and has no parameters.

    Args:
        source: The recombined map of the "local" or "global" perspective, or their "sum".
        readout: "average", "bilinear", "centre" or "none".

    Shape:
        local_tiles, stride_tiles: (B, rows*cols, h, w, D) -> (B, h, w, D)

    Raises:
        ValueError: An option is none of its choices.

    Example:
        >>> DirectReadout("sum")(torch.ones(1, 6, 4, 5, 8), torch.ones(1, 6, 4, 5, 8), (2, 3)).unique().item()
        2.0
    """

    def __init__(self, source: Literal["local", "global", "sum"] = "sum", readout: Readout = "average") -> None:
        super().__init__()
        if source not in ("local", "global", "sum"):
            raise ValueError(f'source={source!r}: must be "local", "global" or "sum".')
        self.source, self.readout = source, check_readout(readout)

    def forward(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: GridLike,
        key_mask: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        # key_mask: part of the call it stands in for; where nothing is attended to, there is no key to mask.
        tiles: dict[Perspective, Tensor] = {"local": local_tiles, "global": stride_tiles}
        maps = [
            recombine(tiles[perspective], grid, perspective, data_format="channels_last")
            for perspective in tiles
            if self.source in (perspective, "sum")
        ]
        return read_out(sum(maps[1:], maps[0]), grid, self.readout)

    def extra_repr(self) -> str:
        return f"source={self.source!r}, readout={self.readout!r}"


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DEM's tensors by their bare names: those under a prefix if any is there, else all."""
    for prefix in ("model.spatial_embed.", "spatial_embed."):
        found = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(state_dict)


def _smooth(stride_tiles: Tensor, grid: TileGrid) -> Tensor:
    full = recombine(stride_tiles, grid, "global", data_format="channels_last")
    smooth = low_pass(full, grid, data_format="channels_last")
    return crop(smooth, grid, "global", data_format="channels_last")


def _cut_mask(mask: Tensor, tiles: Tensor, grid: TileGrid, perspective: Perspective) -> Tensor:
    """A raster mask as (B or 1, rows*cols, h*w) booleans in the order of the tiles' tokens."""
    size = grid.map_size((tiles.shape[2], tiles.shape[3]))
    if mask.dtype != torch.bool or tuple(mask.shape) not in (size, (tiles.shape[0], *size)):
        raise ValueError(
            f"key_mask of shape {tuple(mask.shape)} and type {mask.dtype}: must be boolean, True for real cells, of "
            f"shape {(tiles.shape[0], *size)} or {size}, the token map of the whole grid."
        )
    return crop(mask.reshape(-1, *size, 1), grid, perspective, data_format="channels_last").flatten(2)
