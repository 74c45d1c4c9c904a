"""Attach the enhancement module to a multimodal model, and train it with transformers' Trainer or with TRL.

What you learn: what `attach` changes is a child of the vision tower, so the trainers of other libraries train it as any
module, here beside the projector and LoRA on the language model. Details that the tower does not see are read from
larger images.

The task: name the digit in a picture of 56 x 56 pixels. A small LLaVA, trained from nothing, reads digits of 14 pixels.
Its tower sees pictures reduced to 28 x 28 pixels, so that of digits of 7 pixels hardly anything is left.

    python examples/attach_to_llava.py           # transformers' Trainer
    python examples/attach_to_llava.py --trl     # SFTTrainer of TRL, pip install trl
"""

import copy
import random
import sys
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    logging,
)

import dualview as dv

SIDE, TILE, PATCH = 56, 28, 7
WORDS = ["<pad>", "<s>", "</s>", "<image>", "digit", *map(str, range(10))]
TRAINING: dict[str, Any] = {
    "output_dir": "out", "per_device_train_batch_size": 32, "use_cpu": True, "remove_unused_columns": False,
    "save_strategy": "no", "logging_steps": 10, "report_to": [], "disable_tqdm": True, "seed": 0,
}  # fmt: skip


def small_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model of random weights, and its processor."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<image>"]
    )
    images = CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
    processor = LlavaProcessor(
        images, words, patch_size=PATCH, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=TILE, patch_size=PATCH, initializer_range=0.1, initializer_factor=5.0)
    text = LlamaConfig(
        **sizes, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config), processor


def examples(digit_side: int, count: int) -> list[dict[str, Any]]:
    """Pictures with a digit each, somewhere; as prompts and completions, which is what TRL takes."""
    font, found = ImageFont.load_default(112), []
    for digit in [str(i % 10) for i in range(count)]:
        large = Image.new("L", (112, 112))
        ImageDraw.Draw(large).text((56, 56), digit, font=font, fill=255, anchor="mm")
        picture, cells = Image.new("L", (SIDE, SIDE)), SIDE // digit_side
        corner = digit_side * random.randrange(cells), digit_side * random.randrange(cells)
        picture.paste(large.resize((digit_side, digit_side), Image.Resampling.BOX), corner)
        found.append({"images": [picture.convert("RGB")], "prompt": "<image> digit", "completion": digit})
    return found


def collate(batch: list[dict[str, Any]], processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Inputs, and labels that count the answer alone."""
    texts = [f"{one['prompt']} {one['completion']}" for one in batch]
    inputs = dict(processor(images=[one["images"] for one in batch], text=texts, return_tensors="pt"))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    return {**inputs, "labels": labels}


def with_trainer(model: Any, data: list[dict[str, Any]], processor: LlavaProcessor, **options: Any) -> Trainer:
    """Train with transformers' Trainer."""
    trainer = Trainer(
        model,
        TrainingArguments(**TRAINING, **options),
        train_dataset=data,
        data_collator=lambda batch: collate(batch, processor),
    )
    trainer.train()
    return trainer


# --8<-- [start:trl]
def with_trl(model: Any, data: list[dict[str, Any]], processor: LlavaProcessor, **options: Any) -> Trainer:
    """Train with TRL, which makes inputs of prompts and completions itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**TRAINING, **options, max_length=None, loss_type="nll")
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(data), processing_class=processor)
    trainer.train()
    return trainer


# --8<-- [end:trl]


def right(model: Any, data: list[dict[str, Any]], processor: LlavaProcessor) -> float:
    """How many of the answers are right, 0 to 1."""
    inputs = collate(data, processor)
    with torch.inference_mode():
        answers = model.eval()(**inputs).logits[:, -2].argmax(-1)
    return (answers == inputs["input_ids"][:, -1]).float().mean().item()


def tuned(host: Any, processor: LlavaProcessor, source: str | None, train: Any) -> tuple[PeftModel, LlavaProcessor]:
    """A copy of the host, trained on small digits: LoRA, the projector and, with a source of pixels, the module."""
    host, kept = copy.deepcopy(host), ["multi_modal_projector"]
    if source is not None:
        dv.attach(host, grid=(2, 2), source=source, dem={"preset": "paper"}, max_tiles_per_pass=1024)
        kept.append("dualview")
    if source == "hires":
        processor = dv.adapt_processor(processor, grid=(2, 2))
    language = r".*language_model.*\.(q_proj|v_proj)"  # the tower has layers of these names, too
    model = get_peft_model(host, LoraConfig(r=4, target_modules=language, modules_to_save=kept))
    trainer = train(model, examples(7, 2000), processor, max_steps=200, learning_rate=1e-2)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{source or 'no module'}, {type(trainer).__name__}: loss {losses[0]:.2f} to {losses[-1]:.2f}")
    for name, weights in model.named_parameters():
        if name.endswith("default.gate"):
            print(f"  the gate: 0 to {weights.abs().mean().item():.2f} on average")
    print(f"  digits of  7 pixels: {right(model, examples(7, 500), processor):.0%} right")
    return model, processor


def main() -> None:
    """Train the small model, then three copies of it on small digits: without the module, and with it."""
    random.seed(0)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    host, processor = small_llava()
    with_trainer(host, examples(14, 2000), processor, max_steps=100, learning_rate=3e-3)
    print("the host, on new pictures")
    for side in (14, 7):
        print(f"  digits of {side:2d} pixels: {right(host, examples(side, 500), processor):.0%} right")
    for source in (None, "upsample", "hires"):
        tuned(host, processor, source, with_trl if "--trl" in sys.argv else with_trainer)


if __name__ == "__main__":
    main()
