"""Weights that others published: each layout gives the numbers of the authors' code, or one line.

The files are written here from the golden weights under each layout's names; the published files
themselves were not at hand.
"""

import argparse
import math
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import fails
from safetensors.torch import save_file

import data
import meanflow
import model
import sample
import train

GOLDEN = np.load(Path(__file__).with_name("authors-tiny.npz"))
T_BIAS, FIRST = "t_embedder.mlp.2.bias", "t_embedder.mlp.0.weight"
OUTPUTS = ("final_layer.linear.weight", "final_layer.linear.bias")


def golden(name):
    return torch.from_numpy(GOLDEN[name]).float().contiguous()


def golden_weights():
    names = [name for name in GOLDEN.files if name.startswith("w.")]
    return {name.removeprefix("w."): golden(name) for name in names}


def golden_inputs():
    """Return (z, t, r, y) at which the authors' code computed u."""
    t, e, y = golden("none.t"), golden("none.e"), torch.from_numpy(GOLDEN["y"]).long()
    y = torch.where(torch.from_numpy(GOLDEN["none.drop"]).bool(), 10, y)
    return meanflow.interpolate(golden("x"), e, t)[0], t, golden("none.r"), y


def agrees(u, rows=slice(None)):
    want = golden("none.u")[rows]
    return (u[rows] - want).abs().max() < 1e-5 * want.abs().max()


