"""Train MeanFlow: by default on the embedded digits, in about two minutes on a laptop.

    python train.py
    python train.py --size iT                                the digits, by improved MeanFlow
    torchrun --nproc-per-node 2 train.py                     the digits, shared by two processes
    torchrun --nproc-per-node 8 train.py --size XL --data data/imagenet       on eight GPUs

The same command continues a stopped run from its last save, with any number of processes. SIGTERM
or Ctrl-C makes it save, without grid and scores, and end; a second one ends it. Its folder holds

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
import os
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
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

import data
import evaluate
import imf
import meanflow
import model
import runtime
import sample
import weights
from weights import Method, Sampler, checkpoint, checkpoints, dit_method, image_shape, imf_method

LOG_EVERY = 50  # steps
ASK_EVERY = 10  # steps between questions to the other processes, for which the host waits
SAVE_EVERY, SAVE_SHARE = 500, 0.02  # steps, and share of the time, by default


# --- recipes ---


class Plan(NamedTuple):
    """The numbers that, with method and data, determine a run."""

    lr: float  # Adam's step size
    batch: int  # rows a step, over all processes
    steps: int
    ema: float | tuple = 0.9999  # decay of the averaged weights; of several, the first is drawn
    warmup: int = 0  # steps in which lr grows from 0
    seed: int = 0
    precision: str = "float32"  # of GEMMs, or "bfloat16"
    betas: tuple = (0.9, 0.95)  # Adam's
    ema_every: int = 1  # steps between those after which weights are averaged


class Recipe(NamedTuple):
    guidance: tuple | None  # omega, kappa, times between which it acts; None: it is drawn
    lr: float
    batch: int
    epochs: int
    images: int  # of the data set that the epochs are for
    ema: float
    warmup: int = 0  # epochs


RECIPES = {  # Table 4 and the authors' code, for each of model.SIZES
    "T/2": Recipe((1.0, 0.3, (0.0, 0.5)), 3e-3, 64, 107, 1797, 0.998),  # ours, for the digits
    "S/2": Recipe((1.0, 0.5, (0.0, 1.0)), 1e-4, 256, 240, 1281167, 0.9999),  # ours: as B/2
    "B/4": Recipe((1.0, 0.5, (0.0, 1.0)), 1e-4, 256, 240, 1281167, 0.9999),  # paper: 80 epochs
    "B/2": Recipe((1.0, 0.5, (0.0, 1.0)), 1e-4, 256, 240, 1281167, 0.9999),
    "M/2": Recipe((1.0, 0.5, (0.0, 1.0)), 1e-4, 256, 240, 1281167, 0.9999),  # guidance assumed
    "L/2": Recipe((0.2, 0.92, (0.0, 0.8)), 1e-4, 256, 240, 1281167, 0.9999),
    "XL/2": Recipe((0.2, 0.92, (0.0, 0.75)), 1e-4, 256, 240, 1281167, 0.9999),
    # improved MeanFlow; the authors' code, for each of imf.SIZES
    "iT/2": Recipe(None, 6e-3, 32, 28, 1797, 0.998),
    "iB/2": Recipe(None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iM/2": Recipe(None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iL/2": Recipe(None, 1e-4, 1024, 640, 1281167, 0.9999, 10),
    "iXL/2": Recipe(None, 1e-4, 1024, 800, 1281167, 0.9999, 10),
}


def make_plan(recipe, images, steps=None, seed=0, precision="float32"):
    """Return the Plan of a recipe for a data set of so many images, with so many steps if given.

    A smaller one than the recipe's takes more epochs, but fewer steps: both by the square root.
    """
    epochs = recipe.epochs * max(1, math.sqrt(recipe.images / images))
    steps = steps or LOG_EVERY * max(1, round(epochs * images / recipe.batch / LOG_EVERY))
    warmup = round(recipe.warmup / recipe.epochs * steps)
    return Plan(recipe.lr, recipe.batch, steps, recipe.ema, warmup, seed, precision)


# --- what is trained ---


class State(NamedTuple):
    params: dict
    ema: dict  # {decay: their average over steps}, as Plan.ema has them
    adam: torch.optim.Adam


class Objective(torch.nn.Module):
    """A module whose forward is the loss, for DistributedDataParallel to wrap.

    Wrapping the network would not do: jvp fails on the wrapper, and on the network inside it trains
    without ever averaging gradients.
    """

    def __init__(self, loss, params, precision="float32"):
        super().__init__()
        self.loss, self.params, self.mixed = loss, params, precision == "bfloat16"
        self.weights = torch.nn.ParameterList(params.values())  # where DDP finds them

    def forward(self, x, y, draws, equal):
        """Return the mean loss, and each row's t, r, loss and raw squared errors, (B, 3 + k)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.mixed):
            loss, raw = self.loss(self.params, x, y, draws, equal)
        rows = torch.stack((draws.t, draws.r, loss.detach()), 1)
        return loss.mean(), torch.cat((rows, raw.reshape(len(raw), -1)), 1)


