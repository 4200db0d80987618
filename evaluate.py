"""Scores of checkpoints, or of images: their Fréchet distance from a reference.

    python evaluate.py runs/XL-2 --vae FILE --ref REF.npz --inception FILE            a run's last
    python evaluate.py runs/XL-2 --every --vae FILE --ref REF.npz --inception FILE --out RESULTS
    python evaluate.py runs/digits --ref digits --count 1000                          raw pixels
    python evaluate.py IMAGES --ref REF.npz --inception FILE             images, whoever made them
    python evaluate.py IMAGES --save-stats REF.npz --inception FILE                make a reference
    python evaluate.py runs/a runs/b --plot curves.png                 a picture of the logs of runs

Prints a line of JSON for each checkpoint, or for IMAGES, with all that the scores depend on. --out
appends the lines to a file; the score of a checkpoint that is there is not computed again, so that
the same command continues one that was stopped. All checkpoints make images of one size; they are
drawn from as sample.py does. Under torchrun, the processes share the images.

IMAGES and REF are a folder of images, an .npz with uint8 images (N, H, W, 3) under arr_0, like
ADM's, pixels that data.py wrote, or digits. REF may hold a mean and a covariance instead, as mu and
sigma, or ref_mu and ref_sigma. --inception takes pt_inception-2015-12-05-6726825d.pth, or its
tensors as .safetensors. Without it the features are raw pixels, and the line says so.
"""

import itertools
import json
import math
import os
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import fid
import runtime
import weights
from data import SUFFIXES, files_below, load_data, prefetch, read_image
from sample import add_sampling, choose_labels, draw_images, generate

NPZ = (
    "give images or an .npz, such as ADM's https://openaipublic.blob.core.windows.net/diffusion/"
    "jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz"
)
MOST = 20_000  # features, whose covariance takes 3 GB

# --- images and references from files ---


def open_array(archive, name, sides, *dtypes):
    """Return the file of an array's values in an .npz, their shape and dtype. Raise ValueError
    unless its header claims these sides, None for any, and as many bytes as there are."""
    file, size = archive.open(f"{name}.npy"), archive.getinfo(f"{name}.npy").file_size
    version = np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    fits = len(shape) == len(sides) and all(n > 0 and w in (n, None) for n, w in zip(shape, sides))
    plain = version == (1, 0) and dtype.name in dtypes and not (fortran and len(shape) > 2)
    if not fits or not plain or file.tell() + math.prod(shape) * dtype.itemsize != size:
        wanted = f"{' or '.join(dtypes)} {sides} in C order".replace("None", "any")
        raise ValueError(f"{name} is {dtype} {shape} in {size:,} bytes, should be {wanted}")
    return file, shape, dtype


def load_statistics(path):
    """Return the mean (d,) and covariance (d, d), float64, of an .npz, or None if it has none.

    Raises ValueError unless they are finite, fit each other, and the covariance is one.
    """
    with runtime.reading(path, NPZ) as file, zipfile.ZipFile(file) as archive:
        prefix = "ref_" if "ref_mu.npy" in archive.namelist() else ""
        if f"{prefix}mu.npy" not in archive.namelist():
            return None
        floats = "float32", "float64"  # float16 would change the distance's second digit
        mean, (d,), kind = open_array(archive, f"{prefix}mu", (None,), *floats)
        covariance, shape, other = open_array(archive, f"{prefix}sigma", (d, d), *floats)
        if d > MOST:
            raise ValueError(f"{d:,} features are too many")
        mu = torch.from_numpy(np.frombuffer(mean.read(), kind).astype(float))
        sigma = torch.from_numpy(np.frombuffer(covariance.read(), other).astype(float)).view(shape)
        finite = all(a.abs().max() < 1e100 for a in (mu, sigma))  # false for NaN
        if not finite or (sigma - sigma.T).abs().max() > 1e-6 * sigma.abs().max():
            raise ValueError("mu and sigma are not a finite mean and covariance")
        sigma = (sigma + sigma.T) / 2
        fid.root(sigma)  # raises ValueError if it is no covariance
    return mu, sigma


