"""examples/cifar10.py: the numbers of the authors' PyTorch code, its properties, runs and files."""

import argparse
import json
import re
import sys
from functools import partial

import memory
import numpy as np
import pytest
import torch
from conftest import paint
from hypothesis import given
from hypothesis import strategies as st
from processes import LAUNCH, ROOT, finish, start
from safetensors.torch import load_file
from test_examples import log
from test_imf import hashed
from torch.utils.flop_counter import FlopCounterMode

import data
import dual
import evaluate
import meanflow
import runtime
import sample
import train
import weights

sys.path.insert(0, str(ROOT / "examples"))
import cifar10

GOLDEN = dict(np.load(ROOT / "tests" / "authors-unet.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
SMALL = dict(width=16, mult=(2, 2, 5), blocks=1)
TINY = dict(width=8, mult=(1, 2), blocks=1, side=8, attention=4)


def golden(name, dtype=torch.float64):
    return torch.from_numpy(GOLDEN[name]).to(dtype)


def golden_weights(dtype):
    params = {}
    for k, name in enumerate(ABOUT["names"]):
        shape = ABOUT["shapes"][name]
        n = hashed(k, shape).numpy()
        if name.endswith("bias"):
            n = 0.2 * n
        else:
            n = 1 + 0.3 * n if "norm" in name else 1.7 * n / np.sqrt(np.prod(shape[1:]))
        params[name] = torch.from_numpy(n.astype(np.float16)).to(dtype)  # torch rounds otherwise
        params[name].requires_grad_()
    return params


def golden_masks(k, shape):
    return hashed(5000 + k, shape) >= -0.6


def distance(found, wanted):
    """Return the largest difference, relative to the largest value."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    return (found.detach().double() - wanted).abs().max() / wanted.abs().max()


PRECISIONS = [(torch.float64, 1e-6), (torch.float32, 1e-5)]


# --- the authors' numbers ---


def test_the_parameters_are_the_authors():
    shapes = cifar10.shapes()
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (len(shapes), count) == (417, 55_932_419)
    wanted = {name: tuple(shape) for name, shape in ABOUT["shapes"].items()}
    assert cifar10.shapes(**SMALL) == wanted


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("jvp", [torch.func.jvp, dual.jvp])
@pytest.mark.parametrize("case", ["", "plain.", "drop."])
def test_agrees_with_the_authors_code(case, jvp, dtype, tolerance):
    """u, du/dt, error, loss and gradients, with labels, without, and with dropout."""
    params = golden_weights(dtype)
    x, e, t, r, labels = (golden(name, dtype) for name in ("x", "e", "t", "r", "aug"))
    given_labels, masks = None if case == "plain." else labels, golden_masks
    masks = masks if case == "drop." else None

    def net(z, t, r, y):
        return cifar10.unet(params, z, t, r, given_labels, masks)

    z, v = meanflow.interpolate(x, e, t)
    assert distance(z, GOLDEN["z"]) < 1e-6
    u, dudt = meanflow.derivative(net, z, t, r, v, None, jvp=jvp)
    u_tgt = meanflow.identity(v, t, r, dudt)
    loss, s = meanflow.adaptive_loss(u, u_tgt, ABOUT["p"], ABOUT["c"])
    for name, found in dict(u=u, dudt=dudt, s=s, loss=loss).items():
        assert distance(found, GOLDEN[f"{case}{name}"]) < tolerance, name
    if case == "drop.":
        return  # the authors' gradients are those without dropout
    loss.mean().backward()
    assert case == "" or params["map_augment.weight"].grad is None
    for k, name in enumerate(ABOUT["names"]):
        if params[name].grad is not None:
            gradient = params[name].grad.double().flatten()
            found = gradient.norm(), gradient @ hashed(1000 + k, (len(gradient),))
            norm, product = GOLDEN[f"{case}g.{name}"]
            assert abs(found[0] - norm) < tolerance * norm, name
            assert abs(found[1] - product) < tolerance * norm, name


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_every_block_agrees_with_the_authors(dtype, tolerance):
    params, outputs = golden_weights(dtype), []
    z, t, r, labels = (golden(name, dtype) for name in ("z", "t", "r", "aug"))
    assert distance(cifar10.embed(params, t, t - r, labels), GOLDEN["emb"]) < tolerance

    def block(w, x, *rest):
        if not outputs:
            outputs.append(x)
        outputs.append(cifar10.block(w, x, *rest))
        return outputs[-1]

    outputs.append(cifar10.unet(params, z, t, r, labels, block=block))
    names = [name.removeprefix("block.") for name in GOLDEN if name.startswith("block.")]
    assert names[1:-1] == list(cifar10.blocks_of(params)) and len(outputs) == len(names)
    for j, (name, x) in enumerate(zip(names, outputs)):
        norm, product = GOLDEN[f"block.{name}"]
        x = x.detach().double().flatten()
        assert abs(x.norm() - norm) < tolerance * norm, name
        assert abs(x @ hashed(3000 + j, (len(x),)) - product) < tolerance * norm, name


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_a_sample_is_the_authors(dtype, tolerance):
    x = meanflow.sample(cifar10.drawer(golden_weights(dtype)), golden("e", dtype), None, 1)
    assert distance(x, GOLDEN["sample"]) < tolerance


@pytest.mark.parametrize("sampler", ["v0", "v1"])
def test_times_are_the_authors(sampler):
    found = cifar10.draw_times(*(golden(f"tr.{name}") for name in ("n_t", "n_r", "u")), sampler)
    for name, times in zip("tr", found):
        assert (times - golden(f"tr.{sampler}.{name}")).abs().max() < 1e-14


def warp_draws(**changes):
    """Return draws, which do nothing but for the changes, of as many rows as these have."""
    rows = len(next(iter(changes.values())))
    flip, nothing = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 4)
    coin, angle = changes.pop("coin", nothing + 1), changes.pop("angle", nothing[:, 0])
    chance = torch.cat((coin, angle[:, None].to(coin)), 1)
    empty = dict(e=None, t=None, r=None, seed=None, flip=flip, warp=nothing)
    return cifar10.Draws(**empty | {"chance": chance} | changes)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("case", ["aug1.", "aug2."])
def test_the_augmentation_is_the_authors(case, dtype, tolerance):
    given = {k[5:]: torch.from_numpy(a) for k, a in GOLDEN.items() if k.startswith(case)}
    warp = torch.stack((given["scale"], given["aniso"], *given["shift"]), 1).to(dtype)
    coins = [given[f"{name}_u"] for name in ("scale", "aniso", "shift", "angle")]
    coins, angle = torch.stack(coins, 1).to(dtype), given["angle"].to(dtype)
    draws = warp_draws(flip=given["flip"], warp=warp, coin=coins, angle=angle)
    images, labels = cifar10.augment(given["x"].to(dtype), draws)
    assert distance(images, given["y"]) < tolerance
    assert distance(labels, given["labels"]) < tolerance


# --- properties ---


def images(rows=4, side=32, seed=0):
    """Return smooth random images."""
    x = torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, side, mode="bicubic").double()


def test_draws_that_do_nothing_give_the_image_back():
    """Whatever the numbers are that nothing asks for; and so does a warp to where all is."""
    x = images()
    g = torch.Generator().manual_seed(0)
    draws = warp_draws(warp=torch.randn(4, 4, generator=g), angle=torch.rand(4, generator=g))
    same, labels = cifar10.augment(x.float(), draws)
    assert torch.equal(same, x.float()) and not labels.any()
    still = torch.eye(2, dtype=x.dtype).expand(4, 2, 2), torch.zeros(4, 2, dtype=x.dtype)
    assert (cifar10.warp(x, *still) - x).abs().max() < 1e-5 * x.abs().max()


def test_labels_say_what_was_done():
    x, ones = images(), torch.ones(4)
    warp = torch.tensor([[0.5, -1.5, 0.3, -0.4]]).expand(4, 4)
    coin = torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0], [1, 1, 0, 1]])
    flip = torch.tensor([0, 1, 0, 0])
    draws = warp_draws(warp=warp, coin=coin, angle=0.75 * ones, flip=flip)
    _, labels = cifar10.augment(x.float(), draws)
    wanted = [[0, 0.5, 0, 0, 0, 0], [1, 0, -1.5, 0, 0, 0], [0, 0, 0, -1.5, 0, 0]]
    wanted = torch.tensor([*wanted, [0, 0, 0, 0, 0.3, -0.4]])
    assert torch.allclose(labels, wanted, atol=1e-6)


@given(st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 99))
def test_a_shift_of_whole_pixels_is_a_shift(right, down, seed):
    """Of the image and its reflections, to the right and down."""
    x = images(1, 16, seed)
    warp = torch.tensor([[9.0, 9.0, right / 2, down / 2]]).double()
    coin = torch.tensor([[1.0, 1, 0, 1]]).double()
    moved, _ = cifar10.augment(x, warp_draws(warp=warp, coin=coin, angle=coin[:, 0]))
    around = torch.nn.functional.pad(x, (6, 6, 6, 6), mode="reflect")
    wanted = around[:, :, 6 - down : 22 - down, 6 - right : 22 - right]
    assert (moved - wanted).abs().max() < 1e-4


def test_a_picture_grows_and_is_stretched_about_its_centre():
    """Compare with a smooth picture in closed form, far from the edge."""
    place = torch.arange(32).double() - 15.5
    y, x = torch.meshgrid(place, place, indexing="ij")

    def picture(x, y):
        return torch.sin(x / 5 + 0.3) * torch.cos(y / 7 - 0.2)

    draws = dict(warp=torch.tensor([[1.5, -1.0, 0, 0]]), coin=torch.tensor([[0.0, 0, 1, 0]]))
    draws = {name: a.double() for name, a in draws.items()}
    turn = torch.tensor(0.6).double()
    angle = (turn / torch.pi + 1)[None] / 2
    found, _ = cifar10.augment(picture(x, y)[None, None], warp_draws(**draws, angle=angle))
    cos, sin = turn.cos(), turn.sin()
    along, across = cos * x - sin * y, sin * x + cos * y
    along, across = along / 2**-0.2, across * 2**-0.2
    x, y = cos * along + sin * across, cos * across - sin * along
    wanted = picture(x / 2**0.3, y / 2**0.3)
    assert (found[0, 0] - wanted)[6:-6, 6:-6].abs().max() < 4e-3


@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_keeps_a_plane(direction):
    """Its weights sum to 1 wherever it reads, and it moves nothing."""
    n = 8 if direction == "down" else 32
    place = (torch.arange(16).double() + 0.5) / 16
    x = (3 + place[:, None] - 2 * place)[None, None].expand(1, 5, 16, 16)
    place = (torch.arange(n).double() + 0.5) / n
    wanted = (3 + place[:, None] - 2 * place)[1:-1, 1:-1]
    y = cifar10.resample(x, direction, x)
    assert y.shape == (1, 5, n, n) and torch.allclose(
        y[..., 1:-1, 1:-1], wanted.expand(1, 5, -1, -1)
    )


def tiny(dtype=torch.float64):
    """Return parameters of a tiny network, all random."""
    g = torch.Generator().manual_seed(1)
    params = cifar10.init(generator=g, **TINY)
    return {k: p.to(dtype) + 0.2 * torch.randn(p.shape, generator=g) for k, p in params.items()}


def test_rows_do_not_mix():
    params, g = tiny(), torch.Generator().manual_seed(0)
    z, t, labels = (
        torch.randn(3, 3, 8, 8, generator=g),
        torch.rand(3, generator=g),
        torch.ones(3, 6),
    )
    z, t, labels, seeds = z.double(), t.double(), labels.double(), torch.arange(3)
    whole = cifar10.unet(params, z, t, t / 2, labels, partial(cifar10.masks, seeds))
    for k in range(3):
        part = [a[k : k + 1] for a in (z, t, t / 2, labels)]
        one = cifar10.unet(params, *part, partial(cifar10.masks, seeds[k : k + 1]))
        assert torch.allclose(one, whole[k : k + 1], atol=1e-12)


def test_a_fresh_network_is_nearly_zero_and_its_weights_as_the_authors():
    params = cifar10.init(generator=torch.Generator().manual_seed(0), **SMALL)
    for name, p in params.items():
        if p.ndim == 1:
            assert (p == (name.endswith("weight"))).all()
            continue
        bound = (6 / (p[0].numel() + p[:, 0].numel())) ** 0.5
        bound *= {"conv1": 1e-5, "proj": 1e-5, "qkv": 0.2**0.5}.get(name.split(".")[-2], 1)
        bound *= 1e-5 if "aux_conv" in name else 1
        assert 0.9 * bound < p.abs().max() <= bound, name
    u = cifar10.unet(params, torch.randn(2, 3, 32, 32), torch.ones(2), torch.zeros(2))
    assert 0 < u.abs().max() < 1e-3


def test_dropout_is_a_function_of_seed_block_and_place():
    seeds, shape = torch.randint(2**62, (64,)), (64, 16, 16, 16)
    kept = torch.stack([cifar10.masks(seeds, k, shape) for k in range(4)]).flatten(2).double()
    again = cifar10.masks(seeds[40:50], 2, (10, 16, 16, 16))
    assert torch.equal(again.flatten(1), kept[2, 40:50].bool())
    rows = (kept - 0.8) / 0.4  # of mean 0 and deviation 1
    assert rows.mean((1, 2)).abs().max() < 5 * (64 * 4096) ** -0.5
    assert 0.8 < rows.mean(2).std() * 64 < 1.2
    rows = rows.flatten(0, 1)
    others = rows @ rows.T / 4096 - torch.eye(256)
    assert others.abs().max() < 6 / 64  # rows and blocks know nothing of each other
    for gap in (1, 2, 16, 256):
        assert (rows[:, gap:] * rows[:, :-gap]).mean().abs() < 5 * (256 * 4096) ** -0.5


def test_seeds_that_are_alike_have_other_masks():
    for seeds in (torch.arange(64), torch.arange(64) << 32):
        rows = (cifar10.masks(seeds, 0, (64, 4096)).double() - 0.8) / 0.4
        assert (rows @ rows.T / 4096 - torch.eye(64)).abs().max() < 6 / 64


PAPER = dict(generator=torch.Generator().manual_seed(1), share=0.25, mean=-2, std=2)


@pytest.mark.parametrize("sampler, share", [("v0", 0.75), ("v1", 0.70)])
def test_draws(sampler, share):
    """As many rows have r != t as in the authors' code, and those of v0 are the first."""
    draws = cifar10.draw(
        (4000, 1, 2, 2), generator=torch.Generator().manual_seed(0), sampler=sampler
    )
    assert (draws.r <= draws.t).all() and (draws.r > 0).all() and (draws.t < 1).all()
    assert (draws.r != draws.t).double().mean() == pytest.approx(share, abs=0.02)
    assert (draws.r == draws.t)[:1000].all()
    paper = meanflow.draw((4000, 1), **PAPER).t.logit()
    wanted = (-0.6, 1.6) if sampler == "v1" else (paper.mean(), paper.std())
    found = draws.t.logit().mean(), draws.t.logit().std()
    assert found == pytest.approx(tuple(map(float, wanted)), abs=0.15)
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.03)
    assert len(draws.seed.unique()) == 4000 and draws.chance.shape == (4000, 5)
    assert draws.warp.mean(0).abs().max() < 0.1 and (draws.chance.mean(0) - 0.5).abs().max() < 0.03


def test_the_loss_is_the_authors_loss_of_augmented_images():
    """By a single jvp of all rows, with one dropout mask for u and du/dt."""
    params, g = tiny(), torch.Generator().manual_seed(2)
    params = {name: p.requires_grad_() for name, p in params.items()}
    draws = cifar10.draw((9, 3, 8, 8), generator=g)
    draws = draws._replace(chance=draws.chance / 3)  # more warps
    doubles = {k: a.double() for k, a in draws._asdict().items() if a.is_floating_point()}
    draws = draws._replace(**doubles)
    x = torch.randn(9, 3, 8, 8, generator=g).double()
    found, raw = cifar10.loss(params, x, None, draws, meanflow.count_equal(draws.t, draws.r))
    x, labels = cifar10.augment(x, draws)
    assert labels[:, 1:].any(1).sum() > 3

    def net(z, t, r, y):
        return cifar10.unet(params, z, t, r, labels, partial(cifar10.masks, draws.seed))

    z, v = meanflow.interpolate(x, draws.e, draws.t)
    u, dudt = meanflow.derivative(net, z, draws.t, draws.r, v, None)
    u_tgt = meanflow.identity(v, draws.t, draws.r, dudt)
    wanted, s = meanflow.adaptive_loss(u, u_tgt, 0.75, 1e-3)
    assert torch.allclose(found, wanted) and torch.allclose(raw, s)
    gradients = (torch.autograd.grad(rows.sum(), params.values()) for rows in (found, wanted))
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-10)