def parallel(objective, world):
    """Wrap the objective so that processes average their gradients, if there are several."""
    if world.size == 1:
        return objective
    # Otherwise the compiler cuts graphs where DDP's buckets end, and loses no_grad at the cuts.
    torch._dynamo.config.optimize_ddp = False
    wait = timedelta(minutes=30)  # of the others, while the first saves
    group = dist.new_group(backend="nccl", timeout=wait) if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, process_group=group, gradient_as_bucket_view=True)


def stream(method, dataset, plan, start, world, parts=1):
    """Yield, from step `start` on, this process's rows on its device, in so many parts.

    A part is (x, y, draws, how many of its first rows have r = t). They are made on the CPU for the
    whole batch, so any number of processes, on any device, trains the same run. A thread prepares
    the steps to come.
    """
    order = dict(seed=plan.seed, rank=world.rank, world=world.size, latents=method.latents)

    def make(step):
        g = runtime.generator(plan.seed, "draws", step)
        draws = method.draw((plan.batch, *dataset.shape), generator=g)
        draws = tree_map(lambda a: a[world.rank :: world.size], draws)
        rows, made = (*data.batch(dataset, plan.batch, step=step, **order), draws), []
        for k in range(parts):
            part = tree_map(lambda a: a[k::parts], rows)
            equal = meanflow.count_equal(part[2].t, part[2].r)
            made.append((*tree_map(lambda a: a.to(world.device), part), equal))
        return made

    return data.prefetch(make, count(start))


# --- the run's folder ---


def saved_tensors(state):
    """Return what a save holds, {kind of file: {name: tensor}}."""
    continued = {
        f"{kind}.{name}": tensor
        for name, p in state.params.items()
        for kind, tensor in {"weights": p, **state.adam.state[p]}.items()
    }
    (_, first), *others = state.ema.items()
    return {"state": continued} | {f"ema{decay}": p for decay, p in others} | {"ema": first}


def read_log(folder, step, run):
    """Return the lines of log.jsonl up to `step`, or just `run` if nothing was ever saved. Raise
    ValueError if they are another run's, or no run's."""
    path, half_saves = folder / "log.jsonl", weights.orphans(folder)
    first, *rest = runtime.read_lines(path) or [{}]
    saved = step or half_saves or (folder / "curve.png").exists()
    is_run = first.keys() >= {"lr", "batch", "steps"}
    if not saved and not rest and (is_run or not os.path.lexists(path)):
        return [json.dumps(run)]  # an earlier try may have failed before its first save
    if not first or not (saved or is_run):
        raise ValueError(f"{path} is missing, or not the log of a run: choose another --out")
    weights.check_run(folder, first, run)
    if rest and not (step or half_saves):
        runtime.say(f"{folder} holds no save: starting from step 0", file=sys.stderr)
    kept = [line for line in rest if isinstance(k := line.get("step", 0), int) and k <= step]
    return [json.dumps(line) for line in [first, *kept]]


