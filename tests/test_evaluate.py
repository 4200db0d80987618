"""evaluate.py: scores of checkpoints and of images, the files they come from, and curves of logs.

test_fid.py has the distance, test_inception.py the network.
"""

import json
import math
import os
import shutil
import zipfile
from unittest import mock

import numpy as np
import pytest
import test_inception
import torch
from conftest import paint
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from processes import LAUNCH, ROOT, fails, finish, start
from safetensors.torch import save_file

import data
import evaluate
import fid
import imf
import model
import runtime
import sample
import weights


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- images and references from files ---


def digits_as_images(folder, rows, change=lambda pixels: pixels, scale=2):
    """Write the digits of these rows as enlarged PNGs, some of them in a subfolder."""
    pixels = ((data.digits().items[rows, 0] + 1) * 127.5).byte()
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    for k, image in enumerate(pixels.numpy()):
        path = folder / ("more" if k % 5 == 4 else "") / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(change(image)).save(path)
    return folder


def results(capsys, *argv):
    evaluate.main([str(a) for a in argv], runtime.World())
    return json.loads(capsys.readouterr().out)


def thin(*inputs, whole=fid.inception, **options):
    """Return every 16th of Inception's features, for their covariances to take less time."""
    features, logits = whole(*inputs, **options)
    return features[:, ::16], logits


THIN = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import evaluate, fid, runtime, test_evaluate
fid.inception = test_evaluate.thin
runtime.launch(evaluate.main)
"""


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Two halves of 80 digits, and random Inception weights in the published layout."""
    folder = tmp_path_factory.mktemp("halves")
    save_file(test_inception.weights(), folder / "inception.safetensors")
    return [
        digits_as_images(folder / str(k), slice(k, 80, 2)) for k in (0, 1)
    ], folder / "inception.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("kind, scale, count", [("pixels", 1, 1797), ("Inception", 4, 24)])
def test_distance_grows_with_noise_and_with_blur(
    halves, monkeypatch, tmp_path, capsys, kind, scale, count
):
    """Compare half of the digits with the other half, intact and increasingly degraded."""
    _, weights = halves
    monkeypatch.setattr(fid, "inception", thin)
    first, second = (
        digits_as_images(tmp_path / str(k), slice(k, count, 2), scale=scale) for k in (0, 1)
    )
    flags = ["--inception", weights] if kind == "Inception" else []
    random = np.random.default_rng(0)

    def noisy(amount):
        return lambda image: np.clip(image + random.normal(0, amount, image.shape), 0, 255).astype(
            np.uint8
        )

    def blurred(amount):
        return lambda image: np.asarray(
            Image.fromarray(image).filter(ImageFilter.GaussianBlur(amount))
        )

    evaluate.main(
        [str(a) for a in (first, "--save-stats", tmp_path / "ref.npz", *flags)], runtime.World()
    )
    whole = results(capsys, second, "--ref", tmp_path / "ref.npz", *flags)["fid"]
    for way, amounts in (
        (noisy, (20, 40, 120)),
        (blurred, (0.5, 1, 5) if scale == 1 else (1, 2, 5)),
    ):
        folders = [
            digits_as_images(tmp_path / way.__name__ / str(a), slice(1, count, 2), way(a), scale)
            for a in amounts
        ]
        distances = [whole] + [
            results(capsys, folder, "--ref", tmp_path / "ref.npz", *flags)["fid"]
            for folder in folders
        ]
        assert sorted(distances) == distances and distances[-1] > 2 * distances[0], (
            way.__name__,
            distances,
        )
        assert distances[0] < 0.1 * distances[-1] or kind == "Inception", (
            "20 images say little in 128 dimensions"
        )
    same = results(capsys, first, "--ref", tmp_path / "ref.npz", *flags)
    assert same["fid"] < 1e-6 * distances[0] and same["count"] == (count + 1) // 2
    assert ("is" in same) == (kind == "Inception") and kind.split()[0] in same["features"]
    if kind == "Inception":
        assert same["inception"] == runtime.sha256(weights) and "TensorFlow" in same["resize"]


@pytest.mark.slow
def test_a_folder_an_npz_and_statistics_of_the_same_images_are_the_same(halves, tmp_path, capsys):
    (first, second), _ = halves
    paths = sorted(second.rglob("*.png"))
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]),
        arr_1=np.zeros(40),
    )
    evaluate.main([str(second), "--save-stats", str(tmp_path / "stats.npz")], runtime.World())
    with np.load(tmp_path / "stats.npz") as file:
        np.savez(tmp_path / "authors.npz", ref_mu=file["mu"], ref_sigma=file["sigma"])
        np.savez(
            tmp_path / "both.npz", **file, arr_0=np.zeros((5, 16, 16, 3), np.uint8)
        )  # the statistics count, as in ADM's
    want = results(capsys, first, "--ref", second)
    for name in ("adm", "stats", "authors", "both"):
        got = results(capsys, first, "--ref", tmp_path / f"{name}.npz")
        assert (
            got["fid"] == pytest.approx(want["fid"], rel=1e-9)
            and runtime.sha256(tmp_path / f"{name}.npz") in got["reference"]
        )
    assert results(capsys, tmp_path / "adm.npz", "--ref", second)["fid"] < 1e-9
    assert results(capsys, first, "--ref", second, "--count", 30)["count"] == 30


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("flags", [[], ["--inception"]])
def test_any_number_of_processes_gives_the_same_numbers(
    halves, monkeypatch, tmp_path, capsys, flags
):
    (first, _), weights = halves
    second = digits_as_images(tmp_path / "second", slice(1, 23, 2))
    argv = [first, "--ref", second, "--count", 13, *flags, *([weights] if flags else [])]
    monkeypatch.setattr(fid, "inception", thin)
    (tmp_path / "thin.py").write_text(THIN)
    script = tmp_path / "thin.py" if flags else "evaluate.py"
    processes = [start(*LAUNCH, world, script, *argv) for world in (2, 3)]
    alone = results(capsys, *argv)
    for printed in finish(*processes):
        shared = json.loads(printed)
        for key in ("fid", "is", "is_std") if flags else ("fid",):
            # the network rounds differently in batches of other sizes
            assert shared[key] == pytest.approx(alone[key], rel=1e-5 if flags else 1e-9)
        assert shared["count"] == alone["count"] == 13