# --- cost ---


@pytest.fixture(scope="module")
def full():
    """The authors' network and eight rows, without values."""
    g = torch.Generator().manual_seed(0)
    shapes = cifar10.shapes().items()
    params = {k: torch.empty(p, device="meta", requires_grad=True) for k, p in shapes}
    draws = cifar10.draw((8, 3, 32, 32), generator=g)
    return params, draws.e.to("meta"), cifar10.Draws(*(a.to("meta") for a in draws))


def gigaflop(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 8e9


def test_a_step_costs_3_75_forwards_where_the_authors_costs_5(full):
    params, x, draws = full
    net = partial(cifar10.unet, params)
    one = gigaflop(lambda: net(x, draws.t, draws.r))
    assert one == pytest.approx(42.39, abs=0.01)
    ours = gigaflop(lambda: cifar10.loss(params, x, None, draws, 2)[0].mean().backward())
    assert ours / one == pytest.approx(3.75, abs=0.02)

    def authors():
        z, v = meanflow.interpolate(x, draws.e, draws.t)
        u, dudt = meanflow.derivative(lambda *rows: net(*rows[:3]), z, draws.t, draws.r, v, None)
        u_tgt = meanflow.identity(v, draws.t, draws.r, dudt)
        meanflow.adaptive_loss(u, u_tgt, 0.75, 1e-3)[0].mean().backward()

    assert gigaflop(authors) / one == pytest.approx(5, abs=0.02)


def test_the_backward_pass_keeps_less_than_155_mb_a_row():
    """Where a jvp with its graph keeps 671."""
    few, many = (memory.kept("cifar10", rows) for rows in (4, 12))
    assert (many - few) / 8 < 155e6


# --- runs ---


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """What data.py writes of 3 x 4 coloured images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("data")
    paint(folder / "images", 3, 4, 8)
    data.main([str(folder / "images"), str(folder / "pixels")], runtime.World())
    return str(folder / "pixels")


def words(pictures, folder, steps):
    flags = ["--width", "4", "--batch", "8", "--lr", "1e-3", "--steps", steps, "--out", folder]
    return [pictures, *map(str, flags)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures):
    """A run of 34 steps, the same killed in step 21 after a save, and the same by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    process = start(*LAUNCH, 2, "examples/cifar10.py", *words(pictures, folder / "shared", 34))
    cifar10.main(words(pictures, folder / "whole", 34), runtime.World())

    def update(state, plan, step, whole=train.update):
        if step == 21:
            raise KeyboardInterrupt
        return whole(state, plan, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "SAVE_EVERY", 9)
        patch.setattr(train, "SAVE_SHARE", 1.0)
        patch.setattr(train, "update", update)
        cifar10.main(words(pictures, folder / "killed", 34), runtime.World())
    assert weights.newest(folder / "killed") == 18
    cifar10.main(words(pictures, folder / "killed", 34), runtime.World())
    finish(process)
    return folder


KINDS = "ema", "ema0.9999", "ema0.9996", "state"


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit_and_shared_by_processes(runs):
    for kind in KINDS:
        name = f"{kind}-00000034.safetensors"
        whole, killed, shared = (load_file(runs / k / name) for k in ("whole", "killed", "shared"))
        assert whole.keys() == killed.keys() == shared.keys()
        for k in whole:
            assert torch.equal(whole[k], killed[k]), (kind, k)
            assert (whole[k] - shared[k]).norm() <= 2e-3 * whole[k].norm() + 1e-5, (kind, k)
    assert len({path.name.split("-")[0] for path in (runs / "killed").glob("*.safetensors")}) == 4
    [whole], [shared] = log(runs / "whole"), log(runs / "shared")
    assert whole["loss"] == pytest.approx(shared["loss"], rel=1e-4)
    assert log(runs / "killed")[-1]["step"] == 34


@pytest.mark.slow
def test_averages_are_taken_every_16_steps(runs):
    """At step 32 last, and from nothing of the initial weights."""
    for kind in KINDS[:3]:
        average = load_file(runs / "whole" / f"{kind}-00000034.safetensors")
        assert average.keys() == cifar10.shapes(4, side=8, attention=4).keys()
    first, *_ = [json.loads(line) for line in (runs / "whole" / "log.jsonl").open()]
    assert first["ema"] == [0.99995, 0.9999, 0.9996] and first["ema_every"] == 16
    assert first["betas"] == [0.9, 0.999] and first["warmup"] == 0 and first["sampler"] == "v0"


@pytest.mark.slow
def test_a_run_is_drawn_and_scored_by_the_scripts(runs, pictures, tmp_path, capsys):
    """Its grid has a hundred images, and pixels are rounded down."""
    network = ["--network", "examples/cifar10.py"]
    sampler = cifar10.load(runs / "whole")
    assert (sampler.shape, sampler.kind, sampler.classes) == ((3, 8, 8), "pixels", ["image"])
    x = sample.generate(sampler, torch.zeros(100, dtype=torch.int64))
    images = sample.to_uint8(x, sampler)
    wanted = (255 * (x / 2 + 0.5).clamp(0, 1)).floor()
    assert (images - wanted).abs().max() <= 1 and (images != wanted).double().mean() < 1e-3
    sample.save_grid(images, tmp_path / "grid.png")
    grid = (runs / "whole" / "grid-00000034.png").read_bytes()
    assert (tmp_path / "grid.png").read_bytes() == grid
    sample.main(
        [str(runs / "whole"), *network, "--out", str(tmp_path / "ten.png")], runtime.World()
    )
    sample.save_grid(images[:10], tmp_path / "ten too.png")
    assert (tmp_path / "ten.png").read_bytes() == (tmp_path / "ten too.png").read_bytes()
    capsys.readouterr()
    flags = ["--ref", pictures, "--count", "50", *network]
    evaluate.main([str(runs / "whole"), *flags], runtime.World())
    line = json.loads(capsys.readouterr().out)
    assert line["uint8"] == "rounded down" and line["count"] == 50
    other = str(runs / "whole" / "ema0.9996-00000034.safetensors")
    evaluate.main([other, *flags], runtime.World())
    assert json.loads(capsys.readouterr().out)["weights"].startswith(other)


# --- files ---


def published(path, **changes):
    """Write what the authors published, of a tiny network; return its four networks."""
    model, networks = {"num_updates": torch.tensor(7)}, {}
    for k, name in enumerate(("net", "net_ema", "net_ema1", "net_ema2")):
        networks[name] = cifar10.init(generator=torch.Generator().manual_seed(k), **TINY)
        filters = {
            f"{block}.{part}.resample_filter": cifar10.triangle(torch.zeros(1))[None, None]
            for block in cifar10.blocks_of(networks[name])
            if "down" in block or "up" in block
            for part in ("conv0", "skip")
        }
        model |= {f"{name}.{k}": p for k, p in (networks[name] | filters | changes).items()}
    about = {"epoch": 5, "args": argparse.Namespace(lr=6e-4), "lr_schedule": {"_last_lr": [6e-4]}}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    torch.save({"model": model, "optimizer": optimizer} | about, path)
    return networks


def test_what_the_authors_published_is_read(tmp_path, capsys):
    """Of their averages net_ema1, or by the name of a function another."""
    path = tmp_path / "model.pth"
    networks = published(path)
    for name, function in dict(net_ema1="load", net_ema="net_ema", net_ema2="net_ema2").items():
        place = "examples/cifar10.py" + f":{function}" * (function != "load")
        sampler = weights.open_sampler(path, "cpu", network=str(ROOT / place))
        assert sampler.params.keys() == networks[name].keys() and sampler.floor
        found = getattr(cifar10, function)(path).params
        for k, p in networks[name].items():
            assert torch.equal(sampler.params[k], p) and torch.equal(found[k], p)
        assert sampler.weights == f"{path} sha256 {runtime.sha256(path)}"
        assert re.search(rf"/model/{name}. is taken, not .*/model/net\.", capsys.readouterr().err)
    for changes in ({}, {"half": None}):
        alone = {k: p.half() for k, p in networks["net"].items()} if changes else networks["net"]
        torch.save(alone, path)
        assert all(torch.allclose(cifar10.load(path).params[k], alone[k].float()) for k in alone)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 4, 4) / 16}, "another network"),
        (
            {"enc.4x4_down.conv1.weight": torch.zeros(8, 8, 3, 1)},
            "conv1.weight is .8, 8, 3, 1., sho",
        ),
        ({"enc.4x4_block1.skip.weight": torch.zeros(8)}, "skip.weight is .8,., should be absent"),
        ({"map_layer0.bias": torch.full((32,), torch.nan)}, "map_layer0.bias has values that are"),
        ({"map_layer0.bias": torch.zeros(3)}, "another network"),
        ({"map_layer0.bias": torch.tensor(1.0)}, "another network"),
        ({"dec.8x8_block1.conv0.weight": torch.zeros(8, dtype=torch.int64)}, "should be dense"),
    ],
)
def test_other_networks_are_refused(tmp_path, changes, words):
    published(tmp_path / "model.pth", **changes)
    with pytest.raises(
        ValueError, match=f"model.pth.*{words}.*: give a run's folder or the weights"
    ):
        cifar10.load(tmp_path / "model.pth")


