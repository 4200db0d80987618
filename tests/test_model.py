"""model.py: the paper's sizes, the config read off a checkpoint, and the properties of a DiT.

test_meanflow.py compares it with the authors' code.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_meanflow import MODES, draws
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import data
import meanflow
import model

PAPER = {
    "B/4": (131, 11.1),
    "B/2": (131, 46.0),
    "M/2": (308, 107.6),
    "L/2": (459, 161.4),
    "XL/2": (676, 237.2),
}


def small(seed=0, size=(64, 2, 2), channels=3, classes=5, dtype=torch.float64):
    """Return a DiT without any zero parameter."""
    g = torch.Generator().manual_seed(seed)
    params = model.init(size, channels=channels, classes=classes, generator=g)
    return {
        name: (p + 0.02 * torch.randn(p.shape, generator=g)).to(dtype) for name, p in params.items()
    }


def inputs(batch, channels=3, height=8, width=8, classes=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, channels, height, width, generator=g, dtype=dtype)
    r, t = torch.rand(2, batch, generator=g, dtype=dtype).sort(0).values
    return z, t, r, torch.randint(classes + 1, (batch,), generator=g)


def test_the_printed_sizes_are_the_papers(capsys):
    model.main()
    rows = {row.split()[0]: row.split() for row in capsys.readouterr().out.splitlines()[1:]}
    for size, (millions, gigaflop) in PAPER.items():
        assert math.floor(float(rows[size][4])) == millions and float(rows[size][6]) == gigaflop


@given(
    st.sampled_from([64, 128, 192]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 5),
    st.integers(1, 9),
)
def test_the_checkpoint_is_the_config(width, depth, patch, channels, classes):
    g = torch.Generator().manual_seed(0)
    params = model.init((width, depth, patch), channels=channels, classes=classes, generator=g)
    assert model.config(params) == (width, depth, patch, channels, classes)
    z, t, r, y = inputs(2, channels, 8, 4, classes, torch.float32)
    assert model.dit(params, z, t, r, y).shape == z.shape


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("x_embedder.proj.weight"), "x_embedder.proj.weight"),
        (
            lambda p: p.update({"y_embedder.embedding_table.weight": torch.zeros(6)}),
            "y_embedder.embedding_table.weight",
        ),
        (lambda p: p.pop("blocks.1.mlp.fc1.bias"), "blocks.1.mlp.fc1.bias is missing"),
        (
            lambda p: p.update({"pos_embed": torch.zeros(1)}),
            r"pos_embed is \(1,\), should be absent",
        ),
        (
            lambda p: p.update({"blocks.0.attn.proj.weight": torch.zeros(64, 63)}),
            r"blocks.0.attn.proj.weight.*\(64, 63\)",
        ),
    ],
)
def test_tensors_that_are_no_dit_are_named(change, message):
    params = small()
    change(params)
    with pytest.raises(ValueError, match=message) as error:
        data.check_tensors("x.pt", params, model.shapes(model.config(params)), "give another")
    assert "\n" not in str(error.value)


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="'Z/3' is unknown: choose one of .*XL/2"):
        model.init("Z/3", generator=torch.Generator())


def test_initial_weights():
    params = model.init((192, 2, 2), generator=torch.Generator().manual_seed(0))
    z, t, r, y = inputs(2, channels=4, classes=1000, dtype=torch.float32)
    assert (model.dit(params, z, t, r, y) == 0).all()
    assert all(
        (p == 0).all() for name, p in params.items() if name.endswith("bias") or "adaLN" in name
    )
    for name in ("t_embedder.mlp.0", "h_embedder.mlp.2", "y_embedder.embedding_table"):
        assert abs(params[f"{name}.weight"].std() - 0.02) < 0.001
    for name, fans in (
        ("blocks.0.attn.qkv", 192 + 576),
        ("blocks.1.mlp.fc2", 192 + 768),
        ("x_embedder.proj", 192 + 16),
    ):
        w, bound = params[f"{name}.weight"], math.sqrt(6 / fans)
        assert w.abs().max() <= bound and abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.03


@pytest.mark.parametrize("width, heads", [(32, 1), (64, 1), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_every_size(width, heads):
    """Heads are 64 wide, but at most 16 in number (XL/2: 72 wide); shapes do not tell."""
    q, k, v = model.split_heads(torch.arange(2 * 16 * 3 * width).reshape(2, 16, 3 * width))
    assert q.shape == k.shape == v.shape == (2, heads, 16, width // heads)
    assert (k - q == width).all() and (v - k == width).all()


@given(st.integers(0, 5))
@settings(max_examples=6)
def test_no_layer_mixes_samples(row):
    params, (z, t, r, y) = small(), inputs(6)
    together = model.dit(params, z, t, r, y)
    alone = model.dit(params, *(a[row : row + 1] for a in (z, t, r, y)))
    assert (together[row] - alone[0]).abs().max() < 1e-12


def test_every_input_and_parameter_matters():
    params, (z, t, r, y) = small(), inputs(4)
    u = model.dit(params, z, t, r, y)
    for changed in (
        (z + 1e-3, t, r, y),
        (z, t + 1e-3, r, y),
        (z, t, r + 1e-3, y),
        (z, t, r, (y + 1) % 6),
    ):
        assert ((model.dit(params, *changed) - u).abs().flatten(1).amax(1) > 1e-8).all()
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    model.dit(leaves, z, t, r, y).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in leaves.values())


def test_single_precision_is_close_to_double():
    z, t, r, y = inputs(4)
    exact = model.dit(small(), z, t, r, y)
    single = model.dit(small(dtype=torch.float32), z.float(), t.float(), r.float(), y)
    assert single.dtype == torch.float32 and (single - exact).norm() < 1e-5 * exact.norm()


# --- forward mode ---


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), (a - b).norm() / b.norm()


SHAPES = [
    ((64, 2, 2), 1),
    ((128, 1, 1), 4),
    ((192, 3, 4), 3),
    ((1152, 1, 4), 2),
]  # 1152: 16 heads of 72, as XL/2


def test_dit_jvp_is_torch_func_jvp():
    """Compare value, tangent and gradient, for every number of rows that have a tangent."""
    for size, channels in SHAPES:
        params = {
            name: p.requires_grad_() for name, p in small(size=size, channels=channels).items()
        }
        z, t, r, y = inputs(3, channels)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            value, tangent = torch.func.jvp(
                lambda z, t: model.dit(params, z, t, r, y), (z, t), (v, torch.ones_like(t))
            )
        gradients = torch.autograd.grad(value.square().sum(), params.values())
        for m in range(4):
            u, du = model.dit_jvp(params, z, t, r, y, v[3 - m :])
            close(u, value)
            close(du, tangent[3 - m :])
            assert not du.requires_grad
            for g, want in zip(torch.autograd.grad(u.square().sum(), params.values()), gradients):
                close(g, want)


@given(st.integers(0, 2**31), st.sampled_from(MODES), st.integers(1, 5), st.data())
def test_the_fast_loss_is_the_whole_batch_loss(seed, mode, batch, data):
    """Compare value and gradients, for all guidance modes, with shares of r = t from 0 to 1."""
    params = {
        name: p.requires_grad_()
        for name, p in small(seed, size=(64, 1, 4), channels=1, classes=4).items()
    }
    equal = data.draw(st.integers(0, batch))
    d = draws(seed, batch, dim=64, equal=equal)
    x = torch.randn(batch, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = torch.arange(batch) % 4
    kw = dict(null=4, interval=(0.1, 0.8), p=1.0, c=0.01, **mode)

    def net(z, t, r, y):
        return model.dit(params, z.unflatten(1, (1, 8, 8)), t, r, y).flatten(1)

    def jvp(z, t, r, y, v):
        u, du = model.dit_jvp(params, z.unflatten(1, (1, 8, 8)), t, r, y, v.unflatten(1, (1, 8, 8)))
        return u.flatten(1), du.flatten(1)

    want, _ = meanflow.loss(net, x, y, d, **kw)
    got, _ = meanflow.fast_loss(net, x, y, d, dual=jvp, equal=equal, **kw)
    close(got, want)
    for g, w in zip(*(torch.autograd.grad(each.sum(), params.values()) for each in (got, want))):
        close(g, w)


def test_tangents_in_bfloat16():
    """Under autocast, du/dt is right to 2 %, and no worse than torch.func.jvp's."""
    errors = []
    for seed in range(5):
        params, (z, t, r, y) = (
            small(seed, size=(128, 4, 2)),
            inputs(8, seed=seed),
        )
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        _, exact = model.dit_jvp(params, z, t, r, y, v)
        params, (z, t, r, v) = (
            {name: p.float() for name, p in params.items()},
            (a.float() for a in (z, t, r, v)),
        )
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            _, ours = model.dit_jvp(params, z, t, r, y, v)
            theirs = meanflow.derivative(partial(model.dit, params), z, t, r, v, y)
        errors.append([((du - exact).norm() / exact.norm()).item() for du in (ours, theirs)])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours < 0.02 and ours <= 1.05 * theirs, (ours, theirs)


