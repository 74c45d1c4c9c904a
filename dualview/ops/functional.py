"""The functions of this package, without the modules around them."""

from dualview.ops.low_pass import low_pass
from dualview.ops.readout import read_out
from dualview.ops.tile_attention import tile_attention
from dualview.ops.tiling import crop, global_stride_crop, local_crop, recombine

__all__ = ["crop", "global_stride_crop", "local_crop", "low_pass", "read_out", "recombine", "tile_attention"]
