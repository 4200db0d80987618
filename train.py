"""Train MeanFlow: by default on the embedded digits, in about two minutes on a laptop.

    python train.py
    python train.py --size iT                                the digits, by improved MeanFlow
    torchrun --nproc-per-node 2 train.py                     the digits, shared by two processes
    torchrun --nproc-per-node 8 train.py --size XL --data data/imagenet       on eight GPUs

The same command continues a stopped run from its last save, with any number of processes. SIGTERM
or Ctrl-C makes it save, without grid and scores, and end. The run's folder holds

    ema-STEP.safetensors      averaged weights, for sample.py: the last two and every 50,000th step
    state-STEP.safetensors    weights and Adam's moments, to continue from: the last two saves
    grid-STEP.png             one-step samples of the averaged weights, always from the same noise
    log.jsonl                 the run's arguments, then what to watch every 50 steps and at saves;
                              with --fid, scores of the end and of every 50,000th step
    curve.png                 the log's raw errors and gradient norm by step
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import dual
import fid
import imf
import sample
from meanflow import count_equal, draw, fast_loss
from model import SIZES, block, dit, init

SHARE = 0.75  # of the rows have r = t
LOG_EVERY = 50  # steps
ASK_EVERY = 10  # steps between questions to the other processes, for which the host waits
KEEP = 2  # saves, in case the last is damaged
LASTING = 50_000  # steps between averaged weights that are kept for good
SAVE_EVERY, SAVE_SHARE = 500, 0.02  # steps, and of the time, unless --save is given


class Recipe(NamedTuple):
    omega: float  # guidance: effective scale omega / (1 - kappa)
    kappa: float
    interval: tuple  # times at which it acts
    lr: float
    batch: int
    epochs: int
    images: int  # of the data set that the epochs are for
    ema: float
    warmup: int = 0  # epochs in which lr grows from 0


RECIPES = {  # Table 4 and the authors' code, for each of model.SIZES
    "T/2": Recipe(1.0, 0.3, (0.0, 1.0), 3e-3, 64, 107, 1797, 0.998),  # not the paper's: for digits
    "B/4": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, 240, 1281167, 0.9999),  # paper: 80 epochs
    "B/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, 240, 1281167, 0.9999),
    "M/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, 240, 1281167, 0.9999),  # guidance assumed
    "L/2": Recipe(0.2, 0.92, (0.0, 0.8), 1e-4, 256, 240, 1281167, 0.9999),
    "XL/2": Recipe(0.2, 0.92, (0.0, 0.75), 1e-4, 256, 240, 1281167, 0.9999),
    # improved MeanFlow, whose guidance is drawn; the authors' code, for each of imf.SIZES
    "iT/2": Recipe(None, None, None, 6e-3, 32, 28, 1797, 0.998),
    "iB/2": Recipe(None, None, None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iM/2": Recipe(None, None, None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iL/2": Recipe(None, None, None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iXL/2": Recipe(None, None, None, 1e-4, 1024, 800, 1281167, 0.9999, 10),
}


def count_steps(recipe, images):
    """Return the steps of a run on a data set of so many images, a multiple of LOG_EVERY.

    A smaller one than the recipe's takes more epochs, but fewer steps: both by the square root.
    """
    epochs = recipe.epochs * max(1, math.sqrt(recipe.images / images))
    return LOG_EVERY * max(1, round(epochs * images / recipe.batch / LOG_EVERY))


# --- what is trained ---


class State(NamedTuple):
    params: dict
    ema: dict  # their average over steps
    adam: torch.optim.Adam


class Objective(torch.nn.Module):
    """A module whose forward is the loss, for DistributedDataParallel to wrap.

    Wrapping the network would not do: jvp fails on the wrapper, and on the network inside it trains
    without ever averaging gradients.
    """

    def __init__(self, params, recipe, compiled, precision="float32"):
        super().__init__()
        self.weights = torch.nn.ParameterList(params.values())  # where DDP finds them
        # One compiled block serves for all: as fast, on a CPU, as one graph of everything, which
        # takes five times as long to compile at depth 12, and longer the deeper it is.
        compile = partial(dual.compile, dynamic=False) if compiled else lambda f: f
        null = sample.count_classes(params)
        if sample.is_imf(params):
            one = dict(block=compile(imf.block))
            net, velocity = (
                partial(imf.imf, params, **one),
                partial(imf.imf_velocity, params, **one),
            )
            self.loss = partial(imf.fast_loss, net, velocity=velocity, null=null, jvp=dual.jvp)
        else:
            net = partial(dit, params, block=compile(block))
            guidance = dict(omega=recipe.omega, kappa=recipe.kappa, interval=recipe.interval)
            self.loss = partial(fast_loss, net, null=null, jvp=dual.jvp, **guidance)
        self.mixed = precision == "bfloat16"

    def forward(self, x, y, draws, equal):
        """Return the mean loss, and each row's t, r, loss and raw squared errors, (B, 4 or 5)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed):
            loss, raw = self.loss(x, y, draws, equal=equal)
        rows = torch.stack((draws.t, draws.r, loss.detach()), 1)
        return loss.mean(), torch.cat((rows, raw.reshape(len(raw), -1)), 1)


