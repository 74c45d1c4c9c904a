"""Larger images at as many tokens: adapted processors beside the ones they were made of, and the models behind them."""

import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import dualview as dv
from dualview.interpolation import bicubic
from tests.attach.hosts import IMAGE, PINPOINTS, built
from tests.attach.matrix import gradients, logits, open_gates, ours
from tests.checks import refuses

SIDE = {"height": 16, "width": 16}
SHORTEST = {"size": {"shortest_edge": 16}, "crop_size": SIDE}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "see", "<video>", "<unk>", "<img>", "</img>", "\n", "<image>"]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    special = {"image_token": "<image>", "boi_token": "<img>", "eoi_token": "</img>", "video_token": "<video>"}
    special |= {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<img>", "</img>", "<video>"],
        extra_special_tokens=special,
    )


def processor_of(family: str, pil: bool = False) -> object:
    def images(name: str, **options: object) -> object:
        return getattr(transformers, f"{name}Pil" if pil else name)(**options)

    T, words = transformers, tokenizer()  # noqa: N806
    match family:
        case "llava":
            return T.LlavaProcessor(
                images("CLIPImageProcessor", **SHORTEST),
                words,
                patch_size=4,
                num_additional_image_tokens=1,
                vision_feature_select_strategy="default",
            )
        case "llava_next":
            return T.LlavaNextProcessor(
                images("LlavaNextImageProcessor", **SHORTEST, image_grid_pinpoints=PINPOINTS),
                words,
                patch_size=4,
                num_additional_image_tokens=1,
                vision_feature_select_strategy="default",
            )
        case "llava_onevision":
            return T.LlavaOnevisionProcessor(
                images("LlavaOnevisionImageProcessor", size=SIDE, image_grid_pinpoints=PINPOINTS),
                words,
                T.LlavaOnevisionVideoProcessor(size=SIDE),
                num_image_tokens=16,
                vision_feature_select_strategy="full",
            )
        case "paligemma":
            return T.PaliGemmaProcessor(images("SiglipImageProcessor", size=SIDE, image_seq_length=16), words)
        case "internvl":
            tiles = images("GotOcr2ImageProcessor", size=SIDE, crop_to_patches=True, min_patches=1, max_patches=6)
            return T.InternVLProcessor(tiles, words, T.InternVLVideoProcessor(size=SIDE), image_seq_length=4)
        case "gemma3":
            return T.Gemma3Processor(images("Gemma3ImageProcessor", size=SIDE), words, image_seq_length=4)
    raise KeyError(family)


FAMILIES = ("gemma3", "internvl", "llava", "llava_next", "llava_onevision", "paligemma")
ANY_GRID = ("gemma3", "internvl", "paligemma")


def processed(processor: object, picture: Tensor) -> dict[str, Tensor]:
    text = "<img>" if type(processor).__name__ == "Gemma3Processor" else "<image>"
    return dict(processor(images=[picture], text=[f"{text} see"], return_tensors="pt"))


def picture(height: int, width: int) -> Tensor:
    """Smooth, so that one way to reduce it differs little from another."""
    noise = torch.rand(1, 3, 4, 4)
    smooth = nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=False)
    return (smooth[0].clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("pil", [False, True], ids=["torchvision", "pillow"])
@pytest.mark.parametrize("family", FAMILIES)
@given(height=st.integers(8, 90), width=st.integers(8, 90), n=st.integers(2, 3))
@settings(max_examples=8)
def test_as_many_tokens_and_tiles_as_before(family, pil, height, width, n):
    before = processor_of(family, pil)
    adapted = dv.adapt_processor(before, (n, n))
    image = picture(height, width)
    plain, large = processed(before, image), processed(adapted, image)
    assert set(plain) == set(large)
    for name, value in plain.items():
        if name == "pixel_values":
            *batch, rows, cols = value.shape
            assert large[name].shape == (*batch, n * rows, n * cols)
        else:
            assert torch.equal(large[name], value), name
    sizes = [(height, width)]
    assert adapted._get_num_multimodal_tokens(sizes) == before._get_num_multimodal_tokens(sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reduced_image_is_nearly_the_one_of_before(family):
    before = processor_of(family)
    image = picture(64, 64)
    plain, large = (processed(p, image)["pixel_values"].flatten(0, -4) for p in (before, dv.adapt_processor(before)))
    assert (bicubic(large, plain.shape[-2:]) - plain).abs().max() < 0.25  # of values from about -2 to 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_with_large_images(family):
    model = built(family)
    before = processor_of(family)
    grid = (2, 3) if family in ANY_GRID else (2, 2)
    image = picture(40, 70)
    stock, inputs = processed(before, image), processed(dv.adapt_processor(before, grid), image)
    *batch, channels, height, width = stock["pixel_values"].shape
    small = bicubic(inputs["pixel_values"].reshape(-1, channels, grid[0] * height, grid[1] * width), (height, width))
    plain = logits(model, {**inputs, "pixel_values": small.reshape(*batch, channels, height, width)})
    dv.attach(model, grid, "hires")
    at_start = logits(model, inputs)
    assert torch.equal(at_start, plain)
    open_gates(model)
    assert not torch.allclose(logits(model, inputs), at_start, rtol=1e-3)
    found = gradients(model, inputs)
    assert all(found[name].abs().sum() > 0 for name in ours(model))
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    with refuses("16 x 16", "adapt_processor", "upsample"):
        logits(model, stock)


def test_the_views_are_cut_from_the_large_image():
    model = built("paligemma")
    dv.attach(model, (2, 2), "hires", dem={"preset": "paper"})
    large = torch.randn(1, 3, 32, 32)
    tower, seen = model.get_encoder(modality="image"), []
    tower.embeddings.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    with torch.no_grad():
        tower(large)
    base, *views = seen
    assert torch.equal(base, bicubic(large, (16, 16)))
    expected = [*dv.local_crop(large, (2, 2))[0], *dv.global_stride_crop(large, (2, 2))[0]]
    assert torch.equal(torch.cat(views), torch.stack(expected))


def test_what_is_saved_is_the_processor_of_before(tmp_path):
    before = processor_of("llava")
    adapted = dv.adapt_processor(before, (3, 3))
    assert (before.patch_size, adapted.patch_size) == (4, 12)
    assert dict(before.image_processor.size) == {"shortest_edge": 16}
    adapted.save_pretrained(tmp_path)
    again = transformers.LlavaProcessor.from_pretrained(tmp_path)
    assert again.patch_size == 4
    assert dict(again.image_processor.crop_size) == SIDE
    image = picture(20, 30)
    unpickled = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(processed(unpickled, image)["pixel_values"], processed(adapted, image)["pixel_values"])


def test_what_is_refused():
    llava = processor_of("llava")
    with refuses("2x3", "equal", "(2, 2)"):
        dv.adapt_processor(llava, (2, 3))
    with refuses("adapted", "already"):
        dv.adapt_processor(dv.adapt_processor(llava))
    llava.image_processor = transformers.PixtralImageProcessor()
    with refuses("PixtralImageProcessor", "upsample"):
        dv.adapt_processor(llava)
    with refuses("Qwen2VLImageProcessor", "LlavaNextProcessor"):
        dv.adapt_processor(transformers.Qwen2VLImageProcessor())
    assert tokenizer().convert_tokens_to_ids("<image>") == IMAGE
