"""The paper's ablations (Table 1, and kappa of its appendix) at a scale for two CPU cores.

    python benchmarks/ablations.py                           run what is missing, on the digits
    python benchmarks/ablations.py --data data/cifar16       on pixels that data.py wrote
    python benchmarks/ablations.py --table                   print all results as Markdown
    python benchmarks/ablations.py --plot ablations.png      draw them

Each run trains a small DiT of 16 tokens from a seed, always for the same number of steps, with one
choice changed, and judges 1,000 one-step samples of its averaged weights. A run is a line of JSON
in ablations.jsonl, and is not repeated if its line is there: a killed table goes on. As many runs
as there are cores go side by side, of one thread each.

What is judged: Fréchet distances of raw pixels in [-1, 1], and of the features of a small
classifier of the real images; the share of samples whose nearest real image is of their class; and
diversity, the median distance of a sample to the nearest other one. A half of the real images,
judged by the other half, says what is to be had.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from step import processor
from torch import nn
from torch.multiprocessing import get_context
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import dual
import fid
import meanflow
import model
import runtime
import sample
import train

RESULTS = Path(__file__).with_name("ablations.jsonl")
STEPS, SEEDS, SAMPLES, NEIGHBOURS = 1000, 3, 1000, 5000
METRICS = ("pixels", "features", "class", "diversity")


class Setting(NamedTuple):
    """What a run may change; the defaults are the paper's."""

    share: float = 0.75  # of the rows have r = t
    tangent: tuple = (1, 1, 0)  # dz / v, dt and dr of the derivative
    condition: str = "t, t - r"
    times: tuple | str = (-0.4, 1.0)  # mean and deviation of the logits of t and r, or "uniform"
    p: float = 1.0
    omega: float = 1.0
    kappa: float = 0.0
    interval: tuple = (0, 1)


HALF = {"omega": 1.0, "kappa": 0.5}  # guidance of scale 2
REAL = "real images"  # in place of samples
TABLES = {  # what is changed: [(label, how, published FID of B/4 after 80 epochs)]
    "a: share of rows with r != t": [
        (REAL, REAL, None),
        ("0 % (flow matching)", {"share": 1.0}, 328.91),
        ("25 %", {}, 61.06),
        ("50 %", {"share": 0.5}, 63.14),
        ("100 %", {"share": 0.0}, 67.32),
    ],
    "b: tangent of (z, t, r)": [
        ("(v, 1, 0)", {}, 61.06),
        ("(v, 0, 0)", {"tangent": (1, 0, 0)}, 268.06),
        ("(v, 0, 1)", {"tangent": (1, 0, 1)}, 329.22),
        ("(v, 1, 1)", {"tangent": (1, 1, 1)}, 137.96),
    ],
    "c: condition": [
        ("t, r", {"condition": "t, r"}, 61.75),
        ("t, t - r", {}, 61.06),
        ("t, r, t - r", {"condition": "t, r, t - r"}, 63.98),
        ("t - r", {"condition": "t - r"}, 63.13),
    ],
    "d: times": [
        ("uniform", {"times": "uniform"}, 65.90),
        ("lognorm(-0.2, 1.0)", {"times": (-0.2, 1.0)}, 63.83),
        ("lognorm(-0.2, 1.2)", {"times": (-0.2, 1.2)}, 64.72),
        ("lognorm(-0.4, 1.0)", {}, 61.06),
        ("lognorm(-0.4, 1.2)", {"times": (-0.4, 1.2)}, 61.79),
    ],
    "e: p of the loss": [
        ("0", {"p": 0.0}, 79.75),
        ("0.5", {"p": 0.5}, 63.98),
        ("1", {}, 61.06),
        ("1.5", {"p": 1.5}, 66.57),
        ("2", {"p": 2.0}, 69.19),
    ],
    "f: guidance scale": [
        ("1 (none)", {}, 61.06),
        ("1.5", {"omega": 1.5}, 33.33),
        ("2", {"omega": 2.0}, 20.15),
        ("3", {"omega": 3.0}, 15.53),
        ("5", {"omega": 5.0}, 20.75),
    ],
    "g: kappa at guidance scale 2": [
        ("0", {"omega": 2.0}, 20.15),
        ("0.5", HALF, 19.15),
        ("0.8", {"omega": 0.4, "kappa": 0.8}, 19.10),
        ("0.9", {"omega": 0.2, "kappa": 0.9}, 18.63),
        ("0.95", {"omega": 0.1, "kappa": 0.95}, 19.17),
    ],
    "h: guided for t in, at scale 2 and kappa 0.5": [
        ("[0, 1]", HALF, None),
        ("[0, 0.75]", HALF | {"interval": (0, 0.75)}, None),
        ("[0, 0.5]", HALF | {"interval": (0, 0.5)}, None),
        ("[0.25, 1]", HALF | {"interval": (0.25, 1)}, None),
    ],
}


