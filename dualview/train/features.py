"""Features of the frozen vision tower, on disk: half precision, memory-mapped, one file for each picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dualview.arguments import check_instance, check_mapping, check_path
from dualview.images import ImageError, load_image
from dualview.large.progress import counted
from dualview.outputs import replace_file

VERSION = 1
"""Raised whenever what is stored, or how it is computed, changes."""
SAY_NOTHING = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Fields of a configuration on which no feature depends; the type of the weights is asked of the weights."""


class FeatureCache:
    """What the vision tower makes of pictures, kept from one epoch and one run to the next.

    The key of a picture is the content of its file; the key of the whole is everything that its features depend on: the
    weights and the configuration of the tower, the options of the image processor, the grid and the sub-images that are
    needed. Where one of them is another, nothing is found and all is computed anew.

    Args:
        folder: Where files are kept; those of other keys are left alone.
        model: An `InfLlavaForConditionalGeneration`, whose tower is not trained.
        processor: Its `InfLlavaProcessor`.
        images_kwargs: Arguments of the image processor.

    Raises:
        TypeError: An argument is of another kind.

    Attributes:
        key: The key of the whole.
    """

    def __init__(self, folder: str | Path, model: Any, processor: Any, images_kwargs: dict[str, Any]) -> None:
        from dualview.models.inf_llava import InfLlavaForConditionalGeneration, InfLlavaProcessor

        check_instance(model, "model", InfLlavaForConditionalGeneration, "an InfLlavaForConditionalGeneration")
        check_instance(processor, "processor", InfLlavaProcessor, "an InfLlavaProcessor")
        check_path(folder, "folder")
        self.processor, self.images_kwargs = processor, dict(check_mapping(images_kwargs, "images_kwargs"))
        self.key = _key_of(model, processor, images_kwargs)
        self.folder = Path(folder) / self.key

    def _file_of(self, path: Path) -> Path:
        """Where the features of a picture are, or would be."""
        try:
            key = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror or error}.") from error
        return self.folder / key[:2] / f"{key}.safetensors"

    def fill(self, pictures: Iterable[Path], model: Any, *, shown: bool = False) -> int:
        """Compute what is missing.

        Args:
            pictures: Files; those that cannot be read are left out.
            model: The model of the constructor, on the device to compute on.
            shown: Whether a bar shows how far it has come.

        Returns:
            How many pictures were encoded.

        Raises:
            ValueError: A feature does not fit half precision.
        """
        pictures = list(dict.fromkeys(pictures))
        encoded, was_training = 0, model.training
        model.eval()
        with counted(len(pictures), "encoding pictures", "pictures", shown=shown) as done:
            for path in pictures:
                done(1)
                with suppress(ImageError):  # the row is reported when it is read
                    target = self._file_of(path)
                    if not target.is_file():
                        self._write(target, self._encoded(path, model), path)
                        encoded += 1
        model.train(was_training)
        return encoded

    def _encoded(self, path: Path, model: Any) -> dict[str, Tensor]:
        """Features of a picture, and what else the model has to know of it."""
        made: dict[str, Tensor] = dict(
            self.processor.image_processor([load_image(path)], return_tensors="pt", **self.images_kwargs)
        )
        tower = next(model.get_encoder(modality="image").parameters())
        pixels = made.pop("pixel_values").to(tower.device, tower.dtype)
        grids, (height, width) = made.get("image_grids"), pixels.shape[-2:]
        canvas = (height, width) if grids is None else (height * int(grids[0, 0]), width * int(grids[0, 1]))
        features = model.get_view_features(pixels, grids).to("cpu", torch.float16)
        return {"view_features": features, "image_canvases": torch.tensor([canvas]), **made}

    def _write(self, target: Path, inputs: dict[str, Tensor], path: Path) -> None:
        if not torch.isfinite(inputs["view_features"]).all():
            raise ValueError(f"{path}: a feature of this picture does not fit half precision: train without the cache.")
        target.parent.mkdir(parents=True, exist_ok=True)
        content = save({name: value.contiguous() for name, value in inputs.items()})
        replace_file(target.absolute(), memoryview(content))

    def read(self, paths: Sequence[Path]) -> dict[str, Tensor] | None:
        """Inputs of the model in place of the pixels of some pictures, or None where one of them is not known.

        Shape:
            - view_features: (sub-images of all pictures, h', w', width), of half precision
            - image_canvases, and image_grids, image_sizes where the processor gives them: (pictures, 2)

        Raises:
            ImageError: A picture cannot be read, so that it is not known which one it is.
        """
        files = [self._file_of(path) for path in paths]
        if not all(file.is_file() for file in files):
            return None
        found = [load_file(file) for file in files]  # mapped, not read
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def _key_of(model: Any, processor: Any, images_kwargs: dict[str, Any]) -> str:
    config, tower = model.config, model.get_encoder(modality="image")
    said = {
        "version": VERSION,
        "tower": {k: v for k, v in config.vision_config.to_dict().items() if k not in SAY_NOTHING},
        "layer": config.vision_feature_layer,
        "grid": list(config.grid),
        "low_res": config.low_res,
        "dem": config.dem,
        "processor": processor.image_processor.to_dict(),
        "images_kwargs": images_kwargs,
    }
    found = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
