"""data.py: the digits, shards of image folders, and batches that depend only on (seed, step)."""

import hashlib
import io
import json
import os
import shutil
import signal
import struct
import threading
import time
import zlib
from contextlib import redirect_stdout, suppress
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
    _, kind, classes, shape, mirror, labels, images, _ = data.digits()
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


def test_prefetch_makes_in_order_a_few_ahead_and_hands_on_what_goes_wrong():
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


def test_prefetch_ends_without_waiting_for_what_is_not_needed():
    begun, wait = [], threading.Event()

    def make(k):
        begun.append(k)
        return k == 0 or wait.wait(60)

    ahead = data.prefetch(make, count(), depth=9, threads=2)
    assert next(ahead) and next(data.prefetch(str, [3])) == "3"
    begin = time.monotonic()
    ahead.close()
    assert time.monotonic() - begin < 20
    wait.set()
    time.sleep(0.05)
    assert max(begun) <= 3


@pytest.mark.parametrize("change", [b"", "cut", "other", None])
def test_digits_that_are_not_ours_are_told(monkeypatch, tmp_path, change):
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    path, whole = tmp_path / "digits.npz", (ROOT / "digits.npz").read_bytes()
    if change == "other":
        np.savez(path, images=np.zeros((1797, 8, 8), np.uint8), labels=np.zeros(1797, np.uint8))
    elif change is not None:
        path.write_bytes(whole[:-9] if change == "cut" else change)
    with pytest.raises((ValueError, OSError), match="digits.npz .*: fetch it again$"):
        data.digits()
    path.write_bytes(whole)
    assert len(data.digits().items) == 1797


def test_a_folder_of_the_name_digits_is_not_taken_for_the_digits(monkeypatch, shards, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert data.load_data("digits").name == "digits"
    shutil.copytree(shards[0], "digits")
    with pytest.raises(ValueError, match="^digits is a folder here, too: give ./digits, or rename"):
        data.load_data("digits")
    assert data.load_data("./digits").shape == (3, 16, 16) and data.digits().shape == (1, 8, 8)


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
        assert f"left out: {pictures / name} cannot be read (" in printed
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
    """In whichever way, and whatever was being written."""
    moments = np.random.default_rng(0)
    (tmp_path / "data").mkdir()

    def saving():
        return sorted(os.listdir(tmp_path / "data"))

    for kills in range(100):
        process, before = start_converting(pictures, tmp_path / "data"), saving()
        while process.poll() is None and saving() == before:
            time.sleep(0.0001)
        time.sleep(moments.uniform(0, 0.02))
        if process.poll() is not None:
            break
        with suppress(ProcessLookupError):  # it has ended just now
            os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kills % 3])
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
    assert last.startswith("data.py: ") and "choose another place" in last
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


def test_a_shard_that_lacks_images_is_made_again(pictures, shards, tmp_path):
    """Also one of an earlier version, and without an index that tells its checksum."""
    folder = shutil.copytree(shards[0], tmp_path / "data")
    (folder / "index.json").unlink()
    path = folder / "shard-00001.safetensors"
    tensors, about = runtime.read_tensors(path, "")
    about = {k: v for k, v in json.loads(about["about"]).items() if k != "sizes"}
    fewer = {name: p[1:].clone() for name, p in tensors.items()}
    runtime.save_tensors(path, fewer, {"about": json.dumps(about)})
    path = folder / "shard-00000.safetensors"
    _, about = runtime.read_tensors(path, "")
    runtime.save_tensors(path, {"pixels": torch.zeros(1)}, about)
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
    monkeypatch.setattr(data, "encode", lambda vae, x: 2 * (x[:, :1, ::8, ::8].abs(),))
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


# --- what changes while, or before, it is converted again ---


