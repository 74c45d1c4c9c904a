"""Features from the cache train like features that are computed; whatever they depend on is in their key."""

import copy
import json
import shutil

import pytest
import torch
from PIL import Image

from dualview.train import Collator, FeatureCache, LlavaDataset, TrainConfig, train
from tests.tiny import tiny_model, tiny_processor
from tests.train.data import fields, write_data

PROCESSORS = {"one size": {}, "a grid each": {"max_tiles": 6}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("features"))


def pictures(place):
    return sorted((place / "images").iterdir())


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_loss_and_its_gradients_are_those_without_a_cache(place, tmp_path, kind):
    model, processor = (
        tiny_model(dem={"preset": "released", "num_heads": 4}).train(),
        tiny_processor(**PROCESSORS[kind]),
    )
    data = LlavaDataset(processor).add(place / "chats.jsonl", place / "images")
    cache = FeatureCache(tmp_path, model, processor, {})
    assert cache.fill(pictures(place), model) == len(pictures(place))
    assert cache.fill(pictures(place), model) == 0
    collate, found = Collator(0), []
    for data.cache in (None, cache):
        batch = collate([data[i] for i in (0, 11, 7, 3)])
        assert ("pixel_values" in batch) == (data.cache is None)
        assert data.cache is None or batch["view_features"].dtype == torch.float16
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if "tower" not in n}))
    (expected, gradients), (loss, cached) = found
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for name, value in gradients.items():
        torch.testing.assert_close(cached[name], value, rtol=0, atol=2e-3 * max(1e-2, value.abs().max().item()))


def test_the_tower_says_nothing_of_pictures_that_are_not_given(place, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    cache = FeatureCache(tmp_path, model, processor, {})
    cache.fill(pictures(place)[:1], model)
    with pytest.raises(ValueError, match="output_hidden_states=True: view_features hold no states"):
        model.get_image_features(**cache.read(pictures(place)[:1]), output_hidden_states=True)


def test_what_features_depend_on_is_in_the_key(place, tmp_path):
    model, processor = tiny_model(), tiny_processor()

    def key(change=lambda m, p: None, **options):
        other = copy.deepcopy(model)
        change(other, made := tiny_processor(**options))
        return FeatureCache(tmp_path, other, made, {}).key

    def weight(other, _):
        other.model.vision_tower.embeddings.patch_embedding.weight.data[0, 0, 0, 0] += 1e-6

    def dem(other, _):
        next(other.model.dem.parameters()).data.zero_()

    assert key() == key(dem) == FeatureCache(tmp_path, model, processor, {}).key  # the tower alone makes features
    changed = [
        key(weight),
        key(lambda m, p: setattr(m.config, "vision_feature_layer", -3)),
        key(lambda m, p: setattr(m.config, "grid", (3, 2))),
        key(lambda m, p: setattr(p.image_processor, "image_mean", (0.0, 0.0, 0.0))),
        key(max_tiles=6),
        FeatureCache(tmp_path, model, processor, {"do_pad": False}).key,
    ]
    assert len({key(), *changed}) == 1 + len(changed)


def test_a_picture_that_changes_is_a_miss(place, tmp_path):
    model, processor, path = tiny_model(), tiny_processor(), tmp_path / "0.png"
    shutil.copy(place / "images" / "0.png", path)
    cache = FeatureCache(tmp_path / "cache", model, processor, {})
    cache.fill([path], model)
    before = cache.read([path])["view_features"]
    Image.new("RGB", (90, 30), "red").save(path)
    assert cache.read([path]) is None
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "0.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}]))  # fmt: skip
    data = LlavaDataset(processor).add(tmp_path / "rows.json")
    data.cache = cache
    with pytest.raises(ValueError, match=r"row 0: .*0.png is not in the cache"):
        data[0]
    assert cache.fill([path], model) == 1
    assert not torch.equal(cache.read([path])["view_features"], before)


def test_a_picture_that_has_gone_is_a_bad_row(place, tmp_path):
    model, processor, gone = tiny_model(), tiny_processor(), place / "images" / "gone.png"
    shutil.copy(place / "images" / "0.png", gone)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    rows = [{"image": name, "conversations": turns} for name in ("gone.png", "1.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    said = []
    data = LlavaDataset(processor, bad_rows="skip", report=said.append).add(tmp_path / "rows.json", place / "images")
    data.cache = FeatureCache(tmp_path / "cache", model, processor, {})
    gone.unlink()
    assert data.cache.fill([gone, place / "images" / "1.png"], model) == 1
    assert torch.equal(data[0]["view_features"], data[1]["view_features"])  # the next good row stands in
    assert len(said) == 1
    assert "row 0: " in said[0]
    assert "gone.png cannot be read" in said[0]


def test_features_that_do_not_fit_are_refused(place, tmp_path):
    model = tiny_model()
    model.model.vision_tower.encoder.layers[1].mlp.fc2.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="does not fit half precision"):
        FeatureCache(tmp_path, model, tiny_processor(), {}).fill(pictures(place), model)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.more
def test_a_run_with_a_cache_has_the_losses_of_one_without(place):
    found = {}
    for name, cache in (("computed", None), ("cached", str(place / "cache")), ("again", str(place / "cache"))):
        run = fields(place, name)
        for stage in ("stage1", "stage2"):
            run[stage]["feature_cache"] = cache
        train(TrainConfig.of(run), report=lambda line: None)
        lines = (place / name / "stage2" / "log.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    torch.testing.assert_close(found["cached"], found["computed"], rtol=3e-3, atol=0)
    assert found["again"] == found["cached"]
