"""Images from a checkpoint, each from noise that depends on (seed, index) alone, and their FID.

    python sample.py runs/digits --classes 3,1,4 --steps 1 --seed 0 --out 314.png
    python sample.py iMF-XL-2.pth --vae FILE --classes 207,360 --omega 1,4,8 --interval 0.42,0.62
    python sample.py meanflow-B4.pth --classes 207,360 --vae diffusion_pytorch_model.safetensors
    torchrun --nproc-per-node 8 sample.py runs/XL-2 --vae FILE --fid REF.npz --inception FILE
    python sample.py runs/digits --images samples.npz --count 1000

With --fid, draw --count samples and print their distance from REF and what it was computed with, as
one line of JSON. REF is what fid.py takes as --ref, a folder of pixels that data.py wrote, or
digits. Without --inception the features are raw pixels, and the line says so. --images keeps the
samples, with or without --fid.

A checkpoint is a run's folder, or a file of weights: of an iMF, or with DiT's names, also of others
(`convert` says which).
"""

import argparse
import json
import math
import os
import re
import sys
import zipfile
from contextlib import contextmanager, nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import fid
import imf
from meanflow import sample
from model import config, dit, positions, shapes, sinusoids

GAP, GREY = 4, 128  # pixels between the images of a grid, and their value
WEIGHTS = "give a run's folder, or .safetensors, .pt or .pth weights of a DiT or iMF"
CONVENTIONS = {
    "repa": "predicts e - x, t = 1 is noise (as REPA's SiT)",
    "sit": "predicts x - e, t = 1 is data (as SiT)",
}
LABELS = "y_embedder.embedding_table.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")


class ImageModel(NamedTuple):
    params: dict  # of the network
    kind: str  # what it makes: "pixels" or "latents"
    shape: tuple  # of a sample: (channels, height, width)
    vae: dict | None = None  # decodes latents
    scale: float | torch.Tensor = data.SCALE  # samples are (latents - shift) * scale
    shift: float | torch.Tensor = 0.0
    guidance: tuple | None = None  # of an iMF: omega, low, high


# --- weights, ours and others' ---


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


