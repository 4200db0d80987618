"""Images from a checkpoint, each from noise that depends on (seed, index) alone, and their FID.

    python sample.py runs/digits --classes 3,1,4 --steps 1 --seed 0 --out digits.png
    python sample.py runs/XL-2 --classes 207,360,387 --vae diffusion_pytorch_model.safetensors
    torchrun --nproc-per-node 8 sample.py runs/XL-2 --vae FILE --fid REF.npz --inception FILE

With --fid, draw --count samples and print their distance from REF and what it was computed with, as
one line of JSON. REF is what fid.py takes as --ref, a folder of pixels that data.py wrote, or
digits. Without --inception the features are raw pixels, and the line says so.
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

import data
import fid
from meanflow import sample
from model import config, dit, shapes

GAP, GREY = 4, 128  # pixels between the images of a grid, and their value


class ImageModel(NamedTuple):
    params: dict  # of the DiT
    kind: str  # what it makes: "pixels" or "latents"
    shape: tuple  # of a sample: (channels, height, width)
    vae: dict | None  # decodes latents


def checkpoints(folder, kind):
    """Return {step: path} of the files KIND-STEP.safetensors in a run's folder, newest last."""
    paths = Path(folder).glob(f"{kind}-{'[0-9]' * 8}.safetensors")
    return {int(path.stem[-8:]): path for path in sorted(paths)}


def find_checkpoint(path):
    """Return the file named, or the newest ema-STEP.safetensors of the run's folder named."""
    if not os.path.isdir(path):
        return Path(path)
    if files := checkpoints(path, "ema"):
        return list(files.values())[-1]
    how = f"train one with python train.py --out {path}"
    raise FileNotFoundError(f"{path} holds no ema-STEP.safetensors: {how}")