def npz_images(path):
    """Yield the number of images in an .npz, and then each of them, (3, H, W) uint8.

    One at a time: as a whole, ADM's 50,000 would take 10 GB of memory in each process.
    """
    with runtime.reading(path, NPZ) as file, zipfile.ZipFile(file) as archive:
        values, (count, *shape), _ = open_array(archive, "arr_0", (None, None, None, 3), "uint8")
        size = math.prod(shape)
        if size > 3 * Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"images of {shape} are too large")
        yield count
        for _ in range(count):
            image = torch.frombuffer(bytearray(values.read(size)), dtype=torch.uint8)
            yield image.view(shape).permute(2, 0, 1)


def in_turn(labels):
    """Return the order, a list of indices, that takes the items of each label in turn."""
    counters = defaultdict(itertools.count)
    turns = [next(counters[label]) for label in labels]
    return sorted(range(len(turns)), key=turns.__getitem__)


def load_images(path, count=None, rank=0, world=1):
    """Return an iterator over the images rank::world, (C, H, W) uint8, of all or of `count`.

    path: as IMAGES in this file's docstring. Of an .npz the first are taken, else those of each
    class in turn. Raises ValueError if there are fewer than `count`, or than two.
    """
    labels = None
    if path == "digits" or any(Path(path).glob("shard-*.safetensors")):
        dataset = load_data(path, rank, world)
        if dataset.kind != "pixels":
            raise ValueError(f"{path} holds latents: give images or their statistics")
        items, labels = dataset.items, dataset.labels.tolist()
        if path == "digits":
            items = ((items + 1) * 127.5).round().byte()
        read = items.__getitem__
    elif os.path.isdir(path):
        found = files_below(path)
        files = [file for file in found if file.suffix.lower() in SUFFIXES]
        if others := len(found) - len(files):
            runtime.say(
                f"{path}: {others} files without an image's suffix left out", file=sys.stderr
            )
        labels = [file.relative_to(path).parts[0] for file in files]

        def read(k):
            return torch.from_numpy(np.array(read_image(files[k]))).permute(2, 0, 1)

    else:
        images = npz_images(path)
    total = next(images) if labels is None else len(labels)
    runtime.agree(total, f"images in {path}")
    if total < (count or 2):
        raise ValueError(f"{path} has {total} images, at least {count or 2} are needed")
    if labels is None:
        return itertools.islice(images, rank, count, world)
    mine = (in_turn(labels) if count else range(total))[rank:count:world]
    return prefetch(read, mine, depth=256, threads=os.cpu_count())


# --- features and their statistics ---


def pixels(images):
    """Return raw pixels as features, (B, C H W) in [-1, 1], of uint8 (B, C, H, W); no logits."""
    features = images.flatten(1) / 127.5 - 1
    if features.shape[1] > MOST:
        raise ValueError(f"{features.shape[1]:,} pixels are too many features: give --inception")
    return features, None


def load_features(path, device):
    """Return the features of --inception `path` and a description.

    The features are a function of uint8 images, (B, 1 or 3, H, W), or a list of images of several
    sizes, that returns (features, logits or None). On a GPU the network is compiled.
    """
    if path is None:
        return pixels, {"features": "raw pixels in [-1, 1]"}
    params, digest = fid.load_inception(path)
    params = {name: p.to(device) for name, p in params.items()}
    compiled = torch.compile(fid.network) if device.type == "cuda" else fid.network
    about = {
        "features": "Inception-v3 of 2015-12-05",
        "inception": digest,
        "resize": "TensorFlow 1's bilinear, 299 x 299",
        "precision of features": "float32",
    }

    def features(images):
        if torch.is_tensor(images):
            images = images.expand(-1, 3, -1, -1)
        return fid.inception(params, images, network=compiled)

    return features, about


