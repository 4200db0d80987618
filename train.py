"""Train MeanFlow: by default on the embedded digits, in about two minutes on a laptop.

    python train.py
    torchrun --nproc-per-node 2 train.py                     the digits, shared by two processes
    torchrun --nproc-per-node 8 train.py --size XL --data data/imagenet       on eight GPUs

The same command continues a stopped run from its last save, with any number of processes. SIGTERM
makes it save, without grid and scores, and end. The run's folder holds

    ema-STEP.safetensors      averaged weights, for sample.py: the last two and every 50,000th step
    state-STEP.safetensors    weights and Adam's moments, to continue from: the last two saves
    grid-STEP.png             one-step samples of the averaged weights, always from the same noise
    log.jsonl                 the run's arguments, then mean losses every 50 steps and at saves and,
                              with --fid, scores at saves
"""

import argparse
import json
import math
import signal
import subprocess
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import fid
import sample
from meanflow import Draws, count_equal, draw, fast_loss
from model import SIZES, block, block_jvp, config, dit, dit_jvp, init

SHARE = 0.75  # of the rows have r = t
LOG_EVERY = 50  # steps
KEEP = 2  # saves, in case the last is damaged
LASTING = 50_000  # steps between averaged weights that are kept for good


class Recipe(NamedTuple):
    omega: float  # guidance: effective scale omega / (1 - kappa)
    kappa: float
    interval: tuple  # times at which it acts
    lr: float
    batch: int
    steps: int
    ema: float