@pytest.mark.slow  # starts processes
def test_a_broken_image_of_one_process_ends_all(halves, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(halves[0][0], folder)
    broken = sorted(folder.rglob("*.png"))[1]  # the second process's
    broken.write_text("x")
    process = start(*LAUNCH, 2, "evaluate.py", folder, "--ref", halves[0][1])
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"evaluate.py: {broken} cannot be read (" in errors
    assert "Traceback" not in errors.split("failed (exitcode")[0], "what follows is torchrun's own"


def test_gathering_loses_no_digits(monkeypatch):
    """Combine three processes' statistics at an offset of 1e6; compare with all items at once."""
    x = randn(0, 50, 4)
    parts = (x[:20], x[20:27], x[27:])
    states = [fid.accumulate(None, part + 1e6) for part in parts]
    monkeypatch.setattr(runtime, "all_gather", lambda _: [*states, None])
    count, mean, scatter = evaluate.gather(None)
    _, sigma = fid.statistics((count, mean, scatter))
    assert count == 50 and (mean - 1e6 - x.mean(0)).abs().max() < 1e-9
    assert np.abs(sigma.numpy() - np.cov(x.numpy().T)).max() < 1e-8


@pytest.mark.parametrize("count, world", [(7, 3), (6, 2), (2, 4)])
def test_rows_are_gathered_in_the_order_of_one_process(monkeypatch, count, world):
    rows = randn(0, count, 2)
    parts = [rows[rank::world] for rank in range(world)]
    monkeypatch.setattr(runtime, "all_gather", lambda _: parts)
    assert torch.equal(evaluate.gather_rows(parts[0]), rows)


@pytest.mark.slow
def test_images_of_several_sizes_make_one_batch(tmp_path):
    """A folder of two sizes is resized first: the network sees 64 images at a time."""
    sizes, shapes = [(40, 24), (24, 40)], []
    for k in range(66):
        array = test_inception.images(k, 1, *sizes[k % 2])[0].permute(1, 2, 0).numpy()
        Image.fromarray(array).save(tmp_path / f"{k}.png")

    def features(batch):
        shapes.append([tuple(image.shape) for image in batch])
        return torch.zeros(len(batch), 2), None

    evaluate.measure(tmp_path, features, runtime.World())
    assert [len(batch) for batch in shapes] == [64, 2]
    assert set(shapes[0]) == {(3, 40, 24), (3, 24, 40)}


@pytest.mark.parametrize("kind", ["folder", "npz", "digits", "shards"])
def test_images_are_a_folder_an_npz_digits_or_what_data_py_wrote(tmp_path, capsys, kind):
    """Each is scored against itself, in all and by the first of its images."""
    path, total = tmp_path / "x.npz", 12
    if kind == "folder":
        path = digits_as_images(tmp_path / "x", slice(12))
    elif kind == "npz":
        images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
        np.savez(path, arr_0=images)
    elif kind == "shards":
        paint(tmp_path / "images", 2, 6)
        path = tmp_path / "x"
        data.main([str(tmp_path / "images"), str(path), "--resolution", "8"], runtime.World())
        capsys.readouterr()
    else:
        path, total = "digits", 1797
    line = results(capsys, path, "--ref", path)
    assert line["fid"] < 1e-9 and line["count"] == total and line["images"] == str(path)
    assert line["reference"].startswith(f"{path}, {total} images")
    assert "weights" not in line and line["features"] == "raw pixels in [-1, 1]"
    line = results(capsys, path, "--ref", path, "--count", 7)
    assert line["fid"] > 1e-3 and line["count"] == 7


def test_the_line_of_images_is_appended_once(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(48), sigma=np.eye(48))
    argv = [tmp_path / "x.npz", "--ref", tmp_path / "ref.npz", "--out", tmp_path / "out.jsonl"]
    lines = [results(capsys, *argv) for _ in range(2)]
    assert runtime.read_lines(tmp_path / "out.jsonl") == lines[:1] == lines[1:]


# --- bad input ---


def save_stats(path, mu=np.zeros(768), sigma=np.eye(768)):
    np.savez(path, mu=mu, sigma=sigma)


def rewritten(path, change):
    """Write an .npz of nine images, then apply `change` to the bytes of its .npy."""
    np.savez(path, arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path) as archive:
        npy = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", change(npy))


def claiming(path, **shapes):
    """Write an .npz whose arrays of float64 have these shapes in their headers, but few values."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w") as file:
                about = {"descr": "<f8", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)
                file.write(bytes(min(112, 8 * math.prod(shape))))


REFERENCES = {
    "missing": (
        lambda path: None,
        "ref.npz is not a file: give images or an .npz, such as ADM's https://openaipublic",
    ),
    "a pipe": (os.mkfifo, "ref.npz is not a file: give images or an .npz"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "cannot be read (File is not a zip file): give images or an .npz, such as ADM's https://op",
    ),
    "page": (
        lambda path: path.write_text("<!DOCTYPE html><html>"),
        "cannot be read (File is not a zip file)",
    ),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read (File is not a zip file)"),
    "cut short": (
        lambda path: (save_stats(path), path.write_bytes(path.read_bytes()[:-99])),
        "cannot be read (File is not a zip file)",
    ),
    "bits flipped": (
        lambda path: (
            save_stats(path, np.ones(768)),
            path.write_bytes(
                path.read_bytes().replace(np.ones(9).tobytes(), np.zeros(9).tobytes(), 1)
            ),
        ),
        "cannot be read (Bad CRC-32 for file 'mu.npy')",
    ),
    "other keys": (
        lambda path: np.savez(path, mean=np.zeros(3)),
        "cannot be read (\"There is no item named 'arr_0.npy' in the archive\")",
    ),
    "half the keys": (
        lambda path: np.savez(path, mu=np.zeros(3), ref_sigma=np.eye(3)),
        "cannot be read (\"There is no item named 'sigma.npy' in the archive\")",
    ),
    "pickled": (
        lambda path: save_stats(path, mu=np.array([{}, {}])),
        "cannot be read (mu is object (2,) in ",
    ),
    "text": (
        lambda path: save_stats(path, mu=np.array(["a"])),
        "cannot be read (mu is <U1 (1,) in 132 bytes, should be float32 or float64 (any,) in C or",
    ),
    "shapes": (
        lambda path: save_stats(path, mu=np.zeros(5)),
        "sigma is float64 (768, 768) in 4,718,720 bytes, should be float32 or float64 (5, 5) in C",
    ),
    "no dimension": (
        lambda path: save_stats(path, mu=np.zeros(())),
        "mu is float64 () in 136 bytes, should be float32 or float64 (any,) in C order",
    ),
    "half precision": (
        lambda path: save_stats(path, sigma=np.eye(768, dtype=np.float16)),
        "sigma is float16 (768, 768) in ",
    ),
    "a claim of 8 TB": (
        lambda path: claiming(path, mu=(5,), sigma=(5, 10**12)),
        "sigma is float64 (5, 1000000000000) in 240 bytes, should be float32 or float64 (5, 5) in",
    ),
    "another claim of 8 TB": (
        lambda path: claiming(path, mu=(10**12,), sigma=(5, 5)),
        "mu is float64 (1000000000000,) in 240 bytes, should be",
    ),
    "infinite": (
        lambda path: save_stats(path, mu=np.full(768, np.inf)),
        "mu and sigma are not a finite mean and covariance",
    ),
    "asymmetric": (
        lambda path: save_stats(path, sigma=np.triu(np.ones((768, 768)))),
        "mu and sigma are not a finite mean and covariance",
    ),
    "negative": (
        lambda path: save_stats(path, sigma=-np.eye(768)),
        "no covariance has an eigenvalue -1:",
    ),
    "no covariance": (
        lambda path: save_stats(path, np.zeros(192), np.eye(192) - 0.9999),
        "no covariance has an eigenvalue -191:",
    ),
    "a distance without end": (
        lambda path: save_stats(path, mu=np.full(768, 1e200)),
        "mu and sigma are not a finite mean and covariance",
    ),
    "NaN": (
        lambda path: save_stats(path, sigma=np.full((768, 768), np.nan)),
        "mu and sigma are not a finite mean and covariance",
    ),
    "features": (
        lambda path: save_stats(path, np.zeros(5), np.eye(5)),
        "ref.npz has 5 features, images of (3, 16, 16) have 768",
    ),
    "no real numbers": (
        lambda path: save_stats(path, mu=np.zeros(768, complex)),
        "cannot be read (mu is complex128 (768,) in ",
    ),
    "nothing": (
        lambda path: save_stats(path, np.zeros(0), np.zeros((0, 0))),
        "mu is float64 (0,) in 128 bytes, should be",
    ),
    "another .npy": (
        lambda path: rewritten(path, lambda npy: npy[:6] + bytes([3]) + npy[7:]),
        "cannot be read",
    ),
    "bits of images": (
        lambda path: (
            np.savez(path, arr_0=np.full((9, 8, 8, 3), 7, np.uint8)),
            path.write_bytes(path.read_bytes().replace(bytes([7]) * 99, bytes([8]) * 99, 1)),
        ),
        "cannot be read (Bad CRC-32 for file 'arr_0.npy')",
    ),
    "images cut short": (
        lambda path: rewritten(path, lambda npy: npy[:-9]),
        "arr_0 is uint8 (9, 8, 8, 3) in 1,847 bytes, should be uint8 (any, any, any, 3) in C order",
    ),
    "images beside a claim": (
        lambda path: rewritten(path, lambda npy: npy.replace(b"(9, 8", b"(9,99")),
        "arr_0 is uint8 (9, 99, 8, 3) in 1,856 bytes",
    ),
    "sides below 0": (
        lambda path: rewritten(path, lambda npy: npy.replace(b"8, 8, 3)", b"-8,-8,3)")),
        "arr_0 is uint8 (9, -8, -8, 3) in ",
    ),
    "images in another order": (
        lambda path: np.savez(path, arr_0=np.zeros((3, 8, 9, 3), np.uint8).T),
        "arr_0 is uint8 (3, 9, 8, 3) in ",
    ),
    "one image that fills the memory": (
        lambda path: np.savez_compressed(path, arr_0=np.zeros((2, 2000, 4000, 3), np.uint8)),
        "images of [2000, 4000, 3] are too large",
    ),
    "sizes": (
        lambda path: [paint(path / str(side), 1, 1, side) for side in (8, 9)],
        "images of (3, 8, 8) and (3, 9, 9) cannot be compared: give --inception",
    ),
    "deep images": (
        lambda path: (
            path.mkdir(),
            [Image.fromarray(np.zeros((8, 8), np.uint16)).save(path / f"{k}.png") for k in (0, 1)],
        ),
        "more than 8 bits a channel, mode I;16",
    ),
    "a picture": (
        lambda path: (
            paint(path, 1, 1, 8)
            or next(path.rglob("*.jpg")).rename(path.with_name("y"))
            and [shutil.rmtree(path), path.with_name("y").rename(path)]
        ),
        "cannot be read (File is not a zip file)",
    ),
    "images of floats": (
        lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8, 3))),
        "arr_0 is float64 (3, 8, 8, 3) in 4,736 bytes, should be uint8 (any, any, any, 3) in C",
    ),
    "grey images": (
        lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8), np.uint8)),
        "arr_0 is uint8 (3, 8, 8) in 320 bytes, should be uint8 (any, any, any, 3) in C order",
    ),
    "an empty folder": (lambda path: path.mkdir(), "has 0 images, at least 2 are needed"),
    "no images": (
        lambda path: (path.mkdir(), (path / "x.txt").write_text("x")),
        "has 0 images, at least 2 are needed",
    ),
    "a broken image": (
        lambda path: (path.mkdir(), [(path / f"{k}.png").write_text("x") for k in (0, 1)]),
        "0.png cannot be read (cannot identify image file",
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_bad_references(monkeypatch, halves, tmp_path, kind):
    change, words = REFERENCES[kind]
    change(tmp_path / "ref.npz")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7_999_999)
    message = fails(monkeypatch, "evaluate.py", halves[0][0], "--ref", tmp_path / "ref.npz")
    assert words in message and (kind == "features" or str(tmp_path / "ref.npz") in message)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to do: give --ref or, for images, --save-stats, or both"),
        (["--ref", "x.npz", "--count", "1"], "argument --count: 1: give 2 to 2147483648"),
        (
            ["--save-stats", "."],
            "--save-stats .: give a new file in a folder that exists",
        ),
        (
            ["--save-stats", "s.npz", "--count", "41"],
            "has 40 images, at least 41 are needed",
        ),
        (
            ["--ref", "x.npz", "--inception", "no.pth"],
            "no.pth is not a file: fetch https://github.com/mseitzer/pytorch-fid",
        ),
        (["--ref", "x.npz", "--fast"], "unrecognized arguments: --fast"),
        (["--ref", "x.npz", "--classes", "3"], "--classes would be ignored as {} holds images: le"),
        (["--ref", "x.npz", "--uniform"], "--uniform would be ignored as {} holds images: leave"),
        (["--ref", "x.npz", "--steps", "2"], "--steps would be ignored as {} holds images"),
        (["--ref", "x.npz", "--seed", "0"], "--seed would be ignored as {} holds images"),
        (["--ref", "x.npz", "--vae", "x"], "--vae would be ignored as {} holds images"),
        (["--ref", "x.npz", "--scale", "2"], "--scale would be ignored as {} holds images"),
        (["--ref", "x.npz", "--omega", "1"], "--omega would be ignored as {} holds images"),
        (["--ref", "x.npz", "--out", "/dev/null"], "--out /dev/null: give a file in a folder that"),
        (["--save-stats", "README.md"], "--save-stats README.md: give a new file in a folder that"),
        (["--save-stats", "/dev/null"], "--save-stats /dev/null: give a new file in a folder that"),
        (["--ref", "x.npz", "--interval", "0,1"], "--interval would be ignored as {} holds images"),
        (["--ref", "x.npz", "--convention", "sit"], "--convention would be ignored as {} holds"),
        (["--ref", "x.npz", "--every"], "--every would be ignored as {} holds images"),
        (["digits", "--ref", "x.npz"], "{} holds images: score digits in another command"),
        (["--save-stats", "s.npz", "--out", "x"], "--out would be ignored without --ref: leave it"),
    ],
)
def test_bad_arguments_of_images(monkeypatch, halves, flags, words):
    message = fails(monkeypatch, "evaluate.py", halves[0][0], *flags)
    assert words.format(halves[0][0]) in message


def test_pixels_that_are_too_many_for_a_covariance():
    with pytest.raises(
        ValueError,
        match="196,608 pixels are too many features: give --inception",
    ):
        evaluate.pixels(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))


def test_raw_pixels_run_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 4, 3)
    features, logits = evaluate.pixels(images)
    assert logits is None and features.shape == (2, 36)
    assert (features.unflatten(1, (12, 3)) - torch.tensor([-1.0, -0.6, 1.0])).abs().max() < 1e-6


def test_suffixes_of_images_may_be_in_capitals(tmp_path):
    for k, name in enumerate(("a.PNG", "b.png", "c.JPEG")):
        Image.new("RGB", (4, 4), (k, k, k)).save(tmp_path / name)
    (tmp_path / "notes.TXT").write_text("x")
    assert [image.shape for image in evaluate.load_images(tmp_path)] == [(3, 4, 4)] * 3


def test_raw_pixels_of_other_shapes_are_not_compared(tmp_path, monkeypatch):
    """Nor if there are as many of them, or if each process sees one shape."""
    for name, size in (("tall", (16, 32)), ("wide", (32, 16))):
        (tmp_path / name).mkdir()
        for k in range(3):
            array = np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{k}.png")
    message = fails(monkeypatch, "evaluate.py", tmp_path / "tall", "--ref", tmp_path / "wide")
    assert "images of (3, 16, 32) and (3, 32, 16) cannot be compared: give --inception" in message
    others = [{(3, 16, 32)}, {(3, 32, 16)}]
    monkeypatch.setattr(
        runtime, "all_gather", lambda value: others if value == others[0] else [value]
    )
    with pytest.raises(ValueError, match="tall: images of .* cannot be compared"):
        evaluate.measure(tmp_path / "tall", evaluate.pixels, runtime.World())


def test_a_reference_is_known_by_what_it_holds(tmp_path):
    """A folder whose images are replaced by as many others is another reference."""
    for k in range(4):
        paint_noise(tmp_path / f"{k}.png", k)
    shape = (3, 8, 8)
    first, again = (evaluate.load_scorer(str(tmp_path), None, shape, runtime.World()) for _ in "ab")
    paint_noise(tmp_path / "0.png", 9)
    other = evaluate.load_scorer(str(tmp_path), None, shape, runtime.World())
    assert first.about == again.about != other.about
    for k in range(4):
        Image.open(tmp_path / f"{k}.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
            tmp_path / f"{k}.png"
        )
    mirrored = evaluate.load_scorer(str(tmp_path), None, shape, runtime.World())
    assert mirrored.about != other.about  # although mean and variance are the same
    assert other.about["reference"].startswith(f"{tmp_path}, 4 images, mean ")


def paint_noise(path, seed):
    array = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(path)


def test_logits_are_kept_for_scores_alone(monkeypatch, tmp_path):
    """Those of ImageNet's 1.3 million images would take 5 GB."""
    kept, collect = [], evaluate.collect

    def spy(batches, features, keep_logits=True):
        kept.append(keep_logits)
        return collect(batches, features, keep_logits)

    monkeypatch.setattr(evaluate, "collect", spy)
    evaluate.main(["digits", "--save-stats", str(tmp_path / "ref.npz")], runtime.World())
    assert kept == [False]
    evaluate.main(["digits", "--ref", "digits"], runtime.World())
    assert kept == [False, False, True]


# --- what is not what it seems ---


def test_statistics_are_read_in_any_order_of_bytes_and_of_either_precision(tmp_path):
    """Of few items, too: rounding leaves their covariance eigenvalues below 0."""
    mu, sigma = fid.statistics(fid.accumulate(None, randn(0, 9, 40) + 3))
    mu, sigma = mu.numpy(), sigma.numpy()
    for name, kind in (("a.npz", ">f8"), ("b.NPZ", "<f4"), ("c.npz", ">f4")):
        with open(tmp_path / name, "wb") as file:
            np.savez(file, mu=mu.astype(kind), sigma=np.asfortranarray(sigma.astype(kind)))
        found = evaluate.load_statistics(tmp_path / name)
        for got, want in zip(found, (mu, sigma)):
            assert got.dtype == torch.float64 and np.abs(got.numpy() - want).max() < 1e-6
        assert fid.frechet_distance(*found, *found) < 1e-6
        assert evaluate.is_images(str(tmp_path / name))


def test_more_features_than_a_covariance_can_have_are_refused_unread(monkeypatch, tmp_path):
    save_stats(tmp_path / "x.npz", np.zeros(6), np.eye(6))
    monkeypatch.setattr(evaluate, "MOST", 5)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="6 features are too many"):
        m.setattr(np, "frombuffer", None)
        evaluate.load_statistics(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="^6 pixels are too many features: give --inception$"):
        evaluate.pixels(torch.zeros(2, 1, 2, 3, dtype=torch.uint8))