def gather(state):
    """Return the statistics of all processes' items, some perhaps None, on the CPU."""
    mine = state and (state[0], state[1].cpu(), state[2].cpu())
    return reduce(fid.merge, [state for state in runtime.all_gather(mine) if state])


def gather_rows(rows):
    """Return the rows of all processes, (N, ...), in order; this one has those rank::world."""
    parts = runtime.all_gather(rows)
    whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def collect(batches, features, keep_logits=True):
    """Return the statistics of all processes' batches of uint8 images, and their logits, if any."""
    state, logits = None, [torch.empty(0, 1008)]
    for images in batches:
        values, more = features(images)
        state = fid.accumulate(state, values)
        if keep_logits and more is not None:
            logits.append(more.cpu())
    return gather(state), gather_rows(torch.cat(logits))


def measure(path, features, world, count=None, keep_logits=True, shape=None):
    """Return what `collect` does for the images of `path`, see `load_images`.

    Raw pixels are compared only between images of one shape: of `shape`, if given.
    """
    images = load_images(path, count, world.rank, world.size)
    seen = {shape} if shape else set()

    def check(shapes):
        if len(shapes) > 1 and features is pixels:
            found = " and ".join(map(str, sorted(shapes)[:2]))
            whose = f"{path} and what it is compared with" if shape else path
            raise ValueError(f"{whose}: images of {found} cannot be compared: give --inception")

    def batches():
        while part := [image.to(world.device) for image in itertools.islice(images, 64)]:
            here = {tuple(image.shape) for image in part}
            seen.update(here)
            check(seen)
            yield part if len(here) > 1 else torch.stack(part)
        check(set().union(*runtime.all_gather(seen)))

    return collect(batches(), features, keep_logits)


class Scorer(NamedTuple):
    features: Callable  # from `load_features`
    mean: torch.Tensor  # of the reference's features, (d,), and their covariance, (d, d)
    covariance: torch.Tensor
    shape: tuple  # of the images to compare with it
    about: dict  # what all this is, for a line of scores


def load_scorer(ref, inception, shape, world):
    """Return the Scorer of images of `shape` against `ref`, by the features of --inception.

    An .npz of ADM's has both: the statistics are of the whole data set, the images a few of it.
    Raises ValueError unless images of `shape` have as many features as the reference.
    """
    features, about = load_features(inception, world.device)
    digest = f", sha256 {runtime.sha256(ref)}" if os.path.isfile(ref) else ""
    runtime.agree(digest, f"files {ref}")
    what, known = digest, load_statistics(ref) if digest else None
    if known is None:
        state, _ = measure(ref, features, world, keep_logits=False, shape=shape)
        known, what = fid.statistics(state), f", {state[0]} images" + digest
        mean, variance = known[0].mean(), known[1].trace()
        order = known[0] @ torch.arange(len(known[0])).double().cos()  # tells mirror images
        what += f", mean {mean:.5g}, variance {variance:.5g}, order {order:.5g}"
    if digest and not digest.endswith(runtime.sha256(ref)):
        raise ValueError(f"{ref} changed while it was read: run the same command again")
    image = torch.zeros(1, *shape, dtype=torch.uint8, device=world.device)
    found, wanted = features(image)[0].shape[1], len(known[0])
    if found != wanted:
        hint = "give or leave out --inception, or give another reference"
        raise ValueError(f"{ref} has {wanted} features, images of {shape} have {found}: {hint}")
    return Scorer(features, *known, shape, about | {"reference": ref + what})


def scores(state, logits, scorer):
    """Return {"fid", "count"} and, with logits, {"is", "is_std", "is_splits"}."""
    distance = fid.frechet_distance(*fid.statistics(state), scorer.mean, scorer.covariance)
    result = {"fid": distance.item(), "count": state[0]}
    if len(logits):
        result["is_splits"] = min(10, len(logits))
        result["is"], result["is_std"] = fid.inception_score(logits, result["is_splits"])
    return result


