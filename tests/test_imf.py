"""imf.py: the authors' numbers, the fast loss, the derivative, guided flows and published names."""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import LAUNCH, finish, start
from safetensors.torch import load_file, save_file
from test_model import compare_compiled
from torch.utils.flop_counter import FlopCounterMode

import data
import dual
import evaluate
import imf
import meanflow
import model
import sample
import train
import weights
from runtime import World

GOLDEN = np.load(Path(__file__).with_name("authors-imf.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
JVPS = torch.func.jvp, dual.jvp


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def hashed(k, shape):
    """Return the numbers in [-1, 1] that the golden weights are made of (see the README there)."""
    h = (1000003 * k + np.arange(np.prod(shape, dtype=int), dtype=np.uint64)).astype(np.uint32)
    h *= np.uint32(2654435761)
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    return torch.from_numpy(h / 2**31 - 1).reshape(shape)


def published():
    """Return the golden weights under their published names."""
    tensors = {}
    for k, name in enumerate(ABOUT["names"]):
        shape = ABOUT["shapes"][name]
        n = hashed(k, shape)
        if "norm" in name:
            n = 1 + 0.3 * n
        elif name.endswith("_scale"):
            n = 0.5 * n
        elif name.endswith(("bias", "_tokens")):
            n = 0.2 * n
        else:
            n = 1.7 * n / np.prod(shape[1:]) ** 0.5
        tensors[name] = n.float()
    return tensors


def golden_draws():
    guidance = 1 - 1 / golden("omega"), golden("low"), golden("high")
    return imf.Draws(golden("e"), golden("t"), golden("r"), golden("dropped"), *guidance)


def close(got, want, tolerance):
    return (got - want).abs().max() <= tolerance * want.abs().max()


# --- the authors' numbers ---


def test_agrees_with_the_authors_code():
    """u, v, du/dt, guided velocity, both errors, loss and every gradient."""
    params = {k: p.requires_grad_() for k, p in imf.convert(published()).items()}
    draws, x, y = golden_draws(), golden("x"), golden("y").long()
    net, seen = partial(imf.imf, params), []

    def spy(*inputs, **guidance):
        seen.append(net(*inputs, **guidance))
        return seen[-1]

    rows, raw = imf.loss(spy, x, y, draws, null=10)
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    v_c, v_null = seen[0][1], seen[1][1]
    given_draws = partial(net, guidance=draws)
    labels = torch.where(draws.drop, 10, y)
    for jvp in JVPS:
        out, (dudt, _) = meanflow.derivative(given_draws, z, draws.t, draws.r, v_c, labels, jvp=jvp)
        assert close(dudt, golden("dudt"), 1e-5)
    u, v_head = out
    assert close(u, golden("u"), 1e-5) and close(v_head, golden("v_head"), 1e-5)
    assert close(v_c, golden("v_c"), 1e-5)
    kappa = imf.gate(draws.t, draws)
    v_g = v + meanflow.append_dims(kappa, v) * (v_c - v_null)
    v_g = torch.where(meanflow.append_dims(draws.drop, v), v, v_g)
    assert close(v_g, golden("v_g"), 1e-5)
    assert close(raw[:, 0], golden("s_u"), 1e-5) and close(raw[:, 1], golden("s_v"), 1e-5)
    assert rows.mean().item() == pytest.approx(float(golden("loss")), rel=1e-5)
    rows.mean().backward()
    for k, name in enumerate(ABOUT["names"]):
        ours, part = name, slice(None)
        for i, letter in enumerate("qkv"):
            if name.endswith(f"attn.{letter}_proj.weight"):
                ours = name.replace(f"{letter}_proj", "qkv")
                part = slice(128 * i, 128 * (i + 1))
        gradient = params[ours].grad[part].double()
        norm, product = golden(f"g.{name}").tolist()
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-5, abs=1e-9), name
        found = (gradient * hashed(1000 + k, gradient.shape)).sum().item()
        assert found == pytest.approx(product, rel=1e-5, abs=1e-5 * norm), name


@pytest.mark.parametrize("steps", [1, 2])
def test_samples_are_the_authors(steps):
    params, y = imf.convert(published()), golden("y").long()
    x = meanflow.sample(imf.guided(params, 8, 0.4, 0.65), golden("e"), y, steps)
    assert close(x, golden(f"sample{steps}"), 1e-5)


# --- the fast form ---


def small(seed=0, size=(128, 1, 2, 2), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    params = imf.init(size, channels=3, classes=5, generator=g)
    return {k: (p + 0.1 * torch.randn(p.shape, generator=g)).to(dtype) for k, p in params.items()}


def batch(seed, rows, share=0.5, dtype=torch.float64, drop=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, 4, 4, generator=g).to(dtype)
    draws = imf.draw(x.shape, generator=g, share=share)
    draws = draws._replace(drop=draws.drop if drop is None else torch.full_like(draws.drop, drop))
    draws = imf.Draws(*(d.to(dtype) if d.is_floating_point() else d for d in draws))
    return x, torch.randint(5, (rows,), generator=g), draws


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, True, False]),
)
def test_the_fast_loss_is_the_loss(seed, rows, share, drop):
    params = {k: p.requires_grad_() for k, p in small(seed).items()}
    x, y, draws = batch(seed, rows, share, drop=drop)
    net, alone = partial(imf.imf, params), partial(imf.imf_velocity, params)
    losses = [imf.loss] + [
        partial(imf.fast_loss, jvp=jvp, velocity=velocity)
        for jvp, velocity in zip(JVPS, (None, alone))
    ]
    found = []
    for loss in losses:
        each, raw = loss(net, x, y, draws, null=5)
        gradients = torch.autograd.grad(each.mean(), params.values(), allow_unused=True)
        found.append([each, raw, *gradients])
    for want, *others in zip(*found):
        for got in others:
            assert (want is None) == (got is None)
            assert want is None or close(got, want, 1e-12)


@pytest.mark.parametrize("rows, equal", [(5, 0), (5, 2), (5, 5), (1, 0), (1, 1)])
def test_the_network_is_evaluated_no_more_than_it_must(rows, equal):
    """And never on no rows: once by each row, and once by each velocity that is not known."""
    x, y, draws = batch(0, rows, equal / rows)
    seen = []

    def net(z, t, r, y, guidance):
        assert {len(a) for a in (z, t, r, y, *guidance)} == {len(z)}
        seen.append(len(z))
        return z, z

    for jvp in JVPS:
        seen.clear()
        imf.fast_loss(net, x, y, draws, null=5, jvp=jvp)
        assert sum(seen) == rows + rows + (rows - equal) and 0 not in seen