def test_images_are_taken_from_their_classes_in_turn():
    assert evaluate.in_turn("aaabbc") == [0, 3, 5, 1, 4, 2]
    assert evaluate.in_turn([2, 0, 2, 2, 0]) == [0, 1, 2, 4, 3]
    assert evaluate.in_turn(["x", "y", "z"]) == [0, 1, 2]  # files of no class


def paint_classes(folder):
    """Write four grey images of each of three classes, and what is none."""
    for label, name in enumerate("abc"):
        for k in range(4):
            path = folder / name / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * (4 * label + k),) * 3).save(path)
    (folder / "a" / ".0.png").write_bytes(b"x")
    (folder / "a" / "notes.txt").write_bytes(b"x")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "a" / "0.png", folder / ".cache" / "0.png")
    return folder


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_count_of_images_takes_classes_in_turn(tmp_path, capsys, kind):
    """Without one the order is the files', on which the Inception score depends."""
    path = str(paint_classes(tmp_path / "images"))
    if kind == "shards":
        data.main([path, str(tmp_path / "data"), "--resolution", "8"], runtime.World())
        path = str(tmp_path / "data")

    def shown(*arguments):
        return [int(image[0, 0, 0]) // 10 for image in evaluate.load_images(path, *arguments)]

    assert shown() == [*range(12)] and shown(None, 1, 3) == [1, 4, 7, 10]
    assert shown(5) == [0, 4, 8, 1, 5] and shown(12) == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert [shown(5, rank, 2) for rank in (0, 1)] == [[0, 8, 5], [4, 1]]


@pytest.mark.parametrize("kind", ["statistics", "images"])
def test_a_reference_that_is_replaced_while_it_is_read_is_refused(monkeypatch, tmp_path, kind):
    path = tmp_path / "ref.npz"
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    known = dict(arr_0=images) if kind == "images" else dict(mu=np.zeros(192), sigma=np.eye(192))
    np.savez(path, **known)
    whole, load = path.read_bytes(), evaluate.load_statistics
    before = evaluate.load_scorer(str(path), None, (3, 8, 8), runtime.World())
    assert runtime.sha256(path) in before.about["reference"]

    def replace(path):
        found = load(path)
        np.savez(path, **{name: value + 1 for name, value in known.items()})
        return found

    monkeypatch.setattr(evaluate, "load_statistics", replace)
    with pytest.raises(ValueError, match="ref.npz changed while it was read: run the same"):
        evaluate.load_scorer(str(path), None, (3, 8, 8), runtime.World())
    assert path.read_bytes() != whole


def test_statistics_are_never_written_over_what_is_there(monkeypatch, tmp_path):
    """Neither over the images themselves, nor over what came while they were read."""
    images, new = tmp_path / "x.npz", tmp_path / "new.npz"
    np.savez(images, arr_0=np.zeros((9, 4, 4, 3), np.uint8))
    whole = images.read_bytes()
    (tmp_path / "link.npz").symlink_to("nowhere")
    for path in (images, tmp_path / "link.npz"):
        message = fails(monkeypatch, "evaluate.py", images, "--save-stats", path)
        assert f"--save-stats {path}: give a new file in a folder that exists" in message

    def late(*arguments, whole=evaluate.measure, **options):
        new.write_bytes(b"theirs")
        return whole(*arguments, **options)

    monkeypatch.setattr(evaluate, "measure", late)
    with pytest.raises(OSError, match="new.npz cannot be written .it exists.: choose another"):
        evaluate.main([str(images), "--save-stats", str(new)], runtime.World())
    assert images.read_bytes() == whole and new.read_bytes() == b"theirs"


def disagree(monkeypatch, change):
    """Let a second process hand in what this one does, after `change`."""
    whole = runtime.all_gather
    monkeypatch.setattr(runtime, "all_gather", lambda value: [*whole(value), change(value)])


def test_processes_that_see_different_references_end_before_they_wait(monkeypatch, tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(48), sigma=np.eye(48))
    paint_classes(tmp_path / "images")
    world = runtime.World()
    disagree(monkeypatch, lambda value: ", sha256 0" if isinstance(value, str) else value)
    with pytest.raises(ValueError, match="^processes see different files .*ref.npz: put it on a d"):
        evaluate.load_scorer(str(tmp_path / "ref.npz"), None, (3, 4, 4), world)
    monkeypatch.undo()
    disagree(monkeypatch, lambda value: 11 if value == 12 else value)
    with pytest.raises(ValueError, match="^processes see different images in .*images: put it on"):
        evaluate.load_scorer(str(tmp_path / "images"), None, (3, 8, 8), world)


def test_processes_that_would_say_different_things_of_a_score_end(checkpoint, monkeypatch):
    scorer = evaluate.load_scorer("digits", None, (1, 8, 8), runtime.World())
    options = dict(scorer=scorer, samples=evaluate.Samples(4), world=runtime.World())
    monkeypatch.setattr(sample, "generate", None)
    disagree(monkeypatch, lambda value: value | {"weights": "x"})
    with pytest.raises(ValueError, match="^processes see different weights or references: put"):
        evaluate.score(checkpoint[1], [], **options)


# --- checkpoints ---


def random_weights(seed=0, channels=1, classes=10):
    g = torch.Generator().manual_seed(seed)
    params = model.init((64, 1, 2), channels=channels, classes=classes, generator=g)
    return {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in params.items()}


def save_weights(path, params, resolution=8, kind="pixels"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(params, path, {"kind": kind, "resolution": str(resolution)})
    return path


@pytest.fixture
def checkpoint(tmp_path):
    """A run's folder with random weights for 1-channel 8x8 images of 10 classes."""
    path = save_weights(tmp_path / "run" / "ema-00000010.safetensors", random_weights())
    return tmp_path / "run", weights.load(path)


def scored_all(capsys, *words):
    """Return the lines that are printed for checkpoints."""
    words = [*words, "--ref", "digits", "--count", "60"]
    evaluate.main([str(word) for word in words], runtime.World())
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def scored(capsys, *words):
    [line] = scored_all(capsys, *words)
    return line


def test_the_score_of_samples_in_one_line(checkpoint, capsys):
    folder, sampler = checkpoint
    result = scored(capsys, folder, "--steps", "2", "--seed", "3")
    samples = sample.generate(sampler, torch.arange(60) % 10, steps=2, seed=3)
    quantised = ((samples.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    digits = (data.digits().items.add(1).mul(127.5).round() / 127.5 - 1).flatten(1)
    want = fid.frechet_distance(
        *fid.statistics(fid.accumulate(None, quantised.flatten(1))),
        *fid.statistics(fid.accumulate(None, digits)),
    )
    assert result.pop("fid") == pytest.approx(want.item(), rel=1e-6)
    path = folder / "ema-00000010.safetensors"
    known = {
        "count": 60,
        "features": "raw pixels in [-1, 1]",
        "reference": "digits, 1797 images, mean -0.38938, variance 18.761, order -4.4409",
        "steps": 2,
        "seed": 3,
        "guidance": None,
        "precision": {"network": "float32", "decoder": None},
        "classes": "balanced",
        "weights": f"{path} sha256 {runtime.sha256(path)}",
        "vae": None,
    }
    assert {key: result[key] for key in known} == known and "is" not in result
    assert scored(capsys, folder, "--classes", "3,1")["classes"] == "balanced, of 3,1"


@pytest.mark.slow
def test_grey_images_go_through_inception_as_colours(checkpoint, tmp_path, capsys):
    path, ten = tmp_path / "inception.safetensors", data.digits()
    save_file(test_inception.weights(), path)
    ten = ten._replace(items=ten.items[:10], labels=ten.labels[:10])
    words = [checkpoint[0], "--ref", "digits", "--count", "12", "--inception", path]
    with mock.patch.object(data, "digits", lambda: ten):
        evaluate.main([str(word) for word in words], runtime.World())
    result = json.loads(capsys.readouterr().out)
    assert result["is"] >= 1 and result["is_splits"] == 10
    assert result["features"] == "Inception-v3 of 2015-12-05"


def test_samples_that_are_not_finite_have_no_distance(checkpoint):
    _, sampler = checkpoint
    bad = sampler._replace(params={name: p * 1e38 for name, p in sampler.params.items()})
    world = runtime.World()
    scorer = evaluate.load_scorer("digits", None, (1, 8, 8), world)
    options = dict(scorer=scorer, samples=evaluate.Samples(4), world=world)
    with pytest.raises(ValueError, match="samples have values that are not finite"):
        evaluate.score(bad, [], **options)


def test_a_reference_of_other_features_is_refused_before_anything_is_drawn(
    checkpoint, monkeypatch, tmp_path
):
    np.savez(tmp_path / "x.npz", mu=np.zeros(5), sigma=np.eye(5))
    monkeypatch.setattr(sample, "generate", None)
    message = fails(monkeypatch, "evaluate.py", checkpoint[0], "--ref", tmp_path / "x.npz")
    assert (
        "x.npz has 5 features, images of (1, 8, 8) have 64: give or leave out --inception"
        in message
    )


def test_uniform_classes_depend_on_seed_and_index_alone(checkpoint, capsys):
    assert scored(capsys, checkpoint[0], "--uniform")["classes"] == "uniform"
    seen = []
    for count in (7, 60):
        labels = []

        def generate(sampler, y, **_):
            labels.append(y)
            return torch.zeros(len(y), *sampler.shape)

        with mock.patch.object(sample, "generate", generate):
            words = [checkpoint[0], "--uniform", "--ref", "digits", "--count", count]
            evaluate.main([str(word) for word in words], runtime.World())
        seen.append(torch.cat(labels))
    assert torch.equal(seen[0], seen[1][:7]) and seen[1].bincount(minlength=10).float().std() > 0.5


@pytest.mark.slow  # starts processes
def test_two_processes_draw_the_same_samples(checkpoint, tmp_path, capsys):
    """The first appends the lines, and what is there is not drawn again."""
    save_weights(checkpoint[0] / "ema-00000020.safetensors", random_weights(1))
    words = ["evaluate.py", checkpoint[0], "--every", "--ref", "digits", "--count", "60"]
    out = tmp_path / "out.jsonl"
    [printed] = finish(start(*LAUNCH, 2, *words, "--out", out))
    shared, alone = map(json.loads, printed.splitlines()), scored_all(capsys, *words[1:3])
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.pop("fid") == pytest.approx(theirs.pop("fid"), rel=1e-6) and ours == theirs
    assert "".join(f"{json.dumps(line)}\n" for line in runtime.read_lines(out)) == printed
    assert finish(start(*LAUNCH, 2, *words, "--out", out)) == [printed]
    assert out.read_text() == printed


@pytest.mark.slow  # starts processes
def test_two_processes_share_a_reference_whose_shards_are_odd(monkeypatch, tmp_path, capsys):
    paint(tmp_path / "images", 2, 5)
    monkeypatch.setattr(data, "SHARD", 5)
    words = [str(tmp_path / "images"), str(tmp_path / "data"), "--resolution", "8"]
    data.main(words, runtime.World())
    capsys.readouterr()
    save_file(test_inception.weights(), tmp_path / "inception.safetensors")
    g = torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=3, classes=2, generator=g)
    words = ["evaluate.py", save_weights(tmp_path / "x.safetensors", params), "--count", "12"]
    words += ["--ref", tmp_path / "data", "--inception", tmp_path / "inception.safetensors"]
    process = start(*LAUNCH, 2, *words)
    evaluate.main([str(word) for word in words[1:]], runtime.World())
    alone, [printed] = json.loads(capsys.readouterr().out), finish(process)
    for key in ("fid", "is"):
        assert json.loads(printed)[key] == pytest.approx(alone[key], rel=1e-5)


def test_what_data_py_wrote_is_a_reference_too(tmp_path, capsys):
    paint(tmp_path / "images", 2, 5)
    words = [str(tmp_path / "images"), str(tmp_path / "data"), "--resolution", "8"]
    data.main(words, runtime.World())
    capsys.readouterr()
    g = torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=3, classes=2, generator=g)
    path = save_weights(tmp_path / "x.safetensors", params)
    words = [str(path), "--ref", str(tmp_path / "data"), "--count", "20"]
    evaluate.main(words, runtime.World())
    result = json.loads(capsys.readouterr().out)
    assert result["fid"] > 0
    assert result["reference"].startswith(f"{tmp_path / 'data'}, 10 images, mean ")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to do: give --ref or, for images, --save-stats, or both"),
        (
            ["--ref", "no.npz"],
            "no.npz is not a file: give images or an .npz, such as ADM's https://openaipublic.blob",
        ),
        (["--ref", "digits", "--save-stats", "x.npz"], "--save-stats would be ignored as {} is a"),
        (["--ref", "digits", "--vae", "no"], "--vae would be ignored as "),
        (["--ref", "digits", "--vae", "README.md"], "--vae would be ignored as "),
        (["--ref", "digits", "--vae", "README.md"], ".safetensors makes pixels: leave it out"),
        (["--ref", "digits", "--scale", "1"], "--scale would be ignored as "),
        (["--ref", "digits", "--scale", "0"], "argument --scale: 0: give a number above 0"),
        (["--ref", "digits", "--omega", "1"], "--omega would be ignored as "),
        (["--ref", "digits", "--omega", "inf"], "argument --omega: inf: give a number above 0"),
        (["--ref", "digits", "--seed", str(2**63)], f"argument --seed: {2**63}: give -922337203"),
        (["--ref", "digits", "--interval", "0,1"], "trained with its guidance: leave it out"),
        (["--ref", "digits", "--interval", "0"], "argument --interval: 0: give numbers, two times"),
        (["--ref", "digits", "--convention", "sit"], "whose convention is known: leave out --conv"),
        (["--ref", "digits", "--convention", "ours"], "--convention: invalid choice: 'ours' (choo"),
        (
            ["--ref", "digits", "--classes", "12"],
            'class "12" is unknown: give a class\'s name or a n',
        ),
        (["--ref", "digits", "--classes", "1,,2"], 'class "" is unknown: give a class\'s name or'),
        (["--ref", "digits", "--steps", "0"], "argument --steps: 0: give 1 to 2147483648"),
        (["--ref", "digits", "--count", "1"], "argument --count: 1: give 2 to 2147483648"),
        (
            ["--ref", "digits", "--inception", "no.pth"],
            "no.pth is not a file: fetch https://github.com/mseitzer/pytorch-fid",
        ),
        (["no", "--ref", "digits"], "no is not a file: give a run's folder, or .safetensors"),
        (["tests", "--ref", "digits"], "tests holds no ema-STEP.safetensors: train one with"),
        (["--ref", "digits", "--out", "no/x"], "--out no/x: give a file in a folder that exists"),
        (["--ref", "digits", "--out", "tests"], "--out tests: give a file in a folder that exists"),
        (
            ["--ref", "digits", "--out", "digits.npz"],
            "--out digits.npz holds no lines of scores: choose",
        ),
        (
            ["--ref", "digits", "--out", "README.md"],
            "--out README.md holds no lines of scores: choose",
        ),
    ],
)
def test_bad_arguments_of_checkpoints(monkeypatch, checkpoint, flags, words):
    """They are found before anything is drawn."""
    monkeypatch.setattr(sample, "generate", None)
    message = fails(monkeypatch, "evaluate.py", checkpoint[0], *flags)
    assert words.format(checkpoint[0]) in message


