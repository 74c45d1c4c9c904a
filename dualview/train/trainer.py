"""transformers' Trainer, with what INF-LLaVA's stages need of it: order, frozen parts at rest, whole checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from dualview.arguments import check_instance
from dualview.train.checkpoints import clear, note_files, prune, publish, staging
from dualview.train.collator import Collator
from dualview.train.dataset import LlavaDataset
from dualview.train.logs import Progress
from dualview.train.sampler import EpochSampler, TellEpoch


class DualViewTrainer(Trainer):
    """Trains an INF-LLaVA on the rows of a `LlavaDataset`.

    What differs from transformers' Trainer: the order of rows depends on seed and epoch alone, and rows of about one
    length come together without any being read; the vision tower stays in eval mode, so that its batch norms and
    dropout are those of inference; a checkpoint gets its name when it is complete.

    Args:
        model: An `InfLlavaForConditionalGeneration`, frozen by [`freeze`][dualview.train.freeze]; or peft's of one.
        args: Training arguments, as [`training_arguments`][dualview.train.training_arguments] makes them.
        train_dataset: The rows.
        group_by_length: Whether rows of a step are of about one length, with or without an image.
        save_total_limit: Checkpoints that are kept.
        **kwargs: As for transformers' Trainer.

    Raises:
        TypeError: The dataset is another.
        ValueError: Sharding is asked for, and accelerate would not do it; or one process sees several GPUs, among which
            transformers would split rows and images without regard to which belong together.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: LlavaDataset,
        *,
        group_by_length: bool = False,
        save_total_limit: int = 2,
        **kwargs: Any,
    ) -> None:
        check_instance(train_dataset, "train_dataset", LlavaDataset, "a LlavaDataset")
        check_gpus(args)
        self._in_staging = False
        self.progress: Progress | None = None
        self.keep = save_total_limit
        self.group_by_length = group_by_length
        kwargs = {"data_collator": Collator(train_dataset.processor.tokenizer.pad_token_id), **kwargs}
        super().__init__(model, args, train_dataset=train_dataset, processing_class=train_dataset.processor, **kwargs)
        if args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"arguments.fsdp={args.fsdp}: accelerate shards among several GPUs only, and there are none here; it "
                "would train without sharding. Omit it, or start the processes with torchrun on GPUs."
            )
        self.order = EpochSampler(
            len(train_dataset),
            args.train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1),
            args.seed,
            train_dataset.lengths() if group_by_length else None,
        )
        self.add_callback(TellEpoch(self.order))
        if self.pop_callback(ProgressCallback) is not None:  # there is none where bars are switched off
            self.progress = Progress()
            self.add_callback(self.progress)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the vision tower in eval mode, which ``model.train()`` has just ended."""
        self.accelerator.unwrap_model(model).get_encoder(modality="image").eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(staging(Path(folder))) if self._in_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        if self.args.should_save:
            clear(folder)
        self.accelerator.wait_for_everyone()
        self._in_staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._in_staging = False
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            note_files(staging(folder) / name)
            publish(staging(folder) / name, folder / name)
            prune(folder, self.keep)
        self.accelerator.wait_for_everyone()

    def save_result(self, folder: Path, source: Path) -> None:
        """Write model and processor into a folder, which appears when it is complete. All processes call this.

        Low-rank matrices are merged into the weights. Weights have the type that those of ``source`` have.

        Args:
            folder: It must not exist.
            source: Directory of the model that the training began with.
        """
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_fsdp_enabled and plugin is not None:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        staged = staging(folder.parent) / folder.name
        if self.args.should_save:
            clear(folder.parent)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staged))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _finish(staged, source)
            self.processing_class.save_pretrained(staged)
            publish(staged, folder)
            clear(folder.parent)
        self.accelerator.wait_for_everyone()


def check_gpus(args: TrainingArguments) -> None:
    """Raise a ValueError where transformers would split rows and images among several GPUs of this process."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one for each, torchrun --nproc-per-node {args.n_gpu} -m "
            "dualview train CONFIG.yaml, or show it a single one by CUDA_VISIBLE_DEVICES=0."
        )


def _finish(saved: Path, source: Path) -> None:
    """Make a model of the source's type of what transformers has saved: weights of float32, or an adapter."""
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration as Model

    (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use with the model
    kind = Model.from_pretrained(source, dtype="auto").dtype
    if (saved / "adapter_config.json").is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(Model.from_pretrained(source, dtype=torch.float32), saved).merge_and_unload()
    elif kind == torch.float32:
        return
    else:
        model = Model.from_pretrained(saved, dtype=torch.float32)
    shutil.rmtree(saved)
    model.to(kind).save_pretrained(saved)