def test_dual_jvp_is_torch_func_jvp():
    """Compare u, v, du/dt and gradients; dv/dt, which no loss needs, is left out."""
    params, (x, y, draws) = {k: p.requires_grad_() for k, p in small().items()}, batch(3, 6)
    _, t, r, _, *guidance = draws
    guidance = imf.Guidance(*guidance)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net, found = partial(imf.imf, params, guidance=guidance), []
    for jvp in JVPS:
        (u, v_head), tangents = meanflow.derivative(net, x, t, r, v, y, jvp=jvp)
        loss = (u.square() + v_head.sin()).sum()
        found.append([u, v_head, tangents[0], *torch.autograd.grad(loss, params.values())])
    assert all(close(a, b, 1e-12) for a, b in zip(*found)) and not tangents[1].any()
    kappa = guidance.kappa
    alone = imf.imf_velocity(params, x, t, y, kappa)
    assert close(alone, imf.imf(params, x, t, t, y, imf.at_all_times(kappa))[1], 1e-12)


def test_tangents_in_bfloat16():
    """du/dt is right to 2 %, and no worse than torch.func.jvp's."""
    errors = []
    for seed in range(4):
        params, (x, y, draws) = small(seed, (128, 2, 2, 2)), batch(seed, 6)
        _, t, r, _, *guidance = draws
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        net = partial(imf.imf, params, guidance=imf.Guidance(*guidance))
        exact = meanflow.derivative(net, x, t, r, v, y)[1][0]
        params = {k: p.float() for k, p in params.items()}
        x, t, r, v, *guidance = (a.float() for a in (x, t, r, v, *guidance))
        net = partial(imf.imf, params, guidance=imf.Guidance(*guidance))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            rounded = [meanflow.derivative(net, x, t, r, v, y, jvp=jvp)[1][0] for jvp in JVPS]
        errors.append([((a - exact).norm() / exact.norm()).item() for a in rounded])
    theirs, ours = torch.tensor(errors).mean(0)
    assert ours < 0.02 and ours <= 1.05 * theirs, (ours, theirs)


# --- names, sizes, draws ---


def test_parameters_are_the_published():
    counts = {
        "iB/2": (88_948_256, 145_596_960, 186, 290),
        "iM/2": (173_921_312, 230_570_016, 342, 446),
        "iL/2": (409_071_648, 509_752_352, 446, 550),
        "iXL/2": (610_433_056, 711_113_760, 654, 758),
    }
    for size, (sampling, training, few, many) in counts.items():
        wide, shared, heads, patch = imf.SIZES[size]
        for trains, numbers, tensors in ((False, sampling, few), (True, training, many)):
            found = imf.shapes(imf.Config(wide, shared, heads, patch, 4, 1000, trains))
            blocks = shared + heads * (1 + trains)
            assert len(found) + 2 * blocks == tensors  # q, k, v are one here
            assert sum(int(np.prod(shape)) for shape in found.values()) == numbers


def test_all_tensors_of_b2_have_the_published_names_and_shapes():
    shapes = json.loads(Path(__file__).with_name("imf-B-2-shapes.json").read_text())
    assert len(shapes) == 290
    for trains in (True, False):
        tensors = {
            f"net.{name}": torch.zeros(()).expand(shape)
            for name, shape in shapes.items()
            if trains or not name.startswith("v_heads.")
        }
        assert len(tensors) == (290 if trains else 186)
        params = imf.convert(tensors)
        want = imf.Config(*imf.SIZES["iB/2"], 4, 1000, trains)
        assert imf.config(params) == want
        assert {name: tuple(p.shape) for name, p in params.items()} == imf.shapes(want)


@pytest.mark.parametrize("form", ["net.{}", "{}"])
@pytest.mark.parametrize("flax", [True, False])
def test_published_names_are_read(form, flax):
    tensors = {}
    for name, p in published().items():
        if flax and "norm" not in name and not name.startswith("x_embedder"):
            name = name.replace("_table.weight", "_table._flax_embedding.weight")
            if "_flax_embedding" not in name:
                for end in ("weight", "bias"):
                    name = (
                        name.removesuffix(end)
                        + "_flax_linear." * name.endswith(end)
                        + end * (name.endswith(end))
                    )
        tensors[form.format(name)] = p
    params, plain = imf.convert(tensors), published()
    assert imf.config(params) == (128, 1, 2, 2, 4, 10, True)
    assert params.keys() == imf.shapes(imf.config(params)).keys()
    for name, p in params.items():
        parts = [name.replace("qkv", f"{k}_proj") for k in "qkv"] if "qkv" in name else [name]
        assert torch.equal(p, torch.cat([plain[part] for part in parts]))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"shared_blocks.0.attn.k_proj.weight": None},
            "shared_blocks.0.attn.k_proj.weight is miss",
        ),
        ({"u_heads.1.mlp.w2.weight": None}, "u_heads.1.mlp.w2.weight is missing, should be (128,"),
        ({"z_tokens": torch.ones(2)}, "z_tokens is (2,), should be absent"),
        ({"time_tokens": torch.ones(2, 128)}, "time_tokens is (2, 128), should be (4, 128)"),
        ({"time_tokens": torch.full((4, 128), torch.nan)}, "time_tokens has values that are not f"),
        ({"x_embedder.proj.weight": None}, "not the weights of an iMF"),
    ],
)
def test_other_tensors_are_named(change, words):
    tensors = {k: p for k, p in (published() | change).items() if p is not None}
    with pytest.raises(ValueError) as error:
        weights.convert("x.pth", tensors)
    assert str(error.value).startswith(f"x.pth: {words}")


def test_draws():
    draws = imf.draw((4000, 2), generator=torch.Generator().manual_seed(0))
    kappa, low, high = draws[4:]
    first = torch.arange(4000) < 2000
    assert (draws.t == draws.r).tolist() == first.tolist()
    assert (low[first] == 0).all() and (high[first] == 1).all()
    assert low[~first].max() < 0.5 <= high[~first].min()
    assert abs(low[~first].mean() - 0.25) < 0.02 and abs(high[~first].mean() - 0.75) < 0.02
    omega = 1 / (1 - kappa)
    assert omega.min() >= 1 and omega.max() < 8
    assert abs(omega.log().mean() - np.log(8) / 2) < 0.05  # log-uniform
    assert draws.drop.sum() > 300 and draws.drop[: draws.drop.sum()].all()