def begin_log(folder, start, lines):
    """Lock the folder, write these lines to its log.jsonl and return the lock. Raise ValueError if
    there are averaged weights that the run would write again."""
    lock = runtime.lock_folder(folder)
    last = max(checkpoints(folder, "ema"), default=0)
    if last > start:
        lock.release()
        where = f"{checkpoint(folder, 'ema', last)} is later than the save to continue from"
        raise ValueError(f"{where}, step {start}: move it elsewhere, or choose another --out")
    runtime.sweep(folder)
    with runtime.atomic_write(folder / "log.jsonl") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    return lock


# --- what is watched ---


class Run(NamedTuple):
    """A run in its folder, seen from one process."""

    folder: Path
    dataset: data.Dataset
    plan: Plan
    state: State
    sampler: Sampler  # of the averaged weights
    method: Method
    metadata: dict  # what checkpoints say of themselves
    lock: object | None  # the folder's, in the first process alone, which writes to it
    world: runtime.World


def log_means(run, history, grad_norm, rate):
    """Write a line of means over `history`, [(step, rows as `Objective` returns)], and the rest.

    Returns what to watch, formatted. Beside saving, this is the only place where the host waits for
    the device. Raises ValueError in all processes if a value in any is not finite.
    """
    rows = torch.cat([torch.nn.functional.pad(rows, (1, 0), value=step) for step, rows in history])
    rows = torch.cat(runtime.all_gather(rows.double().cpu()))
    step, t, r, loss, raw, *more = rows.unbind(1)
    bad = rows[~rows.isfinite().all(1)]
    if len(bad):
        bad = bad[bad[:, 0] == bad[:, 0].min()]
        times = ", ".join(f"({t:.4f}, {r:.4f})" for _, t, r, *_ in bad[:8].tolist())
        times += ", ..." * (len(bad) > 8)
        where = f"step {bad[0, 0]:.0f} in {len(bad)} rows, with (t, r) = {times}"
        raise ValueError(f"the loss is not finite at {where}; {weights.last_good(run.folder)}")

    def mean(values):
        return values.mean().item() if len(values) else None

    watched = {"raw_equal": (raw, t == r), "raw_differ": (raw, t > r)}
    more = zip(run.method.errors, more, strict=True)
    watched |= {f"raw_{name}": (error, t >= 0) for name, error in more}  # all rows
    quarter = (4 * t).long().clamp(max=3)
    means = {name: mean(error[rows]) for name, (error, rows) in watched.items()}
    line = {"step": int(step.max()), "loss": mean(loss), **means, "grad_norm": grad_norm}
    line |= {"images_per_second": round(rate, 1), "time": round(time.time(), 3)}
    for name, (error, rows) in watched.items():
        line[f"{name}_by_t"] = [mean(error[rows & (quarter == k)]) for k in range(4)]
    if run.lock:
        runtime.append_line(run.folder / "log.jsonl", line)
    shown = (*means, "grad_norm", "images_per_second")
    return {name: f"{line[name]:.4g}" for name in shown if line[name] is not None}


def log_scores(run, score, since=0):
    """Write the scores of each lasting save from step `since` on, and the run's last, if missing.

    score(sampler, known) -> the line of a checkpoint, or the one of `known` that is it.
    """
    if score is None:
        return
    known, saves = runtime.read_lines(run.folder / "log.jsonl"), checkpoints(run.folder, "ema")
    known, saves = runtime.all_gather((known, saves))[0]
    for step, path in saves.items():
        if step >= since and (step % weights.LASTING == 0 or step == run.plan.steps):
            params, _, identity = weights.read_weights(path)
            params = {name: p.to(run.world.device) for name, p in params.items()}
            line = score(run.sampler._replace(params=params, weights=identity), known)
            if run.lock and line not in known:
                runtime.append_line(run.folder / "log.jsonl", {"step": step} | line)


def find_start(folder, plan, parts):
    """Return the step to continue from. Raise ValueError if the processes or the plan forbid it."""
    if plan.batch % parts:
        hint = "give a multiple of processes times --accumulate"
        raise ValueError(f"--batch {plan.batch} is not divisible by {parts}: {hint}")
    start = weights.newest(folder)
    runtime.agree(start, f"saves in {folder}")
    if start > plan.steps:
        raise ValueError(f"{folder} holds a run of {start} steps: give --steps {start} or more")
    for path in weights.orphans(folder):
        runtime.say(f"{path} is half a save: going on from step {start}", file=sys.stderr)
    return start


