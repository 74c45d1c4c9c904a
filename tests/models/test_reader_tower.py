"""The small vision tower: any tile, any layer, the library's short cut, files, half precision."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

import dualview as dv
from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration
from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel
from dualview.models.reader.modeling_reader import FrozenBatchNorm, waves
from tests.checks import refuses
from tests.tiny import IMAGE, TINY_LLM, prompt

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "stem_widths": (8, 8, 8)}


def small_tower(**changes):
    torch.manual_seed(0)
    return ReaderVisionModel(ReaderVisionConfig(**(SMALL | changes))).eval()


def test_the_default_has_the_size_that_is_said():
    assert sum(p.numel() for p in ReaderVisionModel(ReaderVisionConfig()).parameters()) == 1_264_792


@pytest.mark.parametrize("size", [(14, 14), (56, 84), (112, 112), (126, 70)])
def test_tiles_of_any_size(size):
    out = small_tower()(torch.rand(2, 3, *size), output_hidden_states=True)
    tokens = (size[0] // 14) * (size[1] // 14)
    assert out.last_hidden_state.shape == (2, tokens, 32)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, tokens, 32)] * 3
    assert out.pooler_output.shape == (2, 32)


@pytest.mark.parametrize("size", [(112, 100), (13, 14)])
def test_other_tiles_are_refused(size):
    with refuses(f"{size[0]} x {size[1]}", "multiples"):
        small_tower()(torch.rand(1, 3, *size))


@pytest.mark.parametrize("layer", [0, 1, -1, -2, None])
def test_the_short_cut_gives_what_the_whole_tower_gives(layer):
    tower, pixels = small_tower(), torch.rand(3, 3, 56, 84)
    encoder = dv.HfEncoder(tower, layer)
    out = tower(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if layer is None else out.hidden_states[layer]
    assert torch.equal(encoder(pixels).flatten(1, 2), expected)
    assert encoder.layer_plan().run == {0: 0, 1: 1, -1: 2, -2: 1, None: 2}[layer]
    with dv.full_computation():
        assert torch.equal(encoder(pixels).flatten(1, 2), expected)


def test_a_tile_does_not_depend_on_the_others_in_training_mode_either():
    tower, pixels = small_tower().train(), torch.rand(4, 3, 56, 56)
    for module in tower.modules():
        if isinstance(module, FrozenBatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    alone = torch.cat([tower(tile[None]).last_hidden_state for tile in pixels])
    torch.testing.assert_close(tower(pixels).last_hidden_state, alone)
    assert all(torch.equal(before[name], value) for name, value in tower.state_dict().items())


def test_places_are_fractions_of_the_tile():
    like = torch.empty(0)
    small, large = waves(2, 3, like), waves(6, 9, like)
    torch.testing.assert_close(large[1::3, 1::3], small)
    flat = small.flatten(0, 1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_saved_and_loaded_by_the_auto_classes(tmp_path):
    tower, pixels = small_tower(), torch.rand(1, 3, 28, 42)
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is ReaderVisionModel
    assert type(AutoConfig.from_pretrained(tmp_path)) is ReaderVisionConfig
    assert torch.equal(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.float16)
    out = half(pixels.half()).last_hidden_state
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), tower(pixels).last_hidden_state, atol=0.03, rtol=0.03)


def test_it_is_the_tower_of_an_inf_llava():
    config = InfLlavaConfig(
        vision_config={"model_type": "dualview_reader", "image_size": 28, **SMALL},
        text_config=dict(TINY_LLM),
        grid=(2, 3),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = InfLlavaForConditionalGeneration(config).eval()
    pixels = torch.rand(1, 3, 56, 84)
    logits = model(input_ids=prompt(), pixel_values=pixels).logits
    with dv.full_computation():
        torch.testing.assert_close(model(input_ids=prompt(), pixel_values=pixels).logits, logits, atol=1e-4, rtol=1e-4)
    assert model.get_image_features(pixels, output_hidden_states=True).hidden_states[0].shape == (1, 4, 32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"patch_size": 16}, "patch_size=16"),
        ({"hidden_size": 30, "num_attention_heads": 3}, "hidden_size=30"),
        ({"stem_widths": (8, 8)}, "stem_widths=(8, 8)"),
    ],
)
def test_wrong_configurations_are_refused(changes, words):
    with pytest.raises(Exception, match="must be") as error:
        ReaderVisionConfig(**(SMALL | changes))
    assert words in str(error.value) + str(error.value.__cause__)