def test_a_file_that_is_gone_ends_the_conversion(monkeypatch, pictures, shards, tmp_path):
    """A disk that is unmounted is not a broken image. Back again, the same command continues."""
    source, away, save = tmp_path / "train", tmp_path / "away", data.save_shard
    shutil.copytree(pictures, source)

    def unmount(*args):
        save(*args)
        source.rename(away)

    with monkeypatch.context() as change:
        change.setattr(data, "save_shard", unmount)
        with pytest.raises(OSError, match="train/class0/.*, and run the same command again"):
            convert(source, tmp_path / "data")
    assert {p.name for p in (tmp_path / "data").iterdir()} == {".lock", "shard-00000.safetensors"}
    away.rename(source)
    convert(source, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])
    (source / "class2" / "1.jpg").rename(away)
    (source / "class2" / "1.jpg").symlink_to(away)
    convert(source, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])
    away.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"class2/1.jpg is not a file: repair or delete it"):
        convert(source, tmp_path / "data")
    (tmp_path / "elsewhere").rename(away)
    convert(source, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])


def test_an_image_that_changed_under_its_name_is_converted_again(pictures, shards, tmp_path):
    source = shutil.copytree(pictures, tmp_path / "train")
    folder = shutil.copytree(shards[0], tmp_path / "data")
    name, old = data.load_data(folder).name, {p.name: p.stat().st_ino for p in folder.iterdir()}
    broken = source / LEFT_OUT[0]
    size = broken.stat().st_size
    broken.write_bytes((source / "class0" / "5.jpg").read_bytes())  # repaired: of another size
    convert(source, folder)
    index = data.read_index(folder / "index.json")
    repaired = data.load_data(folder)
    assert index["left_out"] == LEFT_OUT[1:] and len(repaired.items) == 26
    assert repaired.name != name and torch.equal(repaired.items[3], repaired.items[4])
    changed = {p.name for p in folder.iterdir() if p.stat().st_ino != old[p.name]}
    assert changed == {"shard-00000.safetensors", "index.json"}
    Image.new("RGB", (20, 20), "black").save(source / "class2" / "1.jpg")
    convert(source, folder)
    assert len({name, repaired.name, data.load_data(folder).name}) == 3
    assert data.load_data(folder).items[18].unique().tolist() == [0]
    broken.write_bytes((pictures / LEFT_OUT[0]).read_bytes())
    shutil.copy(pictures / "class2" / "1.jpg", source / "class2" / "1.jpg")
    convert(source, folder)
    assert broken.stat().st_size == size and data.load_data(folder).name == name
    assert same(folder, shards[0])


def test_a_file_left_out_that_can_be_read_by_now_is_taken(monkeypatch, pictures, shards, tmp_path):
    """Also one whose size stays, such as behind a decoder that was missing."""
    folder = shutil.copytree(pictures, tmp_path / "train") and tmp_path / "data"
    read = data.read_image

    def cannot(path):
        if path.match("class1/[12].jpg"):
            raise ValueError(f"{path} cannot be read")
        return read(path)

    with monkeypatch.context() as change:
        change.setattr(data, "read_image", cannot)
        printed = convert(tmp_path / "train", folder)
    assert "5 files left out" in printed and printed.count("class1/1.jpg cannot be read") == 1
    before, name = (folder / SECOND).stat().st_ino, data.load_data(folder).name
    assert "3 files left out" in convert(tmp_path / "train", folder)
    assert before == (folder / SECOND).stat().st_ino and name != data.load_data(folder).name
    assert same(folder, shards[0])


def test_data_converted_before_sizes_were_known_keep_their_name(shards, tmp_path):
    folder = shutil.copytree(shards[0], tmp_path / "data")
    index = data.read_index(folder / "index.json")
    for key in ("vae", "mirror"):
        del index[key]
    for entry in index["shards"].values():
        del entry["sizes"]
    write(folder, index)
    dataset, new = data.load_data(folder), data.load_data(shards[0])
    assert dataset.name == f"pixels {data.checksum([index['source'], LEFT_OUT])[:16]}" != new.name
    assert dataset.mirror and dataset.vae == "" and torch.equal(dataset.labels, new.labels)


def test_only_folders_of_this_conversion_are_swept(pictures, shards, tmp_path):
    left = tmp_path / "data" / ".meanflow-abcd1234.tmp"
    shutil.copytree(shards[0], tmp_path / "data")
    left.mkdir()
    (left / SECOND).write_text("x")
    with pytest.raises(FileExistsError, match="was made from other files.*: choose another OUT"):
        convert(pictures, tmp_path / "data", "--resolution", "8")
    assert (left / SECOND).exists()
    convert(pictures, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])


