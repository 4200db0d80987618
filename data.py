"""Data: the embedded digits, folders of images as shards, batches, and the SD-VAE.

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
Recognition of Handwritten Digits, UCI, 1998, CC BY 4.0). The last sections, files and processes,
serve the other files as well.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import ConcatDataset
from tqdm import tqdm

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # on Windows
    from msvcrt import LK_NBLCK, locking

    LOCK_EX = LOCK_NB = 0

    def flock(file, _):
        try:
            locking(file.fileno(), LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error


STREAMS = ("order", "draws", "samples", "init", "views", "classes")  # one for each use
SHARD = 1024  # images
TEMPORARY = "meanflow-tmp-"  # begins the names of files that are being written
SCALE = 0.18215  # brings latents to a variance of about 1
TENSOR = {"latents": "moments", "pixels": "pixels"}  # what a shard of each kind holds


def generator(seed, stream, k):
    """Return the generator of item k >= 0 (an epoch, a step, a sample) of one of STREAMS.

    Torch's CPU generator, a Mersenne Twister, uses only 32 bits of a seed, too few for millions of
    generators. Its whole state is filled here with a hash of (seed, stream, k).
    """
    key = np.array((seed % 2**64, STREAMS.index(stream), k), np.uint64).view(np.uint32)
    words = np.random.SeedSequence(key).generate_state(624)
    g = torch.Generator()
    state = g.get_state()
    state.view(torch.int64)[3:627] = torch.from_numpy(words.astype(np.int64))
    return g.set_state(state)


# --- data sets and batches ---


class Dataset(NamedTuple):
    name: str  # of data.py's folders, a hash of the files' names and the settings
    kind: str  # "pixels" or "latents"
    classes: list  # their names, by label
    shape: tuple  # of a sample: (channels, height, width)
    mirror: bool  # whether mirror images belong to it
    labels: torch.Tensor  # (N,) int64
    items: ConcatDataset  # the N items, from memory-mapped shards


def digits():
    """Return the embedded digits: items (1, 8, 8) float32 in [-1, 1], where -1 is blank paper."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    classes, items = [str(k) for k in range(10)], images[:, None] / 8 - 1
    return Dataset("digits", "pixels", classes, (1, 8, 8), False, labels.long(), items)


@lru_cache(2)  # epochs: permuting ImageNet takes longer than a step
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def epoch_indices(count, batch, *, seed, step):
    """Return which of `count` items the batch of `step` holds, (batch,) int64.

    Every epoch is its own permutation of all items, and batches are cut from the epochs laid end to
    end, so that no item is left out.
    """
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    used = epochs.unique().tolist()
    return torch.cat([permutation(count, seed, k)[places[epochs == k] % count] for k in used])


def batch(dataset, size, *, seed, step, rank=0, world=1):
    """Return rows rank::world of the batch of `step`: x (n, *dataset.shape) float32, labels (n,).

    At each visit an item is mirrored or not, if the data set says so, and a latent is sampled anew
    from the VAE's posterior and multiplied by SCALE.
    """
    mine = slice(rank, None, world)
    rows = epoch_indices(len(dataset.labels), size, seed=seed, step=step)[mine]
    views = generator(seed, "views", step)
    mirrored = torch.randint(2, (size,), generator=views)[mine] * dataset.mirror
    items = [dataset.items[i] for i in rows.tolist()]
    if dataset.kind == "latents":
        moments = torch.stack([item[m] for item, m in zip(items, mirrored.tolist())])
        mean, std = moments.float().unbind(1)
        x = SCALE * (mean + std * torch.randn((size, *dataset.shape), generator=views)[mine])
    else:
        x = torch.stack(items)
        if x.dtype == torch.uint8:
            x = torch.where(mirrored[:, None, None, None] == 1, x.flip(3), x) / 127.5 - 1
    return x, dataset.labels[rows]


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
    shards, mine = [read_tensors(path, hint)[0] for path in paths], paths[rank::world]
    with ThreadPoolExecutor() as pool:
        for path, digest in zip(mine, pool.map(sha256, mine)):
            if digest != index["shards"][path.name]["sha256"]:
                raise ValueError(f"{path} does not have the checksum in index.json: {hint}")
    barrier()  # until the other processes have checked theirs
    kind = index["kind"]
    items = ConcatDataset([shard[TENSOR[kind]] for shard in shards])
    labels = torch.cat([shard["labels"] for shard in shards])
    # The checksums of shards do not count: another GPU encodes with other rounding.
    name = f"{kind} {checksum([index['source'], index['left_out']])[:16]}"
    shape = tuple(items[0].shape[-3:])
    return Dataset(name, kind, index["classes"], shape, index.get("mirror", True), labels, items)


