"""What else a person could use: each peer a short function, written from the equations of arXiv 2407.16198.

A grid is (rows, cols); "local" cuts blocks, "global" strides; images are (B, C, H, W), token maps (B, H, W, D). Tiles
are contiguous, (B, rows*cols, ...), row by row. A peer that cannot be run raises `Missing` with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Grid = tuple[int, int]
Crop = Callable[[Tensor, Grid], Tensor]


class Missing(Exception):  # noqa: N818 - no error: a row of the tables
    """A peer that cannot be run here, and why."""


def need(name: str) -> ModuleType:
    """An optional library."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error


def compiled(function: Callable[..., Any], compiler: str = "inductor") -> Callable[..., Any]:
    """The same under torch.compile, without graph breaks."""
    return torch.compile(function, fullgraph=True, dynamic=False, backend=compiler)


# --- Crops and their inverses ----------------------------------------------------------------------------------------

PATTERNS = {  # map -> tiles
    ("images", "local"): ("b c (i h) (j w)", "b (i j) c h w"),
    ("images", "global"): ("b c (h i) (w j)", "b (i j) c h w"),
    ("tokens", "local"): ("b (i h) (j w) c", "b (i j) h w c"),
    ("tokens", "global"): ("b (h i) (w j) c", "b (i j) h w c"),
}