# --- checkpoints ---


class Samples(NamedTuple):
    """Which samples of a checkpoint are scored."""

    count: int = 50_000
    classes: list | None = None  # names or numbers, as words; None: all
    uniform: bool = False  # classes are drawn; else they take turns
    steps: int = 1
    seed: int = 0
    vae: str | None = None  # the file that decodes them
    scale: float | None = None  # of latents, if not the checkpoint's own
    convention: str | None = None  # of a network that predicts a velocity
    network: str | None = None  # see weights.find_function


def describe(sampler, scorer, samples, device):
    """Return all that the scores of samples depend on."""
    how, some = "uniform" if samples.uniform else "balanced", samples.classes or []
    labels = choose_labels(len(some), some, sampler.classes).tolist()
    how += f", of {','.join(map(str, labels))}" if some else ""
    precision = "float32, convolutions in TF32" if device.type == "cuda" else "float32"
    return {
        "count": samples.count,
        **scorer.about,
        "steps": samples.steps,
        "seed": samples.seed,
        "guidance": list(sampler.guidance) or None,
        "precision": {"network": precision, "decoder": sampler.vae and precision},
        "uint8": "rounded down" if sampler.floor else "rounded",
        "classes": how,
        "weights": sampler.weights,
        "vae": samples.vae and weights.first_sha256(samples.vae),
        "scale": samples.scale,
        "convention": samples.convention,
        "network": samples.network,
    }


def score(sampler, known, *, scorer, samples, world):
    """Return the line of scores of a Sampler. Each process draws its share of samples.

    known: lines that there are. If one has the same facts, return it and draw nothing.
    """
    about = describe(sampler, scorer, samples, world.device)
    runtime.agree(about, "weights or references")

    def facts(line):  # wherever the file lay
        line = {"uint8": "rounded"} | line  # as all were in earlier versions
        digest = str(line.get("weights")).rpartition(" ")[2]
        return {k: line.get(k) for k in about} | {"weights": digest}

    for line in known:
        if sampler.weights and facts(line) == facts(about):
            return line
    chosen = dict(uniform=samples.uniform, seed=samples.seed)
    labels = choose_labels(samples.count, samples.classes, sampler.classes, **chosen)
    drawn = draw_images(sampler, labels, world, steps=samples.steps, seed=samples.seed)
    batches = (images for _, images in drawn)
    return scores(*collect(batches, scorer.features), scorer) | about


def score_checkpoints(paths, omega, interval, ref, inception, samples, known, world):
    """Yield the line of scores of each checkpoint. omega, interval: as of choose_guidance."""
    scorer, gone = None, []
    options = {k: getattr(samples, k) for k in ("steps", "vae", "scale", "convention", "network")}
    for path in paths:
        if not all(runtime.all_gather(path.is_file())):
            gone.append(str(path))
            continue
        sampler = weights.open_sampler(path, world.device, **options)
        sampler = weights.choose_guidance(path, sampler, omega, interval)
        shape = weights.image_shape(sampler.kind, sampler.shape)
        scorer = scorer or load_scorer(ref, inception, shape, world)
        if shape != scorer.shape:
            hint = "score it in another command"
            raise ValueError(f"{path} makes images of {shape}, not {scorer.shape}: {hint}")
        yield score(sampler, known, scorer=scorer, samples=samples, world=world)
    if gone:
        raise FileNotFoundError(f"{', '.join(gone)} is gone: only the others have scores")


def list_checkpoints(paths, every):
    """Return the files of weights named: of a run's folder the last save, or every one."""
    found = []
    if not any(map(os.path.isdir, paths)):
        runtime.refuse("without a run's folder", every=every)
    for path in paths:
        saves = weights.checkpoints(path, "ema").values() if every else []
        found += saves or [weights.find_checkpoint(path)]
    if missing := [path for path in found if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]} is not a file: {weights.WEIGHTS}")
    return found


