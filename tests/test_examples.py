"""examples/: a network that somebody else wrote is trained, resumed, shared, drawn and scored."""

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import paint
from PIL import Image
from processes import LAUNCH, ROOT, finish, start
from safetensors.torch import load_file

import data
import evaluate
import meanflow
import runtime
import sample

sys.path.insert(0, str(ROOT / "examples"))
import own_network


def log(folder):
    clock = ("time", "images_per_second")
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """What data.py writes of 3 x 4 coloured images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("data")
    paint(folder / "images", 3, 4, 8)
    data.main([str(folder / "images"), str(folder / "pixels")], runtime.World())
    return str(folder / "pixels")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """A run of four steps, the same stopped after two, and the same by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    words = [pictures, "--batch", "8", "--out"]
    shared = ["examples/own_network.py", *words, folder / "shared", "--steps", 4]
    process = start(*LAUNCH, 2, *shared)
    few = evaluate.Samples(30)
    with mock.patch.object(evaluate, "Samples", lambda count: few):
        for name, steps in (("whole", "4"), ("parts", "2"), ("parts", "4")):
            flags = [str(folder / name), "--steps", steps, "--ref", pictures]
            own_network.main([*words, *flags], runtime.World())
    finish(process)
    return folder


@pytest.mark.slow
def test_a_run_of_somebody_elses_network_is_resumed_bit_for_bit(runs):
    for kind in ("ema", "state"):
        name = f"{kind}-00000004.safetensors"
        whole, parts = load_file(runs / "whole" / name), load_file(runs / "parts" / name)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_the_same_network(runs):
    whole, shared = (log(runs / name)[0] for name in ("whole", "shared"))
    for key in ("loss", "raw_equal", "raw_differ", "grad_norm"):
        assert shared[key] == pytest.approx(whole[key], rel=1e-4)


@pytest.mark.slow
def test_it_is_watched_drawn_and_scored_as_ours_are(runs, pictures, tmp_path):
    folder = runs / "whole"
    assert {"grid-00000004.png", "curve.png"} <= {path.name for path in folder.iterdir()}
    [scores] = [line for line in log(folder) if "fid" in line]
    sampler = own_network.load(folder)
    scorer = evaluate.load_scorer(pictures, None, (3, 8, 8), runtime.World())
    options = dict(scorer=scorer, samples=evaluate.Samples(30), world=runtime.World())
    again = evaluate.score(sampler, [], **options)
    assert scores.pop("step") == 4 and scores.pop("fid") == pytest.approx(again.pop("fid"))
    assert scores == again
    picture = tmp_path / "picture.png"
    own_network.main(["--out", str(folder), "--draw", str(picture)], runtime.World())
    assert Image.open(picture).size == (10 * 36 + 4, 10 * 36 + 4)


def test_the_module_is_told_both_times_and_the_class():
    method = own_network.unet_method(1, 10)
    g = torch.Generator().manual_seed(0)
    net = method.net(method.init(generator=g))
    z = torch.randn(2, 1, 8, 8, generator=g)
    t, r, y = torch.tensor([0.9, 0.9]), torch.tensor([0.3, 0.3]), torch.tensor([3, 3])
    with torch.no_grad():
        u = net(z, t, r, y)
        for other in ((z, t - 0.2, r - 0.2, y), (z, t, t, y), (z, t, r, y + 1)):
            assert (net(*other) - u).abs().max() > 1e-4
    assert u.shape == z.shape


def test_fresh_weights_depend_on_the_generator_alone():
    method = own_network.unet_method(1, 10)
    torch.manual_seed(1)
    first = method.init(generator=torch.Generator().manual_seed(5))
    before = torch.random.get_rng_state()
    again = method.init(generator=torch.Generator().manual_seed(5))
    other = method.init(generator=torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any((first[name] != other[name]).any() for name in first)
    draws = meanflow.draw((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    loss, raw = method.loss(first, x, y, draws, 3)
    assert loss.shape == raw.shape == (4,)


def test_pictures_that_are_not_square_are_drawn_as_they_are(tmp_path):
    g = torch.Generator().manual_seed(0)
    params = own_network.unet_method(3, 2).init(generator=g)
    for kind, resolution, shape in (
        ("pixels", "16", (3, 16, 16)),
        ("pixels", "8x16", (3, 8, 16)),
        ("latents", "64x128", (3, 8, 16)),
    ):
        about = {"kind": kind, "classes": '["a", "b"]', "resolution": resolution, "run": "{}"}
        runtime.save_tensors(tmp_path / "ema-00000001.safetensors", params, about)
        sampler = own_network.load(tmp_path)
        assert sampler.shape == shape and sampler.kind == kind
    assert sample.generate(sampler, torch.arange(2)).shape == (2, 3, 8, 16)
    runtime.save_tensors(tmp_path / "ema-00000002.safetensors", params)
    with pytest.raises(ValueError, match="ema-00000002.*(another network|give)"):
        own_network.load(tmp_path)
