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
import zipfile
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

    Without a VAE, the first three channels of latents are shown as colours.
    """
    if sampler.kind == "latents":
        latents = x / sampler.scale + sampler.shift
        x = x[:, :3] / 3 if sampler.vae is None else decode(sampler.vae, latents)
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def draw_images(sampler, labels, world, *, steps=1, seed=0):
    """Yield this process's share of one image per label, as (indices, uint8 (n, C, H, W)).

    Raises ValueError if a sample is not finite.
    """
    mine = range(world.rank, len(labels), world.size)
    chunks = [mine[k : k + 100] for k in range(0, len(mine), 100)]
    with tqdm(total=len(mine), unit=" images", leave=False, disable=world.rank > 0) as progress:
        for indices in chunks:
            x = generate(sampler, labels[list(indices)], steps=steps, seed=seed, indices=indices)
            if not x.isfinite().all():
                raise ValueError("samples have values that are not finite: give an earlier save")
            yield indices, to_uint8(x, sampler)
            progress.update(len(indices))


# --- pictures ---


def choose_shown(dataset):
    """Return the conditions of a grid: ten of a class in each row if there are ten or fewer, else a
    hundred classes spread over all. Without classes, return those of the first hundred items."""
    if not dataset.classes:
        return tree_map(lambda y: y[:100], dataset.labels)
    classes = len(dataset.classes)
    count = 10 * min(10, classes)
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
    part = path.with_name(f"{runtime.TEMPORARY}{path.stem}.npy")  # memory may not hold all
    try:
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(header.getvalue())
        runtime.barrier()
        with open(part, "rb+") as file:
            for i, image in images:
                file.seek(start + i * size)
                file.write(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy().tobytes())
        runtime.barrier()
        if world.rank == 0:
            with runtime.atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
                file.write(part, "arr_0.npy")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): make room, or give another") from None
    finally:
        if world.rank == 0:
            part.unlink(missing_ok=True)


def write_images(path, sampler, labels, world, *, steps=1, seed=0):
    """Write an image per label to a folder or an .npz, of which each process draws its share."""
    runtime.barrier()  # before one process writes to `path`, which the others check
    drawn = draw_images(sampler, labels, world, steps=steps, seed=seed)
    images = ((i, image) for indices, part in drawn for i, image in zip(indices, part))
    if path.suffix == ".npz":
        _, *sides = image_shape(sampler.kind, sampler.shape)
        write_npz(path, images, (len(labels), *sides, 3), world)
        return
    for i, image in images:
        save_grid(image[None], path / f"{i:06}.png", gap=0, enlarged=0)


# --- the command line ---


def add_sampling(add):
    """Add the flags that say what is drawn from a checkpoint, and how."""
    whole = runtime.numbers(int, "as 3,1,4")
    add("--classes", type=whole, help="their numbers, separated by commas (default: all, in turn)")
    add("--uniform", action="store_true", help="draw classes at random (default: in turn)")
    add("--steps", type=runtime.number(int, 1), help="evaluations of the network (default: 1)")
    add("--seed", type=int, help="of the noise and of drawn classes (default: 0)")
    add("--vae", help="sd-vae-ft-mse's file, which decodes latents (see vae.py)")
    add("--scale", type=runtime.number(float, 0), help=f"of latents, if not {SCALE}")
    what = "; ".join(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())
    add("--convention", choices=CONVENTIONS, help=f"of a network that predicts a velocity: {what}")
    times = runtime.numbers(float, "two times, as 0.4,0.65", 2)
    add("--interval", type=times, metavar="LOW,HIGH", help="times between which guidance acts")


def choose_labels(count, classes, known, *, uniform=False, seed=0):
    """Return the labels, (count,) int64, of samples of these class numbers, or of all `known`.

    They take turns, or are drawn if `uniform`. Raises ValueError for a number out of range.
    """
    classes = classes or range(known)
    if bad := [c for c in classes if not 0 <= c < known]:
        raise ValueError(f"class {bad[0]} is out of range: give classes from 0 to {known - 1}")
    places = torch.arange(count) % len(classes)
    if uniform:
        g = runtime.generator(seed, "classes", 0)
        places = torch.randint(len(classes), (count,), generator=g)
    return torch.tensor(classes)[places]


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
        if args.images.is_file() or args.images.is_dir() and any(args.images.iterdir()):
            raise ValueError(f"--images {args.images} already exists: give another name")
        if args.omega and len(args.omega) > 1:
            raise ValueError("--omega takes one number with --images: leave out the others")
    else:
        runtime.refuse("without --images", count=args.count, uniform=args.uniform)
    return args


def main(argv, world):
    args = parse_arguments(argv)
    steps, seed, out = args.steps or 1, args.seed or 0, args.out or "samples.png"
    options = dict(convention=args.convention, steps=steps, vae=args.vae, scale=args.scale)
    sampler = open_sampler(args.checkpoint, world.device, **options)
    check_picture(out, image_shape(sampler.kind, sampler.shape)[0])
    samplers = [
        choose_guidance(args.checkpoint, sampler, omega, args.interval)
        for omega in args.omega or [None]
    ]
    known, options = len(sampler.classes), dict(steps=steps, seed=seed)
    if args.images:
        labels = choose_labels(
            args.count or 50_000, args.classes, known, uniform=args.uniform, seed=seed
        )
        write_images(args.images, samplers[0], labels, world, **options)
        runtime.say(args.images)
    elif world.rank == 0:
        labels = choose_labels(len(args.classes or range(10)), args.classes, known)
        x = torch.cat([generate(sampler, labels, **options) for sampler in samplers])
        columns = len(labels) if len(samplers) > 1 else 10
        save_grid(to_uint8(x, sampler), out, columns=columns)
        runtime.say(out)


if __name__ == "__main__":
    runtime.launch(main)