@pytest.mark.parametrize("about", [{}, {"about": "cats"}, {"about": "[1]"}, {"about": '{"a": 1}'}])
def test_files_of_a_shards_name_that_are_not_ours_are_left_alone(pictures, tmp_path, about):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / SECOND
    save_file({"w": torch.ones(3)}, path, about)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=f"{SECOND} was made from other files"):
        convert(pictures, tmp_path / "data")
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2


def test_processes_that_see_different_images_are_told(monkeypatch, pictures, tmp_path):
    monkeypatch.setattr(runtime, "all_gather", lambda value: [value, "another"])
    with pytest.raises(ValueError, match="^processes see different images: put it on a disk that"):
        convert(pictures, tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [".lock"]


# --- what is an image, and which ---


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_photos_are_turned_as_their_exif_says(tmp_path, suffix):
    up = np.zeros((32, 48, 3), np.uint8)
    up[:16, :24], up[16:, 24:] = (255, 0, 0), (0, 0, 255)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4, 9: None}  # undoes the tag
    for tag, how in back.items():
        image, exif = Image.fromarray(up), Image.Exif()
        exif[0x0112] = tag
        image = image if how is None else image.transpose(how)
        image.save(tmp_path / f"x.{suffix}", exif=exif, quality=100)
        found = np.asarray(data.read_image(tmp_path / f"x.{suffix}")).astype(int)
        assert found.shape == up.shape and np.abs(found - up)[::31, ::47].max() < 40, tag
    for broken in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0"):
        if suffix != "tif":
            Image.fromarray(up).save(tmp_path / f"x.{suffix}", exif=broken)
            assert data.read_image(tmp_path / f"x.{suffix}").size == (48, 32)