EPOCHS_240 = 240 * 1281167 // 256  # of ImageNet, as in the paper
RECIPES = {  # Table 4 and the authors' code, for each of model.SIZES
    "T/2": Recipe(1.0, 0.3, (0.0, 1.0), 3e-3, 64, 3000, 0.998),  # not the paper's: for the digits
    "B/4": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),  # paper: 80 epochs
    "B/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),
    "M/2": Recipe(1.0, 0.5, (0.0, 1.0), 1e-4, 256, EPOCHS_240, 0.9999),  # guidance assumed
    "L/2": Recipe(0.2, 0.92, (0.0, 0.8), 1e-4, 256, EPOCHS_240, 0.9999),
    "XL/2": Recipe(0.2, 0.92, (0.0, 0.75), 1e-4, 256, EPOCHS_240, 0.9999),
}


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

    def __init__(self, params, recipe, compiled):
        super().__init__()
        self.weights = torch.nn.ParameterList(params.values())  # where DDP finds them
        # One compiled block serves for all: as fast, on a CPU, as one graph of everything, which
        # takes five times as long to compile at depth 12, and longer the deeper it is.
        compile = partial(torch.compile, fullgraph=True, dynamic=False) if compiled else lambda f: f
        net = partial(dit, params, block=compile(block))
        dual = partial(dit_jvp, params, block_jvp=compile(block_jvp))
        guidance = dict(omega=recipe.omega, kappa=recipe.kappa, interval=recipe.interval)
        null = config(params).classes
        self.loss = partial(fast_loss, net, dual=dual, null=null, **guidance)

    def forward(self, x, y, draws, equal):
        """Return the mean loss, and each row's t, r, loss and raw squared error, (B, 4)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            loss, raw = self.loss(x, y, draws, equal=equal)
        return loss.mean(), torch.stack((draws.t, draws.r, loss.detach(), raw), 1)


def parallel(objective, world):
    """Wrap the objective so that processes average their gradients, if there are several."""
    if world.size == 1:
        return objective
    # Otherwise the compiler cuts graphs where DDP's buckets end, and loses no_grad at the cuts.
    torch._dynamo.config.optimize_ddp = False
    group = None
    if world.device.type == "cuda":  # others wait while the first saves
        group = dist.new_group(backend="nccl", timeout=timedelta(hours=2))
    return DistributedDataParallel(objective, process_group=group)


def stream(dataset, batch, seed, start, world, parts=1):
    """Yield, from step `start` on, this process's rows on its device, in so many parts.

    A part is (x, y, draws, how many of its first rows have r = t). Draws are made on the CPU for
    the whole batch, so any number of processes, on any device, trains the same run. A thread
    prepares the steps to come.
    """

    def make(step):
        rank, size = world.rank, world.size
        x, y = data.batch(dataset, batch, seed=seed, step=step, rank=rank, world=size)
        g = data.generator(seed, "draws", step)
        draws = draw((batch, *dataset.shape), generator=g, share=SHARE)
        rows, made = [x, y, *(d[rank::size] for d in draws)], []
        for k in range(parts):
            part = [a[k::parts] for a in rows]
            equal = count_equal(part[3], part[4])
            x, y, *draws = (a.to(world.device) for a in part)
            made.append((x, y, Draws(*draws), equal))
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


def save_checkpoint(folder, step, state, metadata):
    """Write the state, then the averaged weights, whose presence says that both are whole."""
    data.save_tensors(folder / f"state-{step:08}.safetensors", state_tensors(state))
    metadata = metadata | {"step": str(step)}
    data.save_tensors(folder / f"ema-{step:08}.safetensors", state.ema, metadata)
    for kind in ("ema", "state"):
        for old, path in list(sample.checkpoints(folder, kind).items())[:-KEEP]:
            if kind == "state" or old % LASTING:
                path.unlink()


def restore(folder, step, state):
    """Copy the save of `step` into the tensors of `state`."""
    for kind, tensors in (("state", state_tensors(state)), ("ema", state.ema)):
        path = sample.checkpoints(folder, kind)[step]
        hint = "delete it to continue from the save before"
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
        if key not in ("steps", "commit", "torch") and before.get(key) != run[key]:
            found = f"{key} {before.get(key)}, not {run[key]}"
            raise ValueError(f"{folder} holds a run with {found}: choose another --out")
    return [first, *rest]


def open_log(folder, lines):
    """Return log.jsonl, rewritten with these lines and open to append. Lock its folder."""
    lock = data.lock_folder(folder)
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


def log_means(log, folder, history):
    """Write a line of means over `history`, a list of (step, (B, 4)) as `Objective` returns.

    `log` is None except in the first process. Beside saving, this is the only place where the host
    waits for the device. Raises ValueError in all processes if a value in any is not finite.
    """
    rows = torch.cat([F.pad(rows, (1, 0), value=step) for step, rows in history])
    rows = torch.cat(fid.all_gather(rows.double().cpu()))
    step, t, r, loss, raw = rows.unbind(1)
    bad = rows[~rows.isfinite().all(1)]
    if len(bad):
        bad = bad[bad[:, 0] == bad[:, 0].min()]
        times = ", ".join(f"({t:.4f}, {r:.4f})" for _, t, r, _, _ in bad[:8].tolist())
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
        "time": round(time.time(), 3),
    }
    if log:
        log.write(json.dumps(line) + "\n")


def last_good(folder):
    """Say how to go on after values that are not finite."""
    files = list(sample.checkpoints(folder, "ema").values())
    last = f"the last good checkpoint is {files[-1]}: give it to --init" if files else ""
    return f"{last or 'nothing was saved'}; choose another --out and a smaller --lr"


def log_scores(log, step, model, scorer, count, world):
    """Write a line of how good `count` samples of the averaged weights are; all processes draw."""
    labels = torch.arange(count) % config(model.params).classes
    scores = sample.evaluate(model, scorer, labels, world)
    if log:
        log.write(json.dumps({"step": step, **scores}) + "\n")


def report(model, dataset, folder):
    """Print the last grid's path and, for the digits, how good samples and real images are."""
    print(max(folder.glob("grid-*.png"), default=folder))
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
        x = sample.generate(model.params, classes, model.shape, steps=steps).clamp(-1, 1)
        x = x.flatten(1).cpu()
        line(f"{steps} step(s)", x, classes, x, reals)
    line("real images", reals, labels, reals[::2], reals[1::2], exclude_self=True)


# --- setting up ---


