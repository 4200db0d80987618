"""Trains MeanFlow: on the embedded digits without any argument, in about two minutes on a laptop.

    python train.py
    torchrun --nproc-per-node 2 train.py            the same run, shared by two processes
    python train.py --steps 6000                    goes on from where the first one ended

The same command continues a run that was stopped, from its last save. A run's folder holds

    ema-STEP.safetensors      averaged weights, what sample.py takes and what people share
    state-STEP.safetensors    weights and Adam's moments, what continuing takes
    grid-STEP.png             one-step samples of the averaged weights, always from the same noise
    log.jsonl                 first the arguments, then the losses of every 50 steps
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import fid
from meanflow import Draws, draw, loss
from model import block, block_jvp, config, dit, dit_jvp, init
from sample import generate, load, save_grid, saved

SHARE = 0.75  # of the rows have r = t
LOG_EVERY = 50  # steps
KEEP = 2  # saves; the last but one in case the last is damaged
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


class Recipe(NamedTuple):
    omega: float  # guidance: effective scale omega / (1 - kappa)
    kappa: float
    interval: tuple  # times at which it acts
    lr: float
    batch: int
    steps: int
    ema: float


EPOCHS_240 = 240 * 1281167 // 256  # of ImageNet, as in the paper
RECIPES = {  # Table 4 and the authors' code
    "T/2": Recipe(1.0, 0.3, (0.0, 1.0), 3e-3, 64, 3000, 0.998),  # ours, for the digits
    "B/4": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),
    "B/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),
    "M/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),  # guidance assumed: not in the paper
    "L/2": Recipe(0.2, 0.92, (0.0, 0.8), 1e-4, 256, EPOCHS_240, 0.9999),
    "XL/2": Recipe(0.2, 0.92, (0.0, 0.75), 1e-4, 256, EPOCHS_240, 0.9999),
}


class State(NamedTuple):
    params: dict
    ema: dict  # their average over steps
    adam: torch.optim.Adam


class Place(NamedTuple):
    rank: int
    world: int
    device: torch.device


class Objective(torch.nn.Module):
    """A module whose forward is the loss, for DistributedDataParallel to wrap. Wrapping the network would not do: jvp
    fails on the wrapper, and on the network inside of it trains without ever averaging gradients."""

    def __init__(self, params, compiled, **options):
        super().__init__()
        self.names, self.weights, self.options = list(params), torch.nn.ParameterList(params.values()), options
        # One block is compiled and serves for all: on a CPU a step takes as long as with one graph of everything, which
        # takes five times as long to compile at depth 12, and longer the deeper it is.
        compile = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else lambda f: f
        self.net, self.dual = partial(dit, block=compile(block)), partial(dit_jvp, block_jvp=compile(block_jvp))

    def forward(self, x, y, draws, equal):
        """The mean loss of these rows, and the sums and counts that `record` makes means of."""
        params = dict(zip(self.names, self.weights))
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            each, raw = loss(partial(self.net, params), x, y, draws, dual=partial(self.dual, params), equal=equal,
                             **self.options)
        sums = [each.detach().sum(), raw["equal"].sum(), raw["differ"].sum()]
        counts = [each.new_full((), n) for n in (len(x), equal, len(x) - equal)]  # filled there: the host need not wait
        return each.mean(), torch.stack(sums + counts).double()


def write(path, tensors, metadata=None):
    """Saves tensors such that `path` is there either whole or not at all, whenever the process is killed."""
    temporary = path.with_name(f"tmp-{path.name}")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # safetensors lets only the owner read what it writes
    os.replace(temporary, path)


def newest(folder):
    """The last step of which a run's folder holds both files, or 0."""
    return max(saved(folder, "ema").keys() & saved(folder, "state").keys(), default=0)


def save(folder, step, state, metadata):
    """Writes state, then averaged weights (their being there says that both are), then drops all but KEEP saves."""
    params, ema, adam = state
    tensors = {f"weights.{name}": p for name, p in params.items()}
    tensors |= {f"{moment}.{name}": adam.state[p][moment] for moment in MOMENTS for name, p in params.items()}
    write(folder / f"state-{step:08}.safetensors", tensors)
    write(folder / f"ema-{step:08}.safetensors", ema, metadata | {"step": str(step)})
    for kind in ("ema", "state"):
        for path in list(saved(folder, kind).values())[:-KEEP]:
            path.unlink()