def report(sampler, dataset):
    """Print how good samples of the digits are, in one, two and four steps, and real images."""
    reals, labels = dataset.items.flatten(1), dataset.labels

    def line(name, x, classes, a, b, **options):
        index, gaps = fid.nearest(x, reals, **options)
        right = (labels[index] == classes).double().mean()
        a, b = (fid.statistics(fid.accumulate(None, x)) for x in (a, b))
        distance = fid.frechet_distance(*a, *b)
        print(f"{name:13}{right:28.1%}{distance:19.2f}{gaps.median():38.2f}")

    print(f"1,000 samples, {len(reals):,} real images; Fréchet distance of raw pixels in [-1, 1]")
    print("             nearest real is of the class   Fréchet distance   ", end="")
    print("median distance to the nearest real")
    classes = torch.arange(1000) % len(dataset.classes)
    for steps in (1, 2, 4):
        x = generate(sampler, classes, steps=steps).clamp(-1, 1).flatten(1).cpu()
        line(f"{steps} step(s)", x, classes, x, reals)
    line("real images", reals, labels, reals[::2], reals[1::2], exclude_self=True)


def plot(folders, path):
    """Draw the raw errors and the gradient norm of runs' logs by step, in one picture.

    Of a single run, the raw errors are also shown by quarter of t.
    """
    logs, kinds = {}, Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} is no picture: name it .png, or one of {', '.join(kinds)}")
    for folder in folders:
        if not Path(folder, "log.jsonl").is_file():
            raise FileNotFoundError(f"{folder} holds no log.jsonl: give the folder of a run")
        lines = runtime.read_lines(Path(folder, "log.jsonl"))[1:]
        label = runtime.printable(str(folder)).replace("$", r"\$")  # which begins a formula
        logs[label] = [line for line in lines if {"step", "grad_norm"} <= line.keys()]
    names = dict.fromkeys(k for lines in logs.values() for line in lines for k in line)
    names = [k for k in names if k.startswith("raw_") and k[-5:] != "_by_t" and k.isidentifier()]
    names = names[:8] + ["grad_norm"]  # a damaged log may hold any
    figure = Figure((4.2 * len(names), 3.4), layout="constrained")
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
        for label, lines in logs.items():
            draw_line(axes, lines, name, label if len(logs) > 1 else "mean")
            for k in range(4 * (len(logs) == 1 and name != "grad_norm")):
                times = f"t in [{k / 4:g}, {(k + 1) / 4:g}]"
                draw_line(axes, lines, f"{name}_by_t", times, k, alpha=0.5)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.legend(fontsize="small")
    with runtime.atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_line(axes, lines, name, label, k=None, **style):
    """Draw the values of this name, or their k-th parts, by step; what is no number is a gap."""

    def number(value):
        known = isinstance(value, int | float) and 1e-99 < abs(value) < 1e99
        return float(value) if known else math.nan

    values = [line.get(name) for line in lines]
    if k is not None:
        values = [(v[k:] or [None])[0] if isinstance(v, list) else None for v in values]
    points = [number(line["step"]) for line in lines], [*map(number, values)]
    marker = "." if len(lines) < 100 else None  # of many they take seconds
    axes.plot(*points, label=label, marker=marker, markersize=3, linewidth=1, **style)


# --- the command line ---


