"""Data sets: the embedded digits, and folders of images, converted to shards.

    python data.py IMAGES data/imagenet --vae diffusion_pytorch_model.safetensors
    torchrun --nproc-per-node 8 data.py IMAGES data/imagenet --vae FILE       shared by eight GPUs
    python data.py IMAGES data/cifar10                                        pixels, not latents

IMAGES has one folder of image files per class, like ImageNet's train/, or image files alone, which
are then one class. Names that begin with a dot, and __MACOSX, are left out. It writes shards of up
to 1,024 images and, at the end, an index. The same command continues a conversion that was stopped,
and later makes those shards again whose images have other sizes, or were left out and can be read.

    shard-NNNNN.safetensors     labels (n,) int64, and
                                for latents, moments (n, 2, 2, 4, H/8, W/8) float16: for the image
                                and, unless --no-mirror, its mirror image, mean and standard
                                deviation of the VAE's posterior, not scaled
                                for pixels, pixels (n, 3, H, W) uint8
    index.json                  kind, resolution, classes, files left out, checksums and so on

digits.npz holds 1,797 grey digits, 8x8 uint8 from 0 to 16 (E. Alpaydin, C. Kaynak: Optical
Recognition of Handwritten Digits, UCI, 1998, CC BY 4.0).
"""

import errno
import hashlib
import json
import os
import stat
import struct
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import runtime
from vae import SCALE, encode
from weights import VAE, first_sha256, load_vae

DIGITS = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"  # digits.npz's sha256
SHARD, SHARD_BYTES = 1024, 2**28  # a shard's images, and the bytes of their pixels, at most
TENSOR = {"latents": "moments", "pixels": "pixels"}  # what a shard of each kind holds
FIELDS = {"kind": str, "classes": list, "source": str, "left_out": list, "shards": dict}
FIELDS |= {"mirror": bool, "vae": str | None}  # of an index; old ones lack these two
# Those that Pillow reads by itself: for EPS it starts Ghostscript, whatever the file's name.
FORMATS = "JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
BROKEN_EXIF = AttributeError, LookupError, SyntaxError, TypeError, ValueError, struct.error


# --- data sets and batches ---


class Dataset(NamedTuple):
    name: str  # of data.py's folders, a hash of the files' names and the settings
    kind: str  # "pixels", "latents", or another word for what no grid can show
    classes: list  # their names, by label; none if y is something else
    shape: tuple  # of a sample: (channels, height, width) of images
    mirror: bool  # whether mirror images belong to it
    labels: torch.Tensor  # (N,) int64, or whatever y is: any nested tuple or dict of (N, ...)
    items: ConcatDataset  # the N items, from memory-mapped shards, or a tensor (N, ...)
    vae: str = ""  # the sha256 of the VAE that encoded them, if known


def digits():
    """Return the embedded digits: items (1, 8, 8) float32 in [-1, 1], where -1 is blank paper."""
    with runtime.reading(Path(__file__).with_name("digits.npz"), "fetch it again") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != DIGITS:
            raise ValueError("it is not the one that belongs to data.py")
        file.seek(0)
        images, labels = (torch.from_numpy(np.load(file)[key]) for key in ("images", "labels"))
    classes, items = [str(k) for k in range(10)], images[:, None] / 8 - 1
    return Dataset("digits", "pixels", classes, (1, 8, 8), False, labels.long(), items)


@lru_cache(2)  # epochs: permuting ImageNet takes longer than a step
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=runtime.generator(seed, "order", epoch))