# --- the VAE ---
#
# sd-vae-ft-mse (Rombach et al.: High-Resolution Image Synthesis with Latent Diffusion Models, arXiv
# 2112.10752) as functions of a parameter dict with the names of its file.

WIDTHS = (128, 256, 512, 512)  # channels at 1, 1/2, 1/4 and 1/8 of the image's height
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
FETCH = "fetch diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse from Hugging Face"


def vae_shapes():
    """Return {name: shape} of the VAE's 248 tensors, 83,653,863 parameters."""
    weights, mid = {"quant_conv": (8, 8, 1, 1), "post_quant_conv": (4, 4, 1, 1)}, WIDTHS[-1]

    def resnet(name, inputs, width):
        weights[f"{name}.norm1"], weights[f"{name}.conv1"] = (inputs,), (width, inputs, 3, 3)
        weights[f"{name}.norm2"], weights[f"{name}.conv2"] = (width,), (width, width, 3, 3)
        if inputs != width:
            weights[f"{name}.conv_shortcut"] = (width, inputs, 1, 1)

    def half(name, way, widths, depth, inputs, outputs):
        weights[f"{name}.conv_in"] = (widths[0], inputs, 3, 3)
        for i, (before, width) in enumerate(zip((widths[0], *widths), widths)):
            for j in range(depth):
                resnet(f"{name}.{way}_blocks.{i}.resnets.{j}", width if j else before, width)
            if i < 3:
                weights[f"{name}.{way}_blocks.{i}.{way}samplers.0.conv"] = (width, width, 3, 3)
        for j in range(2):
            resnet(f"{name}.mid_block.resnets.{j}", mid, mid)
        weights[f"{name}.mid_block.attentions.0.group_norm"] = (mid,)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            weights[f"{name}.mid_block.attentions.0.{part}"] = (mid, mid)
        weights[f"{name}.conv_norm_out"] = (width,)
        weights[f"{name}.conv_out"] = (outputs, width, 3, 3)

    half("encoder", "down", WIDTHS, depth=2, inputs=3, outputs=8)
    half("decoder", "up", WIDTHS[::-1], depth=3, inputs=4, outputs=3)
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return {f"{name}.weight": shape for name, shape in weights.items()} | biases


def load_vae(path, device="cpu"):
    """Return the VAE's parameters, {name: float32 tensor}, from its safetensors file.

    -mse has SHA-256 a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815; -ema has the
    same names. Older names of the attention layers are accepted. Raises FileNotFoundError or
    ValueError, with one line, for a file with other tensors.
    """
    tensors, vae = read_tensors(path, FETCH)[0], {}
    for name, p in tensors.items():
        name = ".".join(OLD_NAMES.get(part, part) for part in name.split("."))
        if "attentions" in name and p.ndim == 4:  # once made of 1x1 convolutions
            p = p.flatten(1)
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format  # 15 % faster
        vae[name] = p.to(device, torch.float32, memory_format=layout, copy=True)
    check_tensors(path, vae, vae_shapes(), FETCH)
    return vae


def conv(vae, name, x, padding=1, stride=1):
    return F.conv2d(x, vae[f"{name}.weight"], vae[f"{name}.bias"], stride, padding)


def norm(vae, name, x):
    return F.group_norm(x, 32, vae[f"{name}.weight"], vae[f"{name}.bias"], eps=1e-6)


