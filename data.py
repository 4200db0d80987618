"""Data sets: the embedded digits, and folders of images, converted to shards.

    python data.py IMAGES data/imagenet --vae diffusion_pytorch_model.safetensors
    torchrun --nproc-per-node 8 data.py IMAGES data/imagenet --vae FILE       shared by eight GPUs
    python data.py IMAGES data/cifar10                                        pixels, not latents

IMAGES has one folder of image files per class, like ImageNet's train/, or image files alone, which
are then one class. The same command continues a conversion that was stopped. It writes shards of up
to 1,024 images and, at the end, an index:

    shard-NNNNN.safetensors     labels (n,) int64, and
                                for latents, moments (n, 2, 2, 4, H/8, W/8) float16: for the image
                                and, unless --no-mirror, its mirror image, mean and standard
                                deviation of the VAE's posterior, not scaled
                                for pixels, pixels (n, 3, H, W) uint8
    index.json                  kind, resolution, classes, files left out, checksums and so on

digits.npz holds 1,797 grey digits, 8x8 uint8 from 0 to 16 (E. Alpaydin, C. Kaynak: Optical
Recognition of Handwritten Digits, UCI, 1998, CC BY 4.0).
"""

import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_map
from torch.utils.data import ConcatDataset
from tqdm import tqdm

import runtime
from vae import SCALE, encode
from weights import VAE, load_vae

SHARD = 1024  # images
TENSOR = {"latents": "moments", "pixels": "pixels"}  # what a shard of each kind holds


# --- data sets and batches ---


class Dataset(NamedTuple):
    name: str  # of data.py's folders, a hash of the files' names and the settings
    kind: str  # "pixels", "latents", or another word for what no grid can show
    classes: list  # their names, by label; none if y is something else
    shape: tuple  # of a sample: (channels, height, width) of images
    mirror: bool  # whether mirror images belong to it
    labels: torch.Tensor  # (N,) int64, or whatever y is: any nested tuple or dict of (N, ...)
    items: ConcatDataset  # the N items, from memory-mapped shards, or a tensor (N, ...)


def digits():
    """Return the embedded digits: items (1, 8, 8) float32 in [-1, 1], where -1 is blank paper."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
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
    keys, pending = iter(keys), deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            pending.extend(pool.submit(make, key) for key in islice(keys, depth - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()


def checksum(value):
    """Return the sha256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_index(path):
    """Return the index of a folder of shards.

    Raises FileNotFoundError, or ValueError unless it is as data.py wrote it, both with one line.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run python data.py IMAGES {path.parent}")
    try:
        index = json.loads(path.read_text())
        if index.pop("checksum") == checksum(index):
            return index
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    raise ValueError(f"{path} is not an index that data.py wrote: choose another folder")


def load_data(folder, rank=0, world=1):
    """Return the Dataset of a folder that this script wrote, or of "digits".

    Every shard is opened; the checksums of shards rank::world are compared, which reads ImageNet's
    42 GB once. Raises FileNotFoundError or ValueError, with a line that says what to do.
    """
    if folder == "digits":
        return digits()
    index, hint = read_index(Path(folder, "index.json")), "delete it and run data.py again"
    paths = [Path(folder, Path(name).name) for name in index["shards"]]
    shards, mine = [runtime.read_tensors(path, hint)[0] for path in paths], paths[rank::world]
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(mine, pool.map(runtime.sha256, mine)):
            if digest != index["shards"][path.name]["sha256"]:
                raise ValueError(f"{path} does not have the checksum in index.json: {hint}")
    runtime.barrier()  # until the other processes have checked theirs
    kind = index["kind"]
    items = ConcatDataset([shard[TENSOR[kind]] for shard in shards])
    labels = torch.cat([shard["labels"] for shard in shards])
    # The checksums of shards do not count: another GPU encodes with other rounding.
    name = f"{kind} {checksum([index['source'], index['left_out']])[:16]}"
    shape = tuple(items[0].shape[-3:])
    return Dataset(name, kind, index["classes"], shape, index.get("mirror", True), labels, items)


# --- from a folder of images to shards ---


def read_image(path):
    """Return an image file as a PIL image in RGB.

    Raises ValueError for bytes that are not an image of 8 bits a channel, OSError for a bad disk.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel, mode {image.mode}")
            return image.convert("RGB")
    except Exception as error:  # Pillow's many formats raise many types
        failed = isinstance(error, MemoryError) or getattr(error, "errno", None)
        if failed and not isinstance(error, FileNotFoundError):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a readable image ({why}): repair or delete it") from None


def centre_crop(image, size):
    """Return the centre of a PIL image as ADM (arXiv 2105.05233) crops it, (3, size, size) uint8:
    halved by averaging while at least twice too large, then interpolated to `size`, bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scaled = [round(side * size / min(image.size)) for side in image.size]
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in scaled)
    pixels = np.array(image)[top : top + size, left : left + size]
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


def files_below(folder):
    """Return the paths of all files in a folder and in those below it, sorted.

    Follows links to folders, but enters no folder twice: links may form a loop.
    """
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
        else:
            seen.add(real)
            paths += [Path(parent, name) for name in names]
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
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    loose = first_image(sorted(path for path in root.iterdir() if path.is_file()))
    if folders and loose:
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


def is_complete(path, source, entry):
    """Return whether a shard of `source` is there, whole, and as its entry in the index, if any.
    Raise ValueError if the shard was made from another source."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except (SafetensorError, FileNotFoundError):
        return False
    if about.get("source") != source:
        what = "other files, or with another resolution or VAE"
        raise ValueError(f"{path} was made from {what}: choose another OUT")
    return not entry or entry["sha256"] == runtime.sha256(path)