def test_the_initial_network_says_zero():
    params = imf.init((128, 1, 1, 2), channels=3, classes=5, generator=torch.Generator())
    x, y, draws = batch(0, 4, dtype=torch.float32)
    u, v = imf.imf(params, x, draws.t, draws.r, y, draws)
    assert not u.any() and not v.any() and params["shared_blocks.0.norm1.weight"].eq(1).all()
    assert params["shared_blocks.0.attn.qkv.weight"].std() == pytest.approx(
        0.32 / 128**0.5, rel=0.02
    )
    assert params["h_embedder.mlp.0.weight"].std() == pytest.approx(1 / 16, rel=0.02)
    params = imf.init((512, 1, 1, 2), channels=4, classes=99, generator=torch.Generator())
    for name in ("class_tokens", "time_tokens", "y_embedder.embedding_table.weight"):
        assert params[name].std() == pytest.approx(512**-0.5, rel=0.05)
    most = (6 / (16 + 512)) ** 0.5  # Xavier uniform, of the patches as a linear
    patches = params["x_embedder.proj.weight"]
    assert patches.abs().max() == pytest.approx(most, rel=0.01)
    assert patches.std() == pytest.approx(most / 3**0.5, rel=0.02)


def test_other_widths_and_parameters_that_cannot_train_are_refused():
    for width in (96, 1152):
        with pytest.raises(ValueError, match=f"width {width}, where an iMF has a multiple of 64"):
            imf.config(imf.init((width, 1, 1, 2), generator=torch.Generator()))
    params = {k: p for k, p in small().items() if not k.startswith("v_heads")}
    x, y, draws = batch(0, 4)
    with pytest.raises(ValueError, match="no v_heads: these parameters can only be drawn from"):
        imf.imf_velocity(params, x, draws.t, y, draws.kappa)


# --- flows whose answer is known ---

MEAN = torch.tensor([[2.0, -1.0], [-1.0, 0.5], [0.0, 0.0]], dtype=torch.float64)  # by class
SPREAD = torch.tensor([0.5, 0.7, 1.3], dtype=torch.float64)


def gaussian_velocity(z, t, y):
    """Return E[e - x | z] of x ~ N(MEAN[y], SPREAD[y]^2)."""
    t, s = t[:, None], SPREAD[y][:, None]
    a, variance = 1 - t, (1 - t) ** 2 * s**2 + t**2
    return (t - a * s**2) / variance * (z - a * MEAN[y]) - MEAN[y]


def gaussian_average(z, t, r, y):
    """Return u of the same flow: its map scales the distance from the mean by the deviation."""
    t, r, s = t[:, None], r[:, None], SPREAD[y][:, None]
    deviation = [((1 - a) ** 2 * s**2 + a**2).sqrt() for a in (t, r)]
    at_r = (1 - r) * MEAN[y] + deviation[1] / deviation[0] * (z - (1 - t) * MEAN[y])
    return torch.where(t == r, gaussian_velocity(z, t[:, 0], y), (z - at_r) / (t - r))


@given(st.integers(0, 10**6))
def test_the_true_average_velocity_is_stationary(seed):
    """With the marginal velocity for e - x, and unguided, V is that velocity: no error is left."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 2, generator=g).double()
    r, t = torch.rand(2, 6, generator=g).double().sort(0).values
    y = torch.arange(6) % 2
    v = gaussian_velocity(z, t, y)

    def net(z, t, r, y, guidance):
        return gaussian_average(z, t, r, y), gaussian_velocity(z, t, y)

    x = z - t[:, None] * v  # so that the conditional velocity is the marginal one
    none = torch.zeros_like(t), torch.zeros_like(t), torch.ones_like(t)
    draws = imf.Draws(x + v, t, r, torch.zeros(6, dtype=torch.bool), *none)
    _, raw = imf.loss(net, x, y, draws, null=2)
    assert raw.max() < 1e-20


@given(st.integers(0, 10**6), st.floats(1, 8))
def test_the_guided_velocity_is_stationary_at_scale_omega_within_the_interval(seed, omega):
    """Its fixed point is omega v(y) + (1 - omega) v(null) inside; v(y) outside, or if dropped."""
    g = torch.Generator().manual_seed(seed)
    z, t = torch.randn(8, 2, generator=g).double(), torch.rand(8, generator=g).double()
    low, high = torch.rand(2, 8, generator=g).double().sort(0).values
    y, drop = torch.arange(8) % 2, torch.arange(8) < 2
    low[:2], high[:2] = 0, 1  # a row of the null class learns it with any kappa
    v = gaussian_velocity(z, t, torch.where(drop, 2, y))

    def net(z, t, r, y, guidance):
        inside = (guidance.low <= t) & (t <= guidance.high) & (y != 2)
        scale = torch.where(inside, 1 / (1 - guidance.kappa), 1)[:, None]
        null = gaussian_velocity(z, t, torch.full_like(y, 2))
        v = scale * gaussian_velocity(z, t, y) + (1 - scale) * null
        return v, v

    kappa = torch.full_like(t, 1 - 1 / omega)
    draws = imf.Draws(z + (1 - t[:, None]) * v, t, t, drop, kappa, low, high)
    _, raw = imf.loss(net, z - t[:, None] * v, y, draws, null=2)
    assert raw.max() < 1e-18 * omega**2


# --- the derivations, and the loss of a network with one head ---


@given(st.integers(0, 10**6), st.floats(1, 20))
def test_told_kappa_the_flow_is_guided_with_scale_omega(seed, omega):
    """Both forms of (2) are one; an error of the network's velocity returns kappa times as large;
    and the target is affine in kappa."""
    g = torch.Generator().manual_seed(seed)
    v_class, v_null, error = torch.randn(3, 5, 2, generator=g).double()
    kappa, t, drop = 1 - 1 / omega, torch.rand(5, generator=g), torch.zeros(5, dtype=torch.bool)

    def mean_target(own, kappa):
        return meanflow.mix(v_class, own, v_null, t, drop, 1, kappa, (0, 1))

    v_g = v_null + omega * (v_class - v_null)
    assert close(mean_target(v_g, kappa), v_g, 1e-12)
    assert (mean_target(v_g + error, kappa) - v_g - kappa * error).abs().max() < 1e-12 * omega
    first, second, third = (mean_target(v_g, k) for k in (0, 0.3, 0.6))
    assert (third - 2 * second + first).abs().max() < 1e-12 * omega


def flow(theta):
    """Return a net of one head: the true u of the Gaussian flow, and theta times (t - r) beside."""
    return lambda z, t, r, y: gaussian_average(z, t, r, y) + (t - r)[:, None] * theta * z.sin()


def pairs(seed):
    """Return (x, y, draws, v): pairs of rows with the same z, whose e - x have the mean v."""
    g = torch.Generator().manual_seed(seed)
    z, away = torch.randn(2, 6, 2, generator=g).double()
    r, t = torch.rand(2, 6, generator=g).double().sort(0).values
    y, none = torch.arange(6) % 2, torch.zeros(12, dtype=torch.bool)
    z, t, r, y, v = (
        a.repeat(2, *[1] * (a.ndim - 1)) for a in (z, t, r, y, gaussian_velocity(z, t, y))
    )
    e_minus_x = v + torch.cat((away, -away))
    x = z - t[:, None] * e_minus_x
    return x, y, meanflow.Draws(x + e_minus_x, t, r, none), v


@given(st.integers(0, 10**6))
def test_v_of_the_true_average_velocity_is_the_velocity(seed):
    """(1): no error is left where e - x is the marginal velocity, whatever the direction was."""
    x, y, draws, v = pairs(seed)
    z, _ = meanflow.interpolate(x, draws.e, draws.t)
    draws = draws._replace(e=z + (1 - draws.t[:, None]) * v)
    _, raw = imf.one_head_loss(flow(0), z - draws.t[:, None] * v, y, draws, null=2)
    assert raw.max() < 1e-20


@given(st.integers(0, 10**6), st.floats(-1, 1))
def test_both_losses_have_the_same_expected_gradient_where_the_own_velocity_is_right(seed, theta):
    """Over e - x given z, at p = 0, whatever u is where r < t; else they differ."""
    x, y, draws, _ = pairs(seed)
    found = []
    for wrong in (0, 0.3):
        for loss in (meanflow.loss, imf.one_head_loss):
            weight = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
            net = flow(weight)
            off = lambda z, t, r, y: net(z, t, r, y) + wrong * z  # noqa: E731
            rows, _ = loss(off, x, y, draws, null=2, p=0)
            found.append(torch.autograd.grad(rows.mean(), weight)[0].item())
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-12)
    assert abs(found[3] - found[2]) > 1e-9


@given(st.integers(0, 10**6))
def test_the_noise_of_the_residual(seed):
    """It is that of e - x; MeanFlow's is that times the Jacobian of the map from z_t to z_r."""
    x, y, draws, v = pairs(seed)
    z, e_minus_x = meanflow.interpolate(x, draws.e, draws.t)
    noise, t, r = (e_minus_x - v), draws.t, draws.r

    def spread(along):
        _, dudt = meanflow.derivative(flow(0), z, t, r, along, y)
        return e_minus_x - (t - r)[:, None] * dudt - gaussian_average(z, t, r, y)

    deviation = [((1 - a) ** 2 * SPREAD[y] ** 2 + a**2).sqrt() for a in (t, r)]
    jacobian = (deviation[1] / deviation[0])[:, None]
    assert (spread(v) - noise).abs().max() < 1e-12
    assert (spread(e_minus_x) - jacobian * noise).abs().max() < 1e-12