def parallel(objective, world):
    """Wrap the objective so that processes average their gradients, if there are several."""
    if world.size == 1:
        return objective
    # Otherwise the compiler cuts graphs where DDP's buckets end, and loses no_grad at the cuts.
    torch._dynamo.config.optimize_ddp = False
    group = None
    if world.device.type == "cuda":  # others wait while the first saves
        group = dist.new_group(backend="nccl", timeout=timedelta(minutes=30))
    return DistributedDataParallel(objective, process_group=group, gradient_as_bucket_view=True)


def stream(dataset, batch, seed, start, world, parts=1, improved=False):
    """Yield, from step `start` on, this process's rows on its device, in so many parts.

    A part is (x, y, draws, how many of its first rows have r = t); draws are imf.Draws if
    `improved`. They are made on the CPU for the whole batch, so any number of processes, on any
    device, trains the same run. A thread prepares the steps to come.
    """

    def make(step):
        rank, size = world.rank, world.size
        x, y = data.batch(dataset, batch, seed=seed, step=step, rank=rank, world=size)
        g = data.generator(seed, "draws", step)
        if not improved:
            whole = draw((batch, *dataset.shape), generator=g, share=SHARE)
        else:
            most = 8 if len(dataset.classes) > 1 else 1
            whole = imf.draw((batch, *dataset.shape), generator=g, most=most)
            x = imf.normalize(x / data.SCALE) if dataset.kind == "latents" else x
        rows, made = [x, y, *(d[rank::size] for d in whole)], []
        for k in range(parts):
            part = [a[k::parts] for a in rows]
            equal = count_equal(part[3], part[4])
            x, y, *draws = (a.to(world.device) for a in part)
            made.append((x, y, type(whole)(*draws), equal))
        return made

    return data.prefetch(make, count(start))


# --- the run's folder ---


def newest(folder):
    """Return the last step of which a run's folder holds both files, or 0."""
    ema, state = (sample.checkpoints(folder, kind) for kind in ("ema", "state"))
    return max(ema.keys() & state.keys(), default=0)


def state_tensors(state):
    """Return the tensors needed to continue, besides the averaged weights, {name: tensor}."""
    return {
        f"{kind}.{name}": tensor
        for name, p in state.params.items()
        for kind, tensor in {"weights": p, **state.adam.state[p]}.items()
    }


def checkpoint(folder, kind, step):
    return folder / f"{kind}-{step:08}.safetensors"


def save_checkpoint(folder, step, state, metadata):
    """Write the state, then the averaged weights, whose presence says that both are whole."""
    data.save_tensors(checkpoint(folder, "state", step), state_tensors(state))
    metadata = metadata | {"step": str(step)}
    data.save_tensors(checkpoint(folder, "ema", step), state.ema, metadata)
    for kind in ("ema", "state"):
        for old, path in list(sample.checkpoints(folder, kind).items())[:-KEEP]:
            if kind == "state" or old % LASTING:
                path.unlink()