class Dtypes(TorchFunctionMode):
    """Records the dtypes of what functions are given first and return."""

    def __init__(self):
        self.seen = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple) else out
        if torch.is_tensor(first):
            pair = args[0].dtype if args and torch.is_tensor(args[0]) else None, first.dtype
            self.seen.setdefault(getattr(function, "__name__", ""), []).append(pair)
        return out


def test_what_is_computed_in_which_precision():
    """Under autocast GEMMs and attention are bfloat16; times, norms, softmax, streams float32."""
    params = small(size=(128, 2, 2), dtype=torch.float32)
    z, t, r, y = inputs(4, dtype=torch.float32)
    streams = []

    def block(w, x, c):
        streams.append(x.dtype)
        return model.block(w, x, c)

    def block_jvp(w, x, dx, c, dc):
        streams.extend((x.dtype, dx.dtype))
        return model.block_jvp(w, x, dx, c, dc)

    # linear maps of two time MLPs, and of the patches, two blocks and the output
    for run, times, others in (
        (lambda: model.dit(params, z, t, r, y, block=block), 4, 13),
        (lambda: model.dit_jvp(params, z, t, r, y, z[2:], block_jvp=block_jvp), 8, 26),
    ):
        with torch.autocast("cpu", torch.bfloat16), Dtypes() as dtypes:
            run()
        half, single = torch.bfloat16, torch.float32
        results = {name: {out for _, out in pairs} for name, pairs in dtypes.seen.items()}
        norms = results.get("layer_norm", set()) | results.get("native_layer_norm", set())
        assert norms == {single} and results["scaled_dot_product_attention"] == {half}
        assert results.get("softmax", {single}) == {single}
        linear = [out for _, out in dtypes.seen["linear"]]
        assert (linear.count(single), linear.count(half)) == (times, others)
        assert dtypes.seen["cos"] == [(single, single)] * len(dtypes.seen["cos"])
    assert set(streams) == {torch.float32}


