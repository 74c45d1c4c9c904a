"""The arms: shapes, what they see, and that they are what their names say."""

import numpy as np
import pytest
import torch

from benchmarks.probe_cpu import AVERAGE, EMBEDDED, MINE
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.readout import read_out
from dualview.ops.tiling import recombine
from dualview.probe import draws
from dualview.probe.arms import ARMS, REDUCED
from dualview.probe.attention import attention_of
from dualview.probe.draws import Draw
from dualview.probe.features import Views, encode_draw, tiles_of
from dualview.probe.memory import predicted_scores
from dualview.probe.questions import QUESTIONS
from dualview.probe.readout import Readout
from dualview.probe.training import Budget, Data, Training, mean_of
from dualview.reader.building import DEM

DIM, GRID = 32, (3, 3)
BY_NAME = {arm.name: arm for arm in ARMS}


def views(batch=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    local, stride, smooth = torch.randn(3, batch, 9, 8, 8, DIM, generator=random)
    return Views(local, stride, torch.randn(batch, 8, 8, DIM, generator=random), smooth)


@pytest.fixture(scope="module")
def data():
    """Random features with the questions of real pages."""
    asked = torch.from_numpy(Draw("train", "check", 0, 6).questions())
    return Data(*((views(6, seed), asked) for seed in range(3)))


def test_order_and_names():
    assert [arm.rank for arm in ARMS] == sorted(arm.rank for arm in ARMS)
    assert len(BY_NAME) == len(ARMS)
    assert set(REDUCED) <= set(BY_NAME)
    tables = {table for arm in ARMS if arm.rank == 0 for table in arm.table.split(", ")}
    assert {"4", "6", "controls"} <= tables


@pytest.mark.parametrize("arm", [arm for arm in (*ARMS, *MINE) if arm.pixels == 336], ids=lambda arm: arm.name)
def test_arms_give_a_map_and_learn_all_their_parameters(arm):
    module = arm.build(DIM)
    picked = views().pick(torch.arange(2), arm.views)
    assert set(picked) == set(arm.views)
    out = module(picked)
    side = 24 if arm.name == "full local map" else 8
    assert out.shape == (2, side, side, DIM)
    if parameters := list(module.parameters()):
        out.square().sum().backward()
        assert all(p.grad is not None for p in parameters)


def test_one_arm_has_the_options_of_the_embedded_model():
    dem = {arm.name: arm for arm in MINE}[EMBEDDED].build(DIM).dem
    options = {name: value for name, value in DEM.items() if name != "preset"}
    expected = DualPerspectiveEnhance.released(DIM, **options)
    assert (dem.readout, type(dem.fusion)) == (expected.readout, type(expected.fusion)) == ("average", type(dem.fusion))
    assert dem.state_dict().keys() == expected.state_dict().keys()
    assert type(dem.fusion) is not type(BY_NAME[AVERAGE].build(DIM).dem.fusion)


def test_parameters_are_matched():
    counts = {
        name: sum(p.numel() for p in BY_NAME[name].build(160).parameters())
        for name in ("MLP of as many parameters", "DEM released", "direct cross-attention")
    }
    assert counts["direct cross-attention"] == counts["DEM released"]
    assert counts["MLP of as many parameters"] == pytest.approx(counts["DEM released"], rel=0.01)


def test_direct_attention_is_the_module_on_one_tile():
    arm, seen = BY_NAME["direct cross-attention"].build(DIM), views()
    whole = DualPerspectiveEnhance.released(DIM, readout="none")
    whole.load_state_dict(arm.dem.state_dict())
    maps = [
        recombine(tiles, GRID, perspective, data_format="channels_last")[:, None]
        for tiles, perspective in ((seen.local, "local"), (seen.stride, "global"))
    ]
    expected = read_out(whole(*maps, (1, 1)), GRID, "bilinear")
    torch.testing.assert_close(arm(vars(seen)), expected, atol=1e-5, rtol=1e-4)


def test_thumbnail_stands_where_stride_tiles_do():
    arm, seen = BY_NAME["DEM released, thumbnail for stride"].build(DIM), views()
    copies = seen.thumb[:, None].repeat(1, 9, 1, 1, 1)
    torch.testing.assert_close(arm(vars(seen)), arm.dem(seen.local, copies, GRID))


def test_both_roles_of_one_map_look_at_one_map():
    seen, other = views(seed=0), views(seed=1)
    arm = BY_NAME["DEM released, local in both roles"].build(DIM)
    mixed = {"local": seen.local, "stride": other.stride}
    torch.testing.assert_close(arm(vars(seen)), arm(mixed))


def test_sharper_start_is_the_same_module_with_larger_logits():
    torch.manual_seed(0)
    plain = BY_NAME["DEM paper"].build(DIM).dem
    torch.manual_seed(0)
    sharp = BY_NAME["DEM paper, logits x 8"].build(DIM).dem
    q, k = (plain.attentions[0].q_proj.weight, plain.attentions[0].k_proj.weight)
    product = sharp.attentions[0].q_proj.weight.T @ sharp.attentions[0].k_proj.weight
    torch.testing.assert_close(product, 8 * q.T @ k)


def test_a_blank_view_tells_nothing(data):
    training = Training(BY_NAME["DEM released"], 0, data, Budget(steps=1, batch=2, points=1))
    seen, asked = data.test
    changed = Views(seen.local, seen.stride.flip(1).roll(1, 0), seen.thumb)
    torch.testing.assert_close(mean_of(seen, "stride"), mean_of(changed, "stride"))
    model = training.model.eval()
    index = torch.arange(6)
    answers = []
    for of in (seen, changed):
        picked = of.pick(index, ("local", "stride"))
        picked["stride"] = mean_of(of, "stride").expand_as(picked["stride"])
        answers.append(model(picked, asked).argmax(-1))
    assert torch.equal(*answers)
    assert torch.equal(training.right(seen, asked, "stride"), answers[0] == asked[..., 7])
    assert not torch.equal(model(seen.pick(index, ("local", "stride")), asked).argmax(-1), answers[0])


def test_readout_tells_questions_apart():
    """Places, names and tasks all reach the answer, and no task gets an answer of another."""
    torch.manual_seed(0)
    readout, asked = Readout(DIM), torch.from_numpy(Draw("train", "check", 0, 1).questions())
    tokens = torch.randn(1, 8, 8, DIM)
    before = readout(tokens, asked)
    assert before.shape == (1, QUESTIONS, readout.allowed.shape[1])
    assert readout.allowed[asked[0, :, 0], before[0].argmax(-1)].all()
    for column in (1, 2, 3, 4, 5, 6):
        other = asked.clone()
        other[..., column] = (other[..., column] + 1) % 3
        assert not torch.allclose(readout(tokens, other), before), column
    for column in (7, 8, 9):  # the answer, the level and the seam do not
        other = asked.clone()
        other[..., column] += 1
        torch.testing.assert_close(readout(tokens, other), before)


@pytest.mark.parametrize("side", [8, 24])
def test_readout_starts_by_looking_where_the_question_says(side):
    """What changes in a cell changes its own question most, on a small map and on a large one."""
    torch.manual_seed(0)
    readout, tokens = Readout(DIM), torch.randn(1, side, side, DIM)
    cells = [(1, 1), (4, 6), (8, 3)]
    asked = torch.zeros(1, 3, 10, dtype=torch.long)
    asked[0, :, 1:3] = torch.tensor(cells)
    before = readout(tokens, asked)[0]
    for i, (row, col) in enumerate(cells):
        other, wide = tokens.clone(), side // 8
        other[0, (row - 1) * wide : row * wide, (col - 1) * wide : col * wide] *= -1
        moved = (readout(other, asked)[0] - before).square().sum(-1)
        assert moved.argmax() == i
        assert moved[i] > 3 * moved.sum() / 4


def test_attention_measures():
    seen = views()
    even = DualPerspectiveEnhance.paper(DIM)
    torch.nn.init.zeros_(even.attentions[0].q_proj.weight)
    for of in attention_of(even, seen.local, seen.stride).values():
        assert of["entropy"] == pytest.approx(1)
        assert of["detail"] == pytest.approx(0, abs=1e-6)
        assert of["detail_in"] == pytest.approx(1, abs=0.1)
    sharp = DualPerspectiveEnhance.paper(DIM, init="identical", source="local")
    with torch.no_grad():
        sharp.attentions[0].q_proj.weight.copy_(20 * torch.eye(DIM))
        sharp.attentions[0].k_proj.weight.copy_(torch.eye(DIM))
        sharp.attentions[0].v_proj.weight.copy_(torch.eye(DIM))
    for of in attention_of(sharp, seen.local, seen.stride).values():
        assert of["entropy"] < 0.05
        assert of["detail"] == pytest.approx(of["detail_in"], abs=0.05)


def test_views_show_the_same_pixels():
    """A stride tile of a page that is constant within cells of 3 x 3 is the page reduced."""
    small = torch.rand(1, 3, 28, 28)
    page = small.repeat_interleave(3, -1).repeat_interleave(3, -2)
    tiles = tiles_of(page, smooth=True)
    for k in range(9):
        torch.testing.assert_close(tiles["stride"][:, k], small)
    assert (tiles["thumb"] - small).abs().mean() < 0.12
    assert (tiles["smooth"] - small[:, None]).abs().mean() < 0.2 < (tiles["local"] - small[:, None]).abs().mean()
    assert tiles["local"].shape == tiles["smooth"].shape == (1, 9, 3, 28, 28)


def test_features_are_those_of_the_drawn_pages(monkeypatch):
    def encode(pixels):
        return pixels.movedim(1, -1).unflatten(2, (8, 14)).unflatten(1, (8, 14)).mean((2, 4))

    monkeypatch.setattr(draws, "CHUNK", 2)
    draw = Draw("test", "check", 1, 3)  # more than one chunk
    seen, asked = encode_draw(encode, draw, dtype=torch.float32)
    assert np.array_equal(asked.numpy(), draw.questions())
    page = torch.from_numpy(draw.page(2)[0]).movedim(-1, 0) / 255
    torch.testing.assert_close(seen.local[2, 4], encode(page[None, :, 112:224, 112:224])[0])
    torch.testing.assert_close(seen.stride[2, 5], encode(page[None, :, 1::3, 2::3])[0])


def test_direct_attention_needs_tiles_times_as_many_weights():
    assert [predicted_scores(n, True) // predicted_scores(n, False) for n in (1, 2, 3)] == [1, 4, 9]
    assert predicted_scores(1, False, tokens=2, heads=1) == 2 * 4 * 4
