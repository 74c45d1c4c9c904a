"""A small INF-LLaVA that comes with the package, and the low-resolution model that it is compared with.

Importing this loads nothing: the weights are read when they are asked for. README.md beside this file is their card.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from dualview.arguments import check_choice

if TYPE_CHECKING:
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration, InfLlavaProcessor

__all__ = ["load_embedded"]

EmbeddedView: TypeAlias = Literal["dual", "low-res"]

KNOWN = (
    "What is in B5?",
    "What is right of the star?",
    "Where is the star?",
    "What do D8, E8 and F8 spell?",
    "What is the large character?",
    "Which is larger, B8 or F4?",
    "Is there a star?",
)
"""One question of every kind that the models were trained on; README.md says which they answer well."""


def load_embedded(view: EmbeddedView = "dual") -> tuple[InfLlavaForConditionalGeneration, InfLlavaProcessor]:
    """The small INF-LLaVA that comes with the package, and its processor, on the CPU in float32.

    It was trained to answer questions about pages of 8 x 8 cells ("What is in B5?") and nothing else. Nothing is
    fetched: the files are in the folder `dualview/embedded` of the installation, one folder for each model as
    ``save_pretrained`` writes it.

    Args:
        view: "dual" for the model with tiles and an enhancement module, "low-res" for the model of the same size and
            training that sees the picture at the size of one tile, to compare with.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        ValueError: There is no such view.
        ImportError: transformers, torchvision or pillow is not installed.
        FileNotFoundError: The installation lacks the weights.

    Example:
        >>> import torch
        >>> import dualview as dv
        >>> model, processor = dv.load_embedded()
        >>> chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in B5?"}]}]
        >>> text = processor.apply_chat_template(chat, add_generation_prompt=True)
        >>> picture = torch.full((3, 336, 336), 200, dtype=torch.uint8)
        >>> inputs = processor(images=picture, text=text, return_tensors="pt")
        >>> ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        >>> isinstance(processor.decode(ids[0], skip_special_tokens=True), str)
        True
    """
    folder = embedded_folder(view)
    import torch

    from dualview.models import InfLlavaForConditionalGeneration, InfLlavaProcessor

    model = InfLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), InfLlavaProcessor.from_pretrained(folder)


def measured() -> dict[str, Any]:
    """What was measured of both models: how often they are right, and how long they were trained."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))
    return found


def learnt() -> list[str]:
    """The kinds of questions at which the dual model is better than who always gives the most frequent right answer."""
    tasks = measured()["tasks"]
    weak = {name.split(",")[0] for name in weak_tasks(tasks)}
    return [kind for kind in dict.fromkeys(name.split(",")[0] for name in tasks) if kind not in weak]


def weak_tasks(tasks: dict[str, Any]) -> list[str]:
    """Of what was measured, that of which the dual model's interval does not lie above the most frequent answer."""
    return [name for name, task in tasks.items() if task["dual"]["interval"][0] <= task["constant"]]


def embedded_folder(view: EmbeddedView) -> Path:
    """The folder of one of the models.

    Raises:
        ValueError: There is no such view.
        FileNotFoundError: The installation lacks the weights.
    """
    folder = Path(__file__).with_name(str(check_choice(view, "view", get_args(EmbeddedView))))
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            errno.ENOENT, "the weights that come with the package are not there: install it again", str(folder)
        )
    return folder