def restore(folder, step, state):
    """Copy the save of `step` into the tensors of `state`."""
    for kind, tensors in (("state", state_tensors(state)), ("ema", state.ema)):
        path = checkpoint(folder, kind, step)
        hint = "delete both files of this step to continue from the save before"
        saved, _ = data.read_tensors(path, hint)
        data.check_tensors(path, saved, {k: tuple(p.shape) for k, p in tensors.items()}, hint)
        for name, p in tensors.items():
            p.detach().copy_(saved[name])


def read_log(folder, step, run):
    """Return the lines of log.jsonl up to `step`. Raise ValueError if they are another run's."""
    path = folder / "log.jsonl"
    if not path.exists():
        if step:
            raise ValueError(f"{folder} has saves, but no log.jsonl: choose another --out")
        return [json.dumps(run)]
    first, *rest = path.read_text(errors="replace").splitlines() or [""]
    try:
        before = dict(json.loads(first))
        # A line cut short by a kill is later than any save.
        rest = [line for line in rest if line.endswith("}") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not the log of a run: choose another --out") from None
    for key in run:
        free = key in ("steps", "warmup", "precision", "commit", "torch")
        if not free and before.get(key) != run[key]:
            found = f"{key} {before.get(key)}, not {run[key]}"
            raise ValueError(f"{folder} holds a run with {found}: choose another --out")
    return [first, *rest]


def open_log(folder, start, lines):
    """Return log.jsonl, rewritten with these lines and open to append. Lock its folder.

    Raises ValueError if it holds averaged weights that the run would write again.
    """
    lock = data.lock_folder(folder)
    last = max(sample.checkpoints(folder, "ema"), default=0)
    if last > start:
        where = f"{checkpoint(folder, 'ema', last)} is later than the save to continue from"
        raise ValueError(f"{where}, step {start}: move it elsewhere, or choose another --out")
    with data.atomic_write(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    log = (folder / "log.jsonl").open("a", buffering=1)
    log.lock = lock
    return log


def commit():
    """Return this file's git commit, with a "+" if files differ from it, or None."""
    git = "git describe --always --abbrev=40 --dirty=+ --exclude=*".split()
    where = Path(__file__).parent
    try:
        return subprocess.run(git, cwd=where, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


# --- what is watched ---


def log_means(log, folder, history, grad_norm, rate):
    """Write a line of means over `history`, [(step, rows as `Objective` returns)], and the rest.

    `log` is None except in the first process. Returns what to watch, formatted. Beside saving, this
    is the only place where the host waits for the device. Raises ValueError in all processes if a
    value in any is not finite.
    """
    rows = torch.cat([F.pad(rows, (1, 0), value=step) for step, rows in history])
    rows = torch.cat(fid.all_gather(rows.double().cpu()))
    step, t, r, loss, raw, *raw_v = rows.unbind(1)
    bad = rows[~rows.isfinite().all(1)]
    if len(bad):
        bad = bad[bad[:, 0] == bad[:, 0].min()]
        times = ", ".join(f"({t:.4f}, {r:.4f})" for _, t, r, *_ in bad[:8].tolist())
        times += ", ..." * (len(bad) > 8)
        where = f"step {bad[0, 0]:.0f} in {len(bad)} rows, with (t, r) = {times}"
        raise ValueError(f"the loss is not finite at {where}; {last_good(folder)}")

    def mean(values):
        return values.mean().item() if len(values) else None

    line = {
        "step": int(step.max()),
        "loss": mean(loss),
        "raw_equal": mean(raw[t == r]),
        "raw_differ": mean(raw[t > r]),
        **{"raw_v": mean(error) for error in raw_v},  # of the v head of an iMF
        "grad_norm": grad_norm,
        "images_per_second": round(rate, 1),
        "time": round(time.time(), 3),
    }
    if log:
        log.write(json.dumps(line) + "\n")
    shown = ("raw_equal", "raw_differ", "raw_v", "grad_norm", "images_per_second")
    return {name: f"{line[name]:.4g}" for name in shown if line.get(name) is not None}


def last_good(folder):
    """Say how to go on after values that are not finite."""
    files = list(sample.checkpoints(folder, "ema").values())
    last = f"the last good checkpoint is {files[-1]}: give it to --init" if files else ""
    return f"{last or 'nothing was saved'}; choose another --out and a smaller --lr"


def is_score(line, args):
    """Return whether a line of the log holds the scores that these arguments ask for."""
    same = line.get("count") == args.count and ("inception" in line) == bool(args.inception)
    return same and line["reference"].startswith(f"{args.fid}, ")


def log_scores(log, args, model, scorer, world):
    """Write a line of scores for each lasting save, and the run's last, that has none yet.

    All processes draw --count samples of its averaged weights. Without a scorer, do nothing.
    """
    if scorer is None:
        return
    due, labels = [], torch.arange(args.count) % sample.count_classes(model.params)
    if log:
        lines = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
        scored = [line["step"] for line in lines if is_score(line, args)]
        saves = sample.checkpoints(args.out, "ema")
        due = [k for k in saves if (k % LASTING == 0 or k == args.steps) and k not in scored]
    for step in fid.all_gather(due)[0]:
        path = checkpoint(args.out, "ema", step)
        params = sample.load(path, world.device).params
        scores = sample.evaluate(model._replace(params=params), scorer, labels, world)
        if log:
            line = {"step": step} | scores | sample.describe(path, args.vae)
            log.write(json.dumps(line) + "\n")


def save_curve(folder):
    """Draw the raw errors and the gradient norm of log.jsonl by step, as curve.png."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    picture = Image.new("RGB", (960, 320), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for left, names in ((60, ("raw_equal", "raw_differ")), (540, ("grad_norm",))):
        right, top, bottom = left + 400, 40, 280
        series = [[(k["step"], k.get(name) or 0) for k in lines] for name in names]
        series = [[(step, y) for step, y in points if 0 < y < math.inf] for points in series]
        values = [y for points in series for _, y in points]
        if not values:
            continue
        ticks = [m * 10.0**k for k in range(-40, 40) for m in (1, 2, 5)]
        low = max(y for y in ticks if y <= min(values))
        high = min(y for y in ticks if y >= max(values) and y > low)

        def place(step, value):
            height = math.log(value / low) / math.log(high / low) * (bottom - top)
            return left + step / lines[-1]["step"] * (right - left), bottom - height

        for tick in (y for y in ticks if low <= y <= high):
            (x, y), label = place(0, tick), f"{tick:g}"
            pen.line((x, y, right, y), "lightgrey")
            pen.text((left - 8, y), label, "black", font, anchor="rm")
        pen.text((left, bottom + 8), "0", "black", font, anchor="mt")
        end = f"step {lines[-1]['step']:,}"
        pen.text((right, bottom + 8), end, "black", font, anchor="rt")
        for i, (name, points) in enumerate(zip(names, series)):
            colour = ("steelblue", "darkorange")[i]
            pen.line([place(*point) for point in points], colour, 2)
            pen.text((left + 110 * i, 14), name, colour, font)
    with data.atomic_write(folder / "curve.png") as temporary:
        picture.save(temporary, "PNG")


def grid(folder, step):
    return folder / f"grid-{step:08}.png"


def save_grid(folder, step, model):
    """Write a picture of one-step samples, always from the same noise."""
    classes = sample.count_classes(model.params)
    count = 10 * min(10, classes)  # ten of a class in each row, if they are ten or fewer
    labels = torch.arange(count) * classes // count
    x = sample.generate(model.params, labels, model.shape, guidance=model.guidance)
    sample.save_grid(sample.to_uint8(x, model), grid(folder, step))


def report(model, dataset, folder, step):
    """Print the pictures' paths and, for the digits, how good samples and real images are."""
    if not grid(folder, step).exists():  # the run was stopped at its last step
        save_grid(folder, step, model)
    print(grid(folder, step), folder / "curve.png")
    if dataset.name != "digits":
        return
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
    for steps in (1, 2, 4):
        classes = torch.arange(1000) % len(dataset.classes)
        options = dict(steps=steps, guidance=model.guidance)
        x = sample.generate(model.params, classes, model.shape, **options)
        x = x.clamp(-1, 1).flatten(1).cpu()
        line(f"{steps} step(s)", x, classes, x, reals)
    line("real images", reals, labels, reals[::2], reals[1::2], exclude_self=True)


# --- setting up ---


def parse_arguments(argv):
    """Return the arguments, with `recipe`: the size's, changed by --batch, --lr and --guidance."""
    arguments = data.parser(__doc__)
    add = arguments.add_argument
    add("--size", default="T", help=f"{', '.join(RECIPES)}; /2 may be left out (default: T)")
    add("--data", help="what data.py wrote, or digits (default for T and iT; else data/imagenet)")
    add("--vae", help="its file, to decode grids (default: show a latent's first three channels)")
    add("--fid", metavar="REF", help="log scores of samples against this (see sample.py)")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth for --fid (see fid.py)")
    add("--count", type=int, help="samples for --fid (default: 50000)")
    add("--init", help="weights to start from: a file that sample.py can draw from")
    add("--convention", choices=sample.CONVENTIONS, help="of --init (see sample.py)")
    add("--out", type=Path, help="the run's folder (default: runs/digits, runs/XL-2, ...)")
    add("--steps", type=int, help="the last step of training (default: by the size of the data)")
    add("--batch", type=int, help="images a step, over all processes (default: the size's recipe)")
    add("--lr", type=float, help="Adam's step size (default: the size's recipe)")
    guidance = "OMEGA KAPPA [T0 T1]: its two factors, for t in [T0, T1]; 1 0: none (default: the"
    options = dict(nargs="+", type=float, metavar=("OMEGA", "KAPPA"))
    add("--guidance", **options, help=f"{guidance} size's recipe)")
    floats = ("float32", "bfloat16")
    add("--precision", choices=floats, help="of GEMMs (default: bfloat16 on a GPU, else float32)")
    add("--seed", type=int, default=0)
    saves = f"{SAVE_EVERY}, or so many more that saving takes {SAVE_SHARE:.0%} of the time"
    add("--save", type=int, help=f"steps between saves (default: {saves})".replace("%", "%%"))
    parts = "parts in which a process computes its rows, if memory is short (default: 1)"
    add("--accumulate", type=int, default=1, help=parts)
    on_gpu = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    add("--compile", **on_gpu, help="compile the blocks (default: on a GPU)")
    args = arguments.parse_args(argv)
    if not args.fid:
        data.refuse(args, ["inception", "count"], "without --fid")
    if not args.init:
        data.refuse(args, ["convention"], "without --init")
    data.check_numbers(args, steps=1, batch=1, lr=0, save=1, accumulate=1, count=2)
    size = args.size if args.size in RECIPES else f"{args.size}/2"
    if size not in RECIPES:
        raise ValueError(f"--size {args.size} is unknown: choose one of {', '.join(RECIPES)}")
    changes = {k: v for k, v in vars(args).items() if k in ("batch", "lr") and v}
    if args.guidance:
        changes |= parse_guidance(args.guidance)
    args.size, args.recipe = size, RECIPES[size]._replace(**changes)
    if size in imf.SIZES:
        data.refuse(args, ["guidance", "convention"], f"as {size} is an iMF")
    args.data = args.data or ("digits" if size in ("T/2", "iT/2") else "data/imagenet")
    name = "digits" if (args.data, size) == ("digits", "T/2") else size.replace("/", "-")
    args.out = args.out or Path("runs", name)
    args.precision = args.precision or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.count = args.count or 50_000
    return args


def parse_guidance(numbers):
    """Return the numbers of --guidance as changes of a Recipe."""
    if len(numbers) in (2, 4):
        omega, kappa, start, end = *numbers, *(0.0, 1.0)[: 4 - len(numbers)]
        if 0 <= omega < math.inf and 0 <= kappa < 1 and 0 <= start <= end <= 1:
            return {"omega": omega, "kappa": kappa, "interval": (start, end)}
    hint = "give OMEGA >= 0, KAPPA in [0, 1) and perhaps T0 <= T1 in [0, 1]"
    raise ValueError(f"--guidance {' '.join(map(str, numbers))}: {hint}")


def find_start(args, world):
    """Return the step to continue from. Raise ValueError if the processes or --steps forbid it."""
    batch, parts = args.recipe.batch, world.size * args.accumulate
    if batch % parts:
        hint = "give a multiple of processes times --accumulate"
        raise ValueError(f"--batch {batch} is not divisible by {parts}: {hint}")
    starts = fid.all_gather(newest(args.out))
    if len(set(starts)) > 1:
        raise ValueError(f"processes see saves of steps {starts}: put --out on a shared disk")
    if starts[0] > args.steps:
        hint = f"give --steps {starts[0]} or more, or another --out"
        raise ValueError(f"{args.out} holds a run of {starts[0]} steps: {hint}")
    return starts[0]


def load_dataset(args, world):
    """Return what --data names, and decide what depends on it: --steps and the guidance.

    Raises ValueError if it does not suit the other arguments.
    """
    dataset, improved = data.load_data(args.data, world.rank, world.size), args.size in imf.SIZES
    *_, patch = (SIZES | imf.SIZES)[args.size]
    if any(side % patch for side in dataset.shape[1:]):
        found = f"{args.data} holds {dataset.shape}, not divisible by patches of {patch}"
        raise ValueError(f"{found}: choose another --size, or convert with another --resolution")
    if dataset.kind == "pixels":
        data.refuse(args, ["vae"], f"as {args.data} holds pixels")
    if improved:
        dataset = dataset._replace(mirror=False)  # as in the authors' code
    elif len(dataset.classes) == 1:
        if args.guidance and args.guidance[:2] != [1, 0]:
            data.refuse(args, ["guidance"], f"as {args.data} has one class")
        args.recipe = args.recipe._replace(omega=1.0, kappa=0.0)
    images, batch, recipe = len(dataset.labels), args.recipe.batch, args.recipe
    args.steps = args.steps or count_steps(recipe, images)
    warmup = round(recipe.warmup / recipe.epochs * args.steps)
    if world.rank == 0:
        epochs = f"{args.steps:,} steps of {batch} are {args.steps * batch / images:,.0f} epochs"
        scale = "scales drawn" if improved else f"scale {recipe.omega / (1 - recipe.kappa):.3g}"
        growth = f", --lr grows for {warmup:,} steps" if warmup else ""
        classes = f"{len(dataset.classes):,} classes"
        print(f"{args.size} on {images:,} images of {classes}: {epochs}; guidance {scale}{growth}")
    args.recipe = recipe._replace(warmup=warmup)
    return dataset


def class_names(path, metadata, classes, labels):
    """Return the classes by label of a checkpoint: its own, or else `classes` if as many."""
    if not metadata.keys() >= {"run", "classes"}:  # not ours
        return classes if len(classes) == labels else []
    try:
        names = [str(name) for name in json.loads(metadata["classes"])]
    except (ValueError, TypeError):
        names = []
    if len(names) != labels:
        raise ValueError(f"{path}: metadata names {len(names)} classes of {labels}: redo it")
    return names


def warm_start(params, path, convention, classes):
    """Return fresh `params` with the values of a checkpoint of the same size, and a line on it.

    path, convention: see sample.convert. A missing `h_embedder` is created so that it adds nothing:
    at first u(z, t, r) is the checkpoint's v(z, t). A label that the checkpoint does not know by
    name, or else by number among as many, starts as its null label.
    """
    path, hint = sample.find_checkpoint(path), "give --init weights of the same --size and channels"
    hint += " (of an iMF with v_heads)" if sample.is_imf(params) else ""
    tensors, metadata = sample.read_weights(path)
    if sample.is_imf(tensors) != sample.is_imf(params):
        raise ValueError(f"{path} is {'no' if sample.is_imf(params) else 'an'} iMF: {hint}")
    taken, table = sample.convert(path, tensors, convention), sample.LABELS
    *rows, null = taken[table]
    rows = dict(zip(class_names(path, metadata, classes, len(rows)), rows))
    taken[table] = torch.stack([*(rows.get(name, null) for name in classes), null])
    created = {k: p for k, p in params.items() if k.startswith("h_embedder") and k not in taken}
    created |= {k: torch.zeros_like(p) for k, p in created.items() if ".mlp.2." in k}
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    data.check_tensors(path, taken | created, shapes, hint)
    new = sum(name not in rows for name in classes)
    line = f"{path}: {len(taken)} tensors taken, created {sorted(created)}, {new} labels are new"
    return taken | created, line


def begin(args, dataset, start, world):
    """Return the State at step `start`: fresh, from --init, or restored."""
    channels, classes = dataset.shape[0], dataset.classes
    g = data.generator(args.seed, "init", 0)
    fresh = imf.init if args.size in imf.SIZES else init
    params = fresh(args.size, channels=channels, classes=len(classes), generator=g)
    if args.init is not None and not start:
        params, line = warm_start(params, args.init, args.convention, classes)
        if world.rank == 0:
            print(line)
    params = {name: torch.nn.Parameter(p.to(world.device)) for name, p in params.items()}
    ema = {name: p.detach().clone() for name, p in params.items()}
    # As in the paper (Table 4): a constant step size, no weight decay, no clipping.
    adam = torch.optim.Adam(params.values(), args.recipe.lr, betas=(0.9, 0.95), fused=True)
    for p in params.values():
        moments = {moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")}
        adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    state = State(params, ema, adam)
    if start:
        restore(args.out, start, state)
    return state


def open_run(args, dataset, start, world):
    """Return (model, scorer, state, metadata, log) of the run at step `start`.

    The model draws from the averaged weights, `scorer` is for --fid, `metadata` is what saves say
    of themselves; only the first process has the log. Writes nothing before all are ready.
    """
    kind, shape = dataset.kind, dataset.shape
    images = sample.image_shape(kind, shape)
    names = ("size", "init", "convention", "seed", "steps", "precision")
    run = {name: getattr(args, name) for name in names}
    run |= {"data": dataset.name, "commit": commit(), "torch": torch.__version__}
    run |= {name: value for name, value in args.recipe._asdict().items() if value is not None}
    run = json.loads(json.dumps(run))  # tuples become lists, as in the log
    lines = read_log(args.out, start, run)
    improved = args.size in imf.SIZES
    paper = "improved MeanFlow (arXiv 2512.02012)" if improved else "MeanFlow (arXiv 2505.13447)"
    metadata = {
        "model": f"{paper}, averaged weights of size {args.size}",
        "kind": kind,
        "resolution": str(images[-1]),
        "classes": json.dumps(dataset.classes),
        "run": json.dumps(run),
    }
    vae = None if args.vae is None else data.load_vae(args.vae, world.device)
    if args.fid and kind == "latents" and not vae:
        raise ValueError("--fid needs --vae, sd-vae-ft-mse's file, to decode latents")
    scorer = fid.scorer(args.fid, args.inception, images, world) if args.fid else None
    state = begin(args, dataset, start, world)
    if improved:
        metadata |= imf.metadata(state.ema, kind)
        model = sample.imf_model(args.out, state.ema, kind, shape, metadata)._replace(vae=vae)
    else:
        model = sample.ImageModel(state.ema, kind, shape, vae)
    data.barrier()
    log = open_log(args.out, start, lines) if world.rank == 0 else None
    return model, scorer, state, metadata, log


# --- training ---


def any_process(flag):
    """Return whether `flag` is set in any process. Uses gloo, so it does not wait for a GPU."""
    flag = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def save(folder, step, state, model, metadata, skip_grid):
    """Write the sample grid, the curve and the checkpoint; on a signal skip the grid.
    Raise ValueError, and write nothing, if a weight is not finite."""
    if not all(p.isfinite().all() for p in state.params.values()):
        raise ValueError(f"the weights are not finite after step {step}; {last_good(folder)}")
    if not skip_grid:
        save_grid(folder, step, model)
    save_curve(folder)
    save_checkpoint(folder, step, state, metadata)


def add_gradients(objective, parts):
    """Add the gradients of a batch, given in parts, and return all its rows, (B, 4)."""
    rows = []
    for k, (x, y, draws, equal) in enumerate(parts, 1):
        objective.require_backward_grad_sync = k == len(parts)  # DDP averages gradients once
        loss, part = objective(x, y, draws, equal)
        (loss / len(parts)).backward()
        rows.append(part)
    return torch.cat(rows)


def update(state, recipe, step):
    """Take Adam's step, move the average after it, and return the norm of the gradients.

    differs from the paper: at first the average is over a tenth of the steps so far, so that it
    holds nothing of the initial weights; from step 90,000 on it is the paper's.
    """
    params = [*state.params.values()]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if recipe.warmup:
        state.adam.param_groups[0]["lr"] = recipe.lr * min(1, (step - 1) / recipe.warmup)
    state.adam.step()
    state.adam.zero_grad()
    decay = min(recipe.ema, (1 + step) / (10 + step))
    torch._foreach_lerp_([*state.ema.values()], [p.detach() for p in params], 1 - decay)
    return norm


def is_due(step, args, share, world):
    """Return whether to save after this step, if saves took this share of the time so far."""
    if step % LASTING == 0 or step == args.steps:
        return True
    if step % (args.save or SAVE_EVERY):
        return False
    return any_process(world.rank == 0 and (args.save or share <= SAVE_SHARE))


def progress_bar(steps, start, total, world):
    interval = 0.1 if sys.stderr.isatty() else 60  # seconds between lines in a scheduler's file
    hidden = world.rank > 0
    return tqdm(steps, initial=start, total=total, disable=hidden, mininterval=interval)


def main(argv, world):
    args = parse_arguments(argv)
    dataset, folder, recipe = load_dataset(args, world), args.out, args.recipe
    step, first = find_start(args, world), world.rank == 0
    model, scorer, state, metadata, log = open_run(args, dataset, step, world)
    log_scores(log, args, model, scorer, world)
    objective = parallel(Objective(state.params, recipe, args.compile, args.precision), world)

    terminated, stopped, history, in_saves = Event(), False, [], 0.0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: terminated.set())
    improved = sample.is_imf(state.params)
    batches = stream(dataset, recipe.batch, args.seed, step, world, args.accumulate, improved)
    steps = zip(range(step + 1, args.steps + 1), batches)
    progress = progress_bar(steps, step, args.steps, world)
    begun = clock = time.monotonic()
    for step, parts in progress:
        history.append((step, add_gradients(objective, parts)))
        norm = update(state, recipe, step)

        stopped = step % ASK_EVERY == 0 and any_process(terminated.is_set())
        saving = stopped or is_due(step, args, in_saves / (time.monotonic() - begun), world)
        if saving or step % LOG_EVERY == 0:
            rate = recipe.batch * len(history) / (time.monotonic() - clock)
            line = log_means(log, folder, history, norm.item(), rate)
            progress.set_postfix(line, refresh=sys.stderr.isatty())
            history.clear()
            clock = time.monotonic()
            if saving and first:
                save(folder, step, state, model, metadata, skip_grid=stopped)
                in_saves += time.monotonic() - clock
            if stopped:
                break
            if saving:
                log_scores(log, args, model, scorer, world)
            clock = time.monotonic()
    if stopped and first:
        print(f"stopped by a signal after step {step}, which is saved: the same command continues")
    elif first:
        report(model, dataset, folder, step)


if __name__ == "__main__":
    data.launch(main)