@given(st.integers(0, 10**6), st.sampled_from([(2.0, 0.0), (1.0, 0.5), (0.2, 0.92)]))
def test_the_guided_flow_of_one_head_is_stationary(seed, factors):
    """At scale omega / (1 - kappa) inside the interval; and du/dt is along its velocity."""
    x, y, draws, _ = pairs(seed)
    (omega, kappa), t = factors, draws.t
    z, _ = meanflow.interpolate(x, draws.e, t)
    scale = omega / (1 - kappa)

    def velocity(z, t, y):
        away = gaussian_velocity(z, t, y) - gaussian_velocity(z, t, torch.full_like(y, 2))
        inside = ((t <= 0.6) & (y != 2))[:, None]
        return gaussian_velocity(z, t, y) + torch.where(inside, scale - 1, 0) * away

    seen = []

    def net(z, t, r, y):
        return velocity(z, t, y)

    def spy(f, primals, tangents):
        seen.append(tangents[0])
        return torch.func.jvp(f, primals, tangents)

    v = gaussian_velocity(z, t, y)
    x, draws = z - t[:, None] * v, draws._replace(e=z + (1 - t[:, None]) * v, r=0.99 * t)
    options = dict(null=2, omega=omega, kappa=kappa, interval=(0, 0.6), equal=0)
    imf.fast_one_head_loss(net, x, y, draws, jvp=spy, **options)
    assert close(seen[0], velocity(z, t, y), 1e-12)
    draws = draws._replace(r=t)
    _, raw = imf.fast_one_head_loss(net, x, y, draws, **options | {"equal": len(x)})
    assert raw.max() < 1e-20


ONE_HEAD = {
    "unguided": {},
    "omega": {"omega": 2.0},
    "kappa": {"omega": 0.2, "kappa": 0.92},
    "interval": {"kappa": 0.5, "interval": (0.3, 0.7)},
    "CIFAR-10": {"kappa": 0.5, "p": 0.75, "c": 1e-3},
    "told": {},
}


def one_head(seed, rows, share, mode):
    """Return (params, net, x, y, draws, options) of a DiT, told its guidance or not."""
    g = torch.Generator().manual_seed(seed)
    params = model.init((64, 1, 2), channels=3, classes=5, generator=g)
    params = {k: p + 0.1 * torch.randn(p.shape, generator=g) for k, p in params.items()}
    params = {k: p.double().requires_grad_() for k, p in params.items()}
    x, y, draws = batch(seed, rows, share)
    net, options = partial(model.dit, params), {"null": 5} | ONE_HEAD[mode]
    if mode == "told":
        kappa = draws.kappa[:, None, None, None]
        options |= {"kappa": kappa, "interval": (draws.low, draws.high)}
        y, options["null"] = (y, kappa, draws.low, draws.high), (5, 0.0, 0.0, 1.0)

        def net(z, t, r, y):
            label, kappa, low, high = y
            told = kappa * (low + high)[:, None, None, None]
            return (1 + told) * model.dit(params, z, t, r, label)

    return params, net, x, y, meanflow.Draws(*draws[:4]), options


@pytest.mark.parametrize("mode", ONE_HEAD)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_the_fast_loss_of_one_head_is_the_loss(mode, seed, rows, share):
    params, net, x, y, draws, options = one_head(seed, rows, share, mode)
    losses = [imf.one_head_loss] + [partial(imf.fast_one_head_loss, jvp=jvp) for jvp in JVPS]
    found = []
    for loss in losses:
        each, raw = loss(net, x, y, draws, **options)
        found.append([each, raw, *torch.autograd.grad(each.mean(), params.values())])
    for want, *others in zip(*found):
        for got in others:
            assert (got - want).abs().max() <= 1e-11 * (1e-3 + want.abs().max())