def test_several_checkpoints_have_a_line_each(checkpoint, tmp_path, capsys):
    """Of a run's folder the last save, or every one; a file is itself."""
    folder, _ = checkpoint
    last = save_weights(folder / "ema-00000020.safetensors", random_weights(1))
    other = save_weights(tmp_path / "other.safetensors", random_weights(2))
    first = folder / "ema-00000010.safetensors"
    lines = scored_all(capsys, other, folder, first)
    assert [line["weights"].split(" ")[0] for line in lines] == [*map(str, (other, last, first))]
    assert len({line["fid"] for line in lines}) == 3
    assert lines[1:2] == scored_all(capsys, last)
    assert scored_all(capsys, folder, other, "--every") == [lines[2], lines[1], lines[0]]


def test_checkpoints_of_other_sizes_are_not_scored_together(checkpoint, monkeypatch, tmp_path):
    other = save_weights(tmp_path / "other.safetensors", random_weights(), resolution=16)
    words = [checkpoint[0], other, "--ref", "digits", "--count", "20"]
    message = fails(monkeypatch, "evaluate.py", *words)
    assert f"{other} makes images of (1, 16, 16), not (1, 8, 8): score it in another" in message


@pytest.fixture
def drawn(monkeypatch):
    """Count what is drawn: how many labels in each call."""
    calls, whole = [], evaluate.draw_images

    def draw(sampler, labels, world, **options):
        calls.append(len(labels))
        return whole(sampler, labels, world, **options)

    monkeypatch.setattr(evaluate, "draw_images", draw)
    return calls