def parse_arguments(argv):
    arguments = runtime.parser(__doc__)
    add = arguments.add_argument
    add("what", nargs="+", help="checkpoints (runs' folders or files of weights), or IMAGES")
    add("--ref", help="compare with this: images, or an .npz of statistics")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth (default: raw pixels)")
    count = "samples (default: 50000), or images, of classes in turn (default: all)"
    add("--count", type=runtime.number(int, 2), help=count)
    add("--out", type=Path, help="a file to append the lines to")
    add("--save-stats", type=Path, help="the new .npz for mean and covariance of IMAGES")
    add("--plot", type=Path, help="the picture to draw the logs of runs in, instead of scores")
    add("--every", action="store_true", help="score every save of a run (default: the last)")
    add_sampling(add)
    add("--omega", type=runtime.number(float, 0), help="an iMF's guidance")
    args = arguments.parse_args(argv)
    flags, first = vars(args), args.what[0]
    if args.plot:
        runtime.refuse("with --plot", **{k: flags[k] for k in flags if k not in ("what", "plot")})
        return args
    if is_images(first):
        apply = ("what", "ref", "inception", "count", "out", "save_stats")
        runtime.refuse(f"as {first} holds images", **{k: flags[k] for k in flags if k not in apply})
        if len(args.what) > 1:
            raise ValueError(f"{first} holds images: score {args.what[1]} in another command")
    else:
        runtime.refuse(f"as {first} is a checkpoint", save_stats=args.save_stats)
    if not args.ref and not args.save_stats:
        raise ValueError("nothing to do: give --ref or, for images, --save-stats, or both")
    if not args.ref:
        runtime.refuse("without --ref", out=args.out)
    for name, path, kind in (
        ("save-stats", args.save_stats, "new file"),
        ("out", args.out, "file"),
    ):
        free = path and (not os.path.lexists(path) or kind == "file" and path.is_file())
        if path and not (free and path.parent.is_dir()):
            raise ValueError(f"--{name} {path}: give a {kind} in a folder that exists")
    return args


def is_images(path):
    """Return whether `path` is IMAGES, and not a checkpoint."""
    if os.path.isdir(path):
        return not (weights.checkpoints(path, "ema") or Path(path, "log.jsonl").exists())
    return path == "digits" or Path(path).suffix.lower() == ".npz"


def read_scores(path):
    """Return the lines of --out. Raise ValueError for somebody's file, to leave it as it is."""
    lines = runtime.read_lines(path)
    if not lines and path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
        raise ValueError(f"--out {path} holds no lines of scores: choose another file")
    return lines


def score_images(path, ref, inception, count, save_stats, world):
    """Write the statistics of images; return their line of scores against `ref`, or no line."""
    if ref:
        shape = tuple(next(load_images(path, 2)).shape)
        scorer = load_scorer(ref, inception, shape, world)
        features = scorer.features
    else:
        features, _ = load_features(inception, world.device)
    state, logits = measure(path, features, world, count, keep_logits=bool(ref))
    if save_stats and world.rank == 0:
        mean, covariance = fid.statistics(state)
        with runtime.atomic_write(save_stats, new=True) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=mean.numpy(), sigma=covariance.numpy())
    return [scores(state, logits, scorer) | scorer.about | {"images": path}] if ref else []


def main(argv, world):
    args = parse_arguments(argv)
    if args.plot:
        return plot(args.what, args.plot) if world.rank == 0 else None
    known = read_scores(args.out) if args.out and world.rank == 0 else []
    known = runtime.all_gather(known)[0]
    ref, inception = args.ref, args.inception
    if is_images(args.what[0]):
        lines = score_images(args.what[0], ref, inception, args.count, args.save_stats, world)
    else:
        given = {k: v for k, v in vars(args).items() if k in Samples._fields and v is not None}
        samples, chosen = Samples(**given), (args.omega, args.interval)
        paths = runtime.all_gather(list_checkpoints(args.what, args.every))[0]
        lines = score_checkpoints(paths, *chosen, ref, inception, samples, known, world)
    for line in lines:
        runtime.say(json.dumps(line))
        if args.out and world.rank == 0 and line not in known:
            runtime.append_line(args.out, line)
        known.append(line)


if __name__ == "__main__":
    runtime.launch(main)