def epoch_indices(count, batch, *, seed, step):
    """Return which of `count` items the batch of `step` holds, (batch,) int64.

    Every epoch is its own permutation of all items, and batches are cut from the epochs laid end to
    end, so that no item is left out.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    used = epochs.unique().tolist()
    return torch.cat([permutation(count, seed, k)[places[epochs == k] % count] for k in used])


def batch(dataset, size, *, seed, step, rank=0, world=1, latents=(0.0, SCALE)):
    """Return rows rank::world of the batch of `step`: x (n, *dataset.shape) float32, and their y.

    At each visit an item is mirrored or not, if the data set says so, and a latent is sampled anew
    from the VAE's posterior; x is then (latent - shift) * scale, where (shift, scale) = latents.
    """
    mine = slice(rank, None, world)
    rows = epoch_indices(len(dataset.items), size, seed=seed, step=step)[mine]
    views = runtime.generator(seed, "views", step)
    mirrored = torch.randint(2, (size,), generator=views)[mine] * dataset.mirror
    items = [dataset.items[i] for i in rows.tolist()]
    if dataset.kind == "latents":
        moments = torch.stack([item[m] for item, m in zip(items, mirrored.tolist())])
        mean, std = moments.float().unbind(1)
        shift, scale = latents
        x = mean + std * torch.randn((size, *dataset.shape), generator=views)[mine]
        x = (x - shift) * scale
    else:
        x = torch.stack(items)
        if x.dtype == torch.uint8:
            x = torch.where(mirrored[:, None, None, None] == 1, x.flip(3), x) / 127.5 - 1
    return x, tree_map(lambda labels: labels[rows], dataset.labels)


def prefetch(make, keys, depth=3, threads=1):
    """Yield make(key) for each key in order, computed in threads up to `depth` keys ahead."""
    keys, pending, pool = iter(keys), deque(), ThreadPoolExecutor(threads)
    try:
        while True:
            pending.extend(pool.submit(make, key) for key in islice(keys, depth - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C waits for nothing


def checksum(value):
    """Return the sha256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_index(path):
    """Return the index of a folder of shards.

    Raises FileNotFoundError, or ValueError unless it is as data.py wrote it, both with one line.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run python data.py IMAGES {path.parent}")
    with runtime.reading(path, "choose another folder") as file:
        index = json.load(file)
        if isinstance(index, dict) and index.pop("checksum", None) == checksum(index):
            index = {"mirror": True, "vae": None} | index
            typed = all(isinstance(index.get(key), kind) for key, kind in FIELDS.items())
            if typed and index["kind"] in TENSOR and set(map(type, index["classes"])) <= {str}:
                if set(map(type, index["shards"].values())) == {dict}:
                    return index
        raise ValueError("not an index that data.py wrote")


def check_shards(shards, index, whole=False):
    """Return the labels of shards, {path: tensors}, and an item's shape, if they fit the index.

    Raises ValueError if not, or for a class without images. Reads the items only if `whole`.
    """
    name, classes, hint = TENSOR[index["kind"]], index["classes"], "write it again"
    latents = index["kind"] == "latents"
    views, dtypes = ((1 + index["mirror"], 2), runtime.FLOATS) if latents else ((), [torch.uint8])
    first = next(iter(shards.values())).get(name, torch.empty(0))
    shape = tuple(first.shape[-3:]) if first.ndim == 4 + len(views) else ("C", "H", "W")
    dtype = first.dtype if first.dtype in dtypes else dtypes[0]
    for path, tensors in shards.items():
        found = {key: (*p.shape, p.dtype) for key, p in tensors.items()}
        count = found.get(name, "n")[0]
        wanted = {name: (count, *views, *shape, dtype), "labels": (count, torch.int64)}
        if found != wanted:
            raise ValueError(f"{path} holds {found}, should be {wanted}: {hint}")
        items, labels = tensors[name], tensors["labels"]
        if ((labels < 0) | (labels >= len(classes))).any():
            raise ValueError(f"{path} has labels outside 0 to {len(classes) - 1}: {hint}")
        if whole and latents and not (items.isfinite().all() and (items[:, :, 1] >= 0).all()):
            raise ValueError(f"{path} has moments that are not finite, or deviations < 0: {hint}")
    labels = torch.cat([tensors["labels"] for tensors in shards.values()])
    if empty := set(range(len(classes))) - set(labels.tolist()):
        raise ValueError(f"{path.parent} has no image of class {classes[min(empty)]}: {hint}")
    return labels, shape


def load_data(folder, rank=0, world=1):
    """Return the Dataset of a folder that this script wrote, or of "digits".

    Every shard is opened; the checksums of shards rank::world are compared, which reads ImageNet's
    42 GB once. Raises FileNotFoundError or ValueError, with a line that says what to do.
    """
    if folder == "digits":
        if os.path.isdir("digits"):
            raise ValueError("digits is a folder here, too: give ./digits, or rename it")
        return digits()
    index = read_index(Path(folder, "index.json"))
    hint = "delete this shard, not the index, and run data.py again"
    entries = {Path(folder, Path(name).name): entry for name, entry in index["shards"].items()}
    shards = {path: runtime.read_tensors(path, hint)[0] for path in entries}
    mine = list(entries)[rank::world]
    for path, digest in zip(mine, prefetch(runtime.sha256, mine, 16, os.cpu_count())):
        if digest != entries[path].get("sha256"):
            raise ValueError(f"{path} does not have the checksum in index.json: {hint}")
    runtime.barrier()  # until the other processes have checked theirs
    kind, (labels, shape) = index["kind"], check_shards(shards, index)
    items = ConcatDataset([tensors[TENSOR[kind]] for tensors in shards.values()])
    # The checksums of shards do not count: another GPU encodes with other rounding.
    sizes = [entry["sizes"] for entry in entries.values() if entry.get("sizes")]
    name = f"{kind} {checksum([index['source'], index['left_out'], *sizes])[:16]}"
    about = index["classes"], shape, index["mirror"], labels, items, index["vae"] or ""
    return Dataset(name, kind, *about)


# --- from a folder of images to shards ---


def is_deep(image):
    """Return whether an image file has more than 8 bits a channel, which Pillow cuts off unsaid."""
    raw = image.tile[0][3] if image.tile else ""
    largest = raw[1] if image.format == "PPM" and isinstance(raw, tuple) else 0
    bits = image.tag_v2.get(258, (1,)) if image.format == "TIFF" else (1,)
    return image.mode[0] in "IF" or ";16B" in raw or largest > 255 or max(bits) > 8


def read_image(path):
    """Return an image file as a PIL image in RGB, upright, on white where it is transparent.

    Raises ValueError for bytes that are not an image of 8 bits a channel, OSError if the file is
    gone, or the disk or memory fails.
    """
    with runtime.reading(path, "repair or delete it, and run the same command again") as file:
        try:
            image = Image.open(file, formats=FORMATS)
            if is_deep(image):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            image.load()
            # differs from ADM: pictures are as viewers show them, turned as EXIF says, unless that
            # is broken, and nothing behind them. How many of ImageNet's differ is unknown.
            with suppress(*BROKEN_EXIF):
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
        except MemoryError:
            raise OSError(errno.ENOMEM, "out of memory") from None


def centre_crop(image, size):
    """Return the centre of a PIL image as ADM (arXiv 2105.05233) crops it, (3, size, size) uint8:
    halved by averaging while at least twice too large, then interpolated to `size`, bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scaled = [round(side * size / min(image.size)) for side in image.size]
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in scaled)
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def load_crop(path, size):
    """Return the centre crop of an image file, or zeros and the reason why it is left out."""
    try:
        image = read_image(path)
        if max(image.size) > 32 * min(image.size):
            raise ValueError(f"{path} is too thin to crop, {image.width} x {image.height}")
        return centre_crop(image, size), None
    except ValueError as error:
        return torch.zeros(3, size, size, dtype=torch.uint8), str(error)