def test_what_is_in_the_file_is_not_computed_again(checkpoint, tmp_path, capsys, drawn):
    folder, out = checkpoint[0], tmp_path / "out.jsonl"
    other = save_weights(tmp_path / "other.safetensors", random_weights(1))
    words = [folder, "--out", out]
    [line] = scored_all(capsys, *words)
    assert drawn == [60] and runtime.read_lines(out) == [line]
    assert scored_all(capsys, *words) == [line] and drawn == [60]
    assert scored_all(capsys, other, *words) == [(new := runtime.read_lines(out)[1]), line]
    assert drawn == [60, 60] and new["weights"].startswith(f"{other} sha256 ")
    save_weights(folder / "ema-00000020.safetensors", random_weights(2))
    lines = scored_all(capsys, other, *words, "--every")
    assert drawn == [60, 60, 60] and lines[:2] == [new, line]
    assert runtime.read_lines(out) == [line, new, lines[2]]


def test_every_save_is_asked_of_a_runs_folder(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="--every would be ignored without a run's folder"):
        evaluate.list_checkpoints([path], every=True)


def test_a_checkpoint_named_twice_is_computed_once(checkpoint, tmp_path, capsys, drawn):
    """Under another name, too: a line is known by the weights' checksum."""
    folder, out = checkpoint[0], tmp_path / "out.jsonl"
    copy = shutil.copy(folder / "ema-00000010.safetensors", tmp_path / "copy.safetensors")
    lines = scored_all(capsys, folder, folder, copy, "--every", "--out", out)
    assert drawn == [60] and lines[0] == lines[1] == lines[2]
    assert runtime.read_lines(out) == lines[:1]


