"""Dual-perspective vision tiling for PyTorch: local blocks and global strides, enhanced by each other.

Heights come before widths, rows before columns, everywhere.

Names are loaded when they are first asked for, torch with them: `import dualview` and `dualview --help` cost nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualview import testing
    from dualview.blending import blend_tiles
    from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles
    from dualview.embedded import load_embedded
    from dualview.explain import Explanation, explain
    from dualview.geometry import TileGrid, choose_grid
    from dualview.images import load_image
    from dualview.kernels.dispatch import use_backend
    from dualview.large.predict import predict_tiled
    from dualview.large.reader import TileReader
    from dualview.large.writer import TileWriter
    from dualview.models.adapter.attach import attach, attached, detach
    from dualview.models.adapter.files import load_adapter, save_adapter
    from dualview.models.adapter.processors import adapt_processor
    from dualview.models.dual_view_encoder import DualViewEncoder
    from dualview.models.encoders import HfEncoder, OpenClipEncoder, TimmEncoder
    from dualview.ops.direct_readout import DirectReadout
    from dualview.ops.dual_crop import DualPerspectiveCrop
    from dualview.ops.enhance import DualPerspectiveEnhance, EnhancedMaps
    from dualview.ops.functional import (
        global_stride_crop,
        local_crop,
        low_pass,
        read_out,
        recombine,
        tile_attention,
    )
    from dualview.ops.fusion import (
        AdditionFusion,
        BottleneckConcatFusion,
        Conv3x3Fusion,
        LinearConcatFusion,
        MaxPoolFusion,
        MultiplicationFusion,
        WeightedAdditionFusion,
    )
    from dualview.ops.normalized_crop import NormalizedTiles, normalized_crop
    from dualview.ops.released_weights import LoadReport
    from dualview.ops.tile_attention import TileAttention
    from dualview.ops.tile_batch import TileBatch
    from dualview.ops.tiling import GlobalStrideCrop, LocalCrop, SubfeatureRecombine
    from dualview.switches import full_computation

__version__ = "0.1.0"

_HOMES = {
    "blending": "blend_tiles",
    "embedded": "load_embedded",
    "explain": "Explanation explain",
    "geometry": "TileGrid choose_grid",
    "images": "load_image",
    "kernels.dispatch": "use_backend",
    "large.predict": "predict_tiled",
    "large.reader": "TileReader",
    "large.writer": "TileWriter",
    "models.adapter.attach": "attach attached detach",
    "models.adapter.files": "load_adapter save_adapter",
    "models.adapter.processors": "adapt_processor",
    "models.dual_view_encoder": "DualViewEncoder",
    "models.encoders": "HfEncoder OpenClipEncoder TimmEncoder",
    "ops.direct_readout": "DirectReadout",
    "ops.dual_crop": "DualPerspectiveCrop",
    "dual_tiles": "DualPerspectiveTileBatch DualPerspectiveTiles",
    "ops.enhance": "DualPerspectiveEnhance EnhancedMaps",
    "ops.functional": "global_stride_crop local_crop low_pass read_out recombine tile_attention",
    "ops.fusion": (
        "AdditionFusion BottleneckConcatFusion Conv3x3Fusion LinearConcatFusion MaxPoolFusion MultiplicationFusion "
        "WeightedAdditionFusion"
    ),
    "ops.normalized_crop": "NormalizedTiles normalized_crop",
    "ops.released_weights": "LoadReport",
    "ops.tile_attention": "TileAttention",
    "ops.tile_batch": "TileBatch",
    "ops.tiling": "GlobalStrideCrop LocalCrop SubfeatureRecombine",
    "switches": "full_computation",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = ("kernels", "models", "ops", "testing")

__all__ = [
    "AdditionFusion",
    "BottleneckConcatFusion",
    "Conv3x3Fusion",
    "DirectReadout",
    "DualPerspectiveCrop",
    "DualPerspectiveEnhance",
    "DualPerspectiveTileBatch",
    "DualPerspectiveTiles",
    "DualViewEncoder",
    "EnhancedMaps",
    "Explanation",
    "GlobalStrideCrop",
    "HfEncoder",
    "LinearConcatFusion",
    "LoadReport",
    "LocalCrop",
    "MaxPoolFusion",
    "MultiplicationFusion",
    "NormalizedTiles",
    "OpenClipEncoder",
    "SubfeatureRecombine",
    "TileAttention",
    "TileBatch",
    "TileGrid",
    "TileReader",
    "TileWriter",
    "TimmEncoder",
    "WeightedAdditionFusion",
    "__version__",
    "adapt_processor",
    "attach",
    "attached",
    "blend_tiles",
    "choose_grid",
    "detach",
    "explain",
    "full_computation",
    "global_stride_crop",
    "load_adapter",
    "load_embedded",
    "load_image",
    "local_crop",
    "low_pass",
    "normalized_crop",
    "predict_tiled",
    "read_out",
    "recombine",
    "save_adapter",
    "testing",
    "tile_attention",
    "use_backend",
]


class _Package(ModuleType):
    """`dualview.explain` is the function, also once the file of that name is imported, which would take its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "explain" and isinstance(value, ModuleType):
            value = value.explain
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(f"dualview.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"dualview.{name}")
    where = f": from dualview.models import {name}" if name.startswith("InfLlava") else ""
    raise AttributeError(f"module 'dualview' has no attribute {name!r}{where}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