def test_what_is_transparent_lies_on_white(tmp_path):
    """Whatever colour is stored behind it."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:6, 2:6], alpha[0] = 255, 128
    for colour in (0, 99, 255):
        grey = np.where(alpha, 0, colour).astype(np.uint8)
        shown = Image.fromarray(np.stack([grey] * 3 + [alpha], 2))
        want = np.repeat(255 - alpha[..., None], 3, 2)
        clear = Image.fromarray(np.where(alpha == 255, 0, 7).astype(np.uint8))
        hard = np.repeat(np.where(alpha == 255, 0, 255)[..., None], 3, 2)
        index = clear.convert("L")
        index = Image.frombytes("P", (8, 8), index.tobytes())
        index.putpalette([0, 0, 0] + [colour] * 3 * 255)
        soft = Image.frombytes("P", (8, 8), alpha.tobytes())
        soft.putpalette([0] * 768)
        for image, name, options, expected in (
            (shown, "rgba.png", {}, want),
            (shown, "rgba.tif", {}, want),
            (shown, "rgba.webp", {"lossless": True}, want),
            (shown.convert("LA"), "la.png", {}, want),
            (clear, "l.png", {"transparency": 7}, hard),
            (clear.convert("RGB"), "rgb.png", {"transparency": (7, 7, 7)}, hard),
            (clear.point(lambda v: 255 * (v > 0)).convert("1"), "1.png", {"transparency": 1}, hard),
            (index, "p.png", {"transparency": 7}, hard),
            (soft, "soft.png", {"transparency": bytes(range(256))}, want),
            (index, "p.gif", {"transparency": 7}, hard),
        ):
            image.save(tmp_path / name, **options)
            found = np.asarray(data.read_image(tmp_path / name)).astype(int)
            assert np.abs(found - expected).max() <= 1, (name, colour)


def png(colour, depth, channels):
    def chunk(kind, body):
        size, check = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(kind + body))
        return size + kind + body + check

    head = struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0)
    body = zlib.compress(16 * (b"\0" + bytes(2 * channels * depth)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*words) for words in ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    )


def tiff(bits, planes):
    """Return a TIFF of 16 x 16 in RGB, of three planes or one, all of it black."""
    size, n = 16 * 16 * 3 * bits // 8 // planes, 11
    lists = 8 + 2 + 12 * n + 4
    tags = [(256, 3, 1, 16), (257, 3, 1, 16), (258, 3, 3, lists), (259, 3, 1, 1), (262, 3, 1, 2)]
    starts, sizes = [(lists + 6 + 8 * planes) + k * size for k in range(planes)], [size] * planes
    where = (lists + 6, lists + 6 + 4 * planes) if planes > 1 else (starts[0], size)
    tags += [(273, 4, planes, where[0]), (277, 3, 1, 3), (278, 3, 1, 16)]
    tags += [(279, 4, planes, where[1]), (284, 3, 1, 1 + (planes > 1)), (305, 2, 1, 0)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    values = struct.pack("<3H", *[bits] * 3) + struct.pack(f"<{2 * planes}I", *starts, *sizes)
    head = b"II*\0" + struct.pack("<IH", 8, n) + entries + bytes(4) + values
    return head + bytes(16 * 16 * 3 * bits // 8)


@pytest.mark.parametrize(
    "content, deep",
    [
        (png(2, 16, 3), True),
        (png(6, 16, 4), True),
        (png(4, 16, 2), True),
        (png(0, 16, 1), True),
        (png(2, 8, 3), False),
        (tiff(16, 1), True),
        (tiff(16, 3), True),
        (tiff(8, 1), False),
        (tiff(8, 3), False),
        (b"P6 16 16 65535\n" + bytes(1536), True),
        (b"P6 16 16 256\n" + bytes(1536), True),
        (b"P3 16 16 1000\n" + b"0 " * 768, True),
        (b"P5 16 16 300\n" + bytes(512), True),
        (b"Pf 16 16 -1.0\n" + bytes(1024), True),
        (b"P6 16 16 255\n" + bytes(768), False),
        (b"P6 16 16 100\n" + bytes(768), False),
        (b"P3 16 16 255\n" + b"0 " * 768, False),
    ],
)
def test_more_than_8_bits_a_channel_are_refused_in_every_format(tmp_path, content, deep):
    (tmp_path / "x").write_bytes(content)
    crop, error = data.load_crop(tmp_path / "x", 16)
    assert not crop.any() and ("more than 8 bits a channel" in str(error)) == deep
    assert deep or error is None


def test_only_formats_that_pillow_reads_by_itself_are_opened(monkeypatch, tmp_path):
    """For EPS it starts Ghostscript, whatever the name."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n%%EOF\n"
    (tmp_path / "x.jpg").write_bytes(eps)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.ico")
    for name in ("x.jpg", "x.ico"):
        assert "cannot be read (" in data.load_crop(tmp_path / name, 16)[1]
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".webp"} < data.SUFFIXES
    assert not {".eps", ".ico", ".pdf", ".txt"} & data.SUFFIXES


def test_what_tools_hide_is_no_data(pictures, shards, tmp_path):
    source = shutil.copytree(pictures, tmp_path / "train")
    for folder in (source, source / "class0", source / "class0" / "more"):
        for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
            (folder / name).mkdir()
            shutil.copy(source / "class0" / "0.jpg", folder / name / "0.jpg")
        shutil.copy(source / "class0" / "0.jpg", folder / "._0.jpg")
    os.mkfifo(source / "class0" / "pipe")
    convert(source, tmp_path / "data")
    assert same(tmp_path / "data", shards[0])
    assert not [p for p in data.files_below(source) if "/." in str(p) or "pipe" in str(p)]
    shutil.copytree(source / ".git", tmp_path / ".flat" / ".git")
    shutil.copy(source / "class0" / "0.jpg", tmp_path / ".flat" / "0.jpg")
    assert data.list_images(tmp_path / ".flat")[0] == [("0.jpg", 0)]


def test_a_folder_that_cannot_be_read_is_told(monkeypatch, pictures):
    listed = type(pictures).iterdir

    def iterdir(path):
        if path.name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(type(pictures), "iterdir", iterdir)
    for read in (data.files_below, data.list_images):
        with pytest.raises(OSError, match=r"more cannot be read \(Permission denied\): make it re"):
            read(pictures)


