"""model.py: the paper's sizes, the checkpoint as the config, and what a DiT must be. That it computes what the authors'
code computes is in test_meanflow.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model

PAPER = {"B/4": (131, 11.1), "B/2": (131, 46.0), "M/2": (308, 107.6), "L/2": (459, 161.4), "XL/2": (676, 237.2)}


def small(seed=0, size=(64, 2, 2), channels=3, classes=5, dtype=torch.float64):
    """A DiT no parameter of which is zero."""
    g = torch.Generator().manual_seed(seed)
    params = model.init(size, channels=channels, classes=classes, generator=g)
    return {name: (p + 0.02 * torch.randn(p.shape, generator=g)).to(dtype) for name, p in params.items()}


def inputs(batch, channels=3, height=8, width=8, classes=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, channels, height, width, generator=g, dtype=dtype)
    r, t = torch.rand(2, batch, generator=g, dtype=dtype).sort(0).values
    return z, t, r, torch.randint(classes + 1, (batch,), generator=g)


def test_the_printed_sizes_are_the_papers(capsys):
    model.main()
    rows = {row.split()[0]: row.split() for row in capsys.readouterr().out.splitlines()[1:]}
    for size, (millions, gigaflop) in PAPER.items():
        assert math.floor(float(rows[size][5])) == millions and float(rows[size][7]) == gigaflop


@given(st.sampled_from([64, 128, 192]), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 9))
def test_the_checkpoint_is_the_config(width, depth, patch, channels, classes):
    g = torch.Generator().manual_seed(0)
    params = model.init((width, depth, patch), channels=channels, classes=classes, generator=g)
    assert model.config(params) == (width, depth, patch, channels, classes)
    z, t, r, y = inputs(2, channels, 8, 4, classes, torch.float32)
    assert model.dit(params, z, t, r, y).shape == z.shape


@pytest.mark.parametrize("change, message", [
    (lambda p: p.pop("x_embedder.proj.weight"), "x_embedder.proj.weight"),
    (lambda p: p.update({"y_embedder.embedding_table.weight": torch.zeros(6)}), "y_embedder.embedding_table.weight"),
    (lambda p: p.pop("blocks.1.mlp.fc1.bias"), "missing.*blocks.1.mlp.fc1.bias"),
    (lambda p: p.update({"pos_embed": torch.zeros(1)}), "unknown.*pos_embed"),
    (lambda p: p.update({"blocks.0.attn.proj.weight": torch.zeros(64, 63)}), r"blocks.0.attn.proj.weight.*\(64, 63\)"),
])
def test_tensors_that_are_no_dit_are_named(change, message):
    params = small()
    change(params)
    with pytest.raises(ValueError, match=message) as error:
        model.config(params)
    assert "\n" not in str(error.value)


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="'Z/3' is unknown: choose one of .*XL/2"):
        model.init("Z/3", generator=torch.Generator())


def test_initial_weights():
    params = model.init((192, 2, 2), generator=torch.Generator().manual_seed(0))
    z, t, r, y = inputs(2, channels=4, classes=1000, dtype=torch.float32)
    assert (model.dit(params, z, t, r, y) == 0).all()
    assert all((p == 0).all() for name, p in params.items() if name.endswith("bias") or "adaLN" in name)
    for name in ("t_embedder.mlp.0", "h_embedder.mlp.2", "y_embedder.embedding_table"):
        assert abs(params[f"{name}.weight"].std() - 0.02) < 0.001
    for name, fans in (("blocks.0.attn.qkv", 192 + 576), ("blocks.1.mlp.fc2", 192 + 768), ("x_embedder.proj", 192 + 16)):
        w, bound = params[f"{name}.weight"], math.sqrt(6 / fans)
        assert w.abs().max() <= bound and abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.03


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
    for changed in ((z + 1e-3, t, r, y), (z, t + 1e-3, r, y), (z, t, r + 1e-3, y), (z, t, r, (y + 1) % 6)):
        assert ((model.dit(params, *changed) - u).abs().flatten(1).amax(1) > 1e-8).all()
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    model.dit(leaves, z, t, r, y).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in leaves.values())


def test_single_precision_is_close_to_double():
    z, t, r, y = inputs(4)
    exact = model.dit(small(), z, t, r, y)
    single = model.dit(small(dtype=torch.float32), z.float(), t.float(), r.float(), y)
    assert single.dtype == torch.float32 and (single - exact).norm() < 1e-5 * exact.norm()
