"""Damaged files: whatever a user hands in gives the right result or one line that names the file.

Bytes are flipped, cut out, repeated, or replaced by what parsers trip over. Never a traceback, a
hang, gigabytes of memory, or a wrong number where a checksum is known. More variants by hand:

    FUZZ=2000 python -m pytest tests/test_fuzz.py
"""

import json
import os
import random
import re
import resource
import time

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image
from safetensors.torch import save_file
from test_path import SMALL

import data
import evaluate
import fid
import model
import runtime
import sample
import train
import vae
import weights

pytestmark = pytest.mark.slow
VARIANTS = int(os.environ.get("FUZZ", 200))
SECONDS, MEGABYTES = 20, 800  # for one variant, and for all of a file
STRANGE = (b"", b"\0" * 8, b"\xff" * 8, b'"', b"{}", b"-1", b"1e999", b"NaN", b"[[[[", b"99999999")
STRANGE += (b"F64", b"BF16", b"I32", b"BOOL", b"U8", b"F8_E4M3", b"..", b"\n", b"\r\n", b"null")


def damaged(content, chance):
    """Return the bytes with one to four changes, half of them near the beginning or the end."""
    content = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4])):
        spans = (len(content), min(len(content), 2000))
        i = chance.randrange(chance.choice(spans) or 1)
        i = chance.choice([i, len(content) - 1 - i]) if content else 0
        n = chance.choice([1, 2, 8, 100, len(content) // 2])
        kind = chance.randrange(5)
        if kind == 0 and content:
            content[i] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[i : i + n]
        elif kind == 2:
            content[i:i] = content[i : i + n]
        elif kind == 3:
            content[i : i + n] = chance.randbytes(n)
        else:
            strange = chance.choice(STRANGE)
            content[i : i + len(strange)] = strange
    return bytes(content)


def parameters(generator=None):
    g = generator or torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=1, classes=10, generator=g)
    return {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in params.items()}


METADATA = {
    "kind": "pixels",
    "resolution": "8",
    "run": "{}",
    "classes": json.dumps(list("abcdefghij")),
}


# --- what is handed in: make(folder) -> path, use(path) -> result, and whether it must not vary ---


def checkpoint(folder, suffix=".safetensors"):
    path = folder / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(parameters(), path, METADATA)
    else:
        torch.save({"ema": parameters(), "opt": {"lr": 1.0}}, path)
    return path


def use_checkpoint(path):
    weights.load(path)
    weights.start_from(path, None, list("abcdefghij"), parameters, generator=torch.Generator())


def use_pickle(path):
    weights.start_from(path, None, list("abcdefghij"), parameters, generator=torch.Generator())


def state():
    params = {"w": torch.nn.Parameter(torch.ones(3, 5)), "b": torch.nn.Parameter(torch.ones(5))}
    adam = torch.optim.Adam(params.values())
    for p in params.values():
        adam.state[p] = {"step": torch.zeros(()), "exp_avg": torch.ones_like(p)}
    average = {name: p.detach().clone() for name, p in params.items()}
    return train.State(params, {0.9: average}, adam)


def saved_state(folder):
    weights.save_checkpoint(folder, 7, train.saved_tensors(state()), {"kind": "pixels"})
    return folder / "state-00000007.safetensors"


def averages(folder):
    return saved_state(folder).with_name("ema-00000007.safetensors")


def use_state(path):
    weights.restore(path.parent, 7, train.saved_tensors(state()), {})


def log(folder):
    lines = [{"size": "T/2", "seed": 0}] + [{"step": k, "loss": 1.0} for k in (50, 100, 150)]
    path = folder / "log.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def use_log(path):
    for line in train.read_log(path.parent, 100, {"size": "T/2", "seed": 0}):
        json.loads(line)


def scores(folder):
    path = folder / "scores.jsonl"
    for k in range(3):
        runtime.append_line(path, {"fid": k / 3, "weights": f"x sha256 {k}"})
    return path


def use_scores(path):
    """What is appended to a damaged file is read again, after all that was read before."""
    before, line = runtime.read_lines(path), {"fid": 2.0}
    runtime.append_line(path, line)
    assert runtime.read_lines(path) == [*before, line]
    if not before:
        raise ValueError(f"{path} holds no scores")


def shards(folder):
    if not (folder / "index.json").exists():
        paint(folder.parent / "images", 2, 3, 16)
        data.main([str(folder.parent / "images"), str(folder)], runtime.World())
    return folder / "shard-00000.safetensors"


def index(folder):
    return shards(folder).with_name("index.json")


def use_shards(path):
    dataset = data.load_data(path.parent)
    return dataset.labels.tolist(), torch.stack([*dataset.items]).flatten().tolist()


def vae_file(folder):
    g = torch.Generator().manual_seed(0)
    save_file(
        {name: torch.randn(shape, generator=g) for name, shape in vae.shapes().items()},
        folder / "vae.safetensors",
    )
    return folder / "vae.safetensors"


def inception(folder):
    tensors = {name: torch.rand(shape) for name, shape in fid.inception_shapes().items()}
    save_file(tensors, folder / "inception.safetensors")
    return folder / "inception.safetensors"


def published_inception(folder):
    torch.save({"w": torch.ones(9)}, folder / "inception.pth")
    return folder / "inception.pth"


def npz_images(folder):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez_compressed(folder / "x.npz", arr_0=images)
    return folder / "x.npz"


def use_npz_images(path):
    return torch.stack([*evaluate.load_images(path)]).tolist()


def npz_statistics(folder):
    np.savez(folder / "ref.npz", mu=np.arange(4.0), sigma=np.eye(4))
    return folder / "ref.npz"


def use_npz_statistics(path):
    if (found := evaluate.load_statistics(path)) is not None:
        return [value.tolist() for value in found]
    return use_npz_images(path)


def picture(suffix):
    def write(folder):
        array = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"x{suffix}")
        return folder / f"x{suffix}"

    return write