@pytest.mark.skipif(os.sep != "/", reason="names of bytes")
def test_names_may_have_control_characters_or_bytes_that_are_no_text(tmp_path):
    strange = (
        b"\xe9\xff",
        b"new\nline \x1b[31m",
        "snow\u2603 \ud83d\ude00".encode("utf-8", "replace"),
    )
    for k, name in enumerate(strange):
        folder = os.path.join(os.fsencode(tmp_path), b"d", name)
        os.makedirs(folder)
        with open(os.path.join(folder, name + b".png"), "wb") as file:
            Image.new("RGB", (16, 16), (k, k, k)).save(file, "PNG")
        with open(os.path.join(folder, name + b".txt"), "wb") as file:
            file.write(b"no image")
    printed = convert(tmp_path / "d", tmp_path / "out")
    assert printed.isascii() or "\u2603" in printed
    assert "\x1b" not in printed and printed.count("left out: ") == 3
    dataset = data.load_data(tmp_path / "out")
    assert sorted(map(os.fsencode, dataset.classes)) == sorted(strange)
    for label, name in enumerate(dataset.classes):
        rows = (dataset.labels == label).nonzero().flatten().tolist()
        assert [dataset.items[k].unique().item() for k in rows] == [
            strange.index(os.fsencode(name))
        ]


def test_the_side_that_was_chosen_is_said_and_not_too_small(pictures, tmp_path, capsys):
    data.main([str(pictures), str(tmp_path / "data")], runtime.World())
    first = sorted(pictures.rglob("*.jpg"))[0]
    side = min(Image.open(first).size)
    assert f"--resolution {side}, the shorter side of {first}\n" in capsys.readouterr().out
    (tmp_path / "icons").mkdir()
    Image.new("RGB", (7, 50)).save(tmp_path / "icons" / "0.png")
    with pytest.raises(ValueError, match="0.png is too small .*: give --resolution"):
        data.main([str(tmp_path / "icons"), str(tmp_path / "small")], runtime.World())
    assert not (tmp_path / "small").exists()
    convert(tmp_path / "icons", tmp_path / "small")
    assert data.load_data(tmp_path / "small").shape == (3, 16, 16)


def test_memory_does_not_grow_with_the_photos(monkeypatch, tmp_path):
    """A crop holds its own pixels alone, and a shard at most so many bytes of them."""
    Image.new("RGB", (90, 20), "teal").save(tmp_path / "x.png")
    crop, _ = data.load_crop(tmp_path / "x.png", 16)
    assert crop.untyped_storage().nbytes() == 3 * 16 * 16
    assert 1024 * 3 * 256 * 256 <= data.SHARD_BYTES < 1024 * 3 * 512 * 512
    (tmp_path / "d").mkdir()
    for k in range(5):
        shutil.copy(tmp_path / "x.png", tmp_path / "d" / f"{k}.png")
    for size, shards in ((4 * 768 - 1, 2), (768, 5), (1, 5)):
        monkeypatch.setattr(data, "SHARD_BYTES", size)
        convert(tmp_path / "d", tmp_path / f"out{size}")
        dataset = data.load_data(tmp_path / f"out{size}")
        assert len(dataset.items) == 5 and len(dataset.items.datasets) == shards


def test_the_vae_of_latents_is_known(monkeypatch, pictures, shards, tmp_path):
    assert data.load_data(shards[0]).vae == "" and data.digits().vae == ""
    monkeypatch.setattr(data, "encode", lambda vae, x: 2 * (x[:, :1, ::8, ::8].abs(),))
    monkeypatch.setattr(data, "load_vae", lambda *_: {"w": torch.zeros(1)})
    (tmp_path / "vae").write_text("x")
    convert(pictures, tmp_path / "data", "--vae", str(tmp_path / "vae"))
    assert data.load_data(tmp_path / "data").vae == hashlib.sha256(b"x").hexdigest()


# --- shards and indices written by hand ---


def by_hand(kind, **changes):
    """Return tensors of two shards, and what the index says, after these changes."""
    shape = {"pixels": (4, 3, 12, 16), "latents": (4, 1, 2, 4, 2, 3)}[kind]
    items = torch.ones(shape, dtype=torch.uint8 if kind == "pixels" else torch.float16)
    about = {"kind": kind, "mirror": False, "classes": ["a", "b"], "source": "mine"}
    first = {"items": items, "labels": torch.tensor([0, 1, 0, 1])}
    second = dict(first)
    for key, value in changes.items():
        if key in about:
            about[key] = value
        elif key == "both":
            first |= value
            second |= value
        else:
            second[key] = value
    return (first, second), about


