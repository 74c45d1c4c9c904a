"""What a wheel must do in an environment that has the required dependencies alone. Run outside the checkout."""

import importlib.util
import sys
from pathlib import Path

import torch

import dualview as dv

OPTIONAL = ("transformers", "timm", "open_clip", "torchvision", "PIL", "matplotlib")

assert Path(__file__).parents[1] not in Path(dv.__file__).parents, f"this is the checkout, not the wheel: {dv.__file__}"
assert Path(dv.__file__).with_name("py.typed").exists()
for name in OPTIONAL:
    assert importlib.util.find_spec(name) is None, f"{name} is installed: this environment proves nothing"

pixels = torch.randn(2, 3, 28, 63)
for perspective, crop in (("local", dv.local_crop), ("global", dv.global_stride_crop)):
    tiles = crop(pixels, (2, 3))
    assert tiles.shape == (2, 6, 3, 14, 21)
    assert torch.equal(dv.recombine(tiles, (2, 3), perspective), pixels)
dv.testing.assert_tile_order(dv.LocalCrop((2, 3)), (2, 3), (4, 5))
dcm = dv.DualPerspectiveCrop(tile=(14, 21), remainder="pad")
assert torch.equal(dcm.inverse(dcm(pixels[..., :50])), pixels[..., :50])


def encoder(tiles: torch.Tensor) -> torch.Tensor:
    """Mean colours of patches of 7 x 7, repeated to a width of 48."""
    return torch.nn.functional.avg_pool2d(tiles, 7).movedim(1, -1).repeat(1, 1, 1, 16)


for dem in (dv.DualPerspectiveEnhance.paper(48), dv.DualPerspectiveEnhance.released(48)):
    tokens = dv.DualViewEncoder(encoder, dem, tile=(14, 21), grid=(2, 3))(pixels)
    assert tokens.shape == (2, 2, 3, 48)
    tokens.sum().backward()
    assert all(weight.grad is not None for weight in dem.parameters())
print(dv.explain(dem, grid=(2, 3)))

import dualview.models  # noqa: E402 - the names above must not need it

for name in dualview.models.__all__:
    if name.startswith("InfLlava"):
        try:
            getattr(dualview.models, name)
        except ImportError as error:
            assert 'pip install -e ".[hf]"' in str(error), error
        else:
            raise AssertionError(f"dualview.models.{name} was found without transformers")

for view in ("dual", "low-res"):
    assert (Path(dv.__file__).parent / "embedded" / view / "model.safetensors").is_file(), view
try:
    dv.load_embedded()
except ImportError as error:
    assert 'pip install -e ".[hf]"' in str(error), error
else:
    raise AssertionError("an INF-LLaVA was loaded without transformers")

assert not sys.modules.keys() & set(OPTIONAL)
print(f"smoke test passed: dualview {dv.__version__}, torch {torch.__version__}")