def test_networks_of_the_house_are_refused(tmp_path):
    params = cifar10.train.model.init("T/2", channels=1, classes=2, generator=torch.Generator())
    runtime.save_tensors(tmp_path / "x.safetensors", params, {"run": "{}"})
    with pytest.raises(
        ValueError, match="x.safetensors holds another network: give a run's folder"
    ):
        cifar10.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change, flags, words",
    [
        ({"kind": "latents"}, [], r"^digits: latents \(1, 8, 8\): give pixels of side 4n$"),
        ({"shape": (3, 8, 12)}, [], r"^digits: pixels \(3, 8, 12\): give pixels of side 4n$"),
        ({"shape": (3, 6, 6)}, [], r"^digits: pixels \(3, 6, 6\): give pixels of side 4n$"),
        ({}, ["--width", "6"], "^--width 6: give a multiple of 4 up to 32, or of 32$"),
        ({}, ["--width", "48"], "^--width 48: give a multiple of 4 up to 32, or of 32$"),
    ],
)
def test_other_data_and_widths_are_refused(monkeypatch, tmp_path, change, flags, words):
    monkeypatch.setattr(data, "load_data", lambda *_: data.digits()._replace(**change))
    with pytest.raises(ValueError, match=words):
        cifar10.main(["digits", "--out", str(tmp_path / "run"), *flags], runtime.World())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("width", [4, 12, 20, 28, 32, 64, 96])
