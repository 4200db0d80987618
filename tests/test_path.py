"""The whole path on real files, in pixels and in latents.

A folder of JPEGs becomes shards; two processes train on them and are killed; one continues and
samples images. Also: data and weights made by others.
"""

import argparse
import json
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image
from processes import LAUNCH, fails, kill, start, wait_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import losses

import data
import evaluate
import model
import runtime
import sample
import train
import weights
from runtime import World
from vae import decode, encode, shapes

SMALL = (32, 32, 64, 64)


@pytest.fixture(scope="module", autouse=True)
def small_vae():
    """Give the VAE fewer channels, for speed; test_vae.py has it at full size."""
    with mock.patch("vae.WIDTHS", SMALL):
        yield


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A file of random weights with the layout of sd-vae-ft-mse, but less wide."""
    path = tmp_path_factory.mktemp("vae") / "diffusion_pytorch_model.safetensors"
    tensors, g = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes().items():
        norm, fan = "norm" in name, max(1, np.prod(shape[1:]))
        tensors[name] = torch.randn(shape, generator=g) * (0.1 if len(shape) == 1 else fan**-0.5)
        tensors[name] += norm and name.endswith("weight")
    save_file(tensors, path)
    return path


def call(capsys, script, *words):
    """Run a script in this process, and return what it prints."""
    capsys.readouterr()
    script.main([str(word) for word in words], World())
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "train"
    paint(folder, 3, 8)
    return folder


def train_and_kill(words, folder):
    """Train with two processes and kill both once they have saved."""
    process = start(*LAUNCH, 2, *words)
    wait_until(lambda: weights.newest(folder), process)
    kill(process)
    process.communicate()


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("kind, side, channels", [("pixels", 32, 3), ("latents", 4, 4)])
def test_from_a_folder_of_jpegs_to_images(pictures, vae, tmp_path, capsys, kind, side, channels):
    flags = {"pixels": [], "latents": ["--vae", vae]}[kind]
    printed = call(capsys, data, pictures, tmp_path / "data", "--resolution", 32, *flags)
    assert f"24 images of 3 classes as {kind} of 32x32 in 1 shards; 0 files left out" in printed

    folder = tmp_path / "run"
    words = ["--data", tmp_path / "data", "--out", folder, "--batch", 8, "--save", 5]
    train_and_kill(["train.py", *words, "--steps", 1000], folder)
    assert 0 < weights.newest(folder) < 1000
    call(capsys, train, *words, "--steps", weights.newest(folder) + 5, *flags)
    steps = [entry["step"] for entry in losses(folder)]
    assert steps == list(range(5, weights.newest(folder) + 1, 5))
    assert losses(folder)[-1]["raw_equal"] < losses(folder)[0]["raw_equal"]
    assert Image.open(folder / f"grid-{steps[-1]:08}.png").size == (10 * 36 + 4, 3 * 36 + 4)

    with safe_open(folder / f"ema-{steps[-1]:08}.safetensors", "pt") as file:
        about = file.metadata()
    assert (
        about["kind"] == kind
        and about["resolution"] == "32"
        and json.loads(about["run"])["batch"] == 8
    )
    assert (
        json.loads(about["classes"]) == ["class0", "class1", "class2"]
        and "MeanFlow" in about["model"]
    )
    sampler = weights.load(folder)
    assert model.config(sampler.params) == (64, 4, 2, channels, 3)
    assert sampler.classes == ["class0", "class1", "class2"]
    assert sampler.kind == kind and sampler.shape == (channels, side, side)

    out = ["--out", tmp_path / "two.png"]
    call(capsys, sample, folder, "--classes", "2,0", "--seed", 3, *out, *flags)
    items = sample.generate(sampler, torch.tensor([2, 0]), seed=3)
    images = decode(weights.load_vae(vae), items / 0.18215) if kind == "latents" else items
    picture = np.asarray(Image.open(tmp_path / "two.png"))
    for i, image in enumerate(images.clamp(-1, 1)):
        tile = picture[4:36, 4 + 36 * i :][:, :32].astype(int)
        assert abs(tile - ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()).max() <= 1

    reference = tmp_path / "ref.npz"
    np.savez(
        reference, arr_0=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    )
    line = json.loads(call(capsys, evaluate, folder, "--ref", reference, "--count", 6, *flags))
    assert (
        line["fid"] > 0
        and line["count"] == 6
        and line["reference"].startswith(f"{reference}, 8 images, sha256 ")
    )
    assert line["vae"] == (runtime.sha256(vae) if kind == "latents" else None)
    assert line["precision"] == {
        "network": "float32",
        "decoder": "float32" if kind == "latents" else None,
    }


@pytest.mark.slow
def test_latents_are_those_of_the_images_and_of_their_mirror_images(pictures, vae, tmp_path):
    for kind, flags in (("pixels", []), ("latents", ["--vae", str(vae)])):
        data.main([str(pictures), str(tmp_path / kind), "--resolution", "32", *flags], World())
    kinds = ("latents", "pixels")
    moments, pixels = (torch.stack([*data.load_data(tmp_path / k).items]) for k in kinds)
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert (index["scale"], index["channels"], index["vae"]) == (0.18215, 4, runtime.sha256(vae))
    assert moments.shape == (24, 2, 2, 4, 4, 4) and moments.dtype == torch.float16
    images = pixels[:5] / 127.5 - 1
    for view, seen in enumerate((images, images.flip(3))):
        for kind, wanted in enumerate(encode(weights.load_vae(vae), seen)):
            assert ((moments[:5, view, kind] - wanted).abs() <= 1e-3 * wanted.abs() + 1e-4).all()
    assert (moments[:, 0] != moments[:, 1]).any()


def test_latents_need_their_vae_to_be_seen(monkeypatch, tmp_path):
    params = model.init(
        (64, 1, 2), channels=4, classes=3, generator=torch.Generator().manual_seed(0)
    )
    save_file(params, tmp_path / "x.safetensors", {"kind": "latents", "resolution": "32"})
    assert "makes latents: give --vae, sd-vae-ft-mse's file" in fails(
        monkeypatch, "sample.py", tmp_path / "x.safetensors"
    )


# --- other people's data and weights ---


@pytest.fixture(scope="module")
def pixels(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels") / "data"
    data.main([str(pictures), str(folder), "--resolution", "15"], World())
    data.main([str(pictures), str(folder.parent / "even"), "--resolution", "16"], World())
    return folder


def test_a_resolution_that_the_patch_does_not_divide(monkeypatch, pixels, tmp_path):
    message = fails(monkeypatch, "train.py", "--data", pixels, "--out", tmp_path / "run")
    assert "data holds (3, 15, 15), not divisible by patches of 2: choose another --size" in message


def test_a_run_goes_on_with_its_own_data_only(monkeypatch, pixels, tmp_path, capsys):
    words = ["--out", tmp_path / "run", "--batch", "8", "--steps", "2"]
    call(capsys, train, *words, "--data", pixels.parent / "even")
    message = fails(monkeypatch, "train.py", *words, "--data", "digits")
    assert "holds a run with data pixels" in message


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "state dict", "checkpoint"])
def test_training_starts_from_weights_of_others(pixels, tmp_path, capsys, form):
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: p + 0.1 * torch.randn(p.shape, generator=g)
        for name, p in model.init("T/2", channels=3, classes=3, generator=g).items()
    }
    ours = {name: p for name, p in tensors.items() if not name.startswith("h_embedder")}
    theirs = ours | {"projectors.0.bias": torch.zeros(3)}
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(theirs, path)
    else:
        whole = {"model": {}, "ema": theirs, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
        torch.save(theirs if form == "state dict" else whole, path)
    words = ["--data", pixels.parent / "even", "--init", path, "--batch", "8", "--lr", "1e-12"]
    words += ["--out", tmp_path / "run"]
    printed = call(capsys, train, *words, "--steps", 1)
    assert f"{len(ours)} tensors taken" in printed and "0 labels are new" in printed
    assert "created ['h_embedder.mlp.0.bias', 'h_embedder.mlp.0.weight', 'h_embedder" in printed
    saved = load_file(tmp_path / "run" / "state-00000001.safetensors")
    assert all((saved[f"weights.{name}"] - p).abs().max() < 1e-10 for name, p in ours.items())
    assert "taken" not in call(capsys, train, *words, "--steps", 2)  # it continues
