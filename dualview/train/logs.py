"""What is left of a run to look at: a line for every logged step, and the curve of the loss."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from dualview.outputs import replace_file

LINES, PICTURE = "log.jsonl", "loss.png"


class Progress(ProgressCallback):
    """transformers' bar, with the last loss beside it in place of a line for every step."""

    training_bar: Any

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The last loss."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4g}")

    def close(self) -> None:
        """End the bar's line, where training stopped before its end."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class LossLog(TrainerCallback):
    """Writes ``log.jsonl``, and draws ``loss.png`` at each checkpoint and at the end.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        import matplotlib.figure  # noqa: F401 - where it is missing, that is said now and not at the first checkpoint

        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lines of a run that was killed after its last checkpoint are not those of this one.

        How often to save and to log is what is asked for now; transformers goes on with what the checkpoint says.
        """
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(f"{json.dumps(line)}\n" for line in state.log_history)
            replace_file((self.folder / LINES).absolute(), memoryview(lines.encode()))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One line more."""
        if state.is_world_process_zero and state.log_history:
            with (self.folder / LINES).open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(state.log_history[-1])}\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The curve so far."""
        self._draw(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The whole curve."""
        self._draw(state)

    def _draw(self, state: Any) -> None:
        points = [(line["step"], line["loss"]) for line in state.log_history if "loss" in line]
        if state.is_world_process_zero and points:
            replace_file((self.folder / PICTURE).absolute(), memoryview(drawn_curve(points)))


def drawn_curve(points: list[tuple[int, float]]) -> bytes:
    """A PNG of loss by step: as it was logged, and its running mean."""
    from matplotlib.figure import Figure

    steps, losses = zip(*points, strict=True)
    means: list[float] = []
    for loss in losses:
        means.append(loss if not means else 0.95 * means[-1] + 0.05 * loss)
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="loss")
    axes.plot(steps, means, color="tab:blue", label="running mean")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
