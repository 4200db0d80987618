"""model.py: the paper's sizes, the config read off a checkpoint, and the properties of a DiT.

test_meanflow.py compares it with the authors' code.
"""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_meanflow import MODES, draws
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import dual
import meanflow
import model
import runtime

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
        runtime.check_tensors("x.pt", params, model.shapes(model.config(params)), "give another")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("name", ["attn.qkv.weight", "mlp.fc1.bias", "adaLN_modulation.1.bias"])
def test_a_block_without_one_of_its_tensors_is_an_error(block, name):
    """It was left out, with the blocks after it, or went without its bias."""
    params = small(size=(64, 3, 2))
    del params[f"blocks.{block}.{name}"]
    with pytest.raises(KeyError, match=f"blocks.{block}.{name}"):
        model.dit(params, *inputs(2))


def test_a_missing_block_is_an_error_and_a_shallower_network_is_none():
    params = small(size=(64, 3, 2))
    last = {k: p for k, p in params.items() if not k.startswith("blocks.2.")}
    assert len(model.block_params(last)) == 2
    with pytest.raises(KeyError, match="blocks.1."):
        model.dit({k: p for k, p in params.items() if "blocks.1." not in k}, *inputs(2))
    assert model.block_params(params, "heads") == []


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


def test_times_may_be_more_precise_than_weights():
    z, t, r, y = inputs(4)
    exact = model.dit(small(), z, t, r, y)
    half = model.dit(small(dtype=torch.bfloat16), z.bfloat16(), t, r, y)
    assert half.dtype == torch.bfloat16 and (half - exact).norm() < 0.03 * exact.norm()


# --- forward mode ---


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), (a - b).norm() / b.norm()


SHAPES = [
    ((64, 2, 2), 1),
    ((128, 1, 1), 4),
    ((192, 3, 4), 3),
    ((1152, 1, 4), 2),
]  # 1152: 16 heads of 72, as XL/2


def test_dual_jvp_is_torch_func_jvp():
    """Compare value, tangent and gradient."""
    for size, channels in SHAPES:
        params = {
            name: p.requires_grad_() for name, p in small(size=size, channels=channels).items()
        }
        z, t, r, y = inputs(3, channels)
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = []
        for jvp in (torch.func.jvp, dual.jvp):
            with sdpa_kernel(SDPBackend.MATH):
                u, du = jvp(
                    lambda z, t: model.dit(params, z, t, r, y), (z, t), (v, torch.ones_like(t))
                )
            found.append([u, du, *torch.autograd.grad(u.square().sum(), params.values())])
        assert not du.requires_grad
        for want, got in zip(*found):
            close(got, want)


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

    want, _ = meanflow.loss(net, x, y, d, **kw)
    got, _ = meanflow.fast_loss(net, x, y, d, jvp=dual.jvp, equal=equal, **kw)
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
        _, exact = meanflow.derivative(partial(model.dit, params), z, t, r, v, y)
        net = partial(model.dit, {name: p.float() for name, p in params.items()})
        z, t, r, v = (a.float() for a in (z, t, r, v))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            rounded = [
                meanflow.derivative(net, z, t, r, v, y, jvp=jvp)[1]
                for jvp in (dual.jvp, torch.func.jvp)
            ]
        errors.append([((du - exact).norm() / exact.norm()).item() for du in rounded])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours < 0.02 and ours <= 1.05 * theirs, (ours, theirs)


class Kernels(TorchDispatchMode):
    """Counts what kernels are called by name, and the dtypes they are given first and return."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        if args and torch.is_tensor(args[0]) and torch.is_tensor(first):
            self.seen[function.overloadpacket.__name__, args[0].dtype, first.dtype] += 1
        return out


def test_what_is_computed_in_which_precision():
    """Under autocast GEMMs and attention are bfloat16; times, norms, softmax, streams float32."""
    params = small(size=(128, 2, 2), dtype=torch.float32)
    z, t, r, y = inputs(4, dtype=torch.float32)
    half, single, streams = torch.bfloat16, torch.float32, []

    def block(w, x, c):
        streams.extend(a.dtype for a in dual.split(x) if a is not None)
        return model.block(w, x, c)

    net = partial(model.dit, params, block=block)
    everywhere = {"norm": single, "cos": single, "attention": half}
    for run, gemms, precision in (
        (lambda: net(z, t, r, y), {"addmm"}, everywhere),
        (
            lambda: meanflow.derivative(net, z, t, r, z, y, jvp=dual.jvp),
            {"addmm", "mm"},  # of values, and of tangents: without a bias
            everywhere | {"softmax": single, "silu": single, "bmm": half},
        ),
    ):
        with torch.autocast("cpu", half), Kernels() as kernels:
            run()
        for name in gemms:  # of two time MLPs; of the patches, two blocks and the output
            assert kernels.seen[name, single, single] == 4
            assert kernels.seen[name, half, half] == 13
        for part, dtype in precision.items():
            found = {key[1:] for key in kernels.seen if part in key[0]}
            assert found == {(dtype, dtype)}, part
    assert streams == [single] * 6


@pytest.mark.parametrize("equal", [12, 0])
def test_gradients_in_bfloat16(equal):
    """Autocast caches weights: those cached without gradient must not serve the pass with one."""
    params, d = small(size=(256, 2, 2), channels=3), draws(0, 16, dim=3 * 16 * 16, equal=equal)
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
            jvp=dual.jvp,
            equal=equal,
        )
        return torch.autograd.grad(each.mean(), p.values())

    exact = gradients(lambda a: a)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients(lambda a: a.float() if a.is_floating_point() else a)
    for name, g, want in zip(params, rounded, exact):
        assert (g - want).norm() < 0.03 * want.norm(), (name, (g - want).norm() / want.norm())


def compare_compiled(f, arguments, weights):
    """Compare f with dual.compile(f): value, tangent and gradients, of tensors and of duals.

    arguments(wrap) -> those of f, with `wrap` around what has a tangent.
    """
    compiled = dual.compile(f, fullgraph=True, dynamic=False)

    def with_tangent(x):
        g = torch.Generator().manual_seed(1)
        return dual.Dual(x, torch.randn(x.shape, generator=g, dtype=x.dtype))

    for wrap in (lambda x: x, with_tangent):
        found = []
        for run in (f, compiled):
            value, tangent = dual.split(run(*arguments(wrap)))
            loss = (value * torch.arange(value.shape[-1])).square().sum()
            found.append([value, *torch.autograd.grad(loss, weights)])
            if wrap is with_tangent:
                found[-1].append(tangent)
        for want, got in zip(*found, strict=True):
            close(got, want)


@pytest.mark.slow  # compiles
def test_a_compiled_block_is_the_eager_one():
    """On patches embedded by `embed_patches`; a convolution's layout breaks compiled gradients."""
    params = {name: p.requires_grad_() for name, p in small(size=(64, 1, 2)).items()}
    z, *_ = inputs(4)
    c = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [w] = model.block_params(params)
    used = [p for name, p in params.items() if name.startswith(("blocks", "x_embedder"))]
    compare_compiled(
        model.block, lambda wrap: (w, wrap(model.embed_patches(params, z)), wrap(c)), used
    )


@pytest.mark.slow  # compiles
def test_a_compiled_module_is_the_eager_one():
    torch.manual_seed(0)
    module = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    compare_compiled(module, lambda wrap: (wrap(x),), [*module.parameters()])