def test_a_line_cut_short_is_computed_again(checkpoint, tmp_path, capsys, drawn):
    """Whatever a kill left of it, the lines before it stay as they were."""
    other = save_weights(tmp_path / "other.safetensors", random_weights(1))
    out, words = tmp_path / "out.jsonl", [other, checkpoint[0], "--out", tmp_path / "out.jsonl"]
    lines = scored_all(capsys, *words)
    whole = out.read_text()
    for cut in (1, 2, 30, len(json.dumps(lines[1]))):
        out.write_text(whole[:-cut])
        drawn.clear()
        assert scored_all(capsys, *words) == lines
        # All but the end of the last line is there: it is whole.
        assert drawn == ([] if cut == 1 else [60]) and runtime.read_lines(out) == lines
        assert out.read_text().startswith(whole[:-cut])
        drawn.clear()
        assert scored_all(capsys, *words) == lines and drawn == []


def test_other_samples_are_computed_anew(checkpoint, tmp_path, capsys, drawn):
    """A line is the answer only to the same question, of the same weights and reference."""
    folder, ref, out = checkpoint[0], tmp_path / "ref.npz", tmp_path / "out.jsonl"
    np.savez(ref, mu=np.zeros(64), sigma=np.eye(64))

    def ask(*flags):
        scored(capsys, folder, "--out", out, *flags)

    def scored_with(*words):
        evaluate.main([str(word) for word in (folder, "--out", out, *words)], runtime.World())
        capsys.readouterr()

    questions = [[], ["--steps", "2"], ["--seed", "1"], ["--uniform"], ["--classes", "1,2"]]
    questions += [["--classes", "2,1"], ["--uniform", "--seed", "1"]]
    asked = [lambda flags=flags: ask(*flags) for flags in questions]
    asked += [lambda: scored_with("--ref", "digits", "--count", 61)]
    asked += [lambda: scored_with("--ref", ref, "--count", 60)]
    for k, question in enumerate(asked, 1):
        question()
        assert len(drawn) == len(runtime.read_lines(out)) == k
    for question in asked:
        question()
    before = runtime.read_lines(out)
    assert len(drawn) == len(before) == len(asked)

    np.savez(ref, mu=np.ones(64), sigma=np.eye(64))
    asked[-1]()
    save_weights(folder / "ema-00000010.safetensors", random_weights(1))
    asked[0]()
    *same, other_reference, other_weights = runtime.read_lines(out)
    assert same == before and len(drawn) == len(asked) + 2
    assert other_reference["fid"] != before[-1]["fid"]
    assert other_weights["fid"] != before[0]["fid"]


def test_the_guidance_of_an_imf_is_part_of_the_question(tmp_path, capsys, drawn):
    g = torch.Generator().manual_seed(0)
    params = imf.init((64, 1, 1, 2), channels=1, classes=10, generator=g)
    path, out = save_weights(tmp_path / "x.safetensors", params), tmp_path / "out.jsonl"
    for flags in ([], ["--omega", "2"], ["--omega", "2", "--interval", "0.1,0.9"]):
        for _ in range(2):
            scored(capsys, path, "--out", out, *flags)
    guidances = [line["guidance"] for line in runtime.read_lines(out)]
    assert guidances == [[8.0, 0.4, 0.65], [2.0, 0.4, 0.65], [2.0, 0.1, 0.9]]
    assert drawn == [60, 60, 60]


def test_the_scale_of_latents_and_the_vae_are_part_of_the_question(
    monkeypatch, tmp_path, capsys, drawn
):
    path = save_weights(tmp_path / "x.safetensors", random_weights(channels=4), 64, "latents")
    monkeypatch.setattr(weights, "load_vae", lambda *_: {"w": torch.ones(1)})
    monkeypatch.setattr(sample, "decode", enlarge)
    monkeypatch.setattr(evaluate, "load_features", lambda *_: (corners, {"features": "corners"}))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(12), sigma=np.eye(12))
    for name in ("v", "w"):
        (tmp_path / name).write_text(name)
    words = [path, "--ref", tmp_path / "ref.npz", "--out", tmp_path / "out.jsonl", "--count", "20"]
    for vae, scale in (("v", []), ("v", ["--scale", "0.5"]), ("w", [])):
        for _ in range(2):
            argv = [*words, "--vae", tmp_path / vae, *scale]
            evaluate.main([str(word) for word in argv], runtime.World())
    lines = runtime.read_lines(tmp_path / "out.jsonl")
    assert drawn == [20, 20, 20] and lines[0]["fid"] != lines[1]["fid"]
    assert [line["vae"] for line in lines] == [runtime.sha256(tmp_path / k) for k in "vvw"]
    assert lines[0]["precision"]["decoder"] == "float32"


def enlarge(vae, z):
    return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def corners(images):
    return images[:, :, ::56, ::56].flatten(1).double(), None