def resnet(vae, name, x):
    h = conv(vae, f"{name}.conv1", F.silu(norm(vae, f"{name}.norm1", x)))
    h = conv(vae, f"{name}.conv2", F.silu(norm(vae, f"{name}.norm2", h)))
    if f"{name}.conv_shortcut.weight" in vae:
        x = conv(vae, f"{name}.conv_shortcut", x, padding=0)
    return x + h


def attention(vae, name, x):
    """Apply attention with one head over all h w places of x, (B, 512, h, w)."""

    def linear(part, h):
        return F.linear(h, vae[f"{name}.{part}.weight"], vae[f"{name}.{part}.bias"])

    h = norm(vae, f"{name}.group_norm", x).flatten(2).mT[:, None]  # (B, 1, h w, 512)
    h = F.scaled_dot_product_attention(linear("to_q", h), linear("to_k", h), linear("to_v", h))
    return x + linear("to_out.0", h)[:, 0].mT.unflatten(2, x.shape[2:])


def middle(vae, name, x):
    x = resnet(vae, f"{name}.resnets.0", x)
    return resnet(vae, f"{name}.resnets.1", attention(vae, f"{name}.attentions.0", x))


def encoder(vae, x):
    """Return means and log-variances, (B, 4 + 4, H/8, W/8), of images, (B, 3, H, W)."""
    x = conv(vae, "encoder.conv_in", x)
    for i in range(4):
        for j in range(2):
            x = resnet(vae, f"encoder.down_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = F.pad(x, (0, 1, 0, 1))  # on the right and at the bottom only
            name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
            x = conv(vae, name, x, padding=0, stride=2)
    x = F.silu(norm(vae, "encoder.conv_norm_out", middle(vae, "encoder.mid_block", x)))
    return conv(vae, "quant_conv", conv(vae, "encoder.conv_out", x), padding=0)


def decoder(vae, z):
    """Return images, (B, 3, 8 h, 8 w), from latents, (B, 4, h, w)."""
    x = conv(vae, "decoder.conv_in", conv(vae, "post_quant_conv", z, padding=0))
    x = middle(vae, "decoder.mid_block", x)
    for i in range(4):
        for j in range(3):
            x = resnet(vae, f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(vae, f"decoder.up_blocks.{i}.upsamplers.0.conv", x)
    return conv(vae, "decoder.conv_out", F.silu(norm(vae, "decoder.conv_norm_out", x)))


def in_chunks(half, vae, x, chunk):
    """Return half(vae, x) in the dtype of x, computed in the parameters' dtype, channels last."""
    dtype = next(iter(vae.values())).dtype
    chunk = chunk or (1 if x.device.type == "cpu" else 32)  # 1.5 times as fast on a CPU as 4
    parts = [half(vae, p.to(dtype, memory_format=torch.channels_last)) for p in x.split(chunk)]
    return torch.cat(parts).to(x.dtype, memory_format=torch.contiguous_format)


def encode(vae, images, *, chunk=None):
    """Return mean and standard deviation of the images' latents, both (B, 4, H/8, W/8), unscaled.

    images: (B, 3, H, W) floating in [-1, 1], H and W multiples of 8, else ValueError. Computes
    `chunk` images at a time, in the parameters' dtype; 256x256 takes 135 MB each in float32.
    """
    shape = tuple(images.shape)
    floating = images.is_floating_point()
    if len(shape) != 4 or shape[1] != 3 or shape[2] % 8 or shape[3] % 8 or not floating:
        wanted = "(B, 3, H, W) floating, H and W multiples of 8"
        raise ValueError(f"images are {shape} {images.dtype}: give {wanted}")
    mean, log_variance = in_chunks(encoder, vae, images, chunk).chunk(2, 1)
    return mean.contiguous(), (log_variance.clamp(-30, 20) / 2).exp()


def decode(vae, z, *, chunk=None):
    """Return images, (B, 3, 8 h, 8 w), of about [-1, 1], from unscaled latents.

    z: (B, 4, h, w) floating, else ValueError. Computes `chunk` images at a time, in the parameters'
    dtype; 256x256 takes 206 MB each in float32.
    """
    if z.ndim != 4 or z.shape[1] != 4 or not z.is_floating_point():
        raise ValueError(f"latents are {tuple(z.shape)} {z.dtype}: give (B, 4, h, w) floating")
    return in_chunks(decoder, vae, z, chunk)


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
    return not entry or entry["sha256"] == sha256(path)


def save_shard(path, kind, items, labels, source, left_out=()):
    """Write a shard: items as in this file's docstring, labels (n,) int64, and what they are of."""
    metadata = json.dumps({"source": source, "left_out": left_out})
    save_tensors(path, {TENSOR[kind]: items, "labels": labels}, {"about": metadata})


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
        tensors, metadata = read_tensors(path, "run the same command again")
        labels.append(tensors["labels"])
        left_out += json.loads(metadata["about"])["left_out"]
        entries[path.name] = {"count": len(labels[-1]), "sha256": sha256(path)}
    counts = torch.cat(labels).bincount(minlength=len(about["classes"])).tolist()
    index = about | {"counts": counts, "left_out": left_out, "shards": entries}
    with atomic_write(folder / "index.json") as temporary:
        temporary.write_text(json.dumps(index | {"checksum": checksum(index)}, indent=1))
    side = about["resolution"]
    done = f"{sum(counts):,} images of {len(counts):,} classes as {about['kind']} of {side}x{side}"
    print(f"{folder}: {done} in {len(shards):,} shards; {len(left_out)} files left out")


def convert(args, files, about, vae, world):
    """Write the shards that are not complete, each process its share, then the index."""
    if world.rank == 0:
        args.lock = lock_folder(args.out)  # held until this process ends
        print(f"{len(files):,} files of {len(about['classes']):,} classes", flush=True)
        if len(about["classes"]) == 1:
            print("one class: labels, and so guidance, will make no difference", flush=True)
    barrier()
    shards = [args.out / f"shard-{k:05}.safetensors" for k in range(-(-len(files) // SHARD))]
    index = args.out / "index.json"
    known = read_index(index)["shards"] if index.exists() else {}
    todo = {k: shards[k] for k in range(world.rank, len(shards), world.size)}
    todo = {k: p for k, p in todo.items() if not is_complete(p, about["source"], known.get(p.name))}
    write_shards(args.images, files, about, todo, vae, world)
    barrier()
    if world.rank == 0:
        write_index(args.out, shards, about)


# --- files ---


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to, which then becomes `path`.

    Whenever the process is killed, `path` is whole or as before. Raises OSError on a full disk.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        way_out = "make room and run the same command again, or choose another place"
        raise OSError(f"{path} cannot be written ({error}): {way_out}") from None


def save_tensors(path, tensors, metadata=None):
    """Write a safetensors file. It does not fix the order of metadata: give at most one entry where
    the checksum must not vary."""
    with atomic_write(path) as temporary:
        tensors = {name: p.detach().cpu().contiguous() for name, p in tensors.items()}
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors lets only the owner read


def read_tensors(path, hint):
    """Return the tensors, {name: tensor}, and the metadata, {key: str}, of a safetensors file.

    Raises FileNotFoundError or ValueError with one line that ends in `hint`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: {hint}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): {hint}") from None


def check_tensors(path, tensors, shapes, hint):
    """Raise ValueError unless `tensors` are finite and those of `shapes`, {name: shape}."""
    found = {name: tuple(p.shape) for name, p in tensors.items()}
    for name in shapes | found:
        got, wanted = found.get(name, "missing"), shapes.get(name, "absent")
        if got != wanted:
            raise ValueError(f"{path}: {name} is {got}, should be {wanted}: {hint}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: {hint}")


def lock_folder(folder):
    """Create the folder and lock it for as long as the returned file is open.

    Removes the files that a process killed while writing left there. Raises ValueError if another
    process holds the lock.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        way_out = "wait until it ends, or choose another folder"
        raise ValueError(f"another process is writing to {folder}: {way_out}") from None
    except OSError as error:  # of network disks
        raise OSError(f"{folder} cannot be locked ({error}): choose one on another disk") from None
    for leftover in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(".tmp??????")):  # safetensors' own
        if leftover.is_file():
            leftover.unlink()
    return lock


# --- processes ---


class World(NamedTuple):
    """The processes that run a script together, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


def barrier():
    """Wait for all processes. If one fails, the others do not get past this."""
    if dist.is_initialized():
        dist.barrier()


def pick_device(local_rank):
    """Return this process's GPU, made the current one, or the CPU where there is none."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(f"process {local_rank} has no GPU: give --nproc-per-node {gpus} or fewer")
    torch.cuda.set_device(local_rank)
    # The default on H100 since torch 2.11, with gradients that were NaN (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", local_rank)


def count_failure(store, one):
    """Add `one` to the number of processes that failed, and return it."""
    try:
        return store.add("failed", one)
    except RuntimeError:  # the store has ended with the process that failed
        return 2


def launch(main):
    """Run main(argv, world) in this process, which torchrun may have started with others.

    A ValueError or OSError ends the script with one line on stderr. Of several processes the first
    to fail prints it; the others end silently, whether they fail alike or lose their peer to it.
    Processes leave together, by os._exit: gloo's threads now and then abort a normal exit.
    """
    store, rank, size, status = None, 0, 1, 0
    try:
        if "WORLD_SIZE" in os.environ:
            store, rank, size = next(rendezvous("env://"))
            # For control and statistics, not gradients; whoever is done first may wait for days.
            group = dict(store=store, rank=rank, world_size=size, timeout=timedelta(days=7))
            dist.init_process_group("gloo", **group)
        device = pick_device(int(os.environ.get("LOCAL_RANK", 0)))
        main(sys.argv[1:], World(rank, size, device))
        barrier()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            way_out = "free it, or give train.py --accumulate 2 or more"
            error = ValueError(f"the GPU is out of memory: {way_out}")
        foreseen = isinstance(error, ValueError | OSError)
        if not foreseen and not (store and count_failure(store, 0)):
            raise
        message = f"{Path(sys.argv[0]).name}: {error}"
        if not store:
            sys.exit(message)
        if count_failure(store, 1) == 1:
            tqdm.write(message, file=sys.stderr)
        status = 1
    if store:
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def parser(description):
    """Return an argument parser that reports bad arguments in one line, without the usage."""

    def error(message):
        raise ValueError(message)

    layout = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(description=description, formatter_class=layout)
    result.error = error
    return result


def check_numbers(args, **least):
    """Raise ValueError unless these arguments, if given, are finite and at least so large, or above
    zero where that is the least."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not (low <= value < math.inf and value > 0):
            hint = f"give {low} or more" if low else "give a number above 0"
            raise ValueError(f"--{name} {value}: {hint}")


def refuse(args, names, when):
    """Raise ValueError if one of these flags, which would be ignored, was given."""
    for name in names:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name} would be ignored {when}: leave it out")


def main(argv, world):
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("images", type=Path, help="a folder of images, or with a folder of images per class")
    add("out", type=Path, help="the folder to write")
    add("--vae", help=f"the VAE's file ({FETCH}); default: write pixels")
    side = "side of the crops (default: 256 with --vae, else the first image's shorter side)"
    add("--resolution", type=int, help=side)
    mirror = "train without mirror images, as text and digits need (default: with them)"
    add("--no-mirror", action="store_true", help=mirror)
    args = arguments.parse_args(argv)
    if args.out.resolve().is_relative_to(args.images.resolve()):
        raise ValueError(f"{args.out} lies in {args.images}: choose another folder to write")
    vae = None if args.vae is None else load_vae(args.vae, world.device)
    files, classes, first = list_images(args.images)
    if args.resolution is None:
        args.resolution = 256 if vae else min(read_image(first).size)
    if args.resolution < 1 or vae and args.resolution % 8:
        hint = "give a number above 0 and, with --vae, a multiple of 8"
        raise ValueError(f"--resolution {args.resolution}: {hint}")
    about = {
        "kind": "latents" if vae else "pixels",
        "resolution": args.resolution,
        "mirror": not args.no_mirror,
        "channels": 4 if vae else 3,
        "scale": SCALE if vae else None,
        "vae": sha256(args.vae) if vae else None,
        "classes": classes,
    }
    about["source"] = checksum([about, files])
    convert(args, files, about, vae, world)


if __name__ == "__main__":
    launch(main)