def read_weights(path):
    """Return the tensors, {name: tensor}, and metadata, {key: str}, of a file of weights.

    A safetensors file, or a pickle, in which code is refused and averaged weights are preferred.
    The prefixes of DDP and torch.compile are removed. Raises ValueError or FileNotFoundError.
    """
    if Path(path).suffix == ".safetensors" or not Path(path).is_file():
        tensors, metadata = data.read_tensors(path, WEIGHTS)
    else:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # in DiT's and SiT's files
                options = dict(map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                tensors = torch.load(path, **options)
            for key in ("ema", "model", "state_dict"):
                tensors = tensors[key] if isinstance(tensors.get(key), dict) else tensors
            tensors = {name: p for name, p in tensors.items() if torch.is_tensor(p)}
        except Exception as error:  # of many types, some with pages of text
            why = f"cannot be read as tensors without code ({type(error).__name__})"
            raise ValueError(f"{path} {why}: {WEIGHTS}") from None
        metadata = {}
    return {re.sub(r"\b(module|_orig_mod)\.", "", name): p for name, p in tensors.items()}, metadata


def rename(tensors):
    """Return the parameters among `tensors`, which have others' names, under ours.

    `r_embedder` is another name of `h_embedder`, early files of REPA count `decoder_blocks` anew.
    Fixed positions, and REPA's projectors, which serve its training, are left out.
    """
    encoder_depth = sum(bool(re.match(r"blocks\.\d+\.attn\.qkv\.weight", k)) for k in tensors)

    def block(match):
        return f"blocks.{int(match[1]) + encoder_depth}."

    params = {}
    for name, p in tensors.items():
        name = re.sub("^r_embedder", "h_embedder", name)
        name = re.sub(r"^decoder_blocks\.(\d+)\.", block, name)
        if not re.match(r"pos_embed$|projectors\.", name):
            params[name] = p
    return params


def check_positions(path, found, width):
    """Raise ValueError unless these are DiT's fixed positions, (1, N, width)."""
    rows = math.isqrt(found.numel() // width)
    fixed = positions(width, rows, rows, found.double())[None]
    if found.shape != fixed.shape or not torch.allclose(found.double(), fixed, atol=1e-3):
        raise ValueError(f"{path}: pos_embed is not DiT's fixed positions: {WEIGHTS}")


def convert(path, tensors, convention=None):
    """Return the parameters of our DiT from tensors with the names of DiT or its descendants.

    Of eight output channels the first four are kept. Without an embedding of t - r the network
    predicts a velocity, in one of CONVENTIONS, and what is returned has no `h_embedder`. Those of
    an iMF are returned as its parameters. Raises ValueError for anything else.
    """
    params = rename(tensors)
    try:
        if is_imf(tensors):
            return imf.convert(tensors)
        width, _, patch, channels, _ = architecture = config(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {WEIGHTS}") from None
    for name in OUTPUT:
        if name in params and params[name].shape[:1] == (2 * patch * patch * channels,):
            params[name] = torch.cat(params[name].split(channels)[::2])  # p q 2 (c ...)
    wanted = shapes(architecture)
    if is_velocity := not any(name.startswith("h_embedder") for name in params):
        wanted = {k: shape for k, shape in wanted.items() if not k.startswith("h_embedder")}
    data.check_tensors(path, params, wanted, WEIGHTS)
    if "pos_embed" in tensors:
        check_positions(path, tensors["pos_embed"], width)

    is_repa = any(name.startswith("projectors.") for name in tensors)
    if convention and not is_velocity or convention == "sit" and is_repa:
        kind = "REPA's" if is_repa else "a MeanFlow"
        raise ValueError(f"{path} is {kind}, whose convention is known: leave out --convention")
    if is_velocity and not convention and not is_repa:
        words = "; ".join(f"--convention {name} if it {what}" for name, what in CONVENTIONS.items())
        raise ValueError(
            f"{path} has no embedding of t - r, so it is no MeanFlow: give {words}. "
            "DiT's own weights predict noise on another path and cannot be used"
        )
    if convention == "sit":
        reverse_time(params)
    return {name: p.float() for name, p in params.items()}


def reverse_time(params):
    """Change the parameters of v(z, t) in place to those of -v(z, 1 - t).

    The cosine and sine of w (1 - t) are combinations of those of w t, which the first linear layer
    after them takes in.
    """
    for name in OUTPUT:
        params[name] = -params[name]
    cos, sin = sinusoids(torch.ones(1, dtype=torch.float64)).flatten().chunk(2)
    a, b = params["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    params["t_embedder.mlp.0.weight"] = torch.cat((a * cos + b * sin, a * sin - b * cos), 1)


def image_size(path, architecture, tensors, metadata):
    """Return what a checkpoint makes, "pixels" or "latents", and their side.

    Of a file without metadata, this follows from its positions; four channels are latents, and of
    ImageNet's 1,000 classes they are 32 wide, as of 256x256 images.
    """
    patch, channels, classes = architecture.patch, architecture.channels, architecture.classes
    if not {"kind", "resolution"} & metadata.keys():
        kind = "latents" if channels == 4 else "pixels"
        if "pos_embed" in tensors:
            return kind, patch * math.isqrt(tensors["pos_embed"].shape[1])
        if (channels, classes) == (4, 1000):
            return kind, 32
    kind, resolution = metadata.get("kind"), metadata.get("resolution", "")
    side = int(resolution) // (8 if kind == "latents" else 1) if resolution.isdecimal() else 0
    if kind not in data.TENSOR or not side or side % patch:
        found = f"kind {kind}, resolution {resolution or None}, and there is no pos_embed"
        hint = "save it as .safetensors with metadata kind (pixels or latents) and resolution"
        raise ValueError(f"{path}: metadata has {found}: {hint}")
    return kind, side


def load(path, device="cpu", convention=None, steps=1):
    """Return the ImageModel of a checkpoint, in float32 and without a VAE.

    path: as for `find_checkpoint`. A velocity is made to ignore t - r, so that sampling is Euler's
    method; an iMF comes without its v head, with its guidance for so many steps. Raises
    FileNotFoundError or ValueError, with one line.
    """
    path = find_checkpoint(path)
    tensors, metadata = read_weights(path)
    params = convert(path, tensors, convention)
    architecture = (imf.config if is_imf(params) else config)(params)
    kind, side = image_size(path, architecture, tensors, metadata)
    shape = (architecture.channels, side, side)
    if is_imf(params):
        params = {name: p.to(device) for name, p in params.items() if not name.startswith("v_")}
        return imf_model(path, params, kind, shape, metadata, steps)
    params = {name: torch.zeros(shape) for name, shape in shapes(architecture).items()} | params
    params = {name: p.to(device) for name, p in params.items()}
    return ImageModel(params, kind, shape)


def is_imf(tensors):
    return any("shared_blocks." in name for name in tensors)


def imf_model(path, params, kind, shape, metadata, steps=1):
    """Return the ImageModel of an iMF's parameters, as its metadata says or else the published."""
    guidance, mean, std = imf.read_metadata(path, metadata, params, steps)
    found = ImageModel(params, kind, shape, guidance=guidance)
    return found if kind == "pixels" else found._replace(scale=1 / std, shift=mean)


def count_classes(params):
    return len(params[LABELS]) - 1


# --- samples ---


def noise(seed, indices, shape):
    """Return standard normal noise, (len(indices), *shape): sample i is the same in any batch."""
    generators = (data.generator(seed, "samples", i) for i in indices)
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def generate(params, labels, shape, *, steps=1, seed=0, indices=None, batch=500, guidance=None):
    """Return a sample for each label, (n, *shape) float32, on the parameters' device.

    indices: which noise of `seed` the samples start from (default: 0 ... n - 1). guidance: (omega,
    low, high) if the parameters are an iMF's.
    """
    net, device = partial(dit, params), next(iter(params.values())).device
    if guidance:
        net = imf.guided(params, *guidance)
    indices = range(len(labels)) if indices is None else indices
    samples = []
    for k in range(0, len(labels), batch):
        e = noise(seed, indices[k : k + batch], shape).to(device)
        y = torch.as_tensor(labels[k : k + batch], device=device)
        samples.append(sample(net, e, y, steps))
    return torch.cat(samples)


def to_uint8(x, model):
    """Return samples of an ImageModel as images, (n, channels, H, W) uint8.

    Without a VAE, the first three channels of latents are shown as colours.
    """
    if model.kind == "latents":
        latents = x / model.scale + model.shift
        x = x[:, :3] / 3 if model.vae is None else data.decode(model.vae, latents)
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


@contextmanager
def image_writer(path, count, shape, world):
    """Yield a function that writes image i, (C, H, W) uint8, to a folder, or to an .npz like ADM's.

    Every process writes its share of the `count` images of `shape`.
    """
    if path.suffix != ".npz":
        yield lambda i, image: save_grid(image[None], path / f"{i:06}.png", gap=0, enlarged=0)
        return
    shape, header = (count, *shape[1:], 3), BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    start, size = len(header.getvalue()), math.prod(shape[1:])
    part = path.with_name(f"{data.TEMPORARY}{path.stem}.npy")  # memory may not hold all
    try:
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(header.getvalue())
        data.barrier()
        with open(part, "rb+") as file:

            def write(i, image):
                file.seek(start + i * size)
                file.write(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy().tobytes())

            yield write
        data.barrier()
        if world.rank == 0:
            with data.atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
                file.write(part, "arr_0.npy")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}): make room, or give another") from None
    finally:
        if world.rank == 0:
            part.unlink(missing_ok=True)


def evaluate(model, scorer, labels, world, *, steps=1, seed=0, write=None):
    """Return the scores of one sample per label, of which each process draws its share.

    scorer: from fid.scorer. write: from image_writer, to keep the samples.
    """

    def batches():
        options = dict(steps=steps, seed=seed, guidance=model.guidance)
        mine = range(world.rank, len(labels), world.size)
        chunks = [mine[k : k + 100] for k in range(0, len(mine), 100)]
        for numbers in tqdm(chunks, unit=" hundreds", leave=False, disable=world.rank > 0):
            y = labels[list(numbers)]
            x = generate(model.params, y, model.shape, indices=numbers, **options)
            if not x.isfinite().all():
                raise ValueError("samples have values that are not finite: give an earlier save")
            images = to_uint8(x, model)
            for i, image in zip(numbers, images if write else ()):
                write(i, image)
            yield images

    decoder = "float32, convolutions in TF32" if world.device.type == "cuda" else "float32"
    precision = {"network": "float32", "decoder": model.vae and decoder}
    about = {"steps": steps, "seed": seed, "guidance": model.guidance, "precision": precision}
    return scorer(batches()) | about


def count_images(batches):
    """Stand in for a scorer where only the images are wanted."""
    return {"count": sum(map(len, batches))}


def describe(weights, vae, classes="balanced"):
    """Return the part of a line of scores that says what was judged."""
    weights = f"{weights} sha256 {data.sha256(weights)}"
    return {"classes": classes, "weights": weights, "vae": vae and data.sha256(vae)}


def score(args, model, classes, world):
    """Draw --count samples of these classes; print their scores, if --fid asks for them."""
    places = torch.arange(args.count) % len(classes)
    if args.uniform:
        g = data.generator(args.seed, "classes", 0)
        places = torch.randint(len(classes), (args.count,), generator=g)
    labels, shape = torch.tensor(classes)[places], image_shape(model.kind, model.shape)
    scorer = fid.scorer(args.fid, args.inception, shape, world) if args.fid else count_images
    data.barrier()  # before one process writes to --images, which the others check
    keep = image_writer(args.images, args.count, shape, world) if args.images else nullcontext()
    with keep as write:
        options = dict(steps=args.steps, seed=args.seed, write=write)
        result = evaluate(model, scorer, labels, world, **options)
    if world.rank == 0 and args.fid:
        how = "uniform" if args.uniform else "balanced"
        how += f", of {args.classes}" if args.classes else ""
        print(json.dumps(result | describe(find_checkpoint(args.checkpoint), args.vae, how)))
    elif world.rank == 0:
        print(args.images)


# --- the command line ---


def parse_classes(text, count):
    """Return the class numbers of --classes, or all."""
    try:
        classes = list(range(count)) if text is None else [*map(int, text.split(","))]
    except ValueError:
        raise ValueError(f"--classes {text}: give numbers separated by commas, as 3,1,4") from None
    if bad := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"class {bad[0]} is out of range: give classes from 0 to {count - 1}")
    return classes


def parse_arguments(argv):
    arguments = data.parser(__doc__)
    add = arguments.add_argument
    add("checkpoint", help="a run's folder, or a file of weights, .safetensors, .pt or .pth")
    add("--classes", help="their numbers, separated by commas (default: all, in turn)")
    add("--steps", type=int, default=1, help="evaluations of the network (default: 1)")
    add("--seed", type=int, default=0)
    add("--vae", help="sd-vae-ft-mse's file, which decodes latents (see data.py)")
    add("--scale", type=float, help=f"of latents, if not {data.SCALE}")
    what = "; ".join(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())
    add("--convention", choices=CONVENTIONS, help=f"of a network that predicts a velocity: {what}")
    add("--omega", help="an iMF's guidance; of several, as 1,4,8, each has its row of the picture")
    add("--interval", metavar="LOW,HIGH", help="times between which it acts")
    add("--out", help="the picture to write (default: samples.png)")
    add("--fid", metavar="REF", help="compare samples with this instead of writing a picture")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth (see fid.py)")
    add("--images", type=Path, help="a folder, or a new .npz as ADM's, to write samples to")
    add("--count", type=int, help="samples for --fid and --images (default: 50000)")
    add("--uniform", action="store_true", help="draw their classes at random (default: in turn)")
    args = arguments.parse_args(argv)
    if not args.fid:
        data.refuse(args, ["inception"], "without --fid")
    if args.fid or args.images:
        data.refuse(args, ["out"], "with --fid or --images")
    else:
        data.refuse(args, ["count", "uniform"], "without --fid or --images")
    if args.images and args.images.exists():
        if args.images.is_file() or any(args.images.iterdir()):
            raise ValueError(f"--images {args.images} already exists: give another name")
    data.check_numbers(args, steps=1, scale=0, count=2)
    args.out, args.count = args.out or "samples.png", args.count or 50_000
    return args


def choose_guidance(args, model):
    """Return the guidance of each row of the picture: of an iMF (omega, low, high) by the flags,
    or else the model's."""
    if model.guidance is None:
        data.refuse(args, ["omega", "interval"], f"as {args.checkpoint} is no iMF")
        return [None]
    data.refuse(args, ["convention", "scale"], f"as {args.checkpoint} is an iMF")
    omega, low, high = model.guidance
    try:
        omegas = [*map(float, args.omega.split(","))] if args.omega else [omega]
        low, high = map(float, args.interval.split(",")) if args.interval else (low, high)
    except ValueError:
        hint = "give numbers, as 1,4,8 and two times, as 0.4,0.65"
        raise ValueError(f"--omega {args.omega} --interval {args.interval}: {hint}") from None
    if len(omegas) > 1 and (args.fid or args.images):
        raise ValueError(f"--omega {args.omega}: give one with --fid or --images")
    return [imf.check_guidance(omega, low, high) for omega in omegas]


def main(argv, world):
    args = parse_arguments(argv)
    model = load(args.checkpoint, world.device, args.convention, args.steps)
    check_picture(args.out, image_shape(model.kind, model.shape)[0])
    classes = parse_classes(args.classes, count_classes(model.params))
    guidances = choose_guidance(args, model)
    if model.kind == "pixels":
        data.refuse(args, ["vae", "scale"], f"as {args.checkpoint} makes pixels")
    elif args.vae is None:
        raise ValueError(f"{args.checkpoint} makes latents: give --vae, sd-vae-ft-mse's file")
    else:
        vae = data.load_vae(args.vae, world.device)
        model = model._replace(vae=vae, scale=args.scale or model.scale)
    if not model.params["h_embedder.mlp.2.weight"].any() and args.steps < 10 and world.rank == 0:
        tqdm.write(f"{args.checkpoint} predicts a velocity: give --steps 50 or more", sys.stderr)
    if args.fid or args.images:
        score(args, model._replace(guidance=guidances[0]), classes, world)
    elif world.rank == 0:
        if not args.classes:
            classes = [k % len(classes) for k in range(10)]
        draw = partial(generate, model.params, classes, model.shape, steps=args.steps)
        x = torch.cat([draw(seed=args.seed, guidance=guidance) for guidance in guidances])
        columns = len(classes) if len(guidances) > 1 else 10
        save_grid(to_uint8(x, model), args.out, columns=columns)
        print(args.out)


if __name__ == "__main__":
    data.launch(main)
