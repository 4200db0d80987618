"""Images from a checkpoint, each from noise that depends on (seed, index) alone.

    python sample.py runs/digits --classes 3,1,4 --steps 1 --seed 0 --out 314.png
    python sample.py iMF-XL-2.pth --vae FILE --classes 207,360 --omega 1,4,8 --interval 0.42,0.62
    python sample.py meanflow-B4.pth --classes 207,360 --vae diffusion_pytorch_model.safetensors
    python sample.py runs/digits --images samples.npz --count 1000
    torchrun --nproc-per-node 8 sample.py runs/XL-2 --vae FILE --images samples.npz

Draws one picture, or with --images separate images, into a folder or an .npz like ADM's. A
checkpoint is a run's folder, or a file of weights: of an iMF, or with DiT's names, also of others
(weights.py says which). evaluate.py scores checkpoints and images.
"""

import math
import os
import zipfile
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import meanflow
import runtime
from vae import SCALE, decode
from weights import CONVENTIONS, choose_guidance, image_shape, open_sampler

GAP, GREY = 4, 128  # pixels between the images of a grid, and their value


# --- samples ---


def noise(seed, indices, shape):
    """Return standard normal noise, (len(indices), *shape): sample i is the same in any batch."""
    generators = (runtime.generator(seed, "samples", i) for i in indices)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def generate(sampler, y, *, steps=1, seed=0, indices=None, batch=500):
    """Return a sample for each condition, (n, *sampler.shape) float32, on the parameters' device.

    y: (n,) labels, or any nested tuple or dict of tensors (n, ...). indices: which noise of `seed`
    each sample starts from (default: 0 ... n - 1).
    """
    indices = range(len(tree_leaves(y)[0])) if indices is None else indices
    net = sampler.net(sampler.params, *sampler.guidance)
    device, samples = next(iter(sampler.params.values())).device, []
    for k in range(0, len(indices), batch):
        e = noise(seed, indices[k : k + batch], sampler.shape).to(device)
        part = tree_map(lambda rows: rows[k : k + batch].to(device), y)
        samples.append(meanflow.sample(net, e, part, steps))
    return torch.cat(samples)


def to_uint8(x, sampler):
    """Return a Sampler's samples as images, (n, channels, H, W) uint8.

    Without a VAE, the first three channels of latents are shown as colours. Raises ValueError if a
    value is not finite.
    """
    if sampler.kind == "latents":
        latents = x / sampler.scale + sampler.shift
        x = x[:, :3] / 3 if sampler.vae is None else decode(sampler.vae, latents)
    if not x.isfinite().all():
        raise ValueError("samples have values that are not finite: give an earlier save")
    x = (x + 1) * 127.5
    return (x.floor() if sampler.floor else x.round()).clamp(0, 255).byte()


def draw_images(sampler, labels, world, *, steps=1, seed=0):
    """Yield this process's share of one image per label, as (indices, uint8 (n, C, H, W))."""
    mine = range(world.rank, len(labels), world.size)
    chunks = [mine[k : k + 100] for k in range(0, len(mine), 100)]
    with tqdm(total=len(mine), unit=" images", leave=False, disable=world.rank > 0) as progress:
        for indices in chunks:
            x = generate(sampler, labels[list(indices)], steps=steps, seed=seed, indices=indices)
            yield indices, to_uint8(x, sampler)
            progress.update(len(indices))


# --- pictures ---


def choose_shown(dataset):
    """Return the conditions of a grid: ten of a class in each row if there are ten or fewer, else a
    hundred classes spread over all, or a hundred of one. Without classes, return those of the first
    hundred items."""
    if not dataset.classes:
        return tree_map(lambda y: y[:100], dataset.labels)
    classes = len(dataset.classes)
    count = 10 * min(10, classes) if classes > 1 else 100
    return torch.arange(count) * classes // count


def check_picture(path, channels):
    """Raise ValueError unless images of so many channels can be written to `path`."""
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels cannot be shown: only 1 (grey) or 3 can")
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} has an unsupported image suffix: name it .png")


def save_grid(images, path, *, columns=10, gap=GAP, enlarged=32):
    """Write images, (n, 1 or 3, H, W) uint8, row by row into one picture; enlarge small ones."""
    columns = min(columns, len(images))
    zoom = max(1, enlarged // max(images.shape[2:]))
    x = F.interpolate(images.cpu(), scale_factor=zoom)
    x = F.pad(x, (0, gap, 0, gap, 0, 0, 0, -len(x) % columns), value=GREY)
    x = x.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # c row h col w
    x = F.pad(x.flatten(3).flatten(1, 2), (gap, 0, gap, 0), value=GREY)  # c (row h) (col w)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with runtime.atomic_write(path) as temporary:
        Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()).save(temporary)


def write_npz(path, images, shape, world):
    """Write all processes' images, (i, uint8 (C, H, W)), to an .npz like ADM's, (N, H, W, 3)."""
    header, about = BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    start, size = len(header.getvalue()), math.prod(shape[1:])
    with runtime.atomic_write(path, new=True) if world.rank == 0 else nullcontext() as temporary:
        part = temporary and temporary.with_suffix(".npy")  # memory may not hold all
        if part:
            part.write_bytes(header.getvalue())
        with open(runtime.all_gather(part)[0], "rb+") as file:
            for i, image in images:
                file.seek(start + i * size)
                file.write(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy().tobytes())
        runtime.barrier()
        if part:
            with zipfile.ZipFile(temporary, "w") as file:
                file.write(part, "arr_0.npy")