# --- the ablated pieces ---


def draw(setting, shape, generator):
    """Return meanflow.Draws of this share and these times."""
    if setting.times != "uniform":
        mean, std = setting.times
        return meanflow.draw(shape, generator=generator, share=setting.share, mean=mean, std=std)
    draws = meanflow.draw(shape, generator=generator, share=setting.share, mean=0, std=1)
    t, r = (torch.special.ndtr(torch.logit(a)) for a in (draws.t, draws.r))
    return draws._replace(t=t, r=r)


def condition(params, t, r, y, *, embedded):
    """Stand in for model.embed_condition: embed each of `embedded`, {embedder: what}."""
    values = {"t": t, "r": r, "t - r": t - r}
    c = sum(model.embed_time(params, name, values[what]) for name, what in embedded.items())
    return F.silu(c + model.embed_label(params, y))


def parameters(setting, size, channels, classes, generator):
    """Return fresh parameters, with one embedder for each time that the setting embeds."""
    params = model.init(size, channels=channels, classes=classes, generator=generator)
    embedded = dict(zip(("t_embedder", "h_embedder", "r_embedder"), setting.condition.split(", ")))
    for name in [name for name in params if name.startswith("h_embedder")]:
        if "r_embedder" in embedded:
            fresh = torch.randn(params[name].shape, generator=generator)
            new = 0.02 * fresh if name.endswith("weight") else torch.zeros_like(params[name])
            params[name.replace("h_", "r_")] = new
        if "h_embedder" not in embedded:
            del params[name]
    return params, partial(condition, embedded=embedded)


def along(net, tangent):
    """Return a net and a jvp for meanflow.fast_loss that differentiate along another tangent."""
    of_v, dt, dr = tangent

    def jvp(f, primals, tangents):
        dz, one = tangents
        return dual.jvp(f, primals, (of_v * dz, dt * one))

    def moving(z, t, r, y):
        if dr and dual.is_dual(t):
            r = dual.Dual(r, torch.full_like(r, dr))
        return net(z, t, r, y)

    return moving, jvp


# --- a run ---


