"""Dual-perspective vision tiling for PyTorch: local blocks and global strides, enhanced by each other.

Heights come before widths, rows before columns, everywhere.
"""

from dualview import testing
from dualview.explain import Explanation, explain
from dualview.geometry import TileGrid, choose_grid
from dualview.kernels.dispatch import use_backend
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.models.encoders import HfEncoder, OpenClipEncoder, TimmEncoder
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.dual_crop import DualPerspectiveCrop, DualPerspectiveTileBatch, DualPerspectiveTiles
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
from dualview.ops.plan import full_computation
from dualview.ops.released_weights import LoadReport
from dualview.ops.tile_attention import TileAttention
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import GlobalStrideCrop, LocalCrop, SubfeatureRecombine

__version__ = "0.1.0"

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
    "TimmEncoder",
    "WeightedAdditionFusion",
    "__version__",
    "choose_grid",
    "explain",
    "full_computation",
    "global_stride_crop",
    "local_crop",
    "low_pass",
    "normalized_crop",
    "read_out",
    "recombine",
    "testing",
    "tile_attention",
    "use_backend",
]