def write_images(path, sampler, labels, world, *, steps=1, seed=0):
    """Write an image per label to a folder or an .npz, of which each process draws its share."""
    drawn = draw_images(sampler, labels, world, steps=steps, seed=seed)
    images = ((i, image) for indices, part in drawn for i, image in zip(indices, part))
    if path.suffix.lower() == ".npz":
        path.parent.mkdir(parents=True, exist_ok=True)
        _, *sides = image_shape(sampler.kind, sampler.shape)
        return write_npz(path, images, (len(labels), *sides, 3), world)
    if world.rank == 0 and path.is_dir() and set(os.listdir(path)) - {".lock"}:
        raise ValueError(f"--images {path} is not empty: choose another folder")
    lock = runtime.lock_folder(path) if world.rank == 0 else None
    runtime.barrier()
    for i, image in images:
        save_grid(image[None], path / f"{i:06}.png", gap=0, enlarged=0)
    if lock:
        lock.release()


# --- the command line ---


def add_sampling(add):
    """Add the flags that say what is drawn from a checkpoint, and how."""
    add("--classes", type=lambda text: text.split(","), help="as 3,1,4, or names (default: all)")
    add("--uniform", action="store_true", help="draw classes at random (default: in turn)")
    add("--steps", type=runtime.number(int, 1), help="evaluations of the network (default: 1)")
    seed = runtime.number(int, -(2**63), 2**63 - 1)
    add("--seed", type=seed, help="of the noise and of drawn classes (default: 0)")
    add("--vae", help="sd-vae-ft-mse's file, which decodes latents (see vae.py)")
    add("--scale", type=runtime.number(float, 0), help=f"of latents, if not {SCALE}")
    what = "; ".join(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())
    add("--convention", choices=CONVENTIONS, help=f"of a network that predicts a velocity: {what}")
    how = "whose function load, or NAME, reads a network that is not of this house"
    add("--network", metavar="FILE.py[:NAME]", help=how)
    times = runtime.numbers(float, "two times, as 0.4,0.65", 2)
    add("--interval", type=times, metavar="LOW,HIGH", help="times between which guidance acts")


def choose_labels(count, classes, names, *, uniform=False, seed=0):
    """Return the labels, (count,) int64, of samples of these classes, or of all.

    classes: words, each a class's name or else its number; `names` has the names of all. They take
    turns, or are drawn if `uniform`. Raises ValueError for a word that is neither.
    """
    known = {str(k): k for k in range(len(names))} | {name: k for k, name in enumerate(names)}
    if unknown := [word for word in classes or [] if word not in known]:
        hint = f"give a class's name or a number from 0 to {len(names) - 1}"
        raise ValueError(f'class "{unknown[0]}" is unknown: {hint}')
    chosen = torch.tensor([known[word] for word in classes] if classes else range(len(names)))
    places = torch.arange(count) % len(chosen)
    if uniform:
        g = runtime.generator(seed, "classes", 0)
        places = torch.randint(len(chosen), (count,), generator=g)
    return chosen[places]


def describe_classes(classes, names):
    """Return what these words chose: numbers, and names that are other words."""
    told = []
    for word, k in zip(classes, choose_labels(len(classes), classes, names).tolist()):
        others = [name for j, name in enumerate(names) if str(j) == word != str(k)]
        told.append(str(k) if names[k] == str(k) else f'{k} "{names[k]}"')
        told[-1] += "".join(f' (number {word} is "{other}")' for other in others)
    return f"classes {', '.join(told)}"


def parse_arguments(argv):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("checkpoint", help="a run's folder, or a file of weights, .safetensors, .pt or .pth")
    add_sampling(add)
    scales = "an iMF's guidance; of several, as 1,4,8, each has its row of the picture"
    add("--omega", type=runtime.numbers(float, "as 1,4,8"), help=scales)
    add("--out", help="the picture to write (default: samples.png)")
    add("--images", type=Path, help="a folder, or a new .npz as ADM's, to write samples to")
    add("--count", type=runtime.number(int, 1), help="samples for --images (default: 50000)")
    args = arguments.parse_args(argv)
    if args.images:
        runtime.refuse("with --images", out=args.out)
        if args.omega and len(args.omega) > 1:
            raise ValueError("--omega takes one number with --images: leave out the others")
    else:
        runtime.refuse("without --images", count=args.count, uniform=args.uniform)
    return args


def main(argv, world):
    args = parse_arguments(argv)
    steps, seed, out = args.steps or 1, args.seed or 0, args.out or "samples.png"
    options = {k: getattr(args, k) for k in ("convention", "vae", "scale", "network")}
    sampler = open_sampler(args.checkpoint, world.device, steps=steps, **options)
    check_picture(out, image_shape(sampler.kind, sampler.shape)[0])
    samplers = [
        choose_guidance(args.checkpoint, sampler, omega, args.interval)
        for omega in args.omega or [None]
    ]
    names, options = sampler.classes, dict(steps=steps, seed=seed)
    chosen = f": {describe_classes(args.classes, names)}" if args.classes else ""
    if args.images:
        chance = dict(uniform=args.uniform, seed=seed)
        labels = choose_labels(args.count or 50_000, args.classes, names, **chance)
        write_images(args.images, samplers[0], labels, world, **options)
        runtime.say(f"{args.images}{chosen}")
    elif world.rank == 0:
        labels = choose_labels(len(args.classes or range(10)), args.classes, names)
        x = torch.cat([generate(sampler, labels, **options) for sampler in samplers])
        columns = len(labels) if len(samplers) > 1 else 10
        save_grid(to_uint8(x, sampler), out, columns=columns)
        runtime.say(f"{out}{chosen}")


if __name__ == "__main__":
    runtime.launch(main)