def write_by_hand(folder, shards, about):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"shard-{k:05}.safetensors" for k in range(len(shards))]
    for path, shard in zip(paths, shards):
        data.save_shard(path, about["kind"], shard["items"], shard["labels"], about["source"])
    return data.write_index(folder, paths, about)


ONES = torch.ones(4, 1, 2, 4, 2, 3, dtype=torch.float16)
SPOILT = {
    "a label equal to the number of classes": ("pixels", {"labels": torch.tensor([0, 1, 0, 2])}),
    "a negative label": ("latents", {"labels": torch.tensor([0, 1, 0, -1])}),
    "fewer labels than items": ("pixels", {"labels": torch.tensor([0, 1, 1])}),
    "more labels than items": ("pixels", {"labels": torch.tensor([0, 1, 1, 0, 1])}),
    "labels of another dtype": ("pixels", {"labels": torch.tensor([0, 1, 1, 0]).int()}),
    "labels of one column": ("pixels", {"labels": torch.tensor([[0], [1], [1], [0]])}),
    "floating pixels": ("pixels", {"both": {"items": torch.rand(4, 3, 12, 16)}}),
    "pixels without channels": ("pixels", {"both": {"items": torch.ones(4, 12, 16).byte()}}),
    "pixels of two sizes": ("pixels", {"items": torch.ones(4, 3, 12, 12).byte()}),
    "a number for pixels": ("pixels", {"both": {"items": torch.tensor(3).byte()}}),
    "integer moments": ("latents", {"both": {"items": ONES.byte()}}),
    "moments without views": ("latents", {"both": {"items": ONES[:, 0]}}),
    "one view where mirror images are wanted": ("latents", {"mirror": True}),
    "means without deviations": ("latents", {"both": {"items": ONES[:, :, :1]}}),
    "a class without images": ("pixels", {"classes": ["a", "b", "c"]}),
}
VALUES = {
    "a negative deviation": ONES.index_fill(2, torch.tensor(1), -1),
    "a deviation that is infinite": ONES.index_fill(2, torch.tensor(1), torch.inf),
    "a mean that is not a number": ONES.index_fill(2, torch.tensor(0), torch.nan),
}


@pytest.mark.parametrize("case", [*SPOILT, *VALUES])
def test_what_was_written_by_hand_is_checked(monkeypatch, tmp_path, case):
    """When the index is written, and but for the values when it is read."""
    kind, changes = SPOILT.get(case, ("latents", {"items": VALUES.get(case)}))
    with pytest.raises(ValueError, match=".*data.*: write it again$"):
        write_by_hand(tmp_path / "data", *by_hand(kind, **changes))
    assert not (tmp_path / "data" / "index.json").exists()
    check = data.check_shards
    with monkeypatch.context() as change:
        change.setattr(data, "check_shards", lambda *_, whole: (torch.tensor([0]), (1, 1, 1)))
        write_by_hand(tmp_path / "data", *by_hand(kind, **changes))
    assert check is data.check_shards
    if case in SPOILT:
        with pytest.raises(ValueError, match=".*data.*: write it again$"):
            data.load_data(tmp_path / "data")


@pytest.mark.parametrize("kind, shape", [("pixels", (3, 12, 16)), ("latents", (4, 2, 3))])
def test_what_was_written_by_hand_is_loaded_as_it_is(tmp_path, capsys, kind, shape):
    shards, about = by_hand(kind)
    write_by_hand(tmp_path / "data", shards, about)
    dataset = data.load_data(tmp_path / "data")
    assert dataset.shape == shape and dataset.labels.tolist() == [0, 1, 0, 1] * 2
    assert dataset.name == f"{kind} {data.checksum(['mine', []])[:16]}" and not dataset.mirror
    assert data.batch(dataset, 5, seed=0, step=0)[0].shape == (5, *shape)
    sides = "12x16" if kind == "pixels" else "16x24"
    done = f"8 images of 2 classes as {kind} of {sides} in 2 shards; 0 files left out"
    assert done in capsys.readouterr().out