def load(path, device="cpu"):
    """Return the ImageModel of a checkpoint, in float32 and without a VAE.
    path: as for `find_checkpoint`. Raises FileNotFoundError or ValueError, with one line."""
    path, hint = find_checkpoint(path), "give a run's folder or weights that train.py wrote"
    params, metadata = data.read_tensors(path, hint)
    try:
        architecture = config(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {hint}") from None
    data.check_tensors(path, params, shapes(architecture), hint)
    kind, resolution = metadata.get("kind"), metadata.get("resolution", "")
    side = int(resolution) // (8 if kind == "latents" else 1) if resolution.isdecimal() else 0
    if kind not in data.TENSOR or not side or side % architecture.patch:
        raise ValueError(f"{path}: metadata has kind {kind}, resolution {resolution}: {hint}")
    params = {name: p.to(device, torch.float32, copy=True) for name, p in params.items()}
    return ImageModel(params, kind, (architecture.channels, side, side), None)


def noise(seed, indices, shape):
    """Return standard normal noise, (len(indices), *shape): sample i is the same in any batch."""
    generators = (data.generator(seed, "samples", i) for i in indices)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def generate(params, labels, shape, *, steps=1, seed=0, indices=None, batch=500):
    """Return a sample for each label, (n, *shape) float32, on the parameters' device.

    indices: which noise of `seed` the samples start from (default: 0 ... n - 1).
    """
    net, device = partial(dit, params), next(iter(params.values())).device
    indices = range(len(labels)) if indices is None else indices
    samples = []
    for k in range(0, len(labels), batch):
        e = noise(seed, indices[k : k + batch], shape).to(device)
        y = torch.as_tensor(labels[k : k + batch], device=device)
        samples.append(sample(net, e, y, steps))
    return torch.cat(samples)


def load_decoder(path, device):
    """Return the VAE's decoder, in bfloat16 on a GPU: less than 2 % off, and fast."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return data.load_vae(path, device, dtype)


def to_uint8(x, kind, vae=None):
    """Return samples as images, (n, channels, H, W) uint8.

    Without a VAE, the first three channels of latents are shown as colours.
    """
    if kind == "latents":
        x = x[:, :3] / 3 if vae is None else data.decode(vae, x / data.SCALE)
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


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
    with data.atomic_write(path) as temporary:
        Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy()).save(temporary)


# --- how good the samples are ---


def image_shape(kind, shape):
    """Return the shape of the images that samples of this kind and shape become."""
    channels, height, width = shape
    return (3, 8 * height, 8 * width) if kind == "latents" else shape


def evaluate(model, scorer, labels, world, *, steps=1, seed=0, folder=None):
    """Return the scores of one sample per label, of which each process draws its share.

    scorer: from fid.scorer. Writes the samples to `folder`, if given.
    """

    def batches():
        mine = range(world.rank, len(labels), world.size)
        for numbers in (mine[k : k + 100] for k in range(0, len(mine), 100)):
            y = labels[list(numbers)]
            x = generate(model.params, y, model.shape, steps=steps, seed=seed, indices=numbers)
            if not x.isfinite().all():
                raise ValueError("samples have values that are not finite: give an earlier save")
            images = to_uint8(x, model.kind, model.vae)
            for i, image in zip(numbers, images if folder else ()):
                save_grid(image[None], Path(folder, f"{i:06}.png"), gap=0, enlarged=0)
            yield images

    return scorer(batches())


def score(args, model, world):
    """Print the line of JSON of --fid."""
    file, classes = find_checkpoint(args.checkpoint), config(model.params).classes
    labels = torch.arange(args.count) % classes
    if args.uniform:
        g = data.generator(args.seed, "classes", 0)
        labels = torch.randint(classes, (args.count,), generator=g)
    shape = image_shape(model.kind, model.shape)
    scorer = fid.scorer(args.fid, args.inception, shape, world)
    data.barrier()  # before one process writes to --images, which the others check
    decoder = model.vae and str(model.vae["post_quant_conv.bias"].dtype).removeprefix("torch.")
    options = dict(steps=args.steps, seed=args.seed, folder=args.images)
    result = evaluate(model, scorer, labels, world, **options) | {
        "steps": args.steps,
        "seed": args.seed,
        "classes": "uniform" if args.uniform else "balanced",
        "precision": {"network": "float32", "decoder": decoder},
        "weights": f"{file} sha256 {data.sha256(file)}",
        "vae": model.vae and data.sha256(args.vae),
    }
    if world.rank == 0:
        print(json.dumps(result))


# --- the command line ---


def parse_classes(text, count):
    """Return the class numbers of --classes, or the first ten."""
    try:
        classes = list(range(min(10, count))) if text is None else [*map(int, text.split(","))]
    except ValueError:
        raise ValueError(f"--classes {text}: give numbers separated by commas, as 3,1,4") from None
    if bad := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"class {bad[0]} is out of range: give classes from 0 to {count - 1}")
    return classes


def parse_arguments(argv):
    arguments = data.parser(__doc__)
    add = arguments.add_argument
    add("checkpoint", help="a run's folder, or a safetensors file of weights")
    add("--classes", help="comma-separated class numbers (default: the first ten)")
    add("--steps", type=int, default=1, help="evaluations of the network (default: 1)")
    add("--seed", type=int, default=0)
    add("--vae", help="sd-vae-ft-mse's file, which decodes latents (see data.py)")
    add("--out", default="samples.png", help="the picture to write (default: samples.png)")
    add("--fid", metavar="REF", help="compare samples with this instead of writing a picture")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth (see fid.py)")
    add("--count", type=int, default=50_000, help="samples for --fid (default: 50000)")
    add("--uniform", action="store_true", help="draw the classes for --fid (default: in turn)")
    add("--images", help="a folder to write the samples for --fid to (default: none)")
    args = arguments.parse_args(argv)
    if args.images and os.path.exists(args.images) and os.listdir(args.images):
        raise ValueError(f"--images {args.images} already exists: give a new or an empty folder")
    if not 1 < args.count < 2**29:
        raise ValueError(f"--count {args.count}: give a number above 1 and below 2^29")
    return args


def main(argv, world):
    args = parse_arguments(argv)
    model = load(args.checkpoint, world.device)
    check_picture(args.out, image_shape(model.kind, model.shape)[0])
    classes = parse_classes(args.classes, config(model.params).classes)
    if model.kind == "latents":
        if args.vae is None:
            raise ValueError(f"{args.checkpoint} makes latents: give --vae, sd-vae-ft-mse's file")
        model = model._replace(vae=load_decoder(args.vae, world.device))
    if args.fid:
        score(args, model, world)
    elif world.rank == 0:
        x = generate(model.params, classes, model.shape, steps=args.steps, seed=args.seed)
        save_grid(to_uint8(x, model.kind, model.vae), args.out)
        print(args.out)


if __name__ == "__main__":
    data.launch(main)