def test_group_norms_divide_the_channels_of_these_widths(width):
    with torch.device("meta"):
        shapes = cifar10.shapes(width, blocks=1, side=8, attention=4).items()
        params = {name: torch.empty(shape) for name, shape in shapes}
        z, t = torch.empty(2, 3, 8, 8), torch.empty(2)
        assert cifar10.unet(params, z, t, t).shape == z.shape


@pytest.mark.slow
def test_all_kinds_of_blocks_are_compiled(monkeypatch):
    """As by --compile, but without the compiler's last stage: values and tangents, to one graph."""
    whole = dual.compile
    monkeypatch.setattr(dual, "compile", partial(whole, backend="eager"))
    torch._dynamo.reset()
    method = cifar10.unet_method(4, (3, 8, 8), "v1", compiled=True)
    draws = method.draw((8, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    params = method.init(generator=torch.Generator().manual_seed(1))
    x, equal = torch.randn(8, 3, 8, 8), meanflow.count_equal(draws.t, draws.r)
    found = method.loss(params, x, None, draws, equal)
    wanted = cifar10.loss(params, x, None, draws, equal)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(found, wanted))


def test_each_average_has_a_score_of_its_own(tmp_path, pictures, capsys):
    """And a run's file is one average alone."""
    published(tmp_path / "model.pth")
    scores = []
    for name in ("load", "net_ema2", "load"):
        network = ["--network", f"examples/cifar10.py:{name}", "--out", str(tmp_path / "scores")]
        flags = ["--ref", pictures, "--count", "40", *network]
        evaluate.main([str(tmp_path / "model.pth"), *flags], runtime.World())
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[2] and scores[0]["fid"] != scores[1]["fid"]
    assert scores[1]["network"] == "examples/cifar10.py:net_ema2"
    params = cifar10.init(generator=torch.Generator().manual_seed(0), **TINY)
    runtime.save_tensors(tmp_path / "ema-00000001.safetensors", params, {"run": "{}"})
    assert cifar10.load(tmp_path).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="holds one average: give another file, as ema0.9996-STEP"):
        cifar10.net_ema2(tmp_path)