@pytest.mark.parametrize("mode", ONE_HEAD)
def test_the_loss_of_one_head_is_meanflows_along_the_own_velocity(mode):
    """Number and gradient: the error of u to v_g - (t - r) du/dt, with nothing but u's gradient."""
    params, net, x, y, draws, options = one_head(0, 8, 0.25, mode)
    labels = meanflow.replace(y, options["null"], draws.drop)
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    own = net(z, draws.t, draws.t, labels).detach()
    null = meanflow.replace(y, options["null"], torch.ones_like(draws.drop))
    null = net(z, draws.t, draws.t, null).detach()
    omega, kappa = options.get("omega", 1), options.get("kappa", 0)
    low, high = options.get("interval", (0, 1))
    guided = (low <= draws.t) & (draws.t <= high) & ~draws.drop
    v_g = omega * v + kappa * own + (1 - omega - kappa) * null
    v_g = torch.where(guided[:, None, None, None], v_g, v)
    target = meanflow.target(net, z, draws.t, draws.r, own, labels) - own + v_g
    u = net(z, draws.t, draws.r, labels)
    square = (u - target).square().sum((1, 2, 3))
    weight = 1 / (square + options.get("c", 0.01)).detach() ** options.get("p", 1)
    rows, raw = imf.one_head_loss(net, x, y, draws, **options)
    assert close(raw, square, 1e-12) and close(rows, weight * square, 1e-12)
    wanted = torch.autograd.grad((weight * square).mean(), params.values())
    for got, want in zip(torch.autograd.grad(rows.mean(), params.values()), wanted):
        assert (got - want).abs().max() <= 1e-11 * (1e-3 + want.abs().max())


def test_the_authors_network_of_two_heads_as_one():
    """A net whose u at r = t is their v head, told its guidance, has their errors in every row."""
    params, draws, labels = imf.convert(published()), golden_draws(), golden("y").long()
    kappa, rest = draws.kappa[:, None, None, None], (draws.low, draws.high)

    def net(z, t, r, y):
        label, kappa, low, high = y
        told = imf.Guidance(kappa.flatten(), low, high)
        u, _ = imf.imf(params, z, t, r, label, told)
        _, v = imf.imf(params, z, t, t, label, imf.at_all_times(imf.gate(t, told)))
        return torch.where((t == r)[:, None, None, None], v, u)

    y, null = (labels, kappa, *rest), (10, 0.0, 0.0, 1.0)
    options = dict(null=null, kappa=kappa, interval=rest)
    want = torch.where(draws.t == draws.r, golden("s_v"), golden("s_u"))[~draws.drop]
    assert draws.drop.any() and (draws.r < draws.t)[~draws.drop].any()
    for loss in (imf.one_head_loss, *(partial(imf.fast_one_head_loss, jvp=jvp) for jvp in JVPS)):
        _, raw = loss(net, golden("x"), y, meanflow.Draws(*draws[:4]), **options)
        assert close(raw[~draws.drop], want, 1e-5)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("rows, equal", [(5, 0), (5, 2), (5, 5), (1, 0), (1, 1)])
def test_one_head_is_evaluated_no_more_than_it_must(rows, equal, guided):
    x, y, draws = batch(0, rows, equal / rows)
    seen = []

    def net(z, t, r, y):
        assert {len(a) for a in (z, t, r, y)} == {len(z)}
        seen.append((len(z), torch.is_grad_enabled()))
        return z

    options = dict(null=5, kappa=0.5 * guided)
    imf.fast_one_head_loss(net, x, y, meanflow.Draws(*draws[:4]), **options)
    assert sum(n for n, graph in seen if graph) == rows and (0, True) not in seen
    assert sum(n for n, graph in seen if not graph) == rows - equal + rows * guided


@pytest.mark.parametrize(
    "share, guided, units", [(0.75, 0, 3.5), (0.75, 1, 4.5), (0.5, 0, 4), (0.5, 1, 5)]
)
def test_what_a_step_of_one_head_costs(share, guided, units):
    """In forwards of the network, counted: most of it are linears, so a little is left open."""
    params, _, x, y, draws, _ = one_head(0, 8, share, "unguided")
    wide = torch.nn.Parameter(torch.randn(4, 512, 512, dtype=torch.float64) / 23)

    def net(z, t, r, y):
        h = F.pad(z.flatten(1), (0, 464))
        for w in wide:
            h = F.linear(h, w).tanh()
        return h[:, :48].reshape(z.shape)

    def count(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    def step():
        options = dict(null=5, kappa=0.5 * guided, equal=int(8 * share))
        rows, _ = imf.fast_one_head_loss(net, x, y, draws, **options)
        rows.mean().backward()

    once = count(lambda: net(x, draws.t, draws.r, y))
    first = 1 / len(wide)  # the data need no gradient
    assert count(step) / once == pytest.approx(units - first, abs=1e-9)


# --- files to draw from ---


def saved(path, tensors=None):
    torch.save({f"net.{k}": p for k, p in (tensors or published()).items()}, path)
    return path


def draw_from(path, tmp_path, capsys, *flags):
    words = [str(path), "--ref", "digits", "--count", "4", *flags]
    evaluate.main(words, World())
    return json.loads(capsys.readouterr().out)


def grey(trains=False):
    """Return an iMF of 1-channel 8x8 images as it is published: without the v head's blocks."""
    g = torch.Generator().manual_seed(0)
    params = imf.init((64, 1, 1, 2), channels=1, classes=3, generator=g)
    params = {k: p + 0.1 * torch.randn(p.shape, generator=g) for k, p in params.items()}
    return {k: p for k, p in params.items() if trains or not k.startswith("v_heads")}


def test_published_weights_are_drawn_from(tmp_path, monkeypatch):
    """With latents of their own mean and deviation, at the published guidance of their size."""
    tensors = published()
    seen = []
    monkeypatch.setattr(weights, "image_size", lambda *_: ("latents", (8, 8)))
    monkeypatch.setattr(weights, "load_vae", lambda *_: {})
    monkeypatch.setattr(sample, "decode", lambda vae, z: seen.append(z) or z[:, :3])
    path = saved(tmp_path / "iMF.pth", tensors)
    words = [str(path), "--vae", "x", "--classes", "3,1", "--out", str(tmp_path / "x.png")]
    sample.main([*words, "--omega", "8", "--interval", "0.4,0.65"], World())
    params, e = imf.convert(tensors), sample.noise(0, range(2), (4, 8, 8))
    guidance = imf.Guidance(*(torch.full((2,), v) for v in (1 - 1 / 8, 0.4, 0.65)))
    one = torch.ones(2)
    x = e - imf.imf(params, e, one, 0 * one, torch.tensor([3, 1]), guidance)[0]
    mean, std = (torch.tensor(a)[:, None, None] for a in imf.LATENTS.values())
    assert close(seen[0], x * std + mean, 1e-5)


def test_the_guidance_of_a_run_is_the_published_or_that_of_the_flags(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file(grey(), path, {"kind": "pixels", "resolution": "8"})
    assert draw_from(path, tmp_path, capsys)["guidance"] == [8.0, 0.4, 0.65]
    line = draw_from(path, tmp_path, capsys, "--omega", "3", "--interval", "0.1,0.9")
    assert line["guidance"] == [3.0, 0.1, 0.9]
    monkeypatch.setitem(imf.GUIDANCE, (64, 2), [(10.5, 0.4, 0.6), (4.0, 0.36, 0.64)])
    assert draw_from(path, tmp_path, capsys)["guidance"] == [10.5, 0.4, 0.6]
    assert draw_from(path, tmp_path, capsys, "--steps", "2")["guidance"] == [4.0, 0.36, 0.64]
    save_file(grey(trains=True), path, {"kind": "pixels", "resolution": "8"})
    assert draw_from(path, tmp_path, capsys)["fid"] > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--omega", "0.5"], "omega 0.5, interval 0.4,0.65: give omega >= 1 and an interval of"),
        (["--omega", "2,nan"], "--omega: 2,nan: give numbers, as 1,4,8"),
        (["--interval", "0.6,0.4"], "omega 8, interval 0.6,0.4: give omega >= 1 and an interval"),
        (["--interval", "0.6"], "--interval: 0.6: give numbers, two times, as 0.4,0.65"),
        (["--interval", "0.6,x"], "--interval: 0.6,x: give numbers, two times, as 0.4,0.65"),
        (["--omega", "two"], "--omega: two: give numbers, as 1,4,8"),
        (["--omega", "2,3", "--images", "x"], "--omega takes one number with --images: leave out"),
        (["--convention", "sit"], "x.pth is a MeanFlow, whose convention is known: leave out"),
        (["--scale", "2"], "x.pth makes pixels: leave it out"),
    ],
)
def test_bad_guidance(monkeypatch, tmp_path, flags, words):
    torch.save(grey(), tmp_path / "x.pth")
    monkeypatch.setattr(weights, "image_size", lambda *_: ("pixels", (8, 8)))
    with pytest.raises(ValueError) as error:
        sample.main([str(tmp_path / "x.pth"), *flags], World())
    assert words in str(error.value)


