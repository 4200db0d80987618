"""fid.py: statistics that lose no digits, the Fréchet distance where it is known, and files.

test_inception.py covers the network.
"""

import json
import shutil
import zipfile
from functools import reduce
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import test_inception
import torch
from conftest import paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from processes import LAUNCH, ROOT, fails, finish, start
from safetensors.torch import save_file

import data
import fid

seeds = st.integers(0, 2**31)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, d, rank=None):
    a = randn(seed, d, rank or 2 * d)
    return a @ a.T / a.shape[1]


@given(
    seeds,
    st.lists(st.integers(1, 20), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    st.sampled_from([0.0, 1e6]),
)
def test_statistics_are_those_of_all_items_at_once_however_they_come(seed, sizes, offset):
    features = randn(seed, sum(sizes), 5)
    count, mean, scatter = reduce(fid.accumulate, (features + offset).split(sizes), None)
    mu, sigma = fid.statistics((count, mean, scatter))
    assert count == len(features)
    # At 1e6 the items themselves are rounded to 1e-10; sums of raw products would be off by 1e-4
    # or more.
    tolerance = 1e-12 + offset * 2e-15
    assert (mu - offset - features.mean(0)).abs().max() <= tolerance
    assert np.abs(sigma.numpy() - np.cov(features.numpy().T)).max() <= tolerance


def test_statistics_of_single_precision_features_are_double():
    mu, sigma = fid.statistics(fid.accumulate(None, randn(0, 9, 3).float()))
    assert mu.dtype == sigma.dtype == torch.float64


def test_one_item_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 items, not 1"):
        fid.statistics(fid.accumulate(None, randn(0, 1, 3)))


@given(seeds, st.integers(1, 12))
def test_equal_covariances_leave_the_distance_of_the_means(seed, d):
    sigma, mu1, mu2 = covariance(seed, d), randn(seed + 1, d), randn(seed + 2, d)
    assert abs(
        fid.frechet_distance(mu1, sigma, mu2, sigma) - (mu1 - mu2).square().sum()
    ) < 1e-11 * (1 + d)


@given(seeds, st.integers(1, 12), st.floats(0, 9), st.data())
def test_scaled_covariance(seed, d, c, more):
    sigma, mu = (
        covariance(seed, d, more.draw(st.integers(1, d))),
        randn(seed + 1, d),
    )  # of full rank and of less
    want = (c**0.5 - 1) ** 2 * sigma.trace()
    assert abs(fid.frechet_distance(mu, sigma, mu, c * sigma) - want) < 1e-11 * (1 + sigma.trace())


@given(seeds, st.integers(2, 12))
def test_commuting_covariances(seed, d):
    a, b = randn(seed, d).square(), randn(seed + 1, d).square()
    a[0], b[-1] = 0, 0
    basis, mu = torch.linalg.qr(randn(seed + 2, d, d)).Q, randn(seed + 3, d)
    want = (a.sqrt() - b.sqrt()).square().sum()
    assert (
        abs(fid.frechet_distance(mu, basis * a @ basis.T, mu, basis * b @ basis.T) - want) < 1e-10
    )


@given(seeds, st.integers(1, 12))
def test_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric(seed, d):
    s1, s2, mu1, mu2 = (
        covariance(seed, d),
        covariance(seed + 1, d),
        randn(seed + 2, d),
        randn(seed + 3, d),
    )
    root = np.sqrt(np.linalg.eigvals((s1 @ s2).numpy()).real).sum()
    want = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * root
    got = fid.frechet_distance(mu1, s1, mu2, s2)
    assert abs(got - want) < 1e-8 and abs(got - fid.frechet_distance(mu2, s2, mu1, s1)) < 1e-10
    assert fid.frechet_distance(mu1, s1, mu1, s1) < 1e-11 * (1 + s1.trace())


def test_fewer_items_than_dimensions():
    """In orthogonal subspaces, the distance is the sum of the traces, with little rounding."""
    basis = torch.linalg.qr(randn(0, 300, 300)).Q
    s1, s2 = (
        basis[:, part] * randn(1, 100).square() @ basis[:, part].T
        for part in (slice(0, 100), slice(100, 200))
    )
    zero = torch.zeros(300, dtype=torch.float64)
    assert abs(fid.frechet_distance(zero, s1, zero, s2) - s1.trace() - s2.trace()) < 1e-10
    assert fid.frechet_distance(zero, s1, zero, s1) < 1e-10


def test_nearest():
    reals, points = randn(0, 50, 4), randn(1, 20, 4)
    index, distance = fid.nearest(points, reals)
    table = np.linalg.norm(points.numpy()[:, None] - reals.numpy(), axis=2)
    assert (index.numpy() == table.argmin(1)).all() and np.allclose(
        distance, table.min(1), rtol=1e-12
    )
    index, distance = fid.nearest(reals, reals, exclude_self=True)
    assert (index != torch.arange(50)).all() and (distance > 0).all()
    assert (fid.nearest(reals, reals)[1] == 0).all()


def test_agrees_with_scipys_square_root():
    """Compare at full rank, where scipy's is accurate."""
    sigma1, sigma2, mu = covariance(0, 64), covariance(1, 64), randn(2, 64)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    want = mu.square().sum() + sigma1.trace() + sigma2.trace() - 2 * np.trace(root).real
    assert abs(fid.frechet_distance(0 * mu, sigma1, mu, sigma2) - want) < 1e-10 * want


@pytest.mark.slow
@pytest.mark.parametrize("d, n", [(2048, 1500)])
def test_at_full_size_with_fewer_items_than_dimensions(d, n):
    """The distance is known in closed form: one covariance is a multiple of the other."""
    x = randn(0, n, d) * torch.arange(1, d + 1) ** -0.5
    mu, sigma = fid.statistics(fid.accumulate(None, x))
    want = 0.5**2 * sigma.trace()
    assert abs(fid.frechet_distance(mu, sigma, mu, 2.25 * sigma) - want) < 1e-6 * want
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6


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
    fid.main([str(a) for a in argv], data.World())
    return json.loads(capsys.readouterr().out)


def thin(*inputs, whole=fid.inception, **options):
    """Return every 16th of Inception's features, for their covariances to take less time."""
    features, logits = whole(*inputs, **options)
    return features[:, ::16], logits


THIN = f"""
import sys
sys.path[:0] = {str(ROOT)!r}, {str(ROOT / "tests")!r}
import data, fid, test_fid
fid.inception = test_fid.thin
data.launch(fid.main)
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

    fid.main([str(a) for a in (first, "--save-stats", tmp_path / "ref.npz", *flags)], data.World())
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
        assert same["inception"] == data.sha256(weights) and "TensorFlow" in same["resize"]


@pytest.mark.slow
def test_a_folder_an_npz_and_statistics_of_the_same_images_are_the_same(halves, tmp_path, capsys):
    (first, second), _ = halves
    paths = sorted(second.rglob("*.png"))
    np.savez(
        tmp_path / "adm.npz",
        arr_0=np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]),
        arr_1=np.zeros(40),
    )
    fid.main([str(second), "--save-stats", str(tmp_path / "stats.npz")], data.World())
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
            and data.sha256(tmp_path / f"{name}.npz") in got["reference"]
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
    script = tmp_path / "thin.py" if flags else "fid.py"
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
    process = start(*LAUNCH, 2, "fid.py", folder, "--ref", halves[0][1])
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"fid.py: {broken} is not a readable image" in errors
    assert "Traceback" not in errors.split("failed (exitcode")[0], "what follows is torchrun's own"


def test_gathering_loses_no_digits():
    """Combine two processes' statistics at an offset of 1e6 and compare with all items at once.

    A stand-in for torch.distributed plays both processes.
    """
    x = randn(0, 50, 4)
    states = [fid.accumulate(None, part + 1e6) for part in (x[:20], x[20:])]
    moved = []

    class Group:
        is_initialized, get_world_size = (lambda: True), (lambda: 2)

        def all_gather_object(parts, mine):
            parts[:] = [state[:2] for state in states]

        def all_reduce(scatter):
            moved.append(scatter.clone())
            if len(moved) == 2:
                scatter.copy_(sum(moved))

    with mock.patch.object(fid, "dist", Group):
        fid.gather(states[0])
        count, mean, scatter = fid.gather(states[1])
    _, sigma = fid.statistics((count, mean, scatter))
    assert count == 50 and (mean - 1e6 - x.mean(0)).abs().max() < 1e-9
    assert np.abs(sigma.numpy() - np.cov(x.numpy().T)).max() < 1e-8


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


REFERENCES = {
    "missing": (
        lambda path: None,
        "No such file or directory",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "cannot be read (File is not a zip file): give images or an .npz, such as https://openai",
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
        "cannot be read ('sigma is not a file in the archive')",
    ),
    "pickled": (
        lambda path: save_stats(path, mu=np.array([{}, {}])),
        "cannot be read (Object arrays cannot be loaded",
    ),
    "text": (
        lambda path: save_stats(path, mu=np.array(["a"])),
        "cannot be read (Cannot cast array data from dtype('<U1') to dtype('float64')",
    ),
    "shapes": (
        lambda path: save_stats(path, mu=np.zeros(5)),
        "mu and sigma are (5,) and (768, 768), they should be (d,) and (d, d)",
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
        "mu and sigma are not a finite mean and covariance",
    ),
    "features": (
        lambda path: save_stats(path, np.zeros(5), np.eye(5)),
        "ref.npz has 5 features, images of (3, 16, 16) have 768",
    ),
    "no real numbers": (
        lambda path: save_stats(path, mu=np.zeros(768, complex)),
        "cannot be read (Cannot cast array data from dtype('complex128') to dtype('float64')",
    ),
    "nothing": (
        lambda path: save_stats(path, np.zeros(0), np.zeros((0, 0))),
        "mu and sigma are (0,) and (0, 0), they should be",
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
        "ends after 8 of 9 images",
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
        "arr_0 is float64 (3, 8, 8, 3): give",
    ),
    "grey images": (
        lambda path: np.savez(path, arr_0=np.zeros((3, 8, 8), np.uint8)),
        "arr_0 is uint8 (3, 8, 8): give",
    ),
    "an empty folder": (lambda path: path.mkdir(), "has 0 images, at least 2 are needed"),
    "no images": (
        lambda path: (path.mkdir(), (path / "x.txt").write_text("x")),
        "has 0 images, at least 2 are needed",
    ),
    "a broken image": (
        lambda path: (path.mkdir(), [(path / f"{k}.png").write_text("x") for k in (0, 1)]),
        "0.png is not a readable image",
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_bad_references(monkeypatch, halves, tmp_path, kind):
    change, words = REFERENCES[kind]
    change(tmp_path / "ref.npz")
    message = fails(monkeypatch, "fid.py", halves[0][0], "--ref", tmp_path / "ref.npz")
    assert words in message and (kind == "features" or str(tmp_path / "ref.npz") in message)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "nothing to do: give --ref, or --save-stats, or both"),
        (["--ref", "x.npz", "--count", "1"], "--count 1: give a number above 1"),
        (
            ["--save-stats", "."],
            "--save-stats .: give a file in a folder that exists",
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
    ],
)
def test_bad_arguments(monkeypatch, halves, flags, words):
    assert words in fails(monkeypatch, "fid.py", halves[0][0], *flags)


def test_pixels_that_are_too_many_for_a_covariance():
    with pytest.raises(
        ValueError,
        match="196,608 pixels are too many features: give --inception",
    ):
        fid.pixels(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))


def test_raw_pixels_run_from_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 4, 3)
    features, logits = fid.pixels(images)
    assert logits is None and features.shape == (2, 36)
    assert (features.unflatten(1, (12, 3)) - torch.tensor([-1.0, -0.6, 1.0])).abs().max() < 1e-6


def test_suffixes_of_images_may_be_in_capitals(tmp_path):
    for k, name in enumerate(("a.PNG", "b.png", "c.JPEG")):
        Image.new("RGB", (4, 4), (k, k, k)).save(tmp_path / name)
    (tmp_path / "notes.TXT").write_text("x")
    assert [image.shape for image in fid.load_images(tmp_path)] == [(3, 4, 4)] * 3


def test_raw_pixels_of_other_shapes_are_not_compared(tmp_path, monkeypatch):
    """Nor if there are as many of them, or if each process sees one shape."""
    for name, size in (("tall", (16, 32)), ("wide", (32, 16))):
        (tmp_path / name).mkdir()
        for k in range(3):
            array = np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{k}.png")
    message = fails(monkeypatch, "fid.py", tmp_path / "tall", "--ref", tmp_path / "wide")
    assert "images of (3, 16, 32) and (3, 32, 16) cannot be compared: give --inception" in message
    others = [{(3, 16, 32)}, {(3, 32, 16)}]
    monkeypatch.setattr(fid, "all_gather", lambda value: others if value == others[0] else [value])
    with pytest.raises(ValueError, match="tall: images of .* cannot be compared"):
        fid.measure(tmp_path / "tall", fid.pixels, data.World())