def test_the_convention_of_a_velocity_is_part_of_the_question(tmp_path, capsys, drawn):
    params = {k: p for k, p in random_weights().items() if not k.startswith("h_embedder")}
    path, out = save_weights(tmp_path / "x.safetensors", params), tmp_path / "out.jsonl"
    found = []
    for convention in ("repa", "sit"):
        for _ in range(2):
            found.append(scored(capsys, path, "--out", out, "--convention", convention)["fid"])
    assert drawn == [60, 60] and found[0] == found[1] != found[2] == found[3]


def test_classes_may_have_names(checkpoint, monkeypatch, capsys):
    """The line has their numbers. A word that is one's name and another's number is a name."""
    named = checkpoint[1]._replace(classes=["0", "1", "10", "2", *"abcdef"])
    monkeypatch.setattr(weights, "open_sampler", lambda *_, **__: named)
    by_name = scored(capsys, checkpoint[0], "--classes", "2,a,9")
    assert by_name["classes"] == "balanced, of 3,4,9" and "a" not in by_name["classes"][8:]
    monkeypatch.undo()
    assert scored(capsys, checkpoint[0], "--classes", "3,4,9") == by_name


def test_a_score_is_of_the_file_that_was_read(checkpoint, monkeypatch, capsys):
    """A run saves while its folder is scored, or even replaces the file."""
    folder, path = checkpoint[0], checkpoint[0] / "ema-00000010.safetensors"
    want = scored(capsys, folder)

    def read(*arguments, whole=weights.open_sampler, **options):
        sampler = whole(*arguments, **options)
        save_weights(folder / "ema-00000020.safetensors", random_weights(1))
        save_weights(path, random_weights(2))
        return sampler

    with monkeypatch.context() as m:
        m.setattr(weights, "open_sampler", read)
        assert scored(capsys, folder) == want
    assert scored(capsys, path)["weights"] != want["weights"]


def test_a_save_that_a_run_removes_meanwhile_costs_no_other_score(
    checkpoint, monkeypatch, tmp_path, capsys
):
    folder, out = checkpoint[0], tmp_path / "out.jsonl"
    saves = [folder / f"ema-000000{k}0.safetensors" for k in (1, 2, 3)]
    for seed, path in enumerate(saves[1:], 1):
        save_weights(path, random_weights(seed))

    def draw(*arguments, whole=evaluate.draw_images, **options):
        saves[1].unlink(missing_ok=True)
        return whole(*arguments, **options)

    monkeypatch.setattr(evaluate, "draw_images", draw)
    with pytest.raises(FileNotFoundError, match=f"^{saves[1]} is gone: only the others have score"):
        scored_all(capsys, folder, "--every", "--out", out)
    found = [line["weights"].split(" ")[0] for line in runtime.read_lines(out)]
    assert found == [str(saves[0]), str(saves[2])]


def test_weights_without_a_file_are_never_known(checkpoint, drawn):
    """Of other weights without a file the line may be the same."""
    scorer = evaluate.load_scorer("digits", None, (1, 8, 8), runtime.World())
    options = dict(scorer=scorer, samples=evaluate.Samples(20), world=runtime.World())
    ours = checkpoint[1]._replace(weights="")
    line = evaluate.score(ours, [], **options)
    assert evaluate.score(ours, [line], **options) == line and drawn == [20, 20]
    known = evaluate.score(checkpoint[1], [line], **options)
    assert evaluate.score(checkpoint[1], [line, known], **options) is known and len(drawn) == 3


def test_a_score_appends_its_line_at_once(checkpoint, monkeypatch, tmp_path, capsys):
    """So that a command that is killed between two checkpoints loses nothing."""
    out = tmp_path / "out.jsonl"
    last = save_weights(checkpoint[0] / "ema-00000020.safetensors", random_weights(1))
    whole = evaluate.score

    def score(sampler, *arguments, **options):
        if sampler.weights.startswith(str(last)):
            raise KeyboardInterrupt
        return whole(sampler, *arguments, **options)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(evaluate, "score", score)
        scored_all(capsys, checkpoint[0], "--every", "--out", out)
    capsys.readouterr()
    lines = scored_all(capsys, checkpoint[0], "--every", "--out", out)
    assert runtime.read_lines(out) == lines and len(lines) == 2


def test_the_report_of_perfect_samples(capsys):
    """The network leads to the first digit of the class; every number is known."""
    digits = data.digits()
    first = [int((digits.labels == k).nonzero()[0]) for k in range(10)]

    def net(params):
        return lambda z, t, r, y: (z - params["x"][y]) / t[:, None, None, None]

    params = {"x": digits.items[first]}
    sampler = weights.Sampler(params, net, digits.classes, "pixels", (1, 8, 8))
    evaluate.report(sampler, digits)
    title, columns, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("1,000 samples, 1,797 real images; Fréchet distance of raw pixels")
    assert "median distance to the nearest real" in columns
    names = ["1 step(s)", "2 step(s)", "4 step(s)", "real images"]
    assert [line[:13].rstrip() for line in lines] == names
    rows = [line[13:].split() for line in lines]
    assert all(row[0] == "100.0%" and float(row[2]) < 0.01 for row in rows[:3])
    features = [
        fid.accumulate(None, x.flatten(1)) for x in (params["x"].repeat(100, 1, 1, 1), digits.items)
    ]
    want = fid.frechet_distance(*fid.statistics(features[0]), *fid.statistics(features[1]))
    assert abs(float(rows[0][1]) - want) < 0.01
    assert 95 < float(rows[3][0][:-1]) < 100 and 0 < float(rows[3][1]) < 1 < float(rows[3][2])


# --- curves of logs ---


def save_log(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in [{"size": "T/2"}, *lines])
    (folder / "log.jsonl").write_text(text)
    return folder


def some_lines(steps, errors=("raw_equal", "raw_differ"), by_t=True, factor=1.0):
    lines = []
    for k in steps:
        line = {"step": k, "loss": 1.0, "grad_norm": factor / k}
        for j, name in enumerate(errors):
            line[name] = factor * (10 + j) * 2 ** (k / 100)
            if by_t:
                line[f"{name}_by_t"] = [None if q == 3 and k == 50 else q + k for q in range(4)]
        lines.append(line | {"images_per_second": 3.0, "time": 1.0})
    return lines


def plotted(monkeypatch, folders, path):
    """Return what is drawn: {title: {label: Line2D}}, and the figure."""
    figures, whole = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        figures.append(figure)
        whole(figure, *arguments, **options)

    with monkeypatch.context() as m:
        m.setattr(Figure, "savefig", savefig)
        evaluate.plot(folders, path)
    [figure] = figures
    return {
        axes.get_title(): {line.get_label(): line for line in axes.get_lines()}
        for axes in figure.axes
    }, figure


def same_points(line, steps, values):
    """Whether a Line2D has these points; None is a gap."""
    x, y = line.get_data()
    values = [math.nan if value is None else value for value in values]
    assert list(x) == list(steps)
    return np.array_equal(np.asarray(y, float), np.array(values, float), equal_nan=True)


@pytest.mark.parametrize(
    "errors", [("raw_equal", "raw_differ"), ("raw_equal", "raw_differ", "raw_v")]
)
def test_the_curve_of_a_run_is_that_of_the_log(monkeypatch, tmp_path, errors):
    """Every raw error, its means by quarter of t, and the gradient norm, by step."""
    steps = [50, 100, 150, 200]
    lines = some_lines(steps, errors)
    lines[1]["raw_differ"] = None
    score = {"step": 100, "fid": 3.0, "count": 9}
    run = save_log(tmp_path / "run", [*lines[:2], score, *lines[2:]])
    found, figure = plotted(monkeypatch, [run], tmp_path / "x.png")
    assert list(found) == [*errors, "grad_norm"]
    for name in errors:
        assert list(found[name]) == ["mean", *(f"t in [{a}, {b}]" for a, b in QUARTERS)]
        mean, *quarters = found[name].values()
        assert same_points(mean, steps, [line[name] for line in lines])
        for k, line in enumerate(quarters):
            # A zero has no place on a scale of powers.
            assert same_points(line, steps, [entry[f"{name}_by_t"][k] or None for entry in lines])
    [norm] = found["grad_norm"].values()
    assert same_points(norm, steps, [line["grad_norm"] for line in lines])
    for axes in figure.axes:
        assert axes.get_xlabel() == "step" and axes.get_yscale() == "log"
        assert axes.get_legend() is not None
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    assert {p.name for p in tmp_path.iterdir()} == {"run", "x.png"}