def data_in(folder):
    """Return the paths in a folder, sorted, but for those that tools hide there."""
    try:
        return sorted(p for p in Path(folder).iterdir() if not p.name.startswith((".", "__MACOSX")))
    except OSError as error:
        why = f"cannot be read ({runtime.reason(error)}): make it readable, or delete it"
        raise OSError(f"{folder} {why}") from None


def files_below(folder, seen=None):
    """Return the paths of all files that are data in a folder and in those below it, sorted.

    Follows links to folders, but enters no folder twice: links may form a loop.
    """
    paths, seen = [], set() if seen is None else seen
    if (real := os.path.realpath(folder)) in seen:
        return []
    seen.add(real)
    for path in data_in(folder):
        if path.is_dir():
            paths += files_below(path, seen)
        elif stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFLNK):
            paths.append(path)  # a link that leads nowhere is an image that is gone
    return sorted(paths)


def first_image(paths):
    return next((path for path in paths if load_crop(path, 1)[1] is None), None)


def list_images(root):
    """List the files of a folder of class folders, or of one class's images, in a fixed order.

    Returns [(path below root, label)], the classes' names and the first image's path. Raises
    ValueError for a class without an image, or an image beside the folders of classes.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give one with a folder of images per class")
    folders = [path for path in data_in(root) if path.is_dir()]
    if folders and (loose := first_image(path for path in data_in(root) if not path.is_dir())):
        raise ValueError(f"{loose} lies beside folders of classes: move it into one of them")
    files, first = [], []
    for label, folder in enumerate(folders or [root]):
        paths = files_below(folder)
        first.append(first_image(paths))
        if first[-1] is None:
            raise ValueError(f"{folder} holds no image: put its images there, or delete it")
        files += [(str(path.relative_to(root)), label) for path in paths]
    return files, [folder.name for folder in folders] or [root.resolve().name], first[0]


def encode_views(vae, images, mirror, device):
    """Return the moments of images, (n, 3, H, W) uint8, and perhaps of their mirror images."""
    x = images.to(device) / 127.5 - 1
    views = [torch.stack(encode(vae, view), 1) for view in (x, x.flip(3))[: 1 + mirror]]
    return torch.stack(views, 1).half().cpu()  # (n, view, mean and deviation, 4, H/8, W/8)


def read_shard(path, source):
    """Return the tensors of a shard, and what it says it was made of: {"source", "left_out", ...}.

    Raises FileNotFoundError, ValueError if it is damaged, FileExistsError for another source.
    """
    tensors, metadata = runtime.read_tensors(path, "run the same command again")
    made = {}
    with suppress(LookupError, ValueError, TypeError):
        made = dict(json.loads(metadata["about"]))
    if made.get("source") != source:
        what = "other files, or with another resolution or VAE"
        raise FileExistsError(f"{path} was made from {what}: choose another OUT")
    return tensors, made


def measure(root, part):
    """Return a checksum of files' sizes, by which a change is noticed without reading them."""
    paths = [root / name for name, _ in part]
    return checksum([os.path.getsize(path) if os.path.exists(path) else None for path in paths])