def parse_arguments(argv):
    """Return the arguments, with `recipe`: the size's, changed by --steps, --batch and --lr."""
    arguments = data.parser(__doc__)
    add = arguments.add_argument
    add("--size", default="T", help=f"{', '.join(RECIPES)}; /2 may be left out (default: T)")
    add("--data", help="what data.py wrote, or digits (default: digits for T, else data/imagenet)")
    add("--vae", help="its file, to decode grids (default: show a latent's first three channels)")
    add("--fid", metavar="REF", help="log scores of samples against this at saves (see sample.py)")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth for --fid (see fid.py)")
    add("--count", type=int, default=50_000, help="samples for --fid (default: 50000)")
    add("--init", help="weights to start from: a .safetensors or .pt file with DiT's names")
    add("--out", type=Path, help="the run's folder (default: runs/digits, runs/XL-2, ...)")
    add("--steps", type=int, help="the last step of training (default: the size's recipe)")
    add("--batch", type=int, help="images a step, over all processes (default: the size's recipe)")
    add("--lr", type=float, help="Adam's step size, constant (default: the size's recipe)")
    add("--seed", type=int, default=0)
    add("--save", type=int, help="steps between saves (default: 2000; for the digits 500)")
    parts = "parts in which a process computes its rows, if memory is short (default: 1)"
    add("--accumulate", type=int, default=1, help=parts)
    on_gpu = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    add("--compile", **on_gpu, help="compile the blocks (default: on a GPU)")
    args = arguments.parse_args(argv)
    for name in ("steps", "batch", "lr", "save", "accumulate", "count"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: give a number above 0")
    size = args.size if args.size in RECIPES else f"{args.size}/2"
    if size not in RECIPES:
        raise ValueError(f"--size {args.size} is unknown: choose one of {', '.join(RECIPES)}")
    changes = {k: v for k, v in vars(args).items() if k in ("steps", "batch", "lr") and v}
    args.size, args.recipe = size, RECIPES[size]._replace(**changes)
    args.data = args.data or ("digits" if size == "T/2" else "data/imagenet")
    digits = args.data == "digits"
    args.out = args.out or Path("runs", "digits" if digits else size.replace("/", "-"))
    args.save = args.save or (500 if digits else 2000)
    return args


def find_start(args, world):
    """Return the step to continue from. Raise ValueError if the processes or --steps forbid it."""
    batch, parts = args.recipe.batch, world.size * args.accumulate
    if batch % parts:
        hint = "give a multiple of processes times --accumulate"
        raise ValueError(f"--batch {batch} is not divisible by {parts}: {hint}")
    starts = fid.all_gather(newest(args.out))
    if len(set(starts)) > 1:
        raise ValueError(f"processes see saves of steps {starts}: put --out on a shared disk")
    if starts[0] > args.recipe.steps:
        hint = f"give --steps {starts[0]} or more, or another --out"
        raise ValueError(f"{args.out} holds a run of {starts[0]} steps: {hint}")
    return starts[0]


def load_dataset(args, world):
    """Return what --data names. Raise ValueError if it does not suit --size."""
    dataset = data.load_data(args.data, world.rank, world.size)
    *_, patch = SIZES[args.size]
    if any(side % patch for side in dataset.shape[1:]):
        found = f"{args.data} holds {dataset.shape}, not divisible by patches of {patch}"
        raise ValueError(f"{found}: choose another --size, or convert with another --resolution")
    return dataset


def load_external(path):
    """Return the tensors, {name: tensor}, and metadata of a checkpoint, whoever wrote it.

    Of a pickle, in which code is refused, the averaged weights are taken if there are some. Raises
    ValueError or FileNotFoundError.
    """
    hint = "give --init a .safetensors or .pt file of weights"
    if Path(path).suffix == ".safetensors" or not Path(path).is_file():
        return data.read_tensors(path, hint)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in DiT's and SiT's files
            found = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("ema", "model"):
            found = found[key] if isinstance(found.get(key), dict) else found
        return {name: p for name, p in found.items() if torch.is_tensor(p)}, {}
    except Exception as error:  # of many types, some with pages of text
        why = f"cannot be read as tensors without code ({type(error).__name__})"
        raise ValueError(f"{path} {why}: {hint}") from None


def warm_start(params, path, classes):
    """Return fresh `params` with the values of a checkpoint of the same size with DiT's names.

    Of an output of twice the channels, as DiT and SiT have for a variance, the first half is kept.
    A missing `h_embedder` is created so that it adds nothing: at first u(z, t, r) is the
    checkpoint's v(z, t), of use if that is e - x at z = (1 - t) x + t e, as in REPA's SiT. SiT's
    time and velocity are reversed, DiT predicts noise. Also returns a line on what was taken.
    """
    tensors, metadata = load_external(path)
    if "run" in metadata and json.loads(metadata.get("classes", "null")) not in (None, classes):
        raise ValueError(f"{path} has other classes than --data, or in another order")
    channels = config(params).channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if name in tensors and tensors[name].shape[:1] == (2 * len(params[name]),):
            parts = tensors[name].split(channels)  # p q 2 (c ...)
            tensors[name] = torch.cat(parts[::2])
    created = {k: p for k, p in params.items() if k.startswith("h_embedder") and k not in tensors}
    created |= {k: torch.zeros_like(p) for k, p in created.items() if ".mlp.2." in k}
    taken = {name: p for name, p in tensors.items() if name in params}
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    hint = "give --init a checkpoint of the same --size, channels and classes"
    data.check_tensors(path, taken | created, shapes, hint)
    skipped = sorted(tensors.keys() - params.keys())
    line = f"{path}: {len(taken)} tensors taken, skipped {skipped}, created {sorted(created)}"
    return {name: p.float() for name, p in (taken | created).items()}, line


def begin(args, dataset, start, world):
    """Return the State at step `start`: fresh, from --init, or restored."""
    channels, classes = dataset.shape[0], dataset.classes
    g = data.generator(args.seed, "init", 0)
    params = init(args.size, channels=channels, classes=len(classes), generator=g)
    if args.init is not None and not start:
        params, line = warm_start(params, args.init, classes)
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
    run = {name: getattr(args, name) for name in ("size", "init", "seed")}
    run |= {"data": dataset.name, "commit": commit(), "torch": torch.__version__}
    run |= args.recipe._asdict() | {"interval": list(args.recipe.interval)}
    lines = read_log(args.out, start, run)
    metadata = {
        "model": f"MeanFlow (arXiv 2505.13447), averaged weights of a DiT-{args.size}",
        "kind": kind,
        "resolution": str(images[-1]),
        "classes": json.dumps(dataset.classes),
        "run": lines[0],
    }
    vae = None if args.vae is None else sample.load_decoder(args.vae, world.device)
    if args.fid and kind == "latents" and not vae:
        raise ValueError("--fid needs --vae, sd-vae-ft-mse's file, to decode latents")
    scorer = fid.scorer(args.fid, args.inception, images, world) if args.fid else None
    state = begin(args, dataset, start, world)
    model = sample.ImageModel(state.ema, kind, shape, vae)
    data.barrier()
    log = open_log(args.out, lines) if world.rank == 0 else None
    return model, scorer, state, metadata, log


# --- training ---


def any_process(flag):
    """Return whether `flag` is set in any process. Uses gloo, so it does not wait for a GPU."""
    flag = torch.tensor(int(flag))
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def save(folder, step, state, model, metadata, skip_grid):
    """Write the sample grid, always from the same noise, then the checkpoint; on SIGTERM skip the
    grid. Raise ValueError, and write nothing, if a weight is not finite."""
    if not all(p.isfinite().all() for p in state.params.values()):
        raise ValueError(f"the weights are not finite after step {step}; {last_good(folder)}")
    if not skip_grid:
        labels = torch.arange(100) * config(model.params).classes // 100
        x = sample.generate(model.params, labels, model.shape)
        sample.save_grid(sample.to_uint8(x, model.kind, model.vae), folder / f"grid-{step:08}.png")
    save_checkpoint(folder, step, state, metadata)


def main(argv, world):
    args = parse_arguments(argv)
    recipe, folder, step = args.recipe, args.out, find_start(args, world)
    dataset = load_dataset(args, world)
    model, scorer, state, metadata, log = open_run(args, dataset, step, world)
    params, ema, adam = state
    objective = parallel(Objective(params, recipe, args.compile), world)

    terminated, stopped, history = Event(), False, []
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    batches = stream(dataset, recipe.batch, args.seed, step, world, args.accumulate)
    steps = range(step + 1, recipe.steps + 1)
    for step in tqdm(steps, initial=step, total=recipe.steps, disable=world.rank > 0):
        parts = next(batches)
        for k, (x, y, draws, equal) in enumerate(parts, 1):
            objective.require_backward_grad_sync = k == len(parts)  # DDP averages gradients once
            loss, rows = objective(x, y, draws, equal)
            (loss / len(parts)).backward()
            history.append((step, rows))
        adam.step()
        adam.zero_grad()
        torch._foreach_lerp_([*ema.values()], [p.detach() for p in params.values()], 1 - recipe.ema)

        stopped = any_process(terminated.is_set())
        saving = stopped or step % args.save == 0 or step % LASTING == 0 or step == recipe.steps
        if saving or step % LOG_EVERY == 0:
            log_means(log, folder, history)
            history.clear()
        if saving and world.rank == 0:
            save(folder, step, state, model, metadata, skip_grid=stopped)
        if stopped:
            break
        if saving and scorer:
            log_scores(log, step, model, scorer, args.count, world)
    if stopped and world.rank == 0:
        print(f"stopped by SIGTERM after step {step}, which is saved: the same command continues")
    elif world.rank == 0:
        report(model, dataset, folder)


if __name__ == "__main__":
    data.launch(main)