def test_gradients_in_bfloat16():
    """Autocast caches weights: those cached without gradient must not serve the pass with one."""
    params, d = small(size=(256, 2, 2), channels=3), draws(0, 16, dim=3 * 16 * 16, equal=12)
    x, y = inputs(16, height=16, width=16)[0], torch.arange(16) % 5
    d = d._replace(e=d.e.unflatten(1, (3, 16, 16)))

    def gradients(cast):
        p = {name: cast(p).detach().requires_grad_() for name, p in params.items()}
        each, _ = meanflow.fast_loss(
            partial(model.dit, p),
            cast(x),
            y,
            meanflow.Draws(*map(cast, d)),
            null=5,
            kappa=0.5,
            dual=partial(model.dit_jvp, p),
            equal=12,
        )
        return torch.autograd.grad(each.mean(), p.values())

    exact = gradients(lambda a: a)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(lambda a: a.float() if a.is_floating_point() else a)
    for name, g, want in zip(params, rounded, exact):
        assert (g - want).norm() < 0.03 * want.norm(), (name, (g - want).norm() / want.norm())


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("block, tangents", [(model.block, 0), (model.block_jvp, 2)])
def test_a_compiled_block_has_the_right_gradient(block, tangents):
    """On patches embedded by `embed_patches`; a convolution's layout breaks compiled gradients."""
    params, (z, *_) = (
        {name: p.requires_grad_() for name, p in small(size=(64, 1, 2)).items()},
        inputs(4),
    )
    g = torch.Generator().manual_seed(1)
    dx, c, dc = (
        torch.randn(*shape, 64, generator=g, dtype=torch.float64)
        for shape in ((2, 16), (4, 1), (2, 1))
    )
    inputs_ = (dx, c, dc) if tangents else (c,)

    def run(block):
        out = block(model.block_params(params)[0], model.embed_patches(params, z), *inputs_)
        out = out if tangents else (out,)
        loss = (out[0] * torch.arange(64)).square().sum()
        used = [p for name, p in params.items() if name.startswith(("blocks", "x_embedder"))]
        return [*out, *torch.autograd.grad(loss, used)]

    for got, want in zip(run(torch.compile(block, fullgraph=True, dynamic=False)), run(block)):
        close(got, want)
