"""`dualview demo --full-size` runs a photograph through the real path, and what it reports is what happened."""

import numpy as np
import pytest
import torch
from PIL import Image

import dualview as dv
from dualview import full_size
from dualview.canvas import fit_canvas
from dualview.full_size import Sizes, run_full_size
from dualview.images import CLIP_MEAN, CLIP_STD, ImageError, load_image
from dualview.switches import planning
from dualview.visualize import draw_tiles

TINY = Sizes(tile=28, patch=14, dim=32, mlp_dim=64, layers=3, heads=2, llm_dim=32, llm_layers=1)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def run(photo, tmp_path, **options):
    return run_full_size(photo, tmp_path / "out.png", config=TINY, **options)


def by_hand(photo, grid, preset, seed):
    """The image tokens, by the ops alone."""
    canvas = fit_canvas(photo, (28 * grid[0], 28 * grid[1])).permute(1, 2, 0).numpy()
    pixels = ((canvas / 255 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)[None]
    pixels = torch.from_numpy(pixels).float()
    torch.manual_seed(seed)
    model, projector, _ = full_size._build(TINY, dv.TileGrid(*grid), preset, torch.device("cpu"))
    assert model.dem.pairing == preset
    low = torch.nn.functional.interpolate(pixels, (28, 28), mode="bicubic", align_corners=False)
    with torch.inference_mode():
        local, stride = (
            torch.stack([model.encoder(tile[None])[0] for tile in cut(pixels, grid)[0]])[None]
            for cut in (dv.local_crop, dv.global_stride_crop)
        )
        mixed = model.encoder(low) + model.dem(local, stride, grid)
        if preset == "released":
            mixed = mixed / 2
        return projector(mixed.flatten(1, 2))


@pytest.mark.parametrize("grid, preset", [((3, 3), "released"), ((2, 3), "paper"), ((3, 2), "released")])
def test_tokens_are_those_of_the_photograph(photo, tmp_path, grid, preset):
    report = run(photo, tmp_path, grid=grid, preset=preset, seed=5)
    torch.testing.assert_close(report.image_tokens, by_hand(photo, grid, preset, 5), rtol=1e-4, atol=1e-5)


def test_stages(photo, tmp_path, capsys):
    report = run(photo, tmp_path, grid=(2, 3))
    text = len(full_size.QUESTION.encode())
    assert [(stage.name, stage.shape, stage.tokens) for stage in report.stages] == [
        ("image", (50, 70, 3), 0),
        ("scale, pad, normalise", (1, 3, 56, 84), 0),
        ("draw the tiles", (56, 84, 3), 0),
        ("build the models", (), 0),
        ("cut into tiles", (9, 3, 28, 28), 0),
        ("encoder", (9, 2, 2, 32), 36),
        ("DEM", (1, 2, 2, 32), 4),
        ("mix", (1, 2, 2, 32), 4),
        ("projector", (1, 4, 32), 4),
        ("language model", (1, 4 + text, 256), 4 + text),
    ]
    assert report.logits.shape == (1, 4 + text, 256)
    assert all(stage.seconds >= 0 for stage in report.stages)
    memory = [stage.memory for stage in report.stages]
    assert memory == sorted(memory)
    assert 2**26 < memory[-1] < 2**37
    out, err = capsys.readouterr()
    for stage in report.stages:
        assert any(line.startswith(stage.name) for line in out.splitlines())
    assert "weights     RANDOM" in out
    assert f"Wrote {tmp_path / 'out.png'}" in out
    assert "Next:" in out
    assert "9/9" in err  # progress


@pytest.mark.parametrize("preset, views", [("released", 10), ("paper", 18)])
@pytest.mark.parametrize("full", [False, True])
def test_only_what_matters_is_encoded(photo, tmp_path, capsys, preset, views, full):
    report = run(photo, tmp_path, preset=preset, full=full)
    out = capsys.readouterr().out
    said = "all 19 sub-images" if full else f"{views} of 19 sub-images determine the result; the others are not encoded"
    assert f"encoding    {said}\n" in out
    stages = {stage.name: stage for stage in report.stages}
    assert stages["encoder"].shape[0] == (19 if full else views)
    for stage in report.stages:  # the numbers of a row add up
        assert stage.tokens in (0, np.prod(stage.shape[:-1]))
    other = run(photo, tmp_path, preset=preset, full=not full)
    torch.testing.assert_close(report.logits, other.logits)
    assert planning()


def test_a_grid_larger_than_the_memory_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(full_size, "_whole_memory", lambda _: 2**30)
    with pytest.raises(ValueError, match=r"grid of 20x30 takes about \d\d GiB here, and there are 1: choose a smaller"):
        run_full_size("none.png", tmp_path / "out.png", grid=(20, 30))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(full_size, "_whole_memory", lambda _: None)
    with pytest.raises(ImageError, match="no such file"):
        run_full_size("none.png", tmp_path / "out.png", grid=(20, 30))


def test_a_stage_lasts_from_the_end_of_the_one_before(monkeypatch):
    watch = full_size.Stopwatch(torch.device("cpu"), last=10.0)
    clock = iter([11.0, 13.0, 16.0, 20.0])
    monkeypatch.setattr(full_size.time, "perf_counter", lambda: next(clock))
    for name in ("a", "b", "b", "c"):
        watch.lap(name, (2, 3), tokens=5)
    assert [(stage.name, stage.shape, stage.tokens, stage.seconds) for stage in watch.stages] == [
        ("a", (2, 3), 5, 1.0),
        ("b", (4, 3), 10, 5.0),
        ("c", (2, 3), 5, 4.0),
    ]
    lines = full_size.aligned(watch.stages, watch.device).splitlines()
    assert lines[3].split()[:6] == ["b", "4", "x", "3", "10", "5.00"]
    assert lines[-2].split() == ["total", "10.00"]


def test_the_picture_is_that_of_the_canvas(photo, tmp_path):
    run(photo, tmp_path, grid=(3, 2))
    expected = draw_tiles(fit_canvas(photo, (84, 56)), (3, 2)).picture
    assert torch.equal(load_image(tmp_path / "out.png"), load_image(expected))


def test_seed_and_photograph_matter(photo, tmp_path):
    first = run(photo, tmp_path, seed=1).logits
    assert torch.equal(run(photo, tmp_path, seed=1).logits, first)
    assert not torch.equal(run(photo, tmp_path, seed=2).logits, first)
    Image.new("RGB", (70, 50), "green").save(photo)
    assert not torch.equal(run(photo, tmp_path, seed=1).logits, first)


def test_a_single_tile_is_encoded_once(photo, tmp_path):
    stages = {stage.name: stage.shape for stage in run(photo, tmp_path, grid=(1, 1)).stages}
    assert stages["encoder"] == (1, 2, 2, 32)


def test_default_photograph(tmp_path, capsys):
    report = run(None, tmp_path, grid=(1, 1))
    assert report.stages[0].shape == (600, 512, 3)
    assert "grace_hopper.jpg (Grace Hopper, a photograph that matplotlib ships)" in capsys.readouterr().out


def test_the_default_is_vit_l_14_336(photo, tmp_path, monkeypatch):
    class BuiltError(Exception):
        pass

    def stop(config, *_):
        raise BuiltError(config)

    build = full_size._build
    monkeypatch.setattr(full_size, "_build", stop)
    with pytest.raises(BuiltError) as info:
        run_full_size(photo, tmp_path / "out.png")
    model, _, _ = build(info.value.args[0], dv.TileGrid(3, 3), "released", torch.device("meta"))
    config = model.encoder.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.intermediate_size, config.image_size, config.patch_size) == (4096, 336, 14)
    assert model.encoder.layer == -2
    assert sum(p.numel() for p in model.encoder.parameters()) == 303_507_456
    assert sum(p.numel() for p in model.dem.parameters()) == 4_400_256


def test_gradients_are_not_kept(photo, tmp_path):
    report = run(photo, tmp_path)
    assert report.image_tokens.is_inference()
    assert report.logits.is_inference()