def begin(method, plan, device):
    """Return the State before the first step."""
    params = method.init(generator=runtime.generator(plan.seed, "init", 0))
    params = {name: torch.nn.Parameter(p.to(device)) for name, p in params.items()}
    decays = plan.ema if isinstance(plan.ema, tuple) else (plan.ema,)
    ema = {decay: {name: p.detach().clone() for name, p in params.items()} for decay in decays}
    # As in the paper (Table 4): a constant step size, no weight decay, no clipping.
    adam = torch.optim.Adam(params.values(), plan.lr, plan.betas, fused=True)
    for p in params.values():
        moments = {moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")}
        adam.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return State(params, ema, adam)


def open_run(method, dataset, plan, folder, start, world, *, vae, about):
    """Return the Run at step `start`. Write nothing before all processes are ready."""
    facts = dataset.classes, dataset.kind, dataset.shape, method.guidance
    run = about | plan._asdict() | {"data": dataset.name, "commit": runtime.commit()}
    run = json.loads(json.dumps(run | {"torch": torch.__version__}))  # with lists, as in the log
    lines, state = read_log(folder, start, run), begin(method, plan, world.device)
    about = {"kind": dataset.kind, "classes": json.dumps(dataset.classes), "vae": dataset.vae}
    about |= {"run": json.dumps(run), "model": f"{method.name}, averaged weights"} | method.metadata
    if dataset.kind in data.TENSOR:
        _, height, width = image_shape(dataset.kind, dataset.shape)
        about["resolution"] = str(height) if height == width else f"{height}x{width}"
    if start:
        weights.restore(folder, start, saved_tensors(state), run)
    latents = (torch.as_tensor(a, device=world.device) for a in method.latents)
    runtime.barrier()
    lock = begin_log(folder, start, lines) if world.rank == 0 else None
    known = (*facts, *latents, vae, "", dataset.vae, method.floor)
    sampler = Sampler([*state.ema.values()][0], method.net, *known)
    return Run(folder, dataset, plan, state, sampler, method, about, lock, world)


# --- training ---


def draw(run, step, skip_grid=False):
    """Draw the curve and, unless skipped, samples of always the same noise. Say which fail."""

    def draw_grid(path):
        x = sample.generate(run.sampler, sample.choose_shown(run.dataset))
        sample.save_grid(sample.to_uint8(x, run.sampler), path)

    pictures = {run.folder / "curve.png": partial(evaluate.plot, [run.folder])}
    if run.dataset.kind in data.TENSOR and not skip_grid:
        pictures[run.folder / f"grid-{step:08}.png"] = draw_grid
    for path, write in pictures.items():
        try:
            write(path)
        except Exception as error:  # for whatever reason: training is worth more
            runtime.say(f"{path} is left out: {runtime.reason(error)}", file=sys.stderr)


def save(run, step, skip_grid):
    """Write the checkpoint, then pictures. Raise ValueError before if a weight is not finite."""
    if not all(p.isfinite().all() for p in run.state.params.values()):
        last = weights.last_good(run.folder)
        raise ValueError(f"the weights are not finite after step {step}; {last}")
    weights.save_checkpoint(run.folder, step, saved_tensors(run.state), run.metadata)
    draw(run, step, skip_grid)


def add_gradients(objective, parts):
    """Add the gradients of a batch, given in parts, and return all its rows, (B, 3 + k)."""
    rows = []
    for k, (x, y, draws, equal) in enumerate(parts, 1):
        objective.require_backward_grad_sync = k == len(parts)  # DDP averages gradients once
        loss, part = objective(x, y, draws, equal)
        (loss / len(parts)).backward()
        rows.append(part)
    return torch.cat(rows)


def update(state, plan, step):
    """Take Adam's step, move the average after it, and return the norm of the gradients.

    differs from the paper: at first the average is over a tenth of the steps so far, so that it
    holds nothing of the initial weights; a decay of 0.9999 is the paper's from step 90,000 on.
    """
    params = [*state.params.values()]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if plan.warmup:
        state.adam.param_groups[0]["lr"] = plan.lr * min(1, (step - 1) / plan.warmup)
    state.adam.step()
    state.adam.zero_grad()
    if step % plan.ema_every == 0:
        for decay, average in state.ema.items():
            kept = min(decay, (1 + step) / (10 + step)) ** plan.ema_every
            torch._foreach_lerp_([*average.values()], [p.detach() for p in params], 1 - kept)
    return norm


def is_due(step, last, every, share, world):
    """Return whether to save after this step, if saves took this share of the time so far."""
    if step % weights.LASTING == 0 or step == last:
        return True
    due = world.rank == 0 and bool(every or share <= SAVE_SHARE)
    return step % (every or SAVE_EVERY) == 0 and any(runtime.all_gather(due))


def loop(run, objective, batches, start, every, stopping, score):
    """Train from step `start` on. Return the last step, and whether `stopping` was set before."""
    state, plan, world, history, in_saves = run.state, run.plan, run.world, [], 0.0
    interval = 0.1 if sys.stderr.isatty() else 60  # seconds between lines in a scheduler's file
    options = dict(initial=start, total=plan.steps, disable=world.rank > 0, mininterval=interval)
    progress = tqdm(zip(range(start + 1, plan.steps + 1), batches), **options)
    begun = clock = time.monotonic()
    for step, parts in progress:
        history.append((step, add_gradients(objective, parts)))
        norm = update(state, plan, step)
        stopped = step % ASK_EVERY == 0 and any(runtime.all_gather(stopping.is_set()))
        share = in_saves / (time.monotonic() - begun)
        saving = stopped or is_due(step, plan.steps, every, share, world)
        if saving or step % LOG_EVERY == 0:
            rate = plan.batch * len(history) / (time.monotonic() - clock)
            line = log_means(run, history, norm.item(), rate)
            progress.set_postfix(line, refresh=sys.stderr.isatty())
            history.clear()
            clock = time.monotonic()
        if saving:
            if run.lock:
                save(run, step, skip_grid=stopped and step < plan.steps)
            in_saves += time.monotonic() - clock
            if any(runtime.all_gather(stopping.is_set())):
                return step, True
            with runtime.signals(runtime.interrupt, "ending"):  # scores may take hours
                log_scores(run, score, since=step)
            clock = time.monotonic()
    return plan.steps, False


def fit(
    method, dataset, plan, folder, world, *, about=None, parts=1, every=None, vae=None, score=None
):
    """Train a Method on a data.Dataset by a Plan, and return a Sampler of the averaged weights, or
    None if a signal stopped it. The same call continues it from the last save in `folder`.

    world: from runtime.launch, in each process's main thread. about: what the log's first line says
    besides, by which a run is known. parts: in which a process computes its rows, if memory is
    short. every: steps between saves. vae: draws grids of latents. score(sampler, known): as
    evaluate.score, for lasting saves and the last. Raises ValueError or OSError, with one line.
    """
    folder, about = Path(folder), about or {"method": method.name}
    dataset = dataset._replace(mirror=dataset.mirror and method.mirror)
    runtime.agree([about, plan, dataset.name, every, score is None], "data or arguments")
    start = find_start(folder, plan, parts * world.size)
    run = open_run(method, dataset, plan, folder, start, world, vae=vae, about=about)
    try:
        if run.lock and start and not (folder / f"grid-{start:08}.png").exists():
            draw(run, start)  # a kill or a signal came before
        log_scores(run, score)
        objective = parallel(Objective(method.loss, run.state.params, plan.precision), world)
        batches = stream(method, dataset, plan, start, world, parts)
        stopping = Event()
        with runtime.signals(stopping.set, "saving, then ending"):
            step, stopped = loop(run, objective, batches, start, every, stopping, score)
    finally:
        if run.lock:
            run.lock.release()
    if stopped:
        runtime.say(f"stopped by a signal after step {step}, which is saved: run it again to go on")
        return None
    pictures = folder / f"grid-{step:08}.png", folder / "curve.png"
    runtime.say(*(path for path in pictures if path.exists()))
    return run.sampler


# --- the command line ---


def parse_arguments(argv):
    arguments = runtime.parser(__doc__)
    add, whole = arguments.add_argument, runtime.number(int, 1, 99_999_999)  # as saves are named
    add("--size", default="T", help=f"{', '.join(RECIPES)}; /2 may be left out (default: T)")
    add("--data", help="what data.py wrote, or digits (default for T and iT; else data/imagenet)")
    add("--vae", help="its file, to decode grids (default: show a latent's first three channels)")
    add("--fid", metavar="REF", help="log scores of samples against this (see evaluate.py)")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth for --fid (see fid.py)")
    add("--count", type=runtime.number(int, 2), help="samples for --fid (default: 50000)")
    add("--init", help="weights to start from: a file that sample.py can draw from")
    add("--convention", choices=weights.CONVENTIONS, help="of --init (see sample.py)")
    add("--out", type=Path, help="the run's folder (default: runs/digits, runs/XL-2, ...)")
    add("--steps", type=whole, help="the last step of training (default: by the size of the data)")
    add("--batch", type=whole, help="images a step, over all processes (default: the recipe's)")
    add("--lr", type=runtime.number(float, 0), help="Adam's step size (default: the recipe's)")
    guidance = "its factors [and times between which it acts]; 1 0: none (default: the recipe's)"
    add("--guidance", nargs="+", type=float, metavar=("OMEGA KAPPA", "T0 T1"), help=guidance)
    add("--loss", choices=["imf"], help="improved MeanFlow's, on a DiT (default: MeanFlow's)")
    add("--precision", choices=("float32", "bfloat16"), help="of GEMMs (on a GPU: bfloat16)")
    add("--seed", type=runtime.number(int, -(2**63), 2**63 - 1), default=0)
    saves = f"{SAVE_EVERY}, or so many more that saving takes {SAVE_SHARE:.0%} of the time"
    add("--save", type=whole, help=f"steps between saves (default: {saves})".replace("%", "%%"))
    add("--accumulate", type=whole, default=1, help="parts of a batch, if memory is short")
    on_gpu = {"action": argparse.BooleanOptionalAction, "default": torch.cuda.is_available()}
    add("--compile", **on_gpu, help="compile the blocks (default: on a GPU)")
    args = arguments.parse_args(argv)
    if not args.fid:
        runtime.refuse("without --fid", inception=args.inception, count=args.count)
    if args.init is None:
        runtime.refuse("without --init", convention=args.convention)
    return args


def parse_guidance(numbers):
    """Return (omega, kappa, times) of the numbers of --guidance."""
    if len(numbers) in (2, 4):
        omega, kappa, start, end = *numbers, *(0.0, 1.0)[: 4 - len(numbers)]
        if 0 <= omega < math.inf and 0 <= kappa < 1 and 0 <= start <= end <= 1:
            return omega, kappa, (start, end)
    hint = "give OMEGA >= 0, KAPPA in [0, 1) and perhaps T0 <= T1 in [0, 1]"
    raise ValueError(f"--guidance {' '.join(map(str, numbers))}: {hint}")


def choose_recipe(size, batch=None, lr=None, guidance=None, loss=None):
    """Return the name of a size, with /2, and its Recipe with what was given instead."""
    name = size if size in RECIPES else f"{size}/2"
    if name not in RECIPES:
        known = {size, name} & (model.SIZES | imf.SIZES).keys()
        found = "has no recipe: add one to train.RECIPES, or" if known else "is unknown:"
        raise ValueError(f"--size {size} {found} choose one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.guidance is None:
        runtime.refuse(f"as {name} draws its guidance in its loss", guidance=guidance, loss=loss)
    if guidance:
        recipe = recipe._replace(guidance=parse_guidance(guidance))
    return name, recipe._replace(batch=batch or recipe.batch, lr=lr or recipe.lr)


def check_dataset(dataset, name, size, vae, fid):
    """Raise ValueError unless the data set of this name suits the size and the flags."""
    *_, patch = (model.SIZES | imf.SIZES)[size]
    if any(side % patch for side in dataset.shape[1:]):
        found = f"{name} holds {dataset.shape}, not divisible by patches of {patch}"
        raise ValueError(f"{found}: choose another --size, or convert with another --resolution")
    if dataset.kind == "pixels":
        runtime.refuse(f"as {name} holds pixels", vae=vae)
    if fid and not vae and dataset.kind == "latents":
        raise ValueError("--fid needs --vae, sd-vae-ft-mse's file, to decode latents")


def choose_guidance(recipe, name, classes, given):
    """Return the recipe's guidance; of a single class none, where no other must be `given`."""
    if recipe.guidance is None or classes > 1:
        return recipe.guidance
    if given and given[:2] != [1, 0]:
        raise ValueError(f"--guidance would be ignored as {name} has one class: leave it out")
    return weights.NO_GUIDANCE


def announce(size, plan, dataset, guidance):
    """Print what will be trained, on what and for how long."""
    epochs = plan.steps * plan.batch / len(dataset.items)
    scale = f"scale {guidance[0] / (1 - guidance[1]):.3g}" if guidance else "scales drawn"
    growth = f", --lr grows for {plan.warmup:,} steps" if plan.warmup else ""
    what = f"{size} on {len(dataset.items):,} images of {len(dataset.classes):,} classes"
    length = f"{plan.steps:,} steps of {plan.batch} are {epochs:,.0f} epochs"
    runtime.say(f"{what}: {length}; guidance {scale}{growth}")


def main(argv, world):
    args = parse_arguments(argv)
    size, recipe = choose_recipe(args.size, args.batch, args.lr, args.guidance, args.loss)
    precision = args.precision or ("bfloat16" if torch.cuda.is_available() else "float32")
    embedded = args.data is None and size in ("T/2", "iT/2")
    name = "digits" if embedded else args.data or "data/imagenet"
    dataset = data.digits() if embedded else data.load_data(name, world.rank, world.size)
    check_dataset(dataset, name, size, args.vae, args.fid)
    folder = "digits" if (dataset.name, size) == ("digits", "T/2") else size.replace("/", "-")
    folder = args.out or Path("runs", folder)
    guidance = choose_guidance(recipe, name, len(dataset.classes), args.guidance)
    plan = make_plan(recipe, len(dataset.items), args.steps, args.seed, precision)
    announce(size, plan, dataset, guidance)

    about = {"size": size, "init": args.init, "convention": args.convention, "loss": args.loss}
    options = dict(channels=dataset.shape[0], classes=len(dataset.classes), compiled=args.compile)
    if size in imf.SIZES:
        method = imf_method(size, kind=dataset.kind, **options)
    else:
        method = dit_method(size, guidance=guidance, improved=bool(args.loss), **options)
        about |= dict(zip(("omega", "kappa", "interval"), guidance))
    if args.init is not None and not weights.newest(folder):
        start = partial(weights.start_from, args.init, args.convention, dataset.classes)
        method = method._replace(init=partial(start, method.init))
    images, score = image_shape(dataset.kind, dataset.shape), None
    vae = None if args.vae is None else weights.load_vae(args.vae, world.device, dataset.vae)
    if args.fid:
        samples = evaluate.Samples(args.count or 50_000, vae=args.vae)
        scorer = evaluate.load_scorer(args.fid, args.inception, images, world)
        score = partial(evaluate.score, scorer=scorer, samples=samples, world=world)
    options = dict(about=about, parts=args.accumulate, every=args.save, vae=vae, score=score)
    sampler = fit(method, dataset, plan, folder, world, **options)
    if sampler and dataset.name == "digits" and world.rank == 0:
        evaluate.report(sampler, dataset)


if __name__ == "__main__":
    runtime.launch(main)