def fit(dataset, setting, seed, steps, watch=lambda *_: None):
    """Train from this seed. Return (net of the averaged weights, or None if not finite)."""
    plan = train.make_plan(train.RECIPES["T/2"], len(dataset.items), steps, seed)
    channels, side, _ = dataset.shape
    size, classes = (64, 4, side // 4), len(dataset.classes)
    g = runtime.generator(seed, "init", 0)
    params, conditioned = parameters(setting, size, channels, classes, g)
    params = {name: nn.Parameter(p) for name, p in params.items()}
    ema = {name: p.detach().clone() for name, p in params.items()}
    adam = torch.optim.Adam(params.values(), plan.lr, betas=(0.9, 0.95), fused=True)
    state = train.State(params, {plan.ema: ema}, adam)
    net, jvp = along(partial(model.dit, params, condition=conditioned), setting.tangent)
    guidance = dict(omega=setting.omega, kappa=setting.kappa, interval=setting.interval)
    equal = int(setting.share * plan.batch)
    for step in range(1, steps + 1):
        x, y = data.batch(dataset, plan.batch, seed=seed, step=step)
        draws = draw(setting, x.shape, runtime.generator(seed, "draws", step))
        options = dict(null=classes, p=setting.p, equal=equal, **guidance)
        rows, raw = meanflow.fast_loss(net, x, y, draws, jvp=jvp, **options)
        rows.mean().backward()
        norm = train.update(state, plan, step)
        watch(step, draws, raw, state)
        if not norm.isfinite():
            return None
    return partial(model.dit, ema, condition=conditioned)


def train_classifier(x, y, classes, steps=1500):
    """Return a classifier of half of the images, without its last layer, and its accuracy."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        channels, side, _ = x.shape[1:]
        net = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, 2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, classes)),
        )
        adam, half = torch.optim.Adam(net.parameters(), 1e-3), len(x) // 2
        for _ in range(steps):
            rows = torch.randint(half, (128,))
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            adam.step()
            adam.zero_grad()
    with torch.no_grad():
        right = [net(part).argmax(1) for part in x[half:].split(1000)]
    return net[:-1].requires_grad_(False), (torch.cat(right) == y[half:]).double().mean().item()


def summary(x):
    return fid.statistics(fid.accumulate(None, x))


class Reference(NamedTuple):
    """What samples are compared with."""

    images: torch.Tensor  # some, to look for neighbours
    labels: torch.Tensor  # of those
    features: nn.Module  # of images
    pixels: tuple  # statistics of all
    featured: tuple


def make_reference(x, labels, features):
    featured = summary(torch.cat([features(part) for part in x.split(1000)]))
    some, few = x[:NEIGHBOURS].flatten(1), labels[:NEIGHBOURS]
    return Reference(some, few, features, summary(x.flatten(1)), featured)


def all_images(dataset):
    """Return every image and its label, shuffled."""
    return data.batch(dataset, len(dataset.labels), seed=0, step=0)


def draw_samples(net, dataset, steps=1, sampler=meanflow.sample):
    """Return samples, of each class equally many, and their classes."""
    classes = torch.arange(SAMPLES) % len(dataset.classes)
    x = sampler(net, sample.noise(0, range(SAMPLES), dataset.shape), classes, steps)
    return x.clamp(-1, 1), classes


def judge(x, classes, reference):
    """Return the METRICS of samples of these classes."""
    flat = x.flatten(1)
    index, _ = fid.nearest(flat, reference.images)
    values = (
        fid.frechet_distance(*summary(flat), *reference.pixels),
        fid.frechet_distance(*summary(reference.features(x)), *reference.featured),
        (reference.labels[index] == classes).double().mean(),
        fid.nearest(flat, flat, exclude_self=True)[1].median(),
    )
    return {name: float(f"{value:.4g}") for name, value in zip(METRICS, values)}


def prepare(folder, features):
    """Set up a process: one thread, the data and what samples are compared with."""
    torch.set_num_threads(1)
    prepare.dataset, prepare.features = data.load_data(folder), features
    prepare.reference = make_reference(*all_images(prepare.dataset), features)


def run(job):
    """Return the line of a job: its key, and METRICS, none of them if the training diverged."""
    begun, metrics = time.time(), {}
    if job["change"] == REAL:
        x, labels = all_images(prepare.dataset)
        k = job["seed"] * SAMPLES % (len(x) // 2)
        x, labels = x.roll(k, 0), labels.roll(k)
        half = make_reference(x[::2], labels[::2], prepare.features)
        metrics = judge(x[1::2][:SAMPLES], labels[1::2][:SAMPLES], half)
    elif net := fit(prepare.dataset, Setting(**job["change"]), job["seed"], job["steps"]):
        metrics = judge(*draw_samples(net, prepare.dataset), prepare.reference)
    return job | metrics | {"seconds": round(time.time() - begun)}


# --- all runs ---


def key(line):
    return json.dumps([line[name] for name in ("data", "steps", "seed", "change")], sort_keys=True)


def read(path):
    """Return the lines of a file of results; what a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def run_missing(run, jobs, path, about, initargs, workers=None):
    """Run the jobs side by side, and add the line of each to a file of results, with `about`."""
    options = dict(mp_context=get_context("spawn"), initializer=prepare, initargs=initargs)
    pool = ProcessPoolExecutor(workers, **options)
    with path.open("a+") as file:
        file.seek(0)
        if (text := file.read()) and not text.endswith("\n"):  # a line cut short
            file.write("\n")
        pending = [pool.submit(run, job) for job in jobs]
        try:
            for done in tqdm(as_completed(pending), total=len(jobs)):
                file.write(json.dumps(done.result() | about) + "\n")
                file.flush()
        finally:
            pool.shutdown(cancel_futures=True)


def jobs(name, tables, seeds, steps):
    """Return all runs of these tables, each once, those of the first seed first."""
    rows = [how for title, rows in TABLES.items() if title[0] in tables for _, how, _ in rows]
    about = [
        {"data": name, "steps": steps, "seed": seed, "change": how}
        for seed in range(seeds)
        for how in rows
    ]
    return list({key(job): job for job in about}.values())


def run_all(args):
    dataset, name = data.load_data(args.data), Path(args.data).name
    if dataset.kind != "pixels" or dataset.shape[1] % 4:
        raise ValueError(f"{args.data} holds {dataset.kind} of {dataset.shape}: give pixels of 4n")
    x, y = all_images(dataset)
    features, accuracy = train_classifier(x, y, len(dataset.classes))
    done = {key(line) for line in read(RESULTS)}
    todo = [job for job in jobs(name, args.tables, args.seeds, args.steps) if key(job) not in done]
    about = machine() | {"accuracy": round(accuracy, 4)}
    run_missing(run, todo, RESULTS, about, (args.data, features), args.workers)


def machine():
    """Return what a line says of where it was made."""
    commit = runtime.commit() or ""
    commit = commit[:12] + "+" * commit.endswith("+")
    return {"commit": commit, "torch": torch.__version__, "machine": processor()}


# --- what came out ---


def collect(lines, name, how, metric):
    """Return the values of a setting by seed; those of diverged runs are infinite."""
    same = json.loads(json.dumps(how))
    found = [line for line in lines if line["data"] == name and line["change"] == same]
    return [line.get(metric, math.inf) for line in found]


def ranks(values):
    """Return the rank of each value; equal ones share the mean of theirs."""
    values = torch.tensor(values, dtype=torch.float64)
    below, up_to = values[:, None] > values, values[:, None] >= values
    return (below.sum(1) + up_to.sum(1)) / 2


def correlation(lines, rows, name, metric):
    """Return Spearman's rank correlation with the paper's column, as text."""
    pairs = [(fid, collect(lines, name, how, metric)) for _, how, fid in rows if fid]
    if metric not in ("pixels", "features") or not pairs or not all(found for _, found in pairs):
        return ""
    published, ours = zip(*((fid, statistics.mean(found)) for fid, found in pairs))
    return f"{torch.corrcoef(torch.stack((ranks(published), ranks(ours))))[0, 1]:.2f}"


def cell(values, metric, seeds):
    if not values:
        return "-"
    if math.inf in values:
        return f"diverged ({values.count(math.inf)} of {len(values)})"
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
    form = "{:.0%}" if metric == "class" else "{:.0f}" if mean >= 100 else "{:.3g}"
    text = f"{form.format(mean)} ± {form.format(spread)}" if spread else form.format(mean)
    return text + (f" (of {len(values)})" if len(values) < seeds else "")


def table(lines):
    """Print the tables as Markdown: mean and deviation over seeds."""
    names = list(dict.fromkeys(line["data"] for line in lines))
    seeds = {name: len({k["seed"] for k in lines if k["data"] == name}) for name in names}
    for name in names:
        runs = [line for line in lines if line["data"] == name]
        hours = sum(line["seconds"] for line in runs) / 3600
        keys = ("steps", "machine", "torch", "commit", "accuracy")
        steps, *about = [", ".join(sorted({str(line[key]) for line in runs})) for key in keys]
        print(
            f"- {name}: {len(runs)} runs of {steps} steps, {seeds[name]} seeds; {hours:.1f} hours"
        )
        print("  of one core, {}, torch {}, commit {}, classifier's accuracy {}".format(*about))
    shown = [(name, metric) for name in names for metric in METRICS]
    for title, rows in TABLES.items():
        header = [title, "paper", *(f"{name} {metric}" for name, metric in shown)]
        print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
        for label, how, published in rows:
            cells = [label, f"{published:.2f}" if published else ""]
            for name, metric in shown:
                cells.append(cell(collect(lines, name, how, metric), metric, seeds[name]))
            print(f"| {' | '.join(cells)} |")
        correlations = [correlation(lines, rows, *pair) for pair in shown]
        print(f"| *rank correlation with the paper's* | | {' | '.join(correlations)} |")


def plot(lines, path):
    """Draw each table's distances, in those of the default or first row, and the paper's."""
    names = list(dict.fromkeys(line["data"] for line in lines))
    figure = Figure((16, 7), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (title, rows) in zip(axes.flat, TABLES.items()):
        labels, hows, published = zip(*[row for row in rows if row[1] != REAL])
        base = {} if {} in hows else hows[0]
        if all(published):
            unit = published[hows.index(base)]
            axis.plot(labels, [value / unit for value in published], "ko--", label="paper, FID")
        for name, metric, style in (
            (name, *pair) for name in names for pair in (("pixels", "s-"), ("features", "^:"))
        ):
            found = [collect(lines, name, how, metric) for how in hows]
            found = [[v for v in values if v < math.inf] or [math.nan] for values in found]
            unit = statistics.mean(found[hows.index(base)])
            means = [statistics.mean(values) / unit for values in found]
            spread = [statistics.stdev(v) / unit if len(v) > 1 else 0 for v in found]
            axis.errorbar(labels, means, spread, fmt=style, label=f"{name}, {metric}")
        axis.set(title=title, yscale="log")
        axis.tick_params(axis="x", labelrotation=20)
    axes.flat[0].legend()
    figure.supylabel("distance, beside the default's (in g and h the first row's)")
    figure.savefig(path, dpi=80)


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", default="digits", help="digits, or a folder of pixels")
    parser.add_argument("--tables", default="abcdefgh", help="their letters (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", metavar="PNG")
    args = parser.parse_args(argv)
    lines = [line for line in read(RESULTS) if line["steps"] == args.steps]
    if args.table:
        table(lines)
    elif args.plot:
        plot(lines, args.plot)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