def dit_positions(width, side):
    """Return DiT's pos_embed, (1, side^2, width), element by element from its definition."""
    table = np.empty((side, side, width))
    for row in range(side):
        for column in range(side):
            for k in range(width):
                place, k_half = (column, k) if k < width // 2 else (row, k - width // 2)
                wave, i = (math.sin, k_half) if k_half < width // 4 else (math.cos, k_half)
                angle = place / 10000 ** ((i % (width // 4)) / (width // 4))
                table[row, column, k] = wave(angle)
    return torch.from_numpy(table.reshape(1, side * side, width)).float()


def velocity_weights():
    """Return weights without h_embedder, whose output v(z, t) is the golden u(z, t, t)."""
    w = golden_weights()
    constant = model.embed_time(w, "h_embedder", torch.zeros(1)).flatten()
    w = {name: p for name, p in w.items() if not name.startswith("h_embedder")}
    return w | {T_BIAS: w[T_BIAS] + constant}


def with_sigma(w):
    """Give the output eight channels, of which the last four are a variance."""
    g, w = torch.Generator().manual_seed(0), dict(w)
    for name in OUTPUTS:
        p = w[name].unflatten(0, (2, 2, 4))
        w[name] = torch.cat((p, torch.randn(p.shape, generator=g)), 2).flatten(0, 2)
    return w


def in_sits_time(w):
    """Return the weights of SiT's network, v(z, t) = -u(z, 1 - t), by its values at 256 times."""
    t = torch.linspace(-40, 40, 600, dtype=torch.float64)
    theirs, ours = (model.sinusoids(time)[:, 0] for time in (t, 1 - t))
    mixed = torch.linalg.lstsq(theirs, ours, driver="gelsd").solution
    assert (theirs @ mixed - ours).abs().max() < 1e-9
    first = (w[FIRST].double() @ mixed.T).float()
    return w | {name: -w[name] for name in OUTPUTS} | {FIRST: first}


def renamed(w, old, new):
    return {name.replace(old, new): p for name, p in w.items()}


MEANFLOW, POSITIONS = golden_weights(), {"pos_embed": dit_positions(128, 4)}
VELOCITY = velocity_weights()
PROJECTORS = {"projectors.0.0.weight": torch.ones(3, 128), "projectors.0.0.bias": torch.ones(3)}
SIT = with_sigma(in_sits_time(VELOCITY)) | POSITIONS
LAYOUTS = {  # what is saved, and the convention that must be given
    "HaoyiZhu": ({"ema": MEANFLOW | POSITIONS, "model": {}}, None),
    "HaoyiZhu, bare": (MEANFLOW | POSITIONS, None),
    "ordered": ({"state_dict": OrderedDict(MEANFLOW)}, None),
    "wrapped": ({f"module._orig_mod.{k}": p for k, p in MEANFLOW.items()}, None),
    "compiled blocks": (renamed(MEANFLOW, "blocks.0.", "blocks.0._orig_mod."), None),
    "zhuyu-cs": (
        {
            "model": {},
            "ema": renamed(MEANFLOW, "h_emb", "r_emb") | POSITIONS,
            "args": argparse.Namespace(lr=1e-4),
            "opt": {"state": {}},
        },
        None,
    ),
    "REPA": ({"ema": VELOCITY | POSITIONS | PROJECTORS, "steps": 4}, None),
    "REPA without projectors": ({"ema": VELOCITY}, "repa"),
    "SiT": (SIT, "sit"),
}


def save(content, path):
    if path.suffix == ".safetensors":
        save_file({name: p.contiguous() for name, p in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_others_give_the_numbers_of_the_authors_code(tmp_path, layout):
    content, convention = LAYOUTS[layout]
    z, t, r, y = golden_inputs()
    forms = [save(content, tmp_path / "x.pt"), tmp_path / "old.pth"]
    torch.save(content, forms[1], _use_new_zipfile_serialization=False)
    if all(map(torch.is_tensor, content.values())):
        forms.append(save(content, tmp_path / "x.safetensors"))
    for path in forms:
        params = sample.convert(path, sample.read_weights(path)[0], convention)
        if "h_embedder.mlp.0.weight" not in params:
            zeros = {name: torch.zeros_like(p) for name, p in MEANFLOW.items() if name[0] == "h"}
            assert agrees(model.dit(zeros | params, z, t, t, y), rows=t == r)
        else:
            assert agrees(model.dit(params, z, t, r, y))
        assert all(p.dtype == torch.float32 for p in params.values())


@given(st.floats(0, 1), st.integers(0, 9))
def test_reversing_time_is_exact(t, seed):
    """-v(z, 1 - t) of SiT's network is u(z, t, t) of ours, in float64 to rounding."""
    g = torch.Generator().manual_seed(seed)
    theirs = model.init((128, 1, 2), channels=4, classes=10, generator=g)
    theirs = {k: (p + 0.1 * torch.randn(p.shape, generator=g)).double() for k, p in theirs.items()}
    ours = dict(theirs)
    sample.reverse_time(ours)
    t, z = torch.full((2,), t, dtype=torch.float64), torch.randn(2, 4, 8, 8, generator=g).double()
    y = torch.tensor([3, 10])
    v, u = model.dit(theirs, z, 1 - t, 1 - t, y), model.dit(ours, z, t, t, y)
    assert (u + v).abs().max() < 1e-12 * v.abs().max()


def test_repas_early_files_number_the_decoders_blocks_anew(tmp_path):
    g = torch.Generator().manual_seed(0)
    w = model.init((64, 5, 2), channels=4, classes=10, generator=g)
    w = {name: torch.randn(p.shape, generator=g) for name, p in w.items() if name[0] != "h"}
    early = {}
    for name, p in w.items():
        for i in (3, 4):
            name = name.replace(f"blocks.{i}.", f"decoder_blocks.{i - 3}.")
        early[name] = p
    params = sample.convert("x", early, "repa")
    assert params.keys() == w.keys() and all(torch.equal(params[k], p) for k, p in w.items())


def test_a_velocity_is_sampled_by_eulers_method(tmp_path):
    path = save({"ema": VELOCITY | POSITIONS | PROJECTORS}, tmp_path / "last.pt")
    found = sample.load(path)
    assert (found.kind, found.shape) == ("latents", (4, 8, 8))
    x = sample.generate(found.params, [3, 4], found.shape, steps=3, seed=1)
    z, y = sample.noise(1, range(2), (4, 8, 8)), torch.tensor([3, 4])
    zeros = {name: torch.zeros_like(p) for name, p in MEANFLOW.items() if name[0] == "h"}
    for k in (3, 2, 1):
        t = torch.full((2,), k / 3)
        z = z - model.dit(VELOCITY | zeros, z, t, t, y) / 3
    assert (x - z).abs().max() < 1e-5


def test_a_velocity_in_one_step_gets_a_hint(tmp_path, capsys):
    g = torch.Generator().manual_seed(0)
    w = model.init((64, 1, 2), channels=3, classes=3, generator=g)
    velocity = {name: p for name, p in w.items() if name[0] != "h"} | PROJECTORS
    positions = {"pos_embed": dit_positions(64, 4)}
    for content, steps, hint in ((velocity, 1, True), (velocity, 50, False), (w, 1, False)):
        path = save(content | positions, tmp_path / "x.pt")
        words = ["--out", str(tmp_path / "x.png"), "--steps", str(steps)]
        sample.main([str(path), *words], data.World())
        told = f"{path} predicts a velocity: give --steps 50 or more" in capsys.readouterr().err
        assert told == hint


def test_what_a_file_without_metadata_makes(tmp_path):
    """ImageNet's latents are 32 wide; positions tell any other size; or else it is an error."""
    g = torch.Generator().manual_seed(0)
    for channels, classes, side, want in (
        (4, 1000, None, ("latents", (4, 32, 32))),
        (4, 1000, 16, ("latents", (4, 64, 64))),
        (3, 10, 6, ("pixels", (3, 24, 24))),
    ):
        w = model.init((64, 1, 4), channels=channels, classes=classes, generator=g)
        w |= {"pos_embed": dit_positions(64, side)} if side else {}
        found = sample.load(save(w, tmp_path / "x.pth"))
        assert (found.kind, found.shape) == want
    w = model.init((64, 1, 4), channels=4, classes=10, generator=g)
    with pytest.raises(ValueError, match="kind None, resolution None, and there is no pos_embed"):
        sample.load(save(w, tmp_path / "x.pth"))


def changed(**changes):
    names = {name.replace("__", "."): p for name, p in changes.items()}
    return {name: p for name, p in (MEANFLOW | names).items() if p is not None}


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (SIT, [], "x.pt has no embedding of t - r, so it is no MeanFlow: give --convention repa"),
        (SIT, [], "DiT's own weights predict noise on another path and cannot be used"),
        (VELOCITY, [], "--convention sit if it predicts x - e, t = 1 is data (as SiT)"),
        (MEANFLOW, ["--convention", "sit"], "x.pt is a MeanFlow, whose convention is known: leave"),
        (
            VELOCITY | PROJECTORS,
            ["--convention", "sit"],
            "x.pt is REPA's, whose convention is known: leave out --convention",
        ),
        (
            changed(w_embedder__mlp__0__weight=torch.ones(3, 3)),
            [],
            "x.pt: w_embedder.mlp.0.weight is (3, 3), should be absent: give a run's folder, or",
        ),
        (changed(h_embedder__mlp__2__bias=None), [], "h_embedder.mlp.2.bias is missing, should"),
        (changed(pos_embed=1 + POSITIONS["pos_embed"]), [], "pos_embed is not DiT's fixed posit"),
        (changed(pos_embed=torch.ones(3)), [], "x.pt: pos_embed is not DiT's fixed positions"),
        (changed(pos_embed=torch.ones(())), [], "x.pt: pos_embed is not DiT's fixed positions"),
        (
            changed(pos_embed=POSITIONS["pos_embed"].flip(2)),
            [],
            "x.pt: pos_embed is not DiT's fixed positions",
        ),
        ({"ema": {}}, [], "x.pt: not the weights of a DiT, which have x_embedder.proj.weight"),
        ([1, 2], [], "x.pt cannot be read as tensors without code"),
        (changed(final_layer__linear__bias=torch.full((16,), math.nan)), [], "not finite"),
    ],
)
def test_weights_that_cannot_be_used(monkeypatch, tmp_path, content, flags, words):
    path = save(content, tmp_path / "x.pt")
    for script, words_before in (("sample.py", []), ("train.py", ["--out", "no", "--init"])):
        message = fails(monkeypatch, script, *words_before, path, *flags)
        assert words in message and str(path) in message


def test_a_pickle_with_code_is_not_run(monkeypatch, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    torch.save({"ema": Trap()}, tmp_path / "trap.pt")
    message = fails(monkeypatch, "sample.py", tmp_path / "trap.pt")
    assert "trap.pt cannot be read as tensors without code" in message
    assert not (tmp_path / "sprung").exists()


def test_averaged_weights_are_preferred_in_any_nesting(tmp_path):
    w, other = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    nestings = [w, {"model": w}, {"ema": w, "model": other}, {"ema": {"model": w}}]
    for found in [*nestings, {"ema": None, "model": w, "args": 1}, {"state_dict": w}]:
        torch.save(found, tmp_path / "x.pt")
        assert sample.read_weights(tmp_path / "x.pt") == (w, {})


# --- training goes on from them ---


def fresh(classes=10, size=(128, 1, 2)):
    g = torch.Generator().manual_seed(1)
    return model.init(size, channels=4, classes=classes, generator=g)


@pytest.mark.parametrize("layout", ["REPA", "SiT"])
def test_training_starts_at_the_velocity_of_a_checkpoint(tmp_path, layout):
    """t - r adds nothing at first, but receives a gradient."""
    content, convention = LAYOUTS[layout]
    path = save(content, tmp_path / "x.pt")
    params, line = train.warm_start(fresh(), path, convention, [str(k) for k in range(10)])
    created = [f"h_embedder.mlp.{k}.{kind}" for k in (0, 2) for kind in ("bias", "weight")]
    assert line == f"{path}: {len(VELOCITY)} tensors taken, created {created}, 0 labels are new"
    z, t, r, y = golden_inputs()
    assert agrees(model.dit(params, z, t, 0 * t, y), rows=t == r)
    last = params["h_embedder.mlp.2.weight"].requires_grad_()
    model.dit(params, z, t, 0 * t, y).sum().backward()
    assert last.grad.norm() > 0


def test_training_takes_our_own_weights_whole(tmp_path):
    path = save({k: p.double() for k, p in MEANFLOW.items()}, tmp_path / "x.safetensors")
    params, line = train.warm_start(fresh(), path, None, [str(k) for k in range(10)])
    assert all(
        torch.equal(params[k], p) and params[k].dtype == p.dtype for k, p in MEANFLOW.items()
    )
    assert "created [], 0 labels are new" in line


def test_other_classes_get_new_labels_that_start_as_the_null_label(tmp_path):
    """Ours are known by name, others' by number if there are as many; the null label is kept."""
    table = MEANFLOW["y_embedder.embedding_table.weight"]
    names = [f"class {k}" for k in range(10)]
    ours = {"run": "{}", "classes": json_list(names)}
    for metadata, classes, want in (
        (ours, ["class 7", "cat", "class 0"], [7, 10, 0, 10]),
        (ours, names[::-1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 10]),
        (None, ["x", "y"], [10, 10, 10]),
        (None, list("abcdefghij"), list(range(11))),
        ({"classes": "cat, dog"}, list("abcdefghij"), list(range(11))),
    ):
        save_file(MEANFLOW, tmp_path / "x.safetensors", metadata)
        new = fresh(len(classes))
        params, line = train.warm_start(new, tmp_path / "x.safetensors", None, classes)
        assert torch.equal(params["y_embedder.embedding_table.weight"], table[want])
        assert line.endswith(f"created [], {want[:-1].count(10)} labels are new")


def test_training_starts_from_a_runs_folder(tmp_path):
    save(MEANFLOW, tmp_path / "ema-00000007.safetensors")
    params, line = train.warm_start(fresh(), tmp_path, None, [str(k) for k in range(10)])
    assert torch.equal(params[FIRST], MEANFLOW[FIRST])
    assert line.startswith(f"{tmp_path / 'ema-00000007.safetensors'}: ")


def json_list(names):
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


@pytest.mark.parametrize(
    "size, channels, words",
    [
        ((64, 1, 2), 4, "x_embedder.proj.weight is (128, 4, 2, 2), should be (64, 4, 2, 2): give"),
        ((128, 2, 2), 4, "blocks.1.attn.qkv.weight is missing, should be (384, 128): give --init"),
        ((128, 1, 2), 3, "x_embedder.proj.weight is (128, 4, 2, 2), should be (128, 3, 2, 2)"),
    ],
)
def test_training_takes_nothing_that_does_not_fit(tmp_path, size, channels, words):
    path = save(MEANFLOW, tmp_path / "x.pt")
    g = torch.Generator()
    new = model.init(size, channels=channels, classes=10, generator=g)
    with pytest.raises(ValueError) as error:
        train.warm_start(new, path, None, list(range(10)))
    assert words in str(error.value) and str(path) in str(error.value)


# --- sampling with a scale of one's own ---


def test_the_scale_reaches_the_decoder(monkeypatch, tmp_path):
    found = sample.load(save(MEANFLOW | POSITIONS, tmp_path / "x.pt"))
    seen = []
    monkeypatch.setattr(data, "load_vae", lambda *_: {})
    monkeypatch.setattr(data, "decode", lambda vae, z: seen.append(z) or z[:, :3])
    for flags, scale in (([], 0.18215), (["--scale", "0.18125"], 0.18125)):
        words = [str(tmp_path / "x.pt"), "--vae", "x", "--out", str(tmp_path / "x.png"), *flags]
        sample.main(words, data.World())
        x = sample.generate(found.params, list(range(10)), (4, 8, 8))
        assert (seen.pop() - x / scale).abs().max() < 1e-5


def test_the_network_of_a_file_is_one_for_the_losses(tmp_path):
    """What is loaded has every parameter, in the order in which a fresh network has them."""
    w = sample.load(save({"ema": VELOCITY | POSITIONS | PROJECTORS}, tmp_path / "x.pt")).params
    assert list(w) == list(fresh()) and model.config(w) == (128, 1, 2, 4, 10)
    z, t, r, y = golden_inputs()
    u = partial(model.dit, w)(z, t, r, y)
    assert u.shape == z.shape