def save_shard(path, kind, items, labels, source, left_out=()):
    """Write a shard: items as in this file's docstring, labels (n,) int64, and what they are of."""
    metadata = json.dumps({"source": source, "left_out": left_out})
    runtime.save_tensors(path, {TENSOR[kind]: items, "labels": labels}, {"about": metadata})


def write_shards(root, files, about, todo, vae, world):
    """Convert `files`, [(path below root, label)], to the shards `todo`, {number: path}."""
    size = about["resolution"]

    def read(k):
        part = files[k * SHARD : (k + 1) * SHARD]
        return part, list(pool.map(lambda file: load_crop(root / file[0], size), part))

    total = sum(len(files[k * SHARD : (k + 1) * SHARD]) for k in todo)
    progress = tqdm(total=total, unit=" files", disable=world.rank > 0)
    with progress, ThreadPoolExecutor() as pool:
        for path, (part, crops) in zip(todo.values(), prefetch(read, todo, depth=2)):
            (names, labels), (images, errors) = zip(*part), zip(*crops)
            whole = torch.tensor([error is None for error in errors])
            images, labels = torch.stack(images)[whole], torch.tensor(labels)[whole]
            for error in filter(None, errors):
                tqdm.write(f"left out: {error}")
            left_out = [name for name, error in zip(names, errors) if error]
            progress.update(len(left_out))
            items = []
            for x in images.split(64):
                items.append(encode_views(vae, x, about["mirror"], world.device) if vae else x)
                progress.update(len(x))
            items = torch.cat(items)
            save_shard(path, about["kind"], items, labels, about["source"], left_out)


def write_index(folder, shards, about):
    """Write the index of these shards, with their counts and checksums.

    about: {"kind", "resolution", "mirror", "classes", "source"} and whatever else is to be kept.
    """
    labels, entries, left_out = [], {}, []
    for path in shards:
        tensors, metadata = runtime.read_tensors(path, "run the same command again")
        labels.append(tensors["labels"])
        left_out += json.loads(metadata["about"])["left_out"]
        entries[path.name] = {"count": len(labels[-1]), "sha256": runtime.sha256(path)}
    counts = torch.cat(labels).bincount(minlength=len(about["classes"])).tolist()
    index = about | {"counts": counts, "left_out": left_out, "shards": entries}
    with runtime.atomic_write(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index | {"checksum": checksum(index)}, indent=1))
    side = about["resolution"]
    done = f"{sum(counts):,} images of {len(counts):,} classes as {about['kind']} of {side}x{side}"
    print(f"{folder}: {done} in {len(shards):,} shards; {len(left_out)} files left out")


def convert(root, folder, files, about, vae, world):
    """Convert `files` below `root` to shards and an index in `folder`, each process its share.

    Shards that are there, whole, are kept. about: as for `write_index`.
    """
    lock = runtime.lock_folder(folder) if world.rank == 0 else None
    runtime.say(f"{len(files):,} files of {len(about['classes']):,} classes")
    if len(about["classes"]) == 1:
        runtime.say("there is one class: training will be unguided")
    runtime.barrier()
    shards = [folder / f"shard-{k:05}.safetensors" for k in range(-(-len(files) // SHARD))]
    index = folder / "index.json"
    known = read_index(index)["shards"] if index.exists() else {}
    todo = {k: shards[k] for k in range(world.rank, len(shards), world.size)}
    todo = {k: p for k, p in todo.items() if not is_complete(p, about["source"], known.get(p.name))}
    write_shards(root, files, about, todo, vae, world)
    runtime.barrier()
    if lock:
        write_index(folder, shards, about)
        lock.release()


def main(argv, world):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("images", type=Path, help="a folder of images, or with a folder of images per class")
    add("out", type=Path, help="the folder to write")
    add("--vae", help=f"the VAE's file ({VAE}); default: write pixels")
    side = "side of the crops (default: 256 with --vae, else the first image's shorter side)"
    add("--resolution", type=runtime.number(int, 1), help=side)
    mirror = "train without mirror images, as text and digits need (default: with them)"
    add("--no-mirror", action="store_true", help=mirror)
    args = arguments.parse_args(argv)
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise ValueError(f"{args.out} lies in {args.images}: choose another folder to write")
    vae = None if args.vae is None else load_vae(args.vae, world.device)
    files, classes, first = list_images(args.images)
    side = args.resolution or (256 if vae else min(read_image(first).size))
    if vae and side % 8:
        raise ValueError(f"--resolution {side}: with --vae give a multiple of 8")
    about = {
        "kind": "latents" if vae else "pixels",
        "resolution": side,
        "mirror": not args.no_mirror,
        "channels": 4 if vae else 3,
        "scale": SCALE if vae else None,
        "vae": runtime.sha256(args.vae) if vae else None,
        "classes": classes,
    }
    about["source"] = checksum([about, files])
    convert(args.images, args.out, files, about, vae, world)


if __name__ == "__main__":
    runtime.launch(main)