def test_scores_are_of_one_guidance_and_latents_of_their_own_scale(monkeypatch, tmp_path):
    path = str(saved(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match="--omega: invalid float value: '2,3'"):
        evaluate.main([path, "--ref", "digits", "--omega", "2,3"], World())
    monkeypatch.setattr(weights, "image_size", lambda *_: ("latents", (8, 8)))
    with pytest.raises(ValueError, match="--scale would .* as .* has a scale for each channel: le"):
        sample.main([path, "--vae", "x", "--scale", "2"], World())


def test_several_omegas_have_a_row_each(tmp_path):
    path, out = tmp_path / "x.safetensors", tmp_path / "x.png"
    save_file(grey(), path, {"kind": "pixels", "resolution": "8"})
    flags = ["--classes", "0,1,2", "--omega", "1,8", "--seed", "3"]
    sample.main([str(path), *flags, "--out", str(out)], World())
    sampler = weights.load(path)
    guided = [sampler._replace(guidance=(omega, 0.4, 0.65)) for omega in (1, 8)]
    x = torch.cat([sample.generate(each, torch.arange(3), seed=3) for each in guided])
    assert (x[:3] != x[3:]).any()
    sample.save_grid(sample.to_uint8(x, sampler), tmp_path / "y.png", columns=3)
    assert out.read_bytes() == (tmp_path / "y.png").read_bytes()


def test_guidance_and_latent_statistics_travel_in_the_metadata(tmp_path):
    g = torch.Generator().manual_seed(0)
    params = imf.init((64, 1, 1, 2), channels=4, classes=3, generator=g)
    metadata = {"kind": "latents", "resolution": "64"}
    path = tmp_path / "x.safetensors"
    save_file(params, path, metadata)
    published = weights.load(path)
    mean, std = (torch.tensor(a).view(4, 1, 1) for a in imf.LATENTS.values())
    assert published.guidance == (8.0, 0.40, 0.65)
    assert close(published.shift, mean, 1e-7) and close(1 / published.scale, std, 1e-7)
    latents = {"mean": [1, 2, 3, 4], "std": [4, 3, 2, 1]}
    own = {"guidance": "[[3, 0.1, 0.9], [2, 0, 1]]", "latents": json.dumps(latents)}
    save_file(params, path, metadata | own)
    found = weights.load(path)
    assert found.guidance == (3, 0.1, 0.9)
    assert [weights.load(path, steps=k).guidance for k in (2, 4)] == [(2, 0, 1), (2, 0, 1)]
    assert found.shift.flatten().tolist() == latents["mean"]
    assert (1 / found.scale).flatten().tolist() == pytest.approx(latents["std"])
    bad = "[[3, 0.9, 0.1]]", "[3]", "[3, 0, 1]", '"x"', "{", "[[3, 0, null]]", '{"a": 1}'
    bad = [("guidance", value) for value in bad]
    flat = '{"mean": [1, 2, 3, 4], "std": [1, 2, 3, 0]}'
    short = '{"mean": [1], "std": [1]}'
    bad += [("latents", value) for value in ('{"mean": [1, 2, 3, 4]}', "3", short, flat)]
    for key, value in bad:
        save_file(params, path, metadata | {key: value})
        with pytest.raises(ValueError, match="x.safetensors: metadata guidance or latents are no"):
            weights.load(path)


def test_a_dit_takes_no_omega_and_starts_from_no_imf(tmp_path):
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "dit.safetensors"
    init = partial(model.init, (64, 1, 2), channels=1, classes=3, generator=g)
    save_file(init(), path, {"kind": "pixels", "resolution": "8"})
    ignored = "--omega would be ignored as .* was trained with its guidance: leave it out"
    with pytest.raises(ValueError, match=ignored):
        sample.main([str(path), "--omega", "3"], World())
    torch.save(grey(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth is an iMF: give --init weights of the same --size"):
        weights.start_from(tmp_path / "x.pth", None, list("abc"), init, generator=g)


def test_training_starts_from_an_imf_that_has_its_v_head(tmp_path, capsys):
    """Under our or the published names; by class names the file knows, new ones from null."""
    g = torch.Generator().manual_seed(1)
    init = partial(imf.init, (64, 1, 1, 2), channels=1, classes=3)
    path = tmp_path / "x.safetensors"
    start = partial(weights.start_from, path, None, ["b", "x", "c"], init, generator=g)
    full = grey(trains=True)
    metadata = {"kind": "pixels", "resolution": "8", "run": "{}", "classes": '["a", "b", "c"]'}
    save_file(full, path, metadata)
    taken = start()
    assert "created [], 1 labels are new" in capsys.readouterr().out
    assert taken.keys() == init(generator=g).keys()
    rows = taken.pop(weights.LABELS)
    assert torch.equal(rows, full[weights.LABELS][[1, 3, 2, 3]])
    assert all(torch.equal(p, full[name]) for name, p in taken.items())
    save_file(grey(), path, metadata)
    with pytest.raises(
        ValueError, match="x.safetensors: v_heads.0.* is missing.*of an iMF with v_heads"
    ):
        start()
    dit = model.init((64, 1, 2), channels=1, classes=3, generator=g)
    save_file(dit, path, metadata)
    with pytest.raises(
        ValueError, match="x.safetensors is no iMF: give --init weights of the same"
    ):
        start()
    other = imf.init((64, 2, 1, 2), channels=1, classes=3, generator=g)
    save_file(other, path, metadata)
    with pytest.raises(ValueError, match="shared_blocks.1.* should be absent: give --init"):
        start()


def test_other_weights_of_an_imf_are_named(tmp_path):
    tensors = published()
    del tensors["time_tokens"]
    with pytest.raises(
        ValueError, match=r"x.pth: time_tokens is missing, should be \(4, 128\): give"
    ):
        weights.load(saved(tmp_path / "x.pth", tensors))


# --- training ---


def train_imf(folder, steps, *flags):
    words = ["--size", "iT", "--batch", "8", "--save", "2", "--steps", str(steps), *flags]
    with mock.patch.object(evaluate, "report", lambda *_: None):
        train.main([*words, "--out", str(folder)], World())


def test_the_recipe_is_the_authors():
    for size, epochs in (("iB/2", 640), ("iM/2", 640), ("iL/2", 640), ("iXL/2", 800)):
        recipe = train.RECIPES[size]
        found = recipe.lr, recipe.batch, recipe.epochs, recipe.images, recipe.ema, recipe.warmup
        assert found == (1e-4, 1024, epochs, 1281167, 0.9999, 10)


def test_the_step_size_grows_for_ten_epochs_or_the_same_share_of_a_shorter_run(monkeypatch, capsys):
    images = torch.zeros(1).expand(1281167)
    imagenet = data.digits()._replace(labels=images, items=images, shape=(4, 32, 32))
    monkeypatch.setattr(data, "load_data", lambda *_: imagenet)
    plans = []
    monkeypatch.setattr(train, "fit", lambda method, dataset, plan, *_, **__: plans.append(plan))
    for flags, steps in (([], 12_510), (["--steps", "6400"], 100), (["--size", "B/4"], 0)):
        train.main(["--size", "iB", *flags], World())
        assert abs(plans[-1].warmup - steps) <= 3
        assert ("--lr grows for" in capsys.readouterr().out) == (steps > 0)


def make_method(compiled=False, **options):
    options = dict(channels=1, classes=10, kind="pixels") | options
    return train.imf_method("iT/2", compiled=compiled, **options)


PLAN = train.Plan(lr=6e-3, batch=8, steps=4)


def test_a_method_is_of_any_size():
    method = train.imf_method((64, 1, 2, 2), channels=1, classes=3, kind="pixels")
    params = method.init(generator=torch.Generator().manual_seed(0))
    assert imf.config(params) == (64, 1, 2, 2, 1, 3, True)
    with pytest.raises(ValueError, match="size 'iZ/2' is unknown: choose one of iT/2, "):
        train.imf_method("iZ/2", channels=1, classes=3, kind="pixels").init(generator=None)


def test_images_of_one_class_are_not_guided():
    one = data.digits()._replace(classes=["all"], labels=torch.zeros(1797, dtype=torch.int64))
    method = make_method(classes=1)
    [(_, _, draws, _)] = next(train.stream(method, one, PLAN, 0, World()))
    assert not draws.kappa.any() and method.guidance == (1, 0, 1)
    [(_, _, draws, _)] = next(train.stream(make_method(), data.digits(), PLAN, 0, World()))
    assert draws.kappa.all() and make_method().guidance == (1.5, 0, 1)
    assert imf.default_guidance(imf.Config(*imf.SIZES["iB/2"], 1, 1, True)) == [(1, 0, 1)]


def test_what_the_authors_sample_with():
    """Guidance by size and steps, and the latents' mean and deviation (imeanflow's eval_config)."""
    one = {"iB/2": (8.0, 0.40, 0.65), "iM/2": (10.5, 0.40, 0.60), "iL/2": (10.5, 0.40, 0.60)}
    one["iXL/2"] = (8.0, 0.42, 0.62)
    for size, guidance in one.items():
        config = imf.Config(*imf.SIZES[size], 4, 1000, False)
        for steps in (1, 2, 3):
            two = size == "iXL/2" and steps > 1
            found = imf.default_guidance(config)
            assert found[min(steps, len(found)) - 1] == ((4.0, 0.36, 0.64) if two else guidance)
    assert imf.LATENTS["mean"] == (0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert imf.LATENTS["std"] == (4.85503674, 5.31922414, 3.93725398, 3.9870003)


def test_a_run_goes_on_bit_for_bit_and_is_drawn_from_with_any_guidance(tmp_path):
    train_imf(tmp_path / "whole", 6)
    train_imf(tmp_path / "half", 4)
    train_imf(tmp_path / "half", 6)
    for kind in ("ema", "state"):
        whole, half = (
            load_file(tmp_path / name / f"{kind}-00000006.safetensors")
            for name in ("whole", "half")
        )
        assert all(torch.equal(half[name], p) for name, p in whole.items())
    first, *lines = map(json.loads, (tmp_path / "half/log.jsonl").read_text().splitlines())
    assert not {"omega", "kappa", "interval"} & first.keys()  # they are drawn
    assert all(line["raw_v"] > 0 and 1.9 < line["loss"] <= 2 for line in lines)
    found = weights.load(tmp_path / "whole")
    assert found.guidance == (1.5, 0.0, 1.0) and imf.config(found.params)[:3] == (64, 2, 2)
    three, guided = torch.tensor([3]), [found._replace(guidance=(omega, 0, 1)) for omega in (1, 8)]
    weak, strong = (sample.generate(sampler, three) for sampler in guided)
    assert (weak != strong).any()


def test_what_is_trained_is_the_loss(tmp_path):
    """In parts and without, the rows' errors are those of the paper's form."""
    g = torch.Generator().manual_seed(0)
    params = imf.init("iT/2", channels=1, classes=10, generator=g)
    params = {
        k: torch.nn.Parameter(p + 0.1 * torch.randn(p.shape, generator=g))
        for k, p in params.items()
    }
    method = make_method()
    objective = train.Objective(method.loss, params)
    for parts in (1, 2):
        made = next(train.stream(method, data.digits(), PLAN, 3, World(), parts))
        assert [equal for *_, equal in made] == [4 // parts] * parts
        for x, y, draws, equal in made:
            want, raw = imf.loss(partial(imf.imf, params), x, y, draws, null=10)
            loss, rows = objective(x, y, draws, equal)
            assert loss.item() == pytest.approx(want.mean().item(), rel=1e-5)
            assert torch.allclose(rows[:, 3], raw[:, 0], rtol=1e-4)


def test_latents_are_normalised_and_not_mirrored(monkeypatch, tmp_path):
    """By the mean and deviation of each channel, from the VAE's unscaled latents."""
    raw = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    moments = torch.stack((raw, 0 * raw), 1)[:, None]
    labels = torch.zeros(8, dtype=torch.int64)
    digits = data.digits()
    dataset = digits._replace(kind="latents", shape=(4, 2, 2), labels=labels, items=moments)
    method = make_method(channels=4, kind="latents")
    [(x, *_)] = next(train.stream(method, dataset, PLAN, 0, World()))
    mean, std = (torch.tensor(a)[:, None, None] for a in imf.LATENTS.values())
    rows = data.epoch_indices(8, 8, seed=0, step=0)
    assert torch.allclose(x, (raw[rows] - mean) / std, atol=1e-5)
    seen = []
    monkeypatch.setattr(
        train, "stream", lambda _, dataset, *rest: seen.append(dataset.mirror) or []
    )
    for method in (make_method(), train.dit_method("T/2", channels=1, classes=10)):
        train.fit(method, digits._replace(mirror=True), PLAN, tmp_path / method.name, World())
    assert seen == [False, True]


def test_a_run_from_before_there_was_a_warmup_goes_on(tmp_path):
    words = ["--batch", "8", "--save", "2", "--out", str(tmp_path), "--steps"]
    with mock.patch.object(evaluate, "report", lambda *_: None):
        train.main([*words, "2"], World())
        first, *rest = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
        old = json.loads(first)
        del old["warmup"]
        (tmp_path / "log.jsonl").write_text(json.dumps(old) + "\n" + "".join(rest))
        train.main([*words, "4"], World())
    assert weights.checkpoints(tmp_path, "ema").keys() == {2, 4}
    assert "raw_v" not in (tmp_path / "log.jsonl").read_text()


def test_the_step_size_grows_from_zero(tmp_path):
    p = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([p], 7.0)
    state = train.State({"p": p}, {0.9: {"p": torch.zeros(1)}}, adam)
    plan = train.Plan(lr=0.5, batch=1024, steps=100, warmup=4)
    for step, rate in enumerate((0, 0.125, 0.25, 0.375, 0.5, 0.5), 1):
        p.grad = torch.ones(1)
        train.update(state, plan, step)
        assert adam.param_groups[0]["lr"] == rate


def test_an_imf_is_not_told_its_guidance_nor_a_convention(tmp_path):
    with pytest.raises(ValueError, match="--guidance would be ignored as iT/2 draws its guidance"):
        train.main(["--size", "iT", "--guidance", "1", "0.5"], World())
    with pytest.raises(ValueError, match="--loss would be ignored as iT/2 draws its guidance"):
        train.main(["--size", "iT", "--loss", "imf"], World())
    path = saved(tmp_path / "x.pth", grey(trains=True))
    words = ["--size", "iT", "--init", str(path), "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="x.pth is a MeanFlow, whose convention is known: leave"):
        train.main([*words, "--convention", "sit"], World())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_gradients_in_bfloat16():
    """Autocast caches weights: the velocities' must not serve the pass with gradient."""
    params, (x, y, draws) = small(size=(128, 2, 2, 2)), batch(1, 16)

    def gradients(cast):
        p = {name: cast(p).detach().requires_grad_() for name, p in params.items()}
        net, velocity = partial(imf.imf, p), partial(imf.imf_velocity, p)
        ways = dict(velocity=velocity, jvp=dual.jvp, equal=8)
        each, _ = imf.fast_loss(net, cast(x), y, imf.Draws(*map(cast, draws)), null=5, **ways)
        return torch.autograd.grad(each.mean(), p.values())

    exact = gradients(lambda a: a)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(lambda a: a.float() if a.is_floating_point() else a)
    for name, g, want in zip(params, rounded, exact):
        assert (g - want).norm() < 0.03 * want.norm(), (name, (g - want).norm() / want.norm())


@pytest.mark.slow  # compiles
def test_a_compiled_block_is_the_eager_one():
    params = {k: p.requires_grad_() for k, p in small(size=(128, 1, 1, 2)).items()}
    [w], (x, *_) = model.block_params(params, "shared_blocks"), batch(0, 4)
    x = model.embed_patches(params, x).detach()
    rope = imf.rotary(x.shape[1], x)
    compare_compiled(imf.block, lambda wrap: (w, wrap(x), rope), [*w.values()])


@pytest.mark.slow
def test_the_compiled_loss_is_the_eager_one():
    """A block serves for all, in one graph, with values and gradients."""
    found = []
    for compiled in (False, True):
        params = {k: torch.nn.Parameter(p) for k, p in small(dtype=torch.float32).items()}
        x, y, draws = batch(0, 8, dtype=torch.float32)
        method = make_method(compiled, channels=3, classes=5)
        objective = train.Objective(method.loss, params)
        loss, rows = objective(x, y, draws, 4)
        loss.backward()
        found.append([rows, *(p.grad for p in params.values())])
    for eager, quick in zip(*found):
        assert (quick - eager).norm() <= 1e-4 * eager.norm() + 1e-7


@pytest.mark.slow  # starts processes
def test_two_processes_train_the_same_run(tmp_path):
    words = ["--size", "iT", "--batch", "8", "--save", "2", "--steps", "4", "--out"]
    script = "tests/train_without_report.py"
    finish(start(*LAUNCH, 2, script, *words, tmp_path / "two"))
    train_imf(tmp_path / "one", 4)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "raw_equal", "raw_differ", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3)