QUARTERS = (("0", "0.25"), ("0.25", "0.5"), ("0.5", "0.75"), ("0.75", "1"))


def test_an_older_log_without_quarters_is_drawn(monkeypatch, tmp_path):
    lines = some_lines([50, 100], by_t=False)
    found, _ = plotted(monkeypatch, [save_log(tmp_path / "a", lines)], tmp_path / "x.png")
    assert same_points(found["raw_equal"]["mean"], [50, 100], [k["raw_equal"] for k in lines])
    later = some_lines([150])
    found, _ = plotted(monkeypatch, [save_log(tmp_path / "a", lines + later)], tmp_path / "x.png")
    quarter = found["raw_differ"]["t in [0.25, 0.5]"]
    assert same_points(quarter, [50, 100, 150], [None, None, 151])


def test_a_single_point_is_shown_as_a_point(monkeypatch, tmp_path):
    run = save_log(tmp_path / "run", some_lines([50]))
    found, figure = plotted(monkeypatch, [run], tmp_path / "x.png")
    for lines in found.values():
        assert all(
            line.get_marker() == "." and line.get_markersize() > 0 for line in lines.values()
        )
    plain = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    for line in found["grad_norm"].values():
        line.set_visible(False)
    figure.savefig(tmp_path / "y.png", dpi=100)
    without = np.asarray(Image.open(tmp_path / "y.png").convert("RGB")).astype(int)
    assert 3 < (abs(plain - without).max(-1) > 60).sum() < 100


def test_several_runs_have_a_line_each(monkeypatch, tmp_path):
    """Also where one has an error that the other lacks, or fewer steps."""
    logs = {
        "a": some_lines([50, 100]),
        "b": some_lines([50, 100, 150], ("raw_equal", "raw_differ", "raw_v"), factor=2.0),
        "c": some_lines([25], by_t=False),
    }
    runs = [save_log(tmp_path / name, lines) for name, lines in logs.items()]
    found, _ = plotted(monkeypatch, runs, tmp_path / "x.png")
    assert list(found) == ["raw_equal", "raw_differ", "raw_v", "grad_norm"]
    for name, lines in found.items():
        assert list(lines) == [*map(str, runs)]
        for run, line in zip(runs, lines.values()):
            entries = logs[run.name]
            steps = [entry["step"] for entry in entries]
            assert same_points(line, steps, [entry.get(name) for entry in entries])


def test_what_is_not_finite_leaves_a_gap(monkeypatch, tmp_path):
    lines = some_lines([50, 100, 150])
    lines[1] |= {"grad_norm": math.inf, "raw_equal": math.nan}
    found, figure = plotted(monkeypatch, [save_log(tmp_path / "a", lines)], tmp_path / "x.png")
    low, high = figure.axes[-1].get_ylim()
    assert 0 < low <= 1 / 150 and 1 / 50 <= high < 1
    assert same_points(
        found["raw_equal"]["mean"],
        [50, 100, 150],
        [lines[0]["raw_equal"], None, lines[2]["raw_equal"]],
    )


def test_curves_are_drawn_from_the_command_line(monkeypatch, tmp_path):
    runs = [save_log(tmp_path / name, some_lines([50, 100])) for name in "ab"]
    (runs[0] / "log.jsonl").open("a").write('{"step": 150, "grad_no')  # a kill cut it short
    evaluate.main([*map(str, runs), "--plot", str(tmp_path / "x.png")], runtime.World())
    assert Image.open(tmp_path / "x.png").format == "PNG"
    evaluate.main([str(runs[0]), "--plot", str(tmp_path / "y.png")], runtime.World(1, 2))
    assert not (tmp_path / "y.png").exists()  # the first process draws it
    before = (tmp_path / "x.png").read_bytes()
    words = [*runs, tmp_path, "--plot", tmp_path / "x.png"]
    message = fails(monkeypatch, "evaluate.py", *words)
    assert f"{tmp_path} holds no log.jsonl: give the folder of a run" in message
    assert (tmp_path / "x.png").read_bytes() == before
    message = fails(monkeypatch, "evaluate.py", tmp_path / "no", "--plot", tmp_path / "y.png")
    assert f"{tmp_path / 'no'} holds no log.jsonl" in message
    message = fails(monkeypatch, "evaluate.py", runs[0], "--plot", "README")
    assert "README is no picture: name it .png, or one of " in message
    message = fails(monkeypatch, "evaluate.py", runs[0], "--plot", tmp_path / "no" / "y.png")
    assert f"{tmp_path / 'no' / 'y.png'} cannot be written (" in message


def test_a_run_without_a_line_has_an_empty_picture(monkeypatch, tmp_path):
    found, _ = plotted(monkeypatch, [save_log(tmp_path / "a", [])], tmp_path / "x.png")
    assert list(found) == ["grad_norm"]
    assert len(found["grad_norm"]["mean"].get_xdata()) == 0


@pytest.mark.parametrize(
    "flags", [["--ref", "digits"], ["--every"], ["--steps", "2"], ["--out", "x"]]
)
def test_flags_of_scores_are_refused_with_plot(monkeypatch, tmp_path, flags):
    words = [save_log(tmp_path / "a", some_lines([50])), "--plot", tmp_path / "x.png", *flags]
    message = fails(monkeypatch, "evaluate.py", *words)
    assert f"{flags[0]} would be ignored with --plot: leave it out" in message
    assert not (tmp_path / "x.png").exists()


def test_what_is_no_number_leaves_a_gap(monkeypatch, tmp_path):
    """A damaged log costs no picture, and so no save of a run."""
    lines = some_lines([50, 100, 150, 200])
    lines[1] |= {"raw_equal": "x", "grad_norm": [1.0], "raw_differ_by_t": [1.0, 2.0]}
    lines[2] |= {"raw_equal": {"a": 1}, "raw_differ_by_t": "abcd", "raw_equal_by_t": 3}
    del lines[3]["step"]
    found, _ = plotted(monkeypatch, [save_log(tmp_path / "a", lines)], tmp_path / "x.png")
    steps, first = [50, 100, 150], lines[0]
    assert same_points(found["raw_equal"]["mean"], steps, [first["raw_equal"], None, None])
    assert same_points(found["grad_norm"]["mean"], steps, [first["grad_norm"], None, 1 / 150])
    quarter = found["raw_differ"]["t in [0.25, 0.5]"]
    assert same_points(quarter, steps, [51, 2.0, None])


def test_nothing_that_a_log_or_a_folder_is_called_costs_the_picture(monkeypatch, tmp_path):
    """Names that a typesetter takes for formulas, or no terminal shows; numbers out of reach."""
    lines = some_lines([50, 100])
    lines[0] |= {"raw_$x^$": 1.0, "raw_\n": 2.0, "step": 10**400}
    lines[1] |= {"grad_norm": 10**400, "raw_equal": 1e-320, "raw_differ": -1e308}
    lines[1] |= {f"raw_{k}": 1.0 for k in range(999)}
    names = ["$x_$", "_$\\frac$", os.fsdecode(b"b\xe9\x1b[2J"), "c"]
    runs = [save_log(tmp_path / name, lines) for name in names]
    found, figure = plotted(monkeypatch, runs, tmp_path / "x.png")
    assert "raw_equal" in found and "grad_norm" in found and len(found) == 9
    assert not {"raw_$x^$", "raw_\n"} & found.keys()
    for label, line in found["grad_norm"].items():
        assert label.isprintable()
        x, y = (np.asarray(points, float) for points in line.get_data())
        assert np.array_equal(x, [math.nan, 100], equal_nan=True)
        assert np.array_equal(y, [0.02, math.nan], equal_nan=True)
    with pytest.raises(FileNotFoundError, match="holds no log.jsonl: give the folder of a run"):
        (tmp_path / "pipe").mkdir()
        os.mkfifo(tmp_path / "pipe" / "log.jsonl")
        evaluate.plot([tmp_path / "pipe"], tmp_path / "y.png")