def test_shards_written_in_another_way_are_told(tmp_path):
    shards, about = by_hand("pixels")
    write_by_hand(tmp_path / "data", shards, about)
    with pytest.raises(OSError, match="shard-00001.safetensors was made from other files"):
        save_file({"pixels": shards[1]["items"]}, tmp_path / "data" / SECOND)
        data.write_index(tmp_path / "data", sorted((tmp_path / "data").glob("shard*")), about)


def write(folder, index):
    """Write an index with a checksum that is right."""
    index.pop("checksum", None)
    (folder / "index.json").write_text(json.dumps(index | {"checksum": data.checksum(index)}))


@pytest.mark.parametrize(
    "key", ["kind", "classes", "source", "left_out", "shards", "mirror", "vae", "entry", "name"]
)
def test_an_index_with_a_field_that_cannot_be_is_one_line(shards, tmp_path, key):
    folder = shutil.copytree(shards[0], tmp_path / "data")
    index = data.read_index(folder / "index.json")
    if key not in ("mirror", "vae", "entry", "name"):
        write(folder, {k: v for k, v in index.items() if k != key})
        with pytest.raises(ValueError, match="not an index that data.py wrote"):
            data.load_data(folder)
    for value in (5, 0.5, "x", {}, [], [1], {"a": 1}, [[]], {"x": []}, True):
        changed = index | {key: value}
        if key in ("entry", "name"):
            found = {SECOND: value} if key == "entry" else {str(value): index["shards"][SECOND]}
            changed = index | {"shards": found}
        kind = type(value)
        if {"source": str, "left_out": list, "vae": str, "mirror": bool}.get(key) == kind:
            continue
        write(folder, changed)
        with pytest.raises((ValueError, OSError)) as error:
            data.load_data(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value), value


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
        (lambda folder: None, ["--resolution", "0"], "argument --resolution: 0: give 1 to 8192"),
        (
            lambda folder: None,
            ["--resolution", "big"],
            "argument --resolution: invalid int value: 'big'",
        ),
        (
            lambda folder: None,
            ["--vae", ""],
            "--vae is empty: give a value, or leave it out",
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
    [
        "[1]",
        "{}",
        "{" * 9999,
        '{"shards": [1]}',
        '{"shards": {"shard-00000.safetensors": 1}}',
        "x",
        "\xff",
    ],
)
def test_an_index_of_something_else_is_left_alone(monkeypatch, pictures, shards, tmp_path, text):
    folder = shutil.copytree(shards[0], tmp_path / "data")
    (folder / "index.json").write_text(text, encoding="latin-1")
    monkeypatch.setattr(data, "SHARD", 4)
    with pytest.raises(
        ValueError, match=r"index.json cannot be read \(.*\): choose another folder"
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


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError("no memory")])
def test_what_the_machine_fails_to_read_is_not_taken_for_a_bad_image(monkeypatch, tmp_path, error):
    def failing(*args, **options):
        raise error

    (tmp_path / "x.jpg").touch()
    monkeypatch.setattr(data.Image, "open", failing)
    with pytest.raises(OSError, match="x.jpg cannot be read .*: repair or delete it"):
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
        "index.json cannot be read (",
    ),
    "no JSON": (
        lambda folder: (folder / "index.json").write_bytes(b"\xff{"),
        "index.json cannot be read (",
    ),
    "no classes": (
        lambda folder: edit(folder, classes=""),
        "index.json cannot be read (",
    ),
    "an odd checksum": (
        lambda folder: edit(folder, shards={"shard-00000.safetensors": {"count": 3, "sha256": 5}}),
        "index.json cannot be read (",
    ),
    "classes that are no list": (
        lambda folder: edit(folder, classes=5),
        "index.json cannot be read (",
    ),
    "no shards": (
        lambda folder: edit(folder, shards={}),
        "index.json cannot be read (",
    ),
    "an unknown kind": (
        lambda folder: edit(folder, kind="sounds"),
        "index.json cannot be read (",
    ),
    "a shard missing": (
        lambda folder: (folder / SECOND).unlink(),
        f"{SECOND} is not a file: delete this shard, not the index",
    ),
    "a shard cut short": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-9]),
        f"{SECOND} cannot be read (",
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
        "index.json cannot be read (",
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