def is_complete(path, root, part, about, known):
    """Return whether a shard is there, whole, as its entry in the index, if any, and as made from
    its files now. Raise FileExistsError if it was made from another source."""
    try:
        tensors, made = read_shard(path, about["source"])
    except (FileNotFoundError, ValueError):
        return False
    count, left_out = tensors.get("labels", torch.empty(0)).numel(), made.get("left_out")
    if not isinstance(left_out, list) or count + len(left_out) != len(part):
        return False
    now, entry = (measure(root, part), count), known.get(path.name, {})
    of_index = now == (entry.get("sizes"), entry.get("count"))  # or it was made again since
    if (
        made.get("sizes", now[0]) != now[0]
        or of_index
        and entry.get("sha256") != runtime.sha256(path)
    ):
        return False
    return all(load_crop(root / name, 1)[1] for name in left_out)


def save_shard(path, kind, items, labels, source, left_out=(), sizes=""):
    """Write a shard: items as in this file's docstring, labels (n,) int64, and what they are of."""
    metadata = json.dumps({"source": source, "left_out": left_out, "sizes": sizes})
    runtime.save_tensors(path, {TENSOR[kind]: items, "labels": labels}, {"about": metadata})


def write_shards(root, todo, about, vae, world):
    """Convert files to the shards `todo`, {path: [(path of a file below root, label)]}."""
    side, total = about["resolution"], sum(map(len, todo.values()))
    progress = tqdm(total=total, unit=" files", disable=world.rank > 0)

    def load(row):
        crop, error = load_crop(root / names[row], side)
        crops[row] = crop
        return error is None

    for path, part in todo.items():
        (names, labels), sizes = zip(*part), measure(root, part)
        crops = torch.empty(len(part), 3, side, side, dtype=torch.uint8)
        loaded, whole, items = prefetch(load, range(len(part)), 256, os.cpu_count()), [], []
        for x in crops.split(64):
            fine = list(islice(loaded, len(x)))
            if vae:
                items.append(encode_views(vae, x[fine], about["mirror"], world.device))
            whole += fine
            progress.update(len(x))
        items = torch.cat(items) if vae else crops if all(whole) else crops[whole]
        left_out = [name for name, is_whole in zip(names, whole) if not is_whole]
        labels = torch.tensor(labels)[whole]
        save_shard(path, about["kind"], items, labels, about["source"], left_out, sizes)
    progress.close()