def use_picture(path):
    crop, error = data.load_crop(path, 8)
    if error:
        raise ValueError(error)


FILES = {  # make, use, whether a checksum is known, so that the result must be the whole file's
    "checkpoint": (checkpoint, use_checkpoint, False),
    "pickled checkpoint": (lambda folder: checkpoint(folder, ".pt"), use_pickle, False),
    "state": (saved_state, use_state, False),
    "averages": (averages, use_state, False),
    "log": (log, use_log, False),
    "scores": (scores, use_scores, False),
    "shard": (shards, use_shards, True),
    "index": (index, use_shards, True),
    "vae": (vae_file, weights.load_vae, False),
    "inception": (inception, fid.load_inception, False),
    "published inception": (published_inception, fid.load_inception, True),
    "images in an npz": (npz_images, use_npz_images, True),
    "statistics in an npz": (npz_statistics, use_npz_statistics, True),
    "jpeg": (picture(".jpg"), use_picture, False),
    "png": (picture(".png"), use_picture, False),
    "gif": (picture(".gif"), use_picture, False),
    "webp": (picture(".webp"), use_picture, False),
    "tiff": (picture(".tiff"), use_picture, False),
    "bmp": (picture(".bmp"), use_picture, False),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(monkeypatch, tmp_path, name):
    monkeypatch.setattr(vae, "WIDTHS", SMALL)
    monkeypatch.setattr(fid, "BLOCKS", fid.BLOCKS[:2])
    make, use, known = FILES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    chance, path = random.Random(name), make(folder)
    whole, sizes = path.read_bytes(), {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    try:
        right = use(path)
    except ValueError as error:
        assert "not the published" in str(error)
        right = None
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for variant in range(VARIANTS):
        content = damaged(whole, chance)
        path.write_bytes(content)
        begin = time.monotonic()
        try:
            result = use(path)
            assert not known or content == whole or result == right, variant
        except (ValueError, OSError) as error:
            refused += 1
            assert "\n" not in str(error) and str(path.parent) in str(error), (variant, str(error))
            assert len(str(error)) < 1000, (variant, str(error))
        except Exception as error:
            path.rename(f"/tmp/fuzz-{name.replace(' ', '-')}-{variant}")
            raise AssertionError(f"{name} {variant}: {type(error).__name__} {error}") from error
        assert time.monotonic() - begin < SECONDS, variant
        for other, bytes_ in sizes.items():
            if other != path:
                assert other.read_bytes() == bytes_
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024 and refused > VARIANTS / 10


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def dangling(path):
    path.symlink_to("nothing")


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("kind", [pipe, device, folder, dangling, loop], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_told_at_once(monkeypatch, tmp_path, name, kind):
    """A pipe would be waited for, a device never ends."""
    monkeypatch.setattr(vae, "WIDTHS", SMALL)
    make, use, _ = FILES[name]
    (tmp_path / "folder").mkdir()
    path = make(tmp_path / "folder")
    path.unlink()
    kind(path)
    begin = time.monotonic()
    with pytest.raises((ValueError, OSError)) as error:
        use(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("name", FILES)
def test_a_link_to_a_file_is_the_file(monkeypatch, tmp_path, name):
    """As in caches of weights and data."""
    monkeypatch.setattr(vae, "WIDTHS", SMALL)
    monkeypatch.setattr(fid, "INCEPTION_SHA256", "")
    make, use, _ = FILES[name]
    (tmp_path / "folder").mkdir()
    path = make(tmp_path / "folder")
    if name in ("inception", "published inception"):  # too large, or not at hand
        return
    want = use(path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert str(use(path)) == str(want)


DTYPES = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["checkpoint", "pickled checkpoint", "state", "averages", "vae"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_other_dtypes_are_told(monkeypatch, tmp_path, name, dtype):
    monkeypatch.setattr(vae, "WIDTHS", SMALL)
    make, use, _ = FILES[name]
    path = make(tmp_path)
    if path.suffix == ".pt":
        torch.save({k: p.to(dtype) for k, p in torch.load(path)["ema"].items()}, path)
    else:
        tensors, metadata = runtime.read_tensors(path, "redo it")
        save_file({k: p.to(dtype) for k, p in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=f"{path.name}: .* is {dtype}, .*, should be dense torch"):
        use(path)


@pytest.mark.parametrize("script", [data, sample, evaluate, train], ids=lambda s: s.__name__)
def test_an_empty_value_of_any_flag_is_an_error(script, capsys):
    """As `--fid "$REF"` gives where REF is not set; it was as if the flag were not there."""
    with pytest.raises(SystemExit):
        script.main(["--help"], runtime.World())
    flags = sorted(set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)))
    assert len(flags) > 3
    for flag in flags:
        for argv in ([flag, ""], [flag, " "], [f"{flag}="]):
            with pytest.raises(ValueError, match=f"^{flag}=? is empty: give a value, or leave it"):
                script.main(["x", "y", *argv], runtime.World())


def test_statistics_that_are_no_covariance(tmp_path):
    chance = np.random.default_rng(0)
    for variant in range(VARIANTS // 4):
        d = int(chance.integers(2, 20))
        factor = chance.standard_normal((d, d))
        path, sigma = tmp_path / "ref.npz", factor @ factor.T
        np.savez(path, mu=factor[0], sigma=sigma)
        assert evaluate.load_statistics(path)[1].shape == (d, d)
        values, vectors = np.linalg.eigh(sigma)
        values[chance.integers(d)] = -values[-1] * 10 ** chance.uniform(-2, 1)
        np.savez(path, mu=factor[0], sigma=(vectors * values) @ vectors.T)
        with pytest.raises(ValueError, match="ref.npz"):
            evaluate.load_statistics(path)