def restore(folder, step, state):
    """Puts a save back in place: the tensors are copied into those that are there."""
    params, ema, adam = state
    try:
        path = saved(folder, "state")[step]
        tensors, path = load_file(path), saved(folder, "ema")[step]
        averaged, _ = load(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to continue from the save before") from None
    for name, p in params.items():
        adam.state[p] = {"step": torch.tensor(float(step), device=p.device)}
        adam.state[p] |= {moment: tensors[f"{moment}.{name}"].to(p.device, copy=True) for moment in MOMENTS}
        p.data.copy_(tensors[f"weights.{name}"])
        ema[name].copy_(averaged[name])


def earlier_log(folder, step, run):
    """The lines of log.jsonl up to `step`, the run's arguments first. Raises ValueError if they are another run's."""
    path = folder / "log.jsonl"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    if not path.exists():
        if step:
            raise ValueError(f"{folder} has saves, but no log.jsonl that says what of: choose another --out")
        return [json.dumps(run)]
    first, *rest = path.read_text(errors="replace").splitlines() or [""]
    try:
        before = dict(json.loads(first))
        # The last line is cut short where the process was killed writing it, but then it is later than any save.
        rest = [line for line in rest if line.endswith("}") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not the log of a run: choose another --out") from None
    for key in run:
        if key not in ("steps", "commit", "torch") and before.get(key) != run[key]:
            was = before.get(key)
            raise ValueError(f"{folder} holds a run with {key} {was}, not {run[key]}: choose another --out")
    return [first, *rest]


def open_log(folder, lines):
    """log.jsonl with these lines, opened to append."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "tmp-log.jsonl"
    temporary.write_text("".join(f"{line}\n" for line in lines))
    os.replace(temporary, folder / "log.jsonl")
    return (folder / "log.jsonl").open("a", buffering=1)


def report(params, images, labels, seed):
    """Prints how good 1, 2 and 4 evaluations are, over 1,000 samples of all classes in turn, and the like of the data."""
    reals = images.flatten(1)
    truth = fid.statistics(fid.accumulate(None, reals))
    classes = torch.arange(1000) % config(params).classes
    print(f"1,000 samples, {len(reals):,} real images; Fréchet distance of raw pixels in [-1, 1], not Inception's\n"
          "                nearest real is of the class   Fréchet distance   median distance to the nearest real")
    for steps in (1, 2, 4):
        samples = generate(params, classes, images.shape[1:], steps=steps, seed=seed).flatten(1)
        index, distance = fid.nearest(samples, reals)
        score = fid.frechet_distance(*fid.statistics(fid.accumulate(None, samples)), *truth)
        line(f"{steps} evaluation{'s' * (steps > 1)}", labels[index] == classes, score, distance)
    index, distance = fid.nearest(reals, reals, exclude_self=True)
    halves = [fid.statistics(fid.accumulate(None, half)) for half in (reals[::2], reals[1::2])]
    line("real images", labels[index] == labels, fid.frechet_distance(*halves[0], *halves[1]), distance)


def line(name, right, score, distance):
    print(f"{name:16}{right.double().mean():>28.1%}{score:>19.2f}{distance.median():>38.2f}")


def arguments(argv):
    """(folder, seed, steps between saves, whether to compile, size, Recipe) as the command line gives them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"train.py: {message}")  # one line, without the usage
    parser.add_argument("--size", default="T", help=f"{', '.join(RECIPES)}; /2 may be left out (default: T)")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the run's folder (default: runs/digits)")
    parser.add_argument("--steps", type=int, help="training ends after this many (default: the size's recipe)")
    parser.add_argument("--batch", type=int, help="images per step, over all processes (default: the size's recipe)")
    parser.add_argument("--lr", type=float, help="Adam's step size, constant (default: the size's recipe)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=int, default=500, help="steps between saves (default: 500)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                        help="compile the blocks (default: on a GPU)")
    args = parser.parse_args(argv)
    size = args.size if args.size in RECIPES else f"{args.size}/2"
    if size not in RECIPES:
        raise ValueError(f"--size {args.size} is unknown: choose one of {', '.join(RECIPES)}")
    for name in ("steps", "batch", "lr", "save"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: give a number above 0")
    given = {name: getattr(args, name) for name in ("steps", "batch", "lr") if getattr(args, name) is not None}
    return args.out, args.seed, args.save, args.compile, size, RECIPES[size]._replace(**given)


def commit():
    """This file's git commit, "+" behind it where files differ from it, or None outside a repository."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def join_processes(batch, start):
    """Joins the processes that torchrun started, if it did, and makes sure that all see the same save."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise ValueError(f"--batch {batch} is not divided by the {world} processes: give a multiple of {world}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # Else the compiler cuts graphs where DistributedDataParallel's buckets end, and forgets no_grad at the cuts.
        torch._dynamo.config.optimize_ddp = False
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            raise ValueError(f"processes see saves of different steps, {starts}: put --out on a disk that all share")
    return Place(rank, world, device)


def stream(images, labels, batch, seed, start, place):
    """Endless (x, y, draws, equal) from step `start` on: this process's rows on its device, and how many have r = t.

    Draws are made on the CPU for the whole batch, so that any number of processes, on any device, trains the same run.
    """
    rank, world, device = place
    move = lambda a: a.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else a
    equal = len(range(rank, int(SHARE * batch), world))
    batches = data.batches(images, labels, batch, seed=seed, step=start, rank=rank, world=world)
    for step, (x, y) in enumerate(batches, start):
        draws = draw((batch, *images.shape[1:]), generator=data.generator(seed, "draws", step), share=SHARE)
        yield move(x), move(y), Draws(*(move(d[rank::world]) for d in draws)), equal


def begin(params, lr):
    """Adam as in the paper (Table 4): constant step size, no weight decay, no clipping."""
    ema = {name: p.detach().clone() for name, p in params.items()}
    return State(params, ema, torch.optim.Adam(params.values(), lr=lr, betas=(0.9, 0.95), fused=True))


def update(objective, state, decay, batch):
    """One step of Adam and of the average. Returns the objective's sums and counts."""
    params, ema, adam = state
    value, sums = objective(*batch)
    adam.zero_grad()
    value.backward()
    adam.step()
    torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - decay)
    return sums


def record(log, folder, step, sums, world):
    """Writes a line of means over all rows since the last line. The only place where the host waits for the device."""
    if world > 1:
        dist.all_reduce(sums)
    total, count = sums.cpu().chunk(2)
    means = dict(zip(("loss", "raw_equal", "raw_differ"), (total / count.clamp(min=1)).tolist()))
    if not math.isfinite(sum(means.values())):
        raise ValueError(f"the loss is not finite at step {step}: {means}; the last save is of step {newest(folder)}")
    if log:
        log.write(json.dumps({"step": step, **means, "time": round(time.time(), 3)}) + "\n")


def main(argv=None):
    folder, seed, save_every, compiled, size, recipe = arguments(argv)
    images, labels = data.digits()
    shape, classes = images.shape[1:], int(labels.max()) + 1
    start, about = newest(folder), {"size": size, "data": "digits", "commit": commit(), "torch": torch.__version__}
    if start > recipe.steps:
        raise ValueError(f"{folder} holds a run of {start} steps: give --steps {start} or more, or another --out")
    lines = earlier_log(folder, start, about | {"seed": seed, **recipe._asdict(), "interval": list(recipe.interval)})
    place = join_processes(recipe.batch, start)
    fresh = init(size, channels=shape[0], classes=classes, generator=data.generator(seed, "init", 0))
    params = {name: torch.nn.Parameter(p.to(place.device)) for name, p in fresh.items()}
    state = begin(params, recipe.lr)
    if start:
        restore(folder, start, state)
    log = open_log(folder, lines) if place.rank == 0 else None
    guidance = {"omega": recipe.omega, "kappa": recipe.kappa, "interval": recipe.interval}
    objective = Objective(params, compiled, null=classes, **guidance)
    if place.world > 1:
        objective = torch.nn.parallel.DistributedDataParallel(objective)

    sums, began = torch.zeros(6, dtype=torch.float64, device=place.device), time.time()
    batches = stream(images, labels, recipe.batch, seed, start, place)
    for step in tqdm(range(start + 1, recipe.steps + 1), initial=start, total=recipe.steps, disable=place.rank > 0):
        sums += update(objective, state, recipe.ema, next(batches))
        if compiled and step == start + 1 and place.rank == 0:
            tqdm.write(f"compiled in {time.time() - began:.0f} s, the first step included")
        saving = step % save_every == 0 or step == recipe.steps
        if saving or step % LOG_EVERY == 0:
            record(log, folder, step, sums, place.world)
            sums.zero_()
        if saving and place.rank == 0:  # the picture first: what is saved has one
            save_grid(generate(state.ema, torch.arange(100) * classes // 100, shape), folder / f"grid-{step:08}.png")
            metadata = about | {"resolution": shape[-1]}
            save(folder, step, state, {name: str(value) for name, value in metadata.items()})
    if place.rank == 0:
        report(state.ema, images, labels, seed)
        print(folder / f"grid-{recipe.steps:08}.png")
    if place.world > 1:
        dist.barrier()  # nobody leaves while another still works
        sys.stdout.flush()
        os._exit(0)  # all is written; gloo's threads now and then abort an ordinary exit, and torchrun then ends the rest


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
