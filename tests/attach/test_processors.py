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
from dualview.models.adapter.patches import from_blocks
from tests.attach.hosts import IMAGE, PINPOINTS, built, often
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


@pytest.mark.parametrize("family", often(FAMILIES, "llava", "paligemma"))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_images_in_half_precision(dtype):
    host = built("llava").to(dtype)
    inputs = processed(dv.adapt_processor(processor_of("llava")), picture(40, 70))
    large = inputs["pixel_values"].to(dtype)
    plain = logits(host, {**inputs, "pixel_values": bicubic(large.float(), (16, 16)).to(dtype)})
    assert torch.equal(logits(dv.attach(host, (2, 2), "hires"), {**inputs, "pixel_values": large}), plain)


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


PACKED = ("glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def packed_processor_of(family: str) -> object:
    T, words = transformers, tokenizer()  # noqa: N806
    size = {"size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, "patch_size": 4}
    if family == "glm4v":
        return T.Glm4vProcessor(T.Glm4vImageProcessor(**size), words, T.Glm4vVideoProcessor())
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL"}[family]
    video = T.Qwen3VLVideoProcessor() if family == "qwen3_vl" else T.Qwen2VLVideoProcessor()
    return getattr(T, f"{name}Processor")(T.Qwen2VLImageProcessor(**size), words, video)


def frames(patches: Tensor, rows: int, cols: int) -> Tensor:
    return from_blocks(patches, (1, rows, cols), patch=4, merge=2)[0]


@pytest.mark.parametrize("family", PACKED)
def test_larger_pictures_behind_each(family):
    before = packed_processor_of(family)
    adapted = dv.adapt_processor(before, (2, 3))
    pictures = [picture(40, 70), picture(33, 18)]
    given = {"images": pictures, "text": ["<image> see", "<image>"], "padding": True, "return_tensors": "pt"}
    plain, large = dict(before(**given)), dict(adapted(**given))
    for name in set(plain) - {"pixel_values"}:
        assert torch.equal(plain[name], large[name]), name
    grids = [grid[1:] for grid in plain["image_grid_thw"].tolist()]
    counts = [rows * cols for rows, cols in grids]
    pieces = large["pixel_values"].split([n for count in counts for n in (count, 6 * count)])
    for small, high, grid, stock in zip(
        pieces[::2], pieces[1::2], grids, plain["pixel_values"].split(counts), strict=True
    ):
        assert torch.equal(small, stock)
        reduced = bicubic(frames(high, 2 * grid[0], 3 * grid[1])[None], (4 * grid[0], 4 * grid[1]))[0]
        assert (reduced - frames(stock, *grid)).abs().max() < 0.25
    assert adapted._get_num_multimodal_tokens([(40, 70)]) == before._get_num_multimodal_tokens([(40, 70)])
    again = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(again(**given)["pixel_values"], large["pixel_values"])


@pytest.mark.parametrize("family", often(PACKED, "glm4v", "qwen2_vl"))
@given(height=st.integers(8, 90), width=st.integers(8, 90), n=st.integers(2, 3))
@settings(max_examples=8)
def test_pictures_of_whole_tiles(family, height, width, n):
    adapted = dv.adapt_processor(packed_processor_of(family), (n, n), "native")
    found = dict(adapted(images=[picture(height, width)], text=["<image> see"], return_tensors="pt"))
    ((_, rows, cols),) = found["image_grid_thw"].tolist()
    assert rows % (2 * n) == cols % (2 * n) == 0
    assert 16 * rows * cols <= 64 * 64
    tokens = (found["input_ids"] == IMAGE).sum().item()
    assert [tokens] == adapted._get_num_multimodal_tokens([(height, width)]).num_image_tokens == [rows * cols // 4]


@pytest.mark.parametrize("source", ["hires", "native"])
@pytest.mark.parametrize("family", often(PACKED, "qwen2_5_vl"))
def test_a_packed_host_with_larger_pictures_or_whole_tiles(family, source):
    model = built(family)
    adapted = dv.adapt_processor(packed_processor_of(family), (2, 2), source)
    given = {"images": [picture(40, 70)], "text": ["<image> see"]}
    inputs = dict(adapted(**given, return_tensors="pt", return_mm_token_type_ids=True))
    count = inputs["image_grid_thw"].prod().item()
    small = {**inputs, "pixel_values": inputs["pixel_values"][:count]}
    plain = logits(model, small)
    dv.attach(model, (2, 2), source)
    at_start = logits(model, inputs)
    assert torch.equal(at_start, plain)
    open_gates(model)
    assert not torch.allclose(logits(model, inputs), at_start, rtol=1e-3)
    found = gradients(model, inputs)
    assert all(found[name].abs().sum() > 0 for name in ours(model))
    assert model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2).shape[0] == 2
    if source == "hires":
        with refuses(f"{count} patches", "adapt_processor"):
            logits(model, small)
    model.train()
    words = {"input_ids": torch.tensor([[1, 5, 6]]), "mm_token_type_ids": torch.zeros(1, 3, dtype=torch.long)}
    found = gradients(model, words)
    assert all((found[name] == 0).all() for name in ours(model))


def test_what_is_refused():
    llava = processor_of("llava")
    with refuses("2x3", "equal", "(2, 2)"):
        dv.adapt_processor(llava, (2, 3))
    qwen = packed_processor_of("qwen2_vl")
    with refuses("2x3", "equal", "(2, 2)"):
        dv.adapt_processor(qwen, (2, 3), "native")
    with refuses("LlavaProcessor", "native", "Qwen3VLProcessor"):
        dv.adapt_processor(llava, (2, 2), "native")
    with refuses("upsample", "hires"):
        dv.adapt_processor(llava, (2, 2), "upsample")
    qwen.image_processor = transformers.Qwen2VLImageProcessorPil()
    with refuses("Qwen2VLImageProcessorPil", "Qwen2VLProcessor"):
        dv.adapt_processor(qwen)
    with refuses("adapted", "already"):
        dv.adapt_processor(dv.adapt_processor(llava))
    llava.image_processor = transformers.PixtralImageProcessor()
    with refuses("PixtralImageProcessor", "upsample"):
        dv.adapt_processor(llava)
    with refuses("Qwen2VLImageProcessor", "LlavaNextProcessor"):
        dv.adapt_processor(transformers.Qwen2VLImageProcessor())
    assert tokenizer().convert_tokens_to_ids("<image>") == IMAGE
