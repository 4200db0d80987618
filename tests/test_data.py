"""data.py: the digits, shards of image folders, and batches that depend only on (seed, step)."""

import io
import json
import shutil
import time
from contextlib import redirect_stdout
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import LAUNCH, ROOT, fails, finish, fork, start
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset

import data
import runtime

seeds = st.integers(0, 2**20)
slow = pytest.mark.slow  # starts processes


def test_the_digits_are_all_there():
    _, kind, classes, shape, mirror, labels, images = data.digits()
    assert (
        not mirror
        and images.shape == (1797, *shape) == (1797, 1, 8, 8)
        and images.dtype == torch.float32
    )
    assert images.min() == -1 and images.max() == 1 and len(images.unique()) == 17
    assert kind == "pixels" and classes == list("0123456789") and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]  # UCI's own count
    assert len(images.flatten(1).unique(dim=0)) == 1797


@given(seeds, st.integers(1, 50), st.integers(1, 70), st.integers(1, 4))
def test_every_epoch_visits_every_item_once(seed, count, batch, epochs):
    steps = -(-count * epochs // batch)
    rows = torch.cat([data.epoch_indices(count, batch, seed=seed, step=k) for k in range(steps)])[
        : count * epochs
    ]
    for epoch in rows.split(count):
        assert (epoch.sort().values == torch.arange(count)).all()


def test_epochs_and_seeds_differ_in_order():
    orders = [data.epoch_indices(100, 100, seed=seed, step=k) for seed in (0, 1) for k in (0, 1)]
    assert all((a != b).any() for i, a in enumerate(orders) for b in orders[:i])


# --- batches ---


def numbered(kind, sizes=(3, 0, 5, 2)):
    """Return data whose item k and its label encode the number k, in shards of these sizes.

    Pixel items are 2 wide: (2k, 2k + 1), and mirrored (2k + 1, 2k).
    """
    numbers = torch.arange(float(sum(sizes)))
    if kind == "latents":  # item k has mean k (mirrored: -k) and standard deviation k + 1
        items = torch.stack([torch.stack((m, numbers + 1), 1) for m in (numbers, -numbers)], 1)[
            ..., None, None, None
        ]
        items = items.expand(-1, 2, 2, 4, 16, 16).half().contiguous()
    else:
        items = (
            torch.stack((2 * numbers, 2 * numbers + 1), 1)[:, None, None].byte().expand(-1, 3, 1, 2)
        )
    return data.Dataset(
        "numbers",
        kind,
        ["x"] * len(items),
        tuple(items.shape[-3:]),
        True,
        numbers.long(),
        ConcatDataset(items.split(sizes)),
    )


@pytest.mark.parametrize("kind", ["pixels", "latents", "digits"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_the_same_from_any_step_and_for_any_number_of_processes(kind, world):
    dataset = data.digits() if kind == "digits" else numbered(kind)
    for step in (0, 7, 200):
        x, y = data.batch(dataset, 8, seed=3, step=step)
        assert (
            x.shape == (8, *dataset.shape) and x.dtype == torch.float32 and y.dtype == torch.int64
        )
        for rank in range(world):
            for mine, whole in zip(
                data.batch(dataset, 8, seed=3, step=step, rank=rank, world=world), (x, y)
            ):
                assert torch.equal(mine, whole[rank::world])


def test_items_and_labels_belong_together_across_shards_and_both_views_are_seen():
    x, y = data.batch(numbered("pixels"), 400, seed=0, step=0)
    pairs = ((x[:, 0, 0] + 1) * 127.5).round().long()
    plain, mirrored = torch.stack((2 * y, 2 * y + 1), 1), torch.stack((2 * y + 1, 2 * y), 1)
    seen = (pairs == mirrored).all(1)
    assert (pairs == torch.where(seen[:, None], mirrored, plain)).all()
    assert y.bincount().tolist() == [40] * 10 and 150 < seen.sum() < 250
    assert x[..., 0].equal(x[:, :1, :, 0].expand(-1, 3, 1)) and x.min() >= -1 and x.max() <= 1


def test_a_latent_is_a_fresh_sample_of_its_posterior_or_of_its_mirror_images():
    seen = []
    for step in (0, 1):
        x, y = data.batch(numbered("latents"), 200, seed=0, step=step)
        x, k = x.flatten(1) / 0.18215, y[:, None]
        mean = torch.where((x.mean(1) + y).abs() < (x.mean(1) - y).abs(), -y, y)
        assert 60 < (mean < 0).sum() < 120
        seen.append((x - mean[:, None]) / (k + 1))
    noise = torch.cat(seen)
    assert (noise.mean(1).abs() < 5 / 1024**0.5).all() and (
        (noise.std(1) - 1).abs() < 5 / 2048**0.5
    ).all()
    assert abs(noise.std() - 1) < 0.003
    assert len((noise * 1e3).round().unique(dim=0)) == 400  # one for each visit


def test_latents_are_shifted_and_scaled_by_channel():
    dataset = numbered("latents")
    shift, scale = torch.tensor([0.0, 1.0, -2.0, 3.0])[:, None, None], torch.tensor(0.5)
    plain, _ = data.batch(dataset, 9, seed=2, step=4, latents=(0.0, 1.0))
    x, _ = data.batch(dataset, 9, seed=2, step=4, latents=(shift, scale))
    assert (x - (plain - shift) * scale).abs().max() < 1e-5


def test_a_condition_may_be_any_nest_of_tensors():
    numbers = torch.arange(1797)
    y = {"text": (numbers, numbers[:, None].expand(-1, 7)), "mask": numbers % 2 == 0}
    x, found = data.batch(data.digits()._replace(labels=y), 8, seed=1, step=230, rank=1, world=2)
    rows = data.epoch_indices(1797, 8, seed=1, step=230)[1::2]
    assert torch.equal(x, data.digits().items[rows]) and torch.equal(found["text"][0], rows)
    assert torch.equal(found["text"][1], rows[:, None].expand(-1, 7))
    assert torch.equal(found["mask"], rows % 2 == 0)


def test_without_mirror_images_every_item_is_seen_as_it_is():
    images = data.digits().items
    x, _ = data.batch(data.digits(), 1797, seed=0, step=0)
    assert torch.equal(x.flatten(1).unique(dim=0), images.flatten(1).unique(dim=0))
    dataset = numbered("pixels")._replace(mirror=False)
    x, y = data.batch(dataset, 100, seed=0, step=0)
    assert torch.equal(((x[:, 0, 0, 0] + 1) * 127.5).round().long(), 2 * y)
    dataset = numbered("latents")._replace(mirror=False)
    x, y = data.batch(dataset, 100, seed=0, step=0)
    assert (x.flatten(1).mean(1) / 0.18215 > y - 0.5 - y / 9).all()


def test_ahead_makes_in_order_a_few_ahead_and_hands_on_what_goes_wrong():
    begun = []

    def make(k):
        begun.append(k)
        if k == 5:
            raise ValueError("five")
        return k * k

    squares = data.prefetch(make, count(2), depth=2)
    assert [next(squares), next(squares), next(squares)] == [4, 9, 16] and max(begun) <= 6
    with pytest.raises(ValueError, match="five"):
        next(squares)
    assert list(data.prefetch(lambda k: -k, range(7), depth=3)) == [
        0,
        -1,
        -2,
        -3,
        -4,
        -5,
        -6,
    ] and not list(data.prefetch(make, []))


# --- from a folder of images to shards ---


def test_centre_crop():
    """Without scaling the centre is cut out; scaling down by a power of two averages."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 50, 3), dtype=np.uint8)
    crop = data.centre_crop(Image.fromarray(pixels), 32)
    assert crop.dtype == torch.uint8 and torch.equal(
        crop.permute(1, 2, 0), torch.from_numpy(pixels[:, 9:41])
    )
    crop = data.centre_crop(Image.fromarray(pixels.transpose(1, 0, 2)), 32)
    assert torch.equal(crop.permute(2, 1, 0), torch.from_numpy(pixels[:, 9:41]))
    means = pixels[:, 9:41].reshape(8, 4, 8, 4, 3).mean((1, 3))
    crop = data.centre_crop(Image.fromarray(pixels[:, 9:41]), 8).permute(1, 2, 0).double()
    assert (crop - torch.from_numpy(means)).abs().max() <= 2  # Pillow rounds each time
    ramp = np.repeat(np.arange(48, dtype=np.uint8)[None, :, None] * 5, 48, 0).repeat(
        3, 2
    )  # a linear ramp survives centred resampling
    crop = data.centre_crop(Image.fromarray(ramp), 20)[
        0, 0
    ].double()  # 48 to 24 by averaging, to 20 by cubic
    assert (crop - (5 * ((torch.arange(20) + 0.5) * 2.4 - 0.5))).abs()[2:-2].max() <= 1
    assert data.centre_crop(Image.new("RGB", (9, 5)), 5).shape == (3, 5, 5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of JPEGs, 3 classes of 9, in which three files are not images."""
    folder = tmp_path_factory.mktemp("pictures") / "train"
    paint(folder, 3, 9)
    (folder / "class1" / "notes.txt").write_text("not an image")
    whole = (folder / "class0" / "4.jpg").read_bytes()
    (folder / "class0" / "4.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "class2" / "0.jpg").write_bytes(b"")
    return folder


LEFT_OUT = ["class0/4.jpg", "class1/notes.txt", "class2/0.jpg"]


def convert(pictures, out, *flags):
    """Make small shards in this process, and return what is printed."""
    with mock.patch.object(data, "SHARD", 4), redirect_stdout(io.StringIO()) as printed:
        data.main([str(pictures), str(out), "--resolution", "16", *flags], runtime.World())
    return printed.getvalue()


def start_converting(pictures, out):
    """Make small shards in another process."""
    return fork("data.py", pictures, out, "--resolution", "16", changes={"data.SHARD": 4})


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "data"
    return out, convert(pictures, out)


def test_a_folder_of_images_becomes_shards(pictures, shards):
    out, printed = shards
    index = json.loads((out / "index.json").read_text())
    assert {
        key: index[key]
        for key in ("kind", "resolution", "channels", "classes", "counts", "left_out")
    } == {
        "kind": "pixels",
        "resolution": 16,
        "channels": 3,
        "classes": ["class0", "class1", "class2"],
        "counts": [8, 9, 8],
        "left_out": LEFT_OUT,
    }
    assert "25 images of 3 classes as pixels of 16x16 in 7 shards; 3 files left out" in printed
    for name in LEFT_OUT:
        assert f"left out: {pictures / name} is not a readable image (" in printed
    dataset = data.load_data(out)
    assert dataset.shape == (3, 16, 16) and dataset.labels.tolist() == [0] * 8 + [1] * 9 + [2] * 8
    paths = [
        path
        for path in sorted(pictures.rglob("*.*"))
        if str(path.relative_to(pictures)) not in LEFT_OUT
    ]
    for path, image in zip(paths, dataset.items, strict=True):
        assert torch.equal(image, data.centre_crop(Image.open(path).convert("RGB"), 16)), path
    assert {p.name for p in out.iterdir()} == {"index.json", ".lock"} | set(index["shards"])
    assert all(
        (out / name).stat().st_mode & 0o077 == 0o044 for name in index["shards"]
    )  # others may read them


def same(a, b):
    return all((a / p.name).read_bytes() == p.read_bytes() for p in b.iterdir()) and len(
        list(a.iterdir())
    ) == len(list(b.iterdir()))


@slow
def test_a_conversion_killed_again_and_again_continues(pictures, shards, tmp_path):
    def saving():
        return [p.name for p in tmp_path.rglob("*") if p.name.startswith(("shard-", ".tmp"))]

    for kills in range(100):
        process, before = start_converting(pictures, tmp_path / "data"), saving()
        while process.poll() is None and saving() == before:
            time.sleep(0.0001)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
    assert kills > 2 and process.wait() == 0
    assert same(tmp_path / "data", shards[0])


@slow
def test_two_processes_convert_the_same(pictures, shards, tmp_path):
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    script = f"{path}; import data, runtime; data.SHARD = 4; runtime.launch(data.main)"
    (tmp_path / "script.py").write_text(script)
    words = tmp_path / "script.py", pictures, tmp_path / "data", "--resolution", "16"
    [printed] = finish(start(*LAUNCH, 2, *words))
    assert same(tmp_path / "data", shards[0]) and printed.count("25 images of 3 classes") == 1


@slow
def test_a_full_disk_loses_nothing(pictures, shards, tmp_path):
    """A limit on file size stands in for a full disk: the same call fails, with another errno."""
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "sys.argv = ['data.py', *sys.argv[1:]]; runpy.run_path('data.py', run_name='__main__')"
    )
    full = start("-c", script, pictures, tmp_path / "data", "--resolution", "16")
    _, errors = full.communicate(timeout=120)
    assert full.returncode == 1 and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("data.py: ") and "make room" in last
    assert "shard-00000.safetensors cannot be written" in last
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".lock"]
    for path in sorted(shards[0].glob("shard-*"))[:3]:
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    convert(pictures, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])


def test_a_damaged_shard_is_made_again(pictures, shards, tmp_path):
    folder = shutil.copytree(shards[0], tmp_path / "data")
    content = bytearray((folder / "shard-00002.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "shard-00002.safetensors").write_bytes(content)
    (folder / "shard-00003.safetensors").write_bytes(content[:100])
    (folder / "shard-00004.safetensors").unlink()
    convert(pictures, folder)
    assert same(folder, shards[0])


def test_without_resolution_pixels_keep_the_size_of_the_first(pictures, tmp_path, capsys):
    data.main([str(pictures), str(tmp_path / "data")], runtime.World())
    first = Image.open(sorted(pictures.rglob("*.jpg"))[0])
    assert data.load_data(tmp_path / "data").shape == (3, min(first.size), min(first.size))


def test_classes_have_the_names_of_their_links(pictures, tmp_path):
    """Two links to folders of one name are two classes."""
    for name, target in (("cat", "class0"), ("dog", "class1")):
        shutil.copytree(pictures / target, tmp_path / name / "images")
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).symlink_to(tmp_path / name / "images")
    assert data.list_images(tmp_path / "photos")[1] == ["cat", "dog"]


def test_a_flat_folder_is_one_class(pictures, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(pictures / "class0", folder, ignore=shutil.ignore_patterns("more"))
    printed = convert(folder, tmp_path / "data")
    assert "there is one class: training will be unguided" in printed
    dataset = data.load_data(tmp_path / "data")
    assert dataset.classes == ["photos"] and dataset.labels.tolist() == [0] * 6 and dataset.mirror


@pytest.mark.parametrize("flags, views", [([], 2), (["--no-mirror"], 1)])
def test_mirror_images_are_in_the_index_and_in_latents(
    monkeypatch, pictures, tmp_path, flags, views
):
    """Other flags than the folder's own are refused."""
    monkeypatch.setattr(data, "encode", lambda vae, x: 2 * (x[:, :1, ::8, ::8],))
    monkeypatch.setattr(data, "load_vae", lambda *_: {"w": torch.zeros(1)})
    (tmp_path / "vae").write_text("x")
    words = [str(pictures), str(tmp_path / "data"), "--vae", str(tmp_path / "vae")]
    words += ["--resolution", "16"]
    data.main([*words, *flags], runtime.World())
    dataset = data.load_data(tmp_path / "data")
    assert dataset.mirror == (views == 2) and dataset.items[0].shape == (views, 2, 1, 2, 2)
    convert(pictures, tmp_path / "pixels", *flags)
    assert data.load_data(tmp_path / "pixels").mirror == dataset.mirror
    other = [] if flags else ["--no-mirror"]
    assert "choose another OUT" in fails(monkeypatch, "data.py", *words[:2], *other)


# --- bad input ---


@pytest.mark.parametrize(
    "change, flags, words",
    [
        (
            lambda folder: shutil.rmtree(folder),
            [],
            "train is not a folder: give one with a folder of images per class",
        ),
        (
            lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
            [],
            "train is not a folder: give one with",
        ),
        (
            lambda folder: [shutil.rmtree(p) for p in folder.iterdir()],
            [],
            "train holds no image: put its images there",
        ),
        (
            lambda folder: shutil.copy(folder / "class1" / "0.jpg", folder),
            [],
            "train/0.jpg lies beside folders of classes: move it into one of them",
        ),
        (
            lambda folder: (folder / "class3").mkdir(),
            [],
            "class3 holds no image: put its images there, or delete it",
        ),
        (
            lambda folder: [p.write_text("x") for p in (folder / "class1").iterdir()],
            [],
            "class1 holds no image",
        ),
        (
            lambda folder: [
                p.write_bytes(p.read_bytes()[:-50]) for p in (folder / "class1").iterdir()
            ],
            [],
            "class1 holds no image: put its images there, or delete it",
        ),
        (lambda folder: None, ["--resolution", "0"], "argument --resolution: 0: give 1 or more"),
        (
            lambda folder: None,
            ["--resolution", "big"],
            "argument --resolution: invalid int value: 'big'",
        ),
        (
            lambda folder: None,
            ["--vae", ""],
            " is not a file: fetch diffusion_pytorch_model.safetensors",
        ),
        (
            lambda folder: folder.with_name("data").write_text("mine"),
            [],
            "data is a file: choose another folder to write",
        ),
        (
            lambda folder: folder.with_name("data").symlink_to(folder / "class0"),
            [],
            "train: choose another folder to write",
        ),
        (
            lambda folder: None,
            ["--vae", "no.safetensors"],
            "no.safetensors is not a file: fetch diffusion_pytorch_model.saf",
        ),
    ],
)
def test_bad_folders_of_images(monkeypatch, tmp_path, change, flags, words):
    paint(tmp_path / "train", 3, 2)
    change(tmp_path / "train")
    assert words in fails(monkeypatch, "data.py", tmp_path / "train", tmp_path / "data", *flags)
    assert not (tmp_path / "data" / "index.json").exists()


def test_shards_of_something_else_are_left_alone(monkeypatch, pictures, shards):
    before = {p.name: p.read_bytes() for p in shards[0].iterdir()}
    message = fails(monkeypatch, "data.py", pictures, shards[0], "--resolution", "8")
    assert (
        "was made from other files, or with another resolution or VAE: choose another OUT"
        in message
    )
    assert {p.name: p.read_bytes() for p in shards[0].iterdir()} == before


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", '{"shards": [1]}', '{"shards": {"shard-00000.safetensors": 1}}', "x", "\xff"],
)
def test_an_index_of_something_else_is_left_alone(monkeypatch, pictures, shards, tmp_path, text):
    folder = shutil.copytree(shards[0], tmp_path / "data")
    (folder / "index.json").write_text(text, encoding="latin-1")
    monkeypatch.setattr(data, "SHARD", 4)
    with pytest.raises(
        ValueError, match="index.json is not an index that data.py wrote: choose another"
    ):
        data.main([str(pictures), str(folder), "--resolution", "16"], runtime.World())
    assert (folder / "index.json").read_text(encoding="latin-1") == text


def test_two_conversions_do_not_write_to_one_folder(monkeypatch, pictures, tmp_path):
    lock = runtime.lock_folder(tmp_path / "data")
    with pytest.raises(
        ValueError,
        match="another process is writing to .*data: wait until it ends, or choose another fol",
    ):
        data.main([str(pictures), str(tmp_path / "data"), "--resolution", "16"], runtime.World())
    lock.release()
    data.main([str(pictures), str(tmp_path / "data"), "--resolution", "16"], runtime.World())


def test_what_cropping_would_spoil_is_left_out(tmp_path):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for name, image, why in (
        ("deep.png", Image.fromarray(ramp), "more than 8 bits a channel, mode I;16"),
        ("thin.png", Image.new("RGB", (1, 40)), "is too thin to crop, 1 x 40"),
    ):
        image.save(tmp_path / name)
        crop, error = data.load_crop(tmp_path / name, 16)
        assert crop.shape == (3, 16, 16) and not crop.any()
        assert why in error and str(tmp_path / name) in error
    modes = (
        ("CMYK", "jpg"),
        ("P", "gif"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("L", "webp"),
    )
    for mode, suffix in modes:
        Image.new(mode, (20, 18)).save(tmp_path / f"{mode}.{suffix}")
        crop, error = data.load_crop(tmp_path / f"{mode}.{suffix}", 16)
        assert crop.shape == (3, 16, 16) and error is None
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    assert "is not a readable image" in data.load_crop(tmp_path / "dangling.jpg", 16)[1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_what_the_machine_fails_to_read_is_not_taken_for_a_bad_image(monkeypatch, tmp_path, error):
    def failing(path):
        raise error

    monkeypatch.setattr(data.Image, "open", failing)
    with pytest.raises(type(error)):
        data.load_crop(tmp_path / "x.jpg", 16)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.png").write_text("x")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    names = [str(path.relative_to(tmp_path)) for path in data.files_below(tmp_path / "a")]
    assert names == ["a/b/1.png", "a/linked/2.png"]


def test_shards_are_read_from_the_folder_alone(shards, tmp_path):
    """An index that names a file elsewhere, with its checksum, finds none."""
    folder = shutil.copytree(shards[0], tmp_path / "data")
    index = data.read_index(folder / "index.json")
    (folder / SECOND).rename(tmp_path / SECOND)
    index["shards"] = {
        f"../{name}" if name == SECOND else name: entry for name, entry in index["shards"].items()
    }
    index["checksum"] = data.checksum(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=f"data/{SECOND} is not a file"):
        data.load_data(folder)


def rewrite(path, **tensors):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(
        {name: p for name, p in (load_file(path) | tensors).items() if p is not None},
        path,
        metadata,
    )


def edit(folder, **entries):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(
        json.dumps({key: value for key, value in (index | entries).items() if value != ""})
    )


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SECOND = "shard-00001.safetensors"
DAMAGE = {
    "no folder": (
        lambda folder: shutil.rmtree(folder),
        "index.json does not exist: run python data.py IMAGES",
    ),
    "an empty folder": (
        lambda folder: [p.unlink() for p in folder.iterdir()],
        "index.json does not exist: run python data.py IMAGES",
    ),
    "a conversion stopped": (
        lambda folder: (folder / "index.json").unlink(),
        "index.json does not exist: run python data.py IMAGES",
    ),
    "a foreign index": (
        lambda folder: (folder / "index.json").write_text("[1]"),
        "index.json is not an index that data.py",
    ),
    "no JSON": (
        lambda folder: (folder / "index.json").write_bytes(b"\xff{"),
        "index.json is not an index that data.py",
    ),
    "no classes": (
        lambda folder: edit(folder, classes=""),
        "index.json is not an index that data.py",
    ),
    "an odd checksum": (
        lambda folder: edit(folder, shards={"shard-00000.safetensors": {"count": 3, "sha256": 5}}),
        "index.json is not an index that data.py",
    ),
    "classes that are no list": (
        lambda folder: edit(folder, classes=5),
        "index.json is not an index that data.py",
    ),
    "no shards": (
        lambda folder: edit(folder, shards={}),
        "index.json is not an index that data.py",
    ),
    "an unknown kind": (
        lambda folder: edit(folder, kind="sounds"),
        "index.json is not an index that data.py",
    ),
    "a shard missing": (
        lambda folder: (folder / SECOND).unlink(),
        f"{SECOND} is not a file: delete it and run data.py again",
    ),
    "a shard cut short": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-9]),
        f"{SECOND} is not a whole safetensors file",
    ),
    "a wrong checksum": (
        lambda folder: flip_a_bit(folder / SECOND),
        f"{SECOND} does not have the checksum in index.json",
    ),
    "labels missing": (
        lambda folder: rewrite(folder / SECOND, labels=None),
        f"{SECOND} does not have the checksum in index.json",
    ),
    "a label outside": (
        lambda folder: rewrite(folder / SECOND, labels=torch.tensor([0, 3, 1, 0])),
        f"{SECOND} does not have the checksum in index.json",
    ),
    "too few labels": (
        lambda folder: rewrite(folder / SECOND, labels=torch.tensor([0])),
        f"{SECOND} does not have the checksum in index.json",
    ),
    "another resolution": (
        lambda folder: edit(folder, resolution=8),
        "index.json is not an index that data.py",
    ),
    "fewer images": (
        lambda folder: rewrite(
            folder / SECOND, labels=torch.tensor([0]), pixels=torch.zeros(1, 3, 16, 16).byte()
        ),
        f"{SECOND} does not have the checksum in index.json",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards(monkeypatch, shards, tmp_path, kind):
    change, words = DAMAGE[kind]
    folder = shutil.copytree(shards[0], tmp_path / "data")
    change(folder)
    message = fails(
        monkeypatch,
        "train.py",
        "--data",
        folder,
        "--out",
        tmp_path / "run",
        "--batch",
        "8",
        "--steps",
        "1",
    )
    assert words in message and str(folder) in message and not (tmp_path / "run").exists()