def by_einops(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """einops.rearrange."""
    whole, tiles = PATTERNS[kind, cut]
    pattern = f"{tiles} -> {whole}" if inverse else f"{whole} -> {tiles}"
    return need("einops").rearrange(x, pattern, i=grid[0], j=grid[1]).contiguous()


def by_view(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """View, permute, copy."""
    rows, cols = grid
    first = 2 if kind == "images" else 1  # of height, in a map
    order = {  # (b, [c], height factors, width factors, [c]) -> (b, i, j, [c], h, w, [c])
        ("images", "local"): (0, 2, 4, 1, 3, 5),
        ("images", "global"): (0, 3, 5, 1, 2, 4),
        ("tokens", "local"): (0, 1, 3, 2, 4, 5),
        ("tokens", "global"): (0, 2, 4, 1, 3, 5),
    }[kind, cut]
    if not inverse:
        h, w = x.shape[first] // rows, x.shape[first + 1] // cols
        factors = (rows, h, cols, w) if cut == "local" else (h, rows, w, cols)
        split = x.view(*x.shape[:first], *factors, *x.shape[first + 2 :]).permute(order)
        return split.reshape(x.shape[0], rows * cols, *split.shape[3:])
    back = [order.index(i) for i in range(6)]
    split = x.view(x.shape[0], rows, cols, *x.shape[2:]).permute(back)
    (h1, h2, w1, w2), rest = split.shape[first : first + 4], split.shape[first + 4 :]
    return split.reshape(*split.shape[:first], h1 * h2, w1 * w2, *rest)


def tile_at(cut: str, grid: Grid, size: Grid, i: int, j: int) -> tuple[slice, slice]:
    """The rows and columns of tile (i, j) of a map of ``size``: Eq. 13, Eq. 16-17."""
    if cut == "global":
        return slice(i, None, grid[0]), slice(j, None, grid[1])
    h, w = size[0] // grid[0], size[1] // grid[1]
    return slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w)


def by_slices(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """One slice per tile."""
    first = 2 if kind == "images" else 1
    before = (slice(None),) * first
    places = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    if not inverse:
        size = (x.shape[first], x.shape[first + 1])
        return torch.stack([x[(*before, *tile_at(cut, grid, size, i, j))] for i, j in places], dim=1)
    size = (x.shape[first + 1] * grid[0], x.shape[first + 2] * grid[1])
    out = x.new_empty(x.shape[0], *x.shape[2 : first + 1], *size, *x.shape[first + 3 :])
    for tile, (i, j) in zip(x.unbind(1), places, strict=True):
        out[(*before, *tile_at(cut, grid, size, i, j))] = tile
    return out


def by_unfold(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """F.unfold and F.fold: blocks are windows with a stride, strides are windows with a dilation. Images only."""
    h, w = x.shape[-2:] if inverse else (x.shape[-2] // grid[0], x.shape[-1] // grid[1])
    window = {"stride": (h, w)} if cut == "local" else {"dilation": grid}
    if not inverse:
        return F.unfold(x, (h, w), **window).transpose(1, 2).reshape(x.shape[0], -1, x.shape[1], h, w)
    return F.fold(x.flatten(2).transpose(1, 2), (h * grid[0], w * grid[1]), (h, w), **window)


def by_pixel_shuffle(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """F.pixel_unshuffle and F.pixel_shuffle: strides of a square grid. Images only."""
    if grid[0] != grid[1]:
        raise Missing("takes square grids only")
    if not inverse:
        tiles = F.pixel_unshuffle(x, grid[0]).unflatten(1, (x.shape[1], -1))
        return tiles.transpose(1, 2).contiguous()
    return F.pixel_shuffle(x.transpose(1, 2).flatten(1, 2), grid[0])


def by_timm(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """Of timm: window and grid partition (MaxViT), which take the size of a tile."""
    maxxvit = need("timm.models.maxxvit")
    name, layout = "window" if cut == "local" else "grid", "_nchw" if kind == "images" else ""
    first = 2 if kind == "images" else 1
    if not inverse:
        tile = [x.shape[first] // grid[0], x.shape[first + 1] // grid[1]]
        tiles = getattr(maxxvit, f"{name}_partition{layout}")(x, tile)
        return tiles.unflatten(0, (x.shape[0], -1))
    tile = [x.shape[first + 1], x.shape[first + 2]]
    size = [tile[0] * grid[0], tile[1] * grid[1]]
    return getattr(maxxvit, f"{name}_reverse{layout}")(x.flatten(0, 1), tile, size).contiguous()


def by_kornia(x: Tensor, grid: Grid, kind: str, cut: str, *, inverse: bool = False) -> Tensor:
    """Of kornia: tensor patches: blocks of images."""
    contrib = need("kornia.contrib")
    if not inverse:
        tile = (x.shape[2] // grid[0], x.shape[3] // grid[1])
        return contrib.extract_tensor_patches(x, tile, stride=tile).contiguous()
    tile = (x.shape[3], x.shape[4])
    size = (tile[0] * grid[0], tile[1] * grid[1])
    return contrib.combine_tensor_patches(x, size, tile, stride=tile).contiguous()


def tiling(kind: str, cut: str, *, compile_too: bool) -> dict[str, Callable[..., Tensor]]:
    """All peers of one crop and its inverse, called with (x, grid, inverse=...)."""
    peers: dict[str, Callable[..., Tensor]] = {
        "view + permute": by_view,
        "slice per tile": by_slices,
        "einops": by_einops,
        "timm": by_timm,
    }
    if kind == "images":
        peers["F.unfold / F.fold"] = by_unfold
        peers |= {"kornia": by_kornia} if cut == "local" else {"pixel (un)shuffle": by_pixel_shuffle}
    if compile_too:
        peers["view + permute, torch.compile"] = compiled(by_view)
    return {name: partial(peer, kind=kind, cut=cut) for name, peer in peers.items()}


def retile_by_view(x: Tensor, grid: Grid, source: str, target: str) -> Tensor:
    """One set of tiles to the other: recombine, cut again."""
    return by_view(by_view(x, grid, "tokens", source, inverse=True), grid, "tokens", target)


def retile_by_einops(x: Tensor, grid: Grid, source: str, target: str) -> Tensor:
    """The same by one pattern, where tiles hold whole strides."""
    if x.shape[2] % grid[0] or x.shape[3] % grid[1]:
        raise Missing("takes tiles that are a multiple of the grid only")
    tiles = {"local": "b (i j) (u a) (v c) d", "global": "b (a c) (i u) (j v) d"}
    i, j = grid
    pattern = f"{tiles[source]} -> {tiles[target]}"
    return need("einops").rearrange(x, pattern, i=i, a=i, j=j, c=j).contiguous()


# --- A photograph to normalised tiles --------------------------------------------------------------------------------


def normalise_then_cut(photo: Tensor, grid: Grid, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The plain sequence: normalise (H, W, 3) bytes, permute, rearrange twice."""
    pixels = ((photo.float() / 255 - mean) / std).permute(2, 0, 1).contiguous()[None]
    return by_view(pixels, grid, "images", "local")[0], by_view(pixels, grid, "images", "global")[0]


# --- The enhancement module ------------------------------------------------------------------------------------------
# The modules below are only looked at for their weights: linear layers and norms of torch.

CUT_OF_QUERY = {  # Eq. 18-25, and the released weights
    "paper": {"local": "local", "global": "global"},
    "released": {"local": "global", "global": "local"},
}


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(e)) v, written out. (..., tokens, e)"""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by torch's own kernel."""
    return F.scaled_dot_product_attention(q, k, v)


def finish(attention: nn.Module, attended: Tensor, query: Tensor) -> Tensor:
    """What the released weights have after the attention, and the paper has not."""
    out = attended if attention.out_proj is None else attention.out_proj(attended)
    out = out + query if attention.residual else out
    return out if attention.norm is None else attention.norm(out)


def fuse_and_read(dem: nn.Module, v_loc: Tensor, v_glo: Tensor, grid: Grid) -> Tensor:
    """Eq. 26-27 and 7, or what the released weights do instead. (B, H, W, D) -> (B, h, w, D)"""
    f = dem.fusion
    if hasattr(f, "local_bottleneck"):
        fused = torch.cat([f.local_bottleneck(v_loc), f.global_bottleneck(v_glo)], dim=-1)
        fused = f.norm(fused + v_glo + v_loc)
    else:
        fused = torch.cat([f.global_proj(v_glo), f.local_proj(v_loc)], dim=-1)
    planes = fused.movedim(-1, 1)
    size = (planes.shape[2] // grid[0], planes.shape[3] // grid[1])
    if dem.readout == "average":
        return F.avg_pool2d(planes, grid).movedim(1, -1)
    return F.interpolate(planes, size, mode="bilinear", align_corners=False).movedim(1, -1)


def rasters(local: Tensor, stride: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Eq. 5-6: both sets of feature tiles as maps."""
    return {
        "local": by_view(local, grid, "tokens", "local", inverse=True),
        "global": by_view(stride, grid, "tokens", "global", inverse=True),
    }


def dem_per_tile(dem: nn.Module, local: Tensor, stride: Tensor, grid: Grid) -> Tensor:
    """Every tile by itself: project its queries, keys and values, attend, put the result back."""
    maps, attention = rasters(local, stride, grid), dem.attentions[0]
    size, enhanced = tuple(maps["local"].shape[1:3]), {}

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    for ask, answer in (("local", "global"), ("global", "local")):
        cut, tiles = CUT_OF_QUERY[dem.pairing][ask], []
        for i in range(grid[0]):
            for j in range(grid[1]):
                rows, cols = tile_at(cut, grid, size, i, j)
                query, key = (maps[name][:, rows, cols].flatten(1, 2) for name in (ask, answer))
                q, k, v = (
                    heads(project(x))
                    for project, x in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, key))
                )
                tile = finish(attention, math_attention(q, k, v).transpose(1, 2).flatten(2), query)
                tiles.append(tile.unflatten(1, (size[0] // grid[0], size[1] // grid[1])))
        enhanced[ask] = by_view(torch.stack(tiles, dim=1), grid, "tokens", cut, inverse=True)
    return fuse_and_read(dem, enhanced["local"], enhanced["global"], grid)


Attend = Callable[[Tensor, Tensor, Tensor, Grid, str], Tensor]


def dem_batched(dem: nn.Module, local: Tensor, stride: Tensor, grid: Grid, attend: Attend) -> Tensor:
    """All tokens projected at once; ``attend`` gets projected maps (B, H, W, heads, e), the grid and the cut."""
    maps, attention, enhanced = rasters(local, stride, grid), dem.attentions[0], {}
    for ask, answer in (("local", "global"), ("global", "local")):
        q, k, v = (
            project(maps[name]).unflatten(-1, (attention.num_heads, -1))
            for project, name in ((attention.q_proj, ask), (attention.k_proj, answer), (attention.v_proj, answer))
        )
        attended = attend(q, k, v, grid, CUT_OF_QUERY[dem.pairing][ask]).flatten(-2)
        enhanced[ask] = finish(attention, attended, maps[ask])
    return fuse_and_read(dem, enhanced["local"], enhanced["global"], grid)


def tiles_as_batch(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cut: str) -> Tensor:
    """View, permute, one SDPA over all tiles of both batch dimensions, permute back."""
    heads, (h, w) = q.shape[3], (q.shape[1] // grid[0], q.shape[2] // grid[1])

    def tiles(x: Tensor) -> Tensor:
        cut_up = by_view(x.flatten(3), grid, "tokens", cut)
        return cut_up.flatten(0, 1).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)

    attended = sdpa(tiles(q), tiles(k), tiles(v)).transpose(1, 2).flatten(2)
    by_tile = attended.unflatten(1, (h, w)).unflatten(0, (q.shape[0], -1))
    return by_view(by_tile, grid, "tokens", cut, inverse=True).unflatten(-1, (heads, -1))


@lru_cache
def _flex(per_tile: int, length: int, device: str, compiler: str) -> tuple[Callable[..., Tensor], Any]:
    """The compiled attention and the mask of a size: made once, as a user would."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def same_tile(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i // per_tile == j // per_tile

    block = 64 if device == "cpu" else 128  # 64 divides 576 tokens a tile; the blocks of a GPU's kernel are larger
    mask = create_block_mask(same_tile, None, None, length, length, device, BLOCK_SIZE=block)
    return compiled(flex_attention, compiler), mask


def flex(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, cut: str, *, backend: str | None = None, compiler: str = "inductor"
) -> Tensor:
    """FlexAttention on tokens in the order of the tiles, masked to the tile; ``backend`` "FLASH" needs flash-attn 4."""
    heads, per_tile = q.shape[3], (q.shape[1] // grid[0]) * (q.shape[2] // grid[1])
    length = per_tile * grid[0] * grid[1]

    def ordered(x: Tensor) -> Tensor:
        tiles = by_view(x.flatten(3), grid, "tokens", cut)
        return tiles.reshape(x.shape[0], length, heads, -1).transpose(1, 2)

    attend, mask = _flex(per_tile, length, q.device.type, compiler)
    options = {} if backend is None else {"kernel_options": {"BACKEND": backend}}
    attended = attend(ordered(q), ordered(k), ordered(v), block_mask=mask, **options).transpose(1, 2).flatten(2)
    tile = (q.shape[1] // grid[0], q.shape[2] // grid[1])
    by_tile = attended.unflatten(1, (grid[0] * grid[1], *tile))
    return by_view(by_tile, grid, "tokens", cut, inverse=True).unflatten(-1, (heads, -1))


@lru_cache
def _starts(tiles: int, per_tile: int, device: str) -> Tensor:
    """Where each tile begins among all tokens, and their end: made once, for a CUDA graph copies nothing."""
    return torch.arange(0, (tiles + 1) * per_tile, per_tile, dtype=torch.int32, device=device)


def varlen(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cut: str) -> Tensor:
    """Torch's attention of sequences of any lengths: every tile is one."""
    attend = need("torch.nn.attention.varlen").varlen_attn
    heads, (h, w) = q.shape[3], (q.shape[1] // grid[0], q.shape[2] // grid[1])

    def packed(x: Tensor) -> Tensor:
        return by_view(x.flatten(3), grid, "tokens", cut).flatten(0, 3).unflatten(-1, (heads, -1))

    starts = _starts(q.shape[0] * grid[0] * grid[1], h * w, q.device.type)
    attended = attend(packed(q), packed(k), packed(v), starts, starts, h * w, h * w).flatten(1)
    by_tile = attended.unflatten(0, (q.shape[0], grid[0] * grid[1], h, w))
    return by_view(by_tile, grid, "tokens", cut, inverse=True).unflatten(-1, (heads, -1))


def natten(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cut: str) -> Tensor:
    """NATTEN: blocked attention is a stride of one window, tiles by strides are a dilation."""
    tile = (q.shape[1] // grid[0], q.shape[2] // grid[1])
    window = {"stride": tile} if cut == "local" else {"dilation": grid}
    return need("natten").na2d(q.contiguous(), k.contiguous(), v.contiguous(), kernel_size=tile, **window)


def everywhere(q: Tensor, k: Tensor, v: Tensor, grid: Grid, cut: str, attention: Callable[..., Tensor]) -> Tensor:
    """Direct cross-attention: every query asks the whole map. Another function, the one that tiles stand in for."""
    flat = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    return attention(*flat).transpose(1, 2).unflatten(1, q.shape[1:3])


# --- The vision prefix -----------------------------------------------------------------------------------------------


def sub_images(pixels: Tensor, grid: Grid, tile: Grid) -> list[Tensor]:
    """All 2 rows cols + 1 sub-images: local, strides, low resolution, interpolated as the released model does it."""
    canvas = (grid[0] * tile[0], grid[1] * tile[1])

    def resized(size: Grid) -> Tensor:
        return F.interpolate(pixels.float(), size, mode="bicubic", align_corners=False).to(pixels.dtype)

    high = pixels if tuple(pixels.shape[2:]) == canvas else resized(canvas)
    cuts = [by_slices(high, grid, "images", cut).unbind(1) for cut in ("local", "global")]
    return [*cuts[0], *cuts[1], resized(tile)]


def all_layers(tower: nn.Module, images: Tensor) -> Tensor:
    """hidden_states[-2] without the class token, by running the whole tower. (T, 3, h, w) -> (T, h', w', D)"""
    tokens = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


def prefix(
    tower: nn.Module, dem: nn.Module, projector: nn.Module, pixels: Tensor, grid: Grid, *, one_batch: bool
) -> Tensor:
    """Every sub-image through every layer, one by one or all at once; DEM tile by tile; mean; projector."""
    side = tower.config.image_size
    views = sub_images(pixels, grid, (side, side))
    with torch.no_grad():
        if one_batch:
            features = all_layers(tower, torch.cat(views)).unflatten(0, (len(views), -1)).transpose(0, 1)
        else:
            features = torch.stack([all_layers(tower, view) for view in views], dim=1)
    n = grid[0] * grid[1]
    enhanced = dem_per_tile(dem, features[:, :n], features[:, n : 2 * n], grid)
    return projector(((features[:, -1] + enhanced) / 2).flatten(1, 2))


# --- Image preprocessing ---------------------------------------------------------------------------------------------


def preprocess(photo: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Resize (3, H, W) bytes into a square, pad it with the mean colour, scale, normalise, with torchvision."""
    tv = need("torchvision.transforms.v2.functional")
    most = max(photo.shape[-2:])
    height, width = (round(side * length / most) for length in photo.shape[-2:])
    small = tv.resize(photo, [height, width], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    fill = [int(255 * value) for value in mean]
    square = tv.pad(small, [left, top, side - width - left, side - height - top], fill=fill)
    return tv.normalize(square.float() / 255, list(mean), list(std))
