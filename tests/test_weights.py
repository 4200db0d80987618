"""weights.py: files of weights, ours and others', as networks to draw from and to train.

Weights that others published: each layout gives the numbers of the authors' code, or one line. The
files are written here from the golden weights under each layout's names; the published files
themselves were not at hand.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
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
from test_vae import SMALL, widths
from test_vae import weights as vae_weights

import imf
import meanflow
import model
import runtime
import sample
import weights

NAMES = [str(k) for k in range(10)]
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
        params = weights.convert(path, weights.read_weights(path)[0], convention)
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
    weights.reverse_time(ours)
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
    params = weights.convert("x", early, "repa")
    assert params.keys() == w.keys() and all(torch.equal(params[k], p) for k, p in w.items())


def test_a_velocity_is_sampled_by_eulers_method(tmp_path):
    path = save({"ema": VELOCITY | POSITIONS | PROJECTORS}, tmp_path / "last.pt")
    found = weights.load(path)
    assert (found.kind, found.shape) == ("latents", (4, 8, 8))
    z, y = sample.noise(1, range(2), (4, 8, 8)), torch.tensor([3, 4])
    x = sample.generate(found, y, steps=3, seed=1)
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
        sample.main([str(path), *words], runtime.World())
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
        found = weights.load(save(w, tmp_path / "x.pth"))
        assert (found.kind, found.shape) == want
    w = model.init((64, 1, 4), channels=4, classes=10, generator=g)
    with pytest.raises(ValueError, match="kind None, resolution None and no pos_embed"):
        weights.load(save(w, tmp_path / "x.pth"))


def changed(**changes):
    names = {name.replace("__", "."): p for name, p in changes.items()}
    return {name: p for name, p in (MEANFLOW | names).items() if p is not None}


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (SIT, [], "x.pt has no embedding of t - r, so it is no MeanFlow: give --convention repa"),
        (SIT, [], "DiT's own predict noise on another path and cannot be used"),
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
        ([1, 2], [], "x.pt: not the weights of a DiT, which have x_embedder.proj.weight"),
        ({"ema": range}, [], "x.pt cannot be read (it is no file of tensors without code): give"),
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
    assert "trap.pt cannot be read (it is no file of tensors without code): give" in message
    assert not (tmp_path / "sprung").exists()


def anchored(value, prefix="", **more):
    """Return what stands for a network: the tensor by which one is found, and a bias."""
    names = "x_embedder.proj.weight", "y.bias"
    return {f"{prefix}{name}": torch.full((2,), float(value)) for name in names} | more


RAW, EMA = anchored(0), anchored(1)
USUAL = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "net_ema")
COUNT = {"n_averaged": torch.tensor(3)}
NESTINGS = {  # what a file holds, of which EMA is to be taken, and what is said
    "bare": (EMA, ""),
    "model": ({"model": EMA}, ""),
    "state_dict": ({"state_dict": EMA, "args": 1}, ""),
    "averaged": ({"ema": EMA, "model": {}}, ""),
    "none": ({"ema": None, "model": EMA, "args": argparse.Namespace(lr=1)}, ""),
    "empty": ({"ema": {}, "model": EMA}, ""),
    "deep": ({"ema": {"model": EMA}, "opt": {"state": {0: {"step": torch.ones(9)}}}}, ""),
    "beside": (EMA | {"opt": {"state": {0: torch.ones(9)}}, "step": torch.tensor(3)}, ""),
    "several words": ({"ema": {"ema_model": EMA}}, ""),
    "other form": (
        {"model": EMA, "ema": {"shadow_params": [torch.ones(2)]}},
        "/model/ is taken, not ema",
    ),
    "lightning": ({"state_dict": anchored(1, "model.", loss=torch.ones(1))}, ""),
    "lightning's two": (
        {"state_dict": anchored(0, "model.") | anchored(1, "ema_model.module.", **COUNT)},
        "/state_dict/ema_model. is taken, not /state_dict/model.",
    ),
    "root": (RAW | {"ema": EMA}, "/ema/ is taken, not /"),
    "deepspeed": ({"module": EMA, "optimizer": [torch.ones(9)]}, ""),
    "AveragedModel": ({"ema": anchored(1, "module.", **COUNT)}, ""),
    "compiled": (anchored(1, "_orig_mod.module."), ""),
}
for word in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_flax_linear"):
    NESTINGS[word] = ({k.replace(".", f".{word}."): p for k, p in EMA.items()}, "")
for word in USUAL:
    for key in ("model", "state_dict"):
        NESTINGS[f"{key}, {word}"] = ({key: RAW, word: EMA}, f"/{word}/ is taken, not /{key}/")


@pytest.mark.parametrize("name", NESTINGS)
def test_averaged_weights_are_preferred_in_any_nesting(tmp_path, capsys, name):
    content, told = NESTINGS[name]
    torch.save(content, tmp_path / "x.pt")
    tensors, metadata, _ = weights.read_weights(tmp_path / "x.pt")
    assert tensors.keys() == EMA.keys() and metadata == {}
    assert all(torch.equal(tensors[name], p) for name, p in EMA.items())
    assert capsys.readouterr().err == (f"{tmp_path / 'x.pt'}: {told}\n" if told else "")


def test_a_safetensors_file_of_others_is_searched_in_the_same_way(tmp_path, capsys):
    path = tmp_path / "X.SAFETENSORS"
    save_file(anchored(0, "model.") | anchored(1, "model_ema.module."), path)
    tensors, metadata, _ = weights.read_weights(path)
    assert torch.equal(tensors["y.bias"], EMA["y.bias"]) and metadata == {}
    assert capsys.readouterr().err == f"{path}: /model_ema. is taken, not /model.\n"


@pytest.mark.parametrize(
    "content, words",
    [
        ({"model": RAW, "model_ema1": EMA}, "several networks, /model/, /model_ema1/: save one"),
        ({"net_ema": RAW, "ema": EMA}, "several networks, /ema/, /net_ema/: save one of them al"),
        (anchored(0, "teacher.") | anchored(1, "student."), "networks, /student., /teacher.: sa"),
        (anchored(0) | anchored(1, "module."), "x_embedder.proj.weight is there twice, under tw"),
        (EMA | {"_orig_mod.y.bias": torch.ones(2)}, "y.bias is there twice, under two names"),
        (EMA | {"y._flax_linear.bias": torch.ones(2)}, "y.bias is there twice, under two names"),
        ({"model": {1: EMA["y.bias"], "1": EMA["y.bias"]} | EMA}, "1 is there twice, under two"),
        (
            EMA | {f"{k}_embedder.mlp.0.bias": torch.ones(1) for k in "hr"},
            "h_embedder.mlp.0.bias is there twice, under two names",
        ),
    ],
)
def test_a_file_in_which_a_network_is_not_certain_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        weights.read_weights(tmp_path / "x.pt")
    assert str(error.value).startswith(f"{tmp_path / 'x.pt'} cannot be read (")
    assert "\n" not in str(error.value)


STRANGE = {  # tensors with which nothing is to be computed
    "int8": lambda p: p.to(torch.int8),
    "bool": lambda p: p.bool(),
    "complex64": lambda p: p.to(torch.complex64),
    "float8_e4m3fn": lambda p: p.to(torch.float8_e4m3fn),
    "sparse_coo": lambda p: p.to_sparse(),
    "meta": lambda p: p.to("meta"),
    "qint8": lambda p: torch.quantize_per_tensor(p, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("make", ["dit", "imf"])
def test_tensors_that_are_no_floats_are_named(tmp_path, name, make):
    params = small() if make == "dit" else small_imf()
    key = "x_embedder.proj.weight"
    torch.save({"ema": params | {key: STRANGE[name](params[key])}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x.pt: {key} is .*{name}.*, should be dense torch.*: gi"):
        weights.load(tmp_path / "x.pt")


# --- which file it was ---


def identity(path):
    return f"{path} sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_sampler_says_which_file_it_is_of(tmp_path, name):
    path = save(MEANFLOW | POSITIONS, tmp_path / name)
    assert weights.read_weights(path)[2] == weights.load(path).weights == identity(path)


def test_a_run_s_folder_is_known_by_the_file_taken(tmp_path):
    path = saved(tmp_path / "ema-00000010.safetensors", small(4), "latents", 64, vae="ab12")
    found = weights.load(tmp_path)
    assert found.weights == identity(path) and found.vae_sha256 == "ab12"
    assert weights.load(saved(tmp_path / "x.safetensors", small())).vae_sha256 == ""


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_file_replaced_while_it_is_read_is_refused(monkeypatch, tmp_path, name):
    """Its checksum would be of other tensors."""
    path, other = save(EMA, tmp_path / name), save(RAW, tmp_path / f"other-{name}")
    digest = hashlib.file_digest

    def then_replace(*args):
        try:
            return digest(*args)
        finally:
            os.replace(other, path)

    monkeypatch.setattr(hashlib, "file_digest", then_replace)
    with pytest.raises(ValueError, match=r"changed while it was read: run the same command again"):
        weights.read_weights(path)


# --- what a file becomes ---


def saved(path, params, kind="pixels", resolution=8, **metadata):
    save_file(params, path, {"kind": kind, "resolution": str(resolution)} | metadata)
    return path


def small(channels=1, classes=3):
    g = torch.Generator().manual_seed(0)
    return model.init((64, 1, 2), channels=channels, classes=classes, generator=g)


def small_imf(channels=1, classes=3):
    g = torch.Generator().manual_seed(0)
    return imf.init((64, 1, 1, 2), channels=channels, classes=classes, generator=g)


def test_the_newest_averaged_weights_of_a_folder_are_taken(tmp_path):
    params = small()
    doubled = {name: 2 * p for name, p in params.items()}
    saved(tmp_path / "ema-00000010.safetensors", params)
    saved(tmp_path / "ema-00000100.safetensors", doubled)
    saved(tmp_path / "ema-9.safetensors", params)
    save_file({"weights.x": torch.zeros(1)}, tmp_path / "state-00000200.safetensors")
    save_file({"weights.x": torch.zeros(1)}, tmp_path / "state-00000010.safetensors")
    got = weights.load(tmp_path).params
    assert all(torch.equal(got[name], p) for name, p in doubled.items())
    assert weights.find_checkpoint(tmp_path) == tmp_path / "ema-00000100.safetensors"
    assert list(weights.checkpoints(tmp_path, "ema")) == [10, 100]
    assert weights.newest(tmp_path) == 10 and weights.newest(tmp_path / "no") == 0


def test_our_own_file_becomes_a_sampler(tmp_path):
    names, params = ["cat", "dog", "owl"], small()
    ours = dict(run="{}", classes=json.dumps(names))
    path = saved(tmp_path / "x.safetensors", params, resolution=16, **ours)
    found = weights.load(path)
    assert found._replace(params={}, net=None) == weights.Sampler(
        {}, None, names, "pixels", (1, 16, 16), (), 0.0, 0.18215, None, identity(path), ""
    )
    assert found.params.keys() == params.keys()
    z, t, y = torch.randn(2, 1, 16, 16), torch.ones(2), torch.tensor([0, 3])
    u = found.net(found.params, *found.guidance)(z, t, 0 * t, y)
    assert torch.equal(u, model.dit(params, z, t, 0 * t, y))


def test_latents_of_our_own_are_of_an_eighth_of_the_side(tmp_path):
    path = saved(tmp_path / "x.safetensors", small(4), "latents", 64)
    found = weights.load(path)
    assert (found.kind, found.shape, found.shift, found.scale) == ("latents", (4, 8, 8), 0, 0.18215)
    assert weights.image_shape(found.kind, found.shape) == (3, 64, 64)
    assert weights.image_shape("pixels", (1, 8, 6)) == (1, 8, 6)


@pytest.mark.parametrize(
    "kind, resolution, shape",
    [
        ("pixels", "8", (4, 8, 8)),
        ("pixels", "8x12", (4, 8, 12)),
        ("latents", "64x96", (4, 8, 12)),
        ("latents", "9984x16", (4, 1248, 2)),
    ],
)
def test_sides_may_differ(tmp_path, kind, resolution, shape):
    assert (
        weights.load(saved(tmp_path / "x.safetensors", small(4), kind, resolution)).shape == shape
    )


BAD_SIDES = ["", "0", "00", "8x0", "8x", "x8", "8x8x8", " 8", "8\n", "-8", "1e3", "8.0", "7", "8x7"]
BAD_SIDES += ["16000", "1000000000", "9" * 5000, "\u0668", "8\u00d78", "8X8"]


@pytest.mark.parametrize("resolution", BAD_SIDES, ids=lambda side: ascii(side)[:12])
def test_a_resolution_that_is_none_is_refused(tmp_path, resolution):
    """Nor may the images of latents have other sides than multiples of 8 times the patch."""
    for kind, value in (("pixels", resolution), ("latents", resolution), ("latents", "72")):
        path = saved(tmp_path / "x.safetensors", small(4), kind, value)
        words = f"metadata has kind '{kind}', resolution .*: save"
        with pytest.raises(ValueError, match=words) as error:
            weights.load(path)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", ["guidance", "latents"])
def test_metadata_nested_too_deep_is_told(tmp_path, key):
    nested = {key: "[" * 100_000}
    path = saved(tmp_path / "x.safetensors", small_imf(4), "latents", 64, **nested)
    with pytest.raises(ValueError, match="x.safetensors: "):
        weights.load(path)


def test_a_table_that_may_lack_no_class_gets_a_hint(tmp_path, capsys):
    for classes, ours, hint in (
        (9, {}, "10"),
        (99, {}, "100"),
        (8, {}, ""),
        (10, {}, ""),
        (9, 1, ""),
    ):
        ours = ours and dict(run="{}", classes=json.dumps([str(k) for k in range(classes)]))
        path = saved(tmp_path / "x.safetensors", small(classes=classes), **ours)
        weights.load(path)
        told = f"{path}: the last of {hint} labels is taken for no class\n"
        assert capsys.readouterr().err == (told if hint else "")


def test_others_classes_are_known_by_number(tmp_path):
    path = save(MEANFLOW | POSITIONS, tmp_path / "x.pt")
    assert weights.load(path).classes == NAMES
    path = saved(tmp_path / "x.safetensors", small(), classes='["cat"]')  # no run of ours
    assert weights.load(path).classes == ["0", "1", "2"]


BAD_NAMES = [
    '["cat"]',
    '["a", "b", "c", "d"]',
    "cat",
    "3",
    "null",
    '"cat"',
    '{"a": 1, "b": 2, "c": 3}',
]
BAD_NAMES += ["[1, 2, 3]", '[["a"], "b", "c"]', "[" * 100_000]


@pytest.mark.parametrize("names", BAD_NAMES, ids=lambda names: names[:20])
def test_names_that_do_not_fit_the_labels_are_refused(tmp_path, names):
    path = saved(tmp_path / "x.safetensors", small(), run="{}", classes=names)
    with pytest.raises(ValueError, match="x.safetensors: metadata classes are not 3 names: mend"):
        weights.load(path)


def test_an_imf_becomes_a_sampler_with_guidance_and_without_its_v_head(tmp_path):
    params = small_imf(4)
    found = weights.load(saved(tmp_path / "x.safetensors", params, "latents", 64), steps=1)
    assert found.guidance == (8.0, 0.4, 0.65) and found.classes == ["0", "1", "2"]
    assert found.params.keys() == {name for name in params if not name.startswith("v_")}
    shift, scale = imf.normalization()
    assert torch.equal(found.shift, shift) and torch.equal(found.scale, scale)
    z, t, y = torch.randn(2, 4, 8, 8), torch.ones(2), torch.tensor([0, 3])
    u = found.net(found.params, *found.guidance)(z, t, 0 * t, y)
    assert torch.equal(u, imf.guided(params, 8.0, 0.4, 0.65)(z, t, 0 * t, y))


# --- what may be chosen of a sampler ---


def test_a_guidance_is_chosen_in_whole_or_in_part():
    sampler = weights.Sampler({}, None, [], "pixels", (1, 8, 8), guidance=(8.0, 0.4, 0.65))
    for omega, interval, want in (
        (None, None, (8.0, 0.4, 0.65)),
        (3.0, None, (3.0, 0.4, 0.65)),
        (None, [0.1, 0.9], (8.0, 0.1, 0.9)),
        (1.0, [0.0, 0.0], (1.0, 0.0, 0.0)),
    ):
        chosen = weights.choose_guidance("x", sampler, omega, interval)
        assert chosen == sampler._replace(guidance=want)
    for omega, interval in ((0.0, None), (math.inf, None), (2.0, [0.9, 0.1]), (2.0, [0.1, 1.1])):
        with pytest.raises(ValueError, match=f"omega {omega or 0:g}, interval .*: give omega >= 1"):
            weights.choose_guidance("x", sampler, omega, interval)


@pytest.mark.parametrize("name, value", [("omega", 2.0), ("omega", 0.0), ("interval", [0.0, 1.0])])
def test_a_network_trained_with_its_guidance_takes_no_other(name, value):
    sampler = weights.Sampler({}, None, [], "pixels", (1, 8, 8))
    assert weights.choose_guidance("x", sampler) == sampler
    words = f"--{name} would be ignored as x was trained with its guidance: leave it out"
    with pytest.raises(ValueError, match=words):
        weights.choose_guidance("x", sampler, **{name: value})


@pytest.mark.parametrize(
    "params, kind, options, words",
    [
        (small(), "pixels", dict(vae="v"), "--vae would be ignored as {} makes pixels: leave it"),
        (small(), "pixels", dict(scale=2.0), "--scale would be ignored as {} makes pixels: leave"),
        (small_imf(), "pixels", dict(scale=2.0), "--scale would be ignored as {} makes pixels"),
        (small(4), "latents", {}, "{} makes latents: give --vae, sd-vae-ft-mse's file"),
        (small(4), "latents", dict(scale=2.0), "{} makes latents: give --vae, sd-vae-ft-mse's"),
        (small(4), "latents", dict(vae="no"), "no is not a file: fetch diffusion_pytorch_model"),
        (small(16), "latents", dict(vae="v"), "{} makes latents of 16 channels: the VAE has 4"),
        (small_imf(16), "latents", dict(vae="v"), "{} makes latents of 16 channels: the VAE has 4"),
        (
            small_imf(4),
            "latents",
            dict(vae="v", scale=2.0),
            "--scale would be ignored as {} has a scale for each channel: leave it out",
        ),
        (
            small(),
            "pixels",
            dict(convention="sit"),
            "{} is a MeanFlow, whose convention is known: leave out --convention",
        ),
        (small_imf(), "pixels", dict(convention="repa"), "convention is known: leave out --conv"),
    ],
)
def test_what_a_sampler_would_ignore_or_lacks_is_said(tmp_path, params, kind, options, words):
    path = saved(tmp_path / "x.safetensors", params, kind, 64)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        weights.open_sampler(path, "cpu", **options)
    assert words.format(path) in str(error.value) and "\n" not in str(error.value)


def test_a_sampler_of_latents_is_opened_with_its_vae_and_scale(monkeypatch, tmp_path):
    decoder = {"w": torch.ones(1)}
    seen = []
    monkeypatch.setattr(weights, "load_vae", lambda *args: (seen.append(args), decoder)[1])
    ours = saved(tmp_path / "x.safetensors", small(4), "latents", 64)
    assert weights.open_sampler(ours, "cpu", vae="v").vae is decoder
    assert weights.open_sampler(ours, "cpu", vae="v").scale == 0.18215
    assert weights.open_sampler(ours, "cpu", vae="v", scale=0.5).scale == 0.5
    improved = saved(tmp_path / "y.safetensors", small_imf(4), "latents", 64)
    found = weights.open_sampler(improved, "cpu", vae="v", steps=2)
    assert found.vae is decoder and torch.equal(found.scale, imf.normalization()[1])
    pixels = saved(tmp_path / "z.safetensors", small(), "pixels", 8)
    assert weights.open_sampler(pixels, "cpu").vae is None
    assert set(seen) == {("v", "cpu", "")}
    encoded = saved(tmp_path / "e.safetensors", small(4), "latents", 64, vae="ab12")
    weights.open_sampler(encoded, "cpu", vae="v")
    assert seen[-1] == ("v", "cpu", "ab12")


# --- training goes on from them ---


def start(capsys, path, convention=None, classes=NAMES, size=(128, 1, 2)):
    """Return the parameters that training starts from, and the line that is printed."""
    fresh = partial(model.init, size, channels=4, classes=len(classes))
    g = torch.Generator().manual_seed(1)
    params = weights.start_from(path, convention, classes, fresh, generator=g)
    return params, capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize("layout", ["REPA", "SiT"])
def test_training_starts_at_the_velocity_of_a_checkpoint(tmp_path, capsys, layout):
    """t - r adds nothing at first, but receives a gradient."""
    content, convention = LAYOUTS[layout]
    path = save(content, tmp_path / "x.pt")
    params, line = start(capsys, path, convention)
    created = [f"h_embedder.mlp.{k}.{kind}" for k in (0, 2) for kind in ("bias", "weight")]
    assert line == f"{path}: {len(VELOCITY)} tensors taken, created {created}, 0 labels are new"
    z, t, r, y = golden_inputs()
    assert agrees(model.dit(params, z, t, 0 * t, y), rows=t == r)
    last = params["h_embedder.mlp.2.weight"].requires_grad_()
    model.dit(params, z, t, 0 * t, y).sum().backward()
    assert last.grad.norm() > 0


def test_training_takes_our_own_weights_whole(tmp_path, capsys):
    path = save({k: p.double() for k, p in MEANFLOW.items()}, tmp_path / "x.safetensors")
    params, line = start(capsys, path)
    assert all(
        torch.equal(params[k], p) and params[k].dtype == p.dtype for k, p in MEANFLOW.items()
    )
    assert "created [], 0 labels are new" in line


def test_other_classes_get_new_labels_that_start_as_the_null_label(tmp_path, capsys):
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
        params, line = start(capsys, tmp_path / "x.safetensors", classes=classes)
        assert torch.equal(params["y_embedder.embedding_table.weight"], table[want])
        assert line.endswith(f"created [], {want[:-1].count(10)} labels are new")


def test_training_starts_from_a_runs_folder(tmp_path, capsys):
    save(MEANFLOW, tmp_path / "ema-00000007.safetensors")
    params, line = start(capsys, tmp_path)
    assert torch.equal(params[FIRST], MEANFLOW[FIRST])
    assert line.startswith(f"{tmp_path / 'ema-00000007.safetensors'}: ")


def test_the_generator_is_that_of_fresh_parameters(tmp_path, capsys):
    """What is created is drawn from it, and its device is that of the parameters."""
    path = save(VELOCITY | PROJECTORS, tmp_path / "x.pt")
    one, _ = start(capsys, path)
    fresh = model.init(
        (128, 1, 2), channels=4, classes=10, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(one["h_embedder.mlp.0.weight"], fresh["h_embedder.mlp.0.weight"])
    assert one.keys() == fresh.keys()


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
    new = partial(model.init, size, channels=channels, classes=10)
    with pytest.raises(ValueError) as error:
        weights.start_from(path, None, NAMES, new, generator=torch.Generator())
    assert words in str(error.value) and str(path) in str(error.value)


# --- sampling with a scale of one's own ---


def test_the_scale_reaches_the_decoder(monkeypatch, tmp_path):
    found = weights.load(save(MEANFLOW | POSITIONS, tmp_path / "x.pt"))
    seen = []
    monkeypatch.setattr(weights, "load_vae", lambda *_: {})
    monkeypatch.setattr(sample, "decode", lambda vae, z: seen.append(z) or z[:, :3])
    for flags, scale in (([], 0.18215), (["--scale", "0.18125"], 0.18125)):
        words = [str(tmp_path / "x.pt"), "--vae", "x", "--out", str(tmp_path / "x.png"), *flags]
        sample.main(words, runtime.World())
        x = sample.generate(found, torch.arange(10))
        assert (seen.pop() - x / scale).abs().max() < 1e-5


def test_the_network_of_a_file_is_one_for_the_losses(tmp_path):
    """What is loaded has every parameter, in the order in which a fresh network has them."""
    w = weights.load(save({"ema": VELOCITY | POSITIONS | PROJECTORS}, tmp_path / "x.pt")).params
    fresh = model.init((128, 1, 2), channels=4, classes=10, generator=torch.Generator())
    assert list(w) == list(fresh) and model.config(w) == (128, 1, 2, 4, 10)
    z, t, r, y = golden_inputs()
    u = partial(model.dit, w)(z, t, r, y)
    assert u.shape == z.shape


# --- the VAE's file ---


def load_small_vae(path):
    with widths(SMALL):
        return weights.load_vae(path)


CHANGES = {  # what is done to the tensors: what the message must name
    "missing": (lambda p: p.pop("quant_conv.bias"), "quant_conv.bias is missing"),
    "unknown": (
        lambda p: p.update({"loss.logvar": torch.zeros(1)}),
        r"loss.logvar is \(1,\), should be absent",
    ),
    "shape": (
        lambda p: p.update({"quant_conv.bias": torch.zeros(9)}),
        r"quant_conv.bias is \(9,\), should be \(8,\)",
    ),
    "nan": (
        lambda p: p["decoder.conv_in.bias"].fill_(torch.nan),
        "decoder.conv_in.bias .*not finite",
    ),
    "inf": (
        lambda p: p["quant_conv.weight"].view(-1)[3:4].fill_(torch.inf),
        "quant_conv.weight .*not finite",
    ),
    "empty": (lambda p: p.clear(), "quant_conv.weight is missing"),
    "LDM": (
        lambda p: (
            p.clear(),
            p.update({"first_stage_model.encoder.down.0.block.0.norm1.bias": torch.zeros(1)}),
        ),
        "quant_conv.weight is missing",
    ),
    "LDM's VAE": (
        lambda p: (p.clear(), p.update({"encoder.down.0.block.0.norm1.bias": torch.zeros(1)})),
        "quant_conv.weight is missing",
    ),
}


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def pickled(path, protocol=2):
    with path.open("wb") as file:
        pickle.dump({"state_dict": Trap()}, file, protocol)


def cut(path, stop):
    save_file({"a": torch.zeros(99)}, path)
    path.write_bytes(path.read_bytes()[:stop])


FILES = {  # what is written at the path: what the message must say
    "nothing": (lambda path: None, "is not a file"),
    "folder": (Path.mkdir, "is not a file"),
    "void": (Path.touch, "cannot be read \\(Error while deserializing header: "),
    "half": (lambda path: cut(path, -9), "cannot be read \\(Error while deserializing header: "),
    "head": (lambda path: cut(path, 20), "cannot be read \\(Error while deserializing header: "),
    "page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html><title>404</title></html>"),
        "cannot be read \\(Error while deserializing header: ",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a1"),
        "cannot be read \\(Error while deserializing header: ",
    ),
    "pickle": (pickled, "cannot be read \\(Error while deserializing header: "),
    "zip": (
        lambda path: torch.save({"state_dict": Trap()}, path),
        "cannot be read \\(Error while deserializing header: ",
    ),
}


def refused(path, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_small_vae(path)
    line = str(error.value)
    assert (
        line.startswith(str(path))
        and "\n" not in line
        and line.count("diffusion_pytorch_model.safetensors") == 1
    )
    assert re.search(message, line), line


@pytest.mark.slow
@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_not_the_vaes_are_named(tmp_path, change, message):
    params = vae_weights(dtype=torch.float32)
    change(params)
    save_file(params, tmp_path / "vae.safetensors")
    refused(tmp_path / "vae.safetensors", message)


@pytest.mark.parametrize("write, message", FILES.values(), ids=FILES)
def test_what_is_no_safetensors_file_is_named(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "vae.ckpt")
    refused(tmp_path / "vae.ckpt", message)
    assert not Path("executed").exists()


def test_latents_of_another_vae_get_a_word(tmp_path, capsys):
    """No refusal: two published ones share their encoder."""
    path, no_sha = tmp_path / "vae.safetensors", 64 * "0"
    save_file(vae_weights(dtype=torch.float32), path)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    told = f"{path}: latents were encoded by another VAE, sha256 {no_sha}\n"
    for wanted, said in (("", ""), (right, ""), (no_sha, told), (no_sha + "x" * 9999, told)):
        with widths(SMALL):
            weights.load_vae(path, "cpu", wanted)
        assert capsys.readouterr().err == said


def test_a_vae_of_integers_is_refused(tmp_path):
    params = vae_weights(dtype=torch.float32)
    save_file(params | {"quant_conv.bias": torch.ones(8).long()}, tmp_path / "vae.safetensors")
    refused(tmp_path / "vae.safetensors", "quant_conv.bias is torch.int64, .*, should be dense")


# --- saves of a run ---

RUN = {"seed": 0, "size": "T/2", "steps": 20, "interval": [0.0, 0.5]}
MORE_STEPS = RUN | {"steps": 30, "torch": "3", "commit": "x", "precision": "bfloat16", "warmup": 1}


def parts(value=0.0):
    """Return what a save holds, or what it is to be copied into."""
    w = torch.full((2,), value)
    return {"state": {"weights.w": w, "step.w": w[0].clone()}, "ema": {"w": w.clone()}}


def write_save(folder, step, run=RUN, value=1.0):
    folder.mkdir(exist_ok=True)
    weights.save_checkpoint(folder, step, parts(value), {"kind": "x", "run": json.dumps(run)})
    return [weights.checkpoint(folder, kind, step) for kind in ("state", "ema")]


def test_a_save_is_restored_by_its_run_with_what_may_change(tmp_path):
    write_save(tmp_path, 7)
    for run in (RUN, MORE_STEPS):
        into = parts()
        weights.restore(tmp_path, 7, into, run)
        assert all((p == 1).all() for part in into.values() for p in part.values())


def test_a_state_of_an_earlier_version_without_metadata_is_accepted(tmp_path):
    state, _ = write_save(tmp_path, 7)
    save_file(parts(2.0)["state"], state)
    into = parts()
    weights.restore(tmp_path, 7, into, RUN)
    assert (into["state"]["weights.w"] == 2).all() and (into["ema"]["w"] == 1).all()


@pytest.mark.parametrize("kinds", [["state"], ["ema"], ["state", "ema"]], ids="+".join)
@pytest.mark.parametrize(
    "step, run, words",
    [
        (7, RUN | {"seed": 1}, "holds a run with seed 1, not 0"),
        (7, RUN | {"interval": [0.0, 1.0]}, r"a run with interval \[0.0, 1.0\], not \[0.0, 0.5\]"),
        (7, RUN | {"init": "x"}, "holds a run with init x, not None"),
        (7, {k: value for k, value in RUN.items() if k != "size"}, "with size None, not T/2"),
        (5, RUN, "holds a run with step 5, not 7"),
    ],
)
def test_files_copied_from_another_run_or_step_are_refused(tmp_path, kinds, step, run, words):
    others = write_save(tmp_path / "other", step, run)
    for path, other in zip(write_save(tmp_path / "run", 7), others):
        if path.name.split("-")[0] in kinds:
            path.write_bytes(other.read_bytes())
    want = rf"{kinds[0]}-00000007.safetensors .*{words}: delete the files of this step to continue"
    with pytest.raises(ValueError, match=want):
        weights.restore(tmp_path / "run", 7, parts(), RUN)


@pytest.mark.parametrize("kind, name", [("state", "weights.w"), ("state", "step.w"), ("ema", "w")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64], ids=str)
def test_a_save_of_other_dtypes_is_refused(tmp_path, kind, name, dtype):
    write_save(tmp_path, 7)
    path = weights.checkpoint(tmp_path, kind, 7)
    tensors, metadata = runtime.read_tensors(path, "")
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata)
    words = rf"{path.name}: {name} is {dtype}, .*, should be dense torch.float32: delete the files"
    with pytest.raises(ValueError, match=words):
        weights.restore(tmp_path, 7, parts(), RUN)


@pytest.mark.parametrize("kind", ["state", "ema"])
@pytest.mark.parametrize("text", ["", "null", "7", '"x"', "[]", "{}", "[" * 100_000, '{"run": 3}'])
def test_a_save_whose_metadata_are_damaged_is_refused(tmp_path, kind, text):
    write_save(tmp_path, 7)
    path = weights.checkpoint(tmp_path, kind, 7)
    tensors, metadata = runtime.read_tensors(path, "")
    save_file(tensors, path, metadata | {"save" if kind == "state" else "run": text})
    with pytest.raises(ValueError, match=f"{path.name}.*: delete the files of this step"):
        weights.restore(tmp_path, 7, parts(), RUN)
    if kind == "ema":
        save_file(tensors, path)  # none at all
        with pytest.raises(ValueError, match=f"{path.name}.*: delete the files of this step"):
            weights.restore(tmp_path, 7, parts(), RUN)


def test_a_run_is_another_by_any_value_but_those_that_may_change():
    weights.check_run("x", RUN, MORE_STEPS)
    weights.check_run("x", MORE_STEPS, RUN)
    for before, words in ((RUN | {"seed": 7}, "seed 7, not 0"), (RUN | {"y": 1}, "y 1, not None")):
        with pytest.raises(ValueError, match=f"^x holds a run with {words}: choose another --out$"):
            weights.check_run("x", before, RUN)


def test_files_of_later_saves_that_lack_their_partner_are_named(tmp_path):
    assert weights.orphans(tmp_path) == weights.orphans(tmp_path / "no") == []
    (tmp_path / "ema-00000003.safetensors").touch()  # kept for good, older than the last save
    write_save(tmp_path, 7)
    assert weights.orphans(tmp_path) == []
    later = [tmp_path / f"{name}.safetensors" for name in ("state-00000008", "ema-00000100")]
    for path in later[::-1]:
        path.touch()
    assert weights.orphans(tmp_path) == later
    for path in tmp_path.glob("*-00000007*"):
        path.unlink()
    first, *more = weights.orphans(tmp_path)
    assert first.name == "ema-00000003.safetensors" and more == later


# --- methods ---


def a_batch(shape=(8, 1, 8, 8)):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.arange(shape[0]) % 10, g


GUIDED = {"guidance": (1.0, 0.3, (0.0, 1.0))}
METHODS = {
    "dit": (partial(weights.dit_method, "T/2", **GUIDED), 3 * 4),
    "improved": (partial(weights.dit_method, "T/2", **GUIDED, improved=True), 4 * 4),
    # the trunk and two heads for rows with r = t and for the others, trunk and one for velocities
    "imf": (partial(weights.imf_method, "iT/2", kind="pixels"), 2 * 6 + 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_method_computes_with_the_compiled_block_alone(monkeypatch, name):
    calls = []

    def compile(f, **options):
        return lambda *inputs: (calls.append(options), f(*inputs))[1]

    make, blocks = METHODS[name]
    x, y, g = a_batch()
    plain = make(channels=1, classes=10)
    monkeypatch.setattr(weights.dual, "compile", compile)
    compiled = make(channels=1, classes=10, compiled=True)
    params, draws = plain.init(generator=g), plain.draw(x.shape, generator=g)
    equal = int((draws.t == draws.r).sum())
    wanted = plain.loss(params, x, y, draws, equal)
    assert not calls
    for got, want in zip(compiled.loss(params, x, y, draws, equal), wanted):
        assert torch.equal(got, want)
    assert calls == blocks * [{"dynamic": False}]


@pytest.mark.parametrize("name", METHODS)
def test_rows_with_equal_times_are_not_counted_again(monkeypatch, name):
    """Counting makes the host wait for a GPU."""

    def fail(*_):
        raise AssertionError("counted")

    make, _ = METHODS[name]
    x, y, g = a_batch()
    method = make(channels=1, classes=10)
    params, draws = method.init(generator=g), method.draw(x.shape, generator=g)
    monkeypatch.setattr(weights.meanflow, "count_equal", fail)
    method.loss(params, x, y, draws, 6 if name == "dit" else 4)


def test_a_dit_by_the_improved_loss():
    """Half of the rows have r = t, and each argument arrives."""
    x, y, g = a_batch()
    guidance = 0.7, 0.6, (0.0, 0.8)
    method = weights.dit_method("T/2", channels=1, classes=10, guidance=guidance, improved=True)
    params, draws = method.init(generator=g), method.draw(x.shape, generator=g)
    params = {name: p + 0.1 * torch.randn(p.shape, generator=g) for name, p in params.items()}
    assert (draws.t == draws.r).tolist() == 4 * [True] + 4 * [False]
    options = dict(null=10, omega=0.7, kappa=0.6, interval=(0.0, 0.8))
    wanted = imf.one_head_loss(partial(model.dit, params), x, y, draws, **options)
    for got, want in zip(method.loss(params, x, y, draws, 4), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert "2512.02012" in method.name and method.net is weights.dit_net


def test_an_imf_takes_latents_of_four_channels_alone():
    """Its mean and deviation of each channel are known for these."""
    for channels, kind in ((4, "latents"), (16, "pixels")):
        weights.imf_method("iT/2", channels=channels, classes=10, kind=kind)
    with pytest.raises(ValueError, match="latents of 4 channels, not 16: choose a DiT's --size"):
        weights.imf_method("iT/2", channels=16, classes=10, kind="latents")


def test_latents_are_scaled_as_each_network_takes_them():
    dit = weights.dit_method("T/2", channels=4, classes=10)
    assert dit.latents == (0.0, 0.18215)
    improved = weights.imf_method("iT/2", channels=4, classes=10, kind="latents")
    shift, scale = improved.latents
    assert shift.flatten()[0] == pytest.approx(0.86488) and scale.shape == (4, 1, 1)
    assert scale.flatten()[0] == pytest.approx(1 / 4.85503674)


def test_a_network_of_the_users_is_found(tmp_path):
    """By its file, and the name of a function in it, if that is not `load`."""
    path = tmp_path / "own.py"
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\nimport beside\n"
    code += "@dataclass\nclass A:\n    b: int\nother = print\n"
    code += "def load(*inputs):\n    return inputs\n"
    path.write_text(code)
    (tmp_path / "beside.py").write_text("")
    assert weights.find_function(str(path))("x", "cpu") == ("x", "cpu")
    assert weights.find_function(f"{path}:other") is print
    (tmp_path / "a:b").mkdir()
    other = path.rename(tmp_path / "a:b" / "data.py")
    assert weights.find_function(f"{other}:load")("x") == ("x",)
    assert weights.find_function(f"{other}:load") is weights.find_function(f"{other}:load")
    assert sys.modules["data"].__file__ != str(other)
    for place in (f"{other}:no", f"{other}:__name__", tmp_path, "no.py", tmp_path / "beside.txt"):
        with pytest.raises(ValueError, match="is no function in a file: give FILE.py, where it is"):
            weights.find_function(str(place))
    with pytest.raises(ValueError, match="--convention would be ignored with --network: leave it"):
        weights.open_sampler("x", "cpu", network=str(path), convention="sit")