def write_index(folder, shards, about):
    """Write the index of these shards, with their counts and checksums, and return it.

    about: {"kind", "mirror", "classes", "source"} and whatever else is to be kept. Raises
    ValueError unless the shards fit it, and each other.
    """
    tensors, entries, left_out = {}, {}, []
    for path in shards:
        tensors[path], made = read_shard(path, about["source"])
        count = len(tensors[path].get("labels", ()))
        entries[path.name] = {"count": count, "sha256": runtime.sha256(path)}
        entries[path.name]["sizes"] = made.get("sizes")
        left_out += made["left_out"]
    labels, shape = check_shards(tensors, {"mirror": True} | about, whole=True)
    counts = labels.bincount().tolist()
    index = about | {"counts": counts, "left_out": left_out, "shards": entries}
    with runtime.atomic_write(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index | {"checksum": checksum(index)}, indent=1))
    unit = 8 if about["kind"] == "latents" else 1
    sides = "x".join(str(unit * side) for side in shape[1:])
    done = f"{sum(counts):,} images of {len(counts):,} classes as {about['kind']} of {sides}"
    rest = f"in {len(shards):,} shards; {len(left_out)} files left out"
    runtime.say(f"{folder}: {done} {rest}")
    return index


def convert(root, folder, files, about, vae, world):
    """Convert `files` below `root` to shards and an index in `folder`, each process its share.

    Shards that are there, whole, are kept. about: as for `write_index`, with "resolution".
    """
    lock = runtime.lock_folder(folder) if world.rank == 0 else None
    runtime.say(f"{len(files):,} files of {len(about['classes']):,} classes")
    if len(about["classes"]) == 1:
        runtime.say("there is one class: training will be unguided")
    runtime.agree(about["source"], "images")
    size = max(1, min(SHARD, SHARD_BYTES // (3 * about["resolution"] ** 2)))
    parts = [files[k : k + size] for k in range(0, len(files), size)]
    shards = {folder / f"shard-{k:05}.safetensors": part for k, part in enumerate(parts)}
    index = folder / "index.json"
    known = read_index(index)["shards"] if index.exists() else {}
    mine = islice(shards.items(), world.rank, None, world.size)
    todo = {path: part for path, part in mine if not is_complete(path, root, part, about, known)}
    write_shards(root, todo, about, vae, world)
    runtime.barrier()
    if lock:
        runtime.sweep(folder)  # no earlier: it is this conversion's, and nobody is writing
        for name in write_index(folder, [*shards], about)["left_out"]:
            runtime.say("left out:", load_crop(root / name, 1)[1])
        lock.release()


def main(argv, world):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("images", type=Path, help="a folder of images, or with a folder of images per class")
    add("out", type=Path, help="the folder to write")
    add("--vae", help=f"the VAE's file ({VAE}); default: write pixels")
    side = "side of the crops (default: 256 with --vae, else the first image's shorter side)"
    add("--resolution", type=runtime.number(int, 1, 2**13), help=side)
    mirror = "train without mirror images, as text and digits need (default: with them)"
    add("--no-mirror", action="store_true", help=mirror)
    args = arguments.parse_args(argv)
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise ValueError(f"{args.out} lies in {args.images}: choose another folder to write")
    vae = None if args.vae is None else load_vae(args.vae, world.device)
    files, classes, first = list_images(args.images)
    side = args.resolution or (256 if vae else min(read_image(first).size))
    if not args.resolution and not vae:
        runtime.say(f"--resolution {side}, the shorter side of {first}")
        if side < 8:
            raise ValueError(f"{first} is too small to set the side of all: give --resolution")
    if vae and side % 8:
        raise ValueError(f"--resolution {side}: with --vae give a multiple of 8")
    about = {
        "kind": "latents" if vae else "pixels",
        "resolution": side,
        "mirror": not args.no_mirror,
        "channels": 4 if vae else 3,
        "scale": SCALE if vae else None,
        "vae": first_sha256(args.vae) if vae else None,
        "classes": classes,
    }
    about["source"] = checksum([about, files])
    convert(args.images, args.out, files, about, vae, world)


if __name__ == "__main__":
    runtime.launch(main)
