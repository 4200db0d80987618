"""Two figures on the digits: how many steps are needed, and what a run's errors look like.

    python benchmarks/curves.py                            run what is missing, into curves.jsonl
    python benchmarks/curves.py --plot steps.png errors.png      draw both (needs matplotlib)

Steps: MeanFlow beside flow matching of the same network and data in the same time, by Euler's and
by Heun's method, judged as in ablations.py by the number of evaluations of the network.
Errors: raw squared errors of runs with other shares of r != t, and with p = 0: by (t, r) in the
first, a middle and the last tenth of the training, and their quantiles in the last.
"""

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import ablations
import torch
from ablations import Setting, fit, judge, train_classifier

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import meanflow

RESULTS = Path(__file__).with_name("curves.jsonl")
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
BINS = 6  # of t, and of r
QUANTILES = (0.5, 0.9, 0.99, 1.0)


def euler(net, e, y, evaluations):
    return meanflow.sample(lambda z, t, r, y: net(z, t, t, y), e, y, evaluations)


@torch.no_grad()
def heun(net, e, y, evaluations):
    """Follow the velocity u(z, t, t) by Heun's method, of two evaluations a step."""
    z = e
    for t, r in pairwise(torch.linspace(1, 0, evaluations // 2 + 1).expand(len(e), -1).unbind(1)):
        dt = meanflow.append_dims(t - r, z)
        v = net(z, t, t, y)
        z = z - dt * (v + net(z - dt * v, r, r, y)) / 2
    return z


METHODS = {  # sampler, what is changed, time of a step beside MeanFlow's (by count), evaluations
    "MeanFlow": (meanflow.sample, {}, 1.0, EVALUATIONS),
    "flow matching, Euler": (euler, {"share": 1.0}, 1 / 1.09, EVALUATIONS),
    "flow matching, Heun": (heun, {"share": 1.0}, 1 / 1.09, EVALUATIONS[1:]),
}
ERRORS = {  # runs whose errors are watched
    "0 %": {"share": 1.0},
    "25 %": {},
    "50 %": {"share": 0.5},
    "100 %": {"share": 0.0},
    "25 %, p = 0": {"p": 0.0},
}


def steps_line(job):
    """Return the job with the METRICS by number of evaluations, of each method."""
    found = {}
    for change in ({}, {"share": 1.0}):
        methods = {name: m for name, m in METHODS.items() if m[1] == change}
        cost = next(iter(methods.values()))[2]
        steps = round(job["steps"] / cost)
        net = fit(ablations.prepare.dataset, Setting(**change), job["seed"], steps)
        for name, (sampler, _, _, evaluations) in methods.items():
            judged = [judge(net, ablations.prepare.reference, n, sampler) for n in evaluations]
            found[name] = dict(zip(map(str, evaluations), judged))
    return job | found


def errors_line(job):
    """Return the job with mean errors by (t, r) in three tenths of the training, and QUANTILES."""
    steps, rows = job["steps"], {0: [], 1: [], 2: []}
    starts = 0, steps * 9 // 20, steps - steps // 10

    def watch(step, draws, raw, state):
        for k, start in enumerate(starts):
            if start < step <= start + steps // 10:
                rows[k].append(torch.stack((draws.t, draws.r, raw), 1))

    fit(ablations.prepare.dataset, Setting(**ERRORS[job["errors"]]), job["seed"], steps, watch)
    maps = []
    for t, r, raw in (torch.cat(part).unbind(1) for part in rows.values()):
        place = (t * BINS).long().clamp(max=BINS - 1), (r * BINS).long().clamp(max=BINS - 1)
        total, count = (
            torch.zeros(BINS, BINS).index_put_(place, w, accumulate=True)
            for w in (raw, torch.ones_like(raw))
        )
        means = (total / count).masked_fill((count < 10), torch.nan)
        maps.append([[None if m.isnan() else round(m.item(), 2) for m in row] for row in means])
    quantiles = {}
    for name, chosen in (("r = t", t == r), ("r != t", t != r)):
        if chosen.any():
            of = raw[chosen].quantile(torch.tensor(QUANTILES))
            quantiles[name] = [round(q.item(), 2) for q in of]
            quantiles[f"mean, {name}"] = round(raw[chosen].mean().item(), 2)
    return job | {"maps": maps, "quantiles": quantiles}


def run(job):
    return steps_line(job) if "errors" not in job else errors_line(job)


def jobs(steps, seeds):
    found = [{"seed": seed, "steps": steps} for seed in range(seeds)]
    return found + [{"errors": name, "seed": 0, "steps": steps // 3} for name in ERRORS]


def run_all(steps, seeds):
    lines = ablations.read(RESULTS)
    todo = [job for job in jobs(steps, seeds) if not any(job.items() <= k.items() for k in lines)]
    x, y = data.batch(data.digits(), 1797, seed=0, step=0)
    initargs = "digits", train_classifier(x, y, 10)[0]
    ablations.run_missing(run, todo, RESULTS, ablations.machine(), initargs)


def plot_steps(pyplot, lines, path):
    """Draw the distances by number of evaluations, mean and deviation over seeds."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, metric in zip(axes, ("pixels", "features")):
        for name, (*_, evaluations) in METHODS.items():
            found = [[line[name][str(n)][metric] for line in lines] for n in evaluations]
            spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in found]
            means = [*map(statistics.mean, found)]
            axis.errorbar(evaluations, means, spread, marker="o", label=name)
        axis.set(xscale="log", yscale="log", title=f"Fréchet distance, {metric}")
        axis.set(xlabel="evaluations of the network", xticks=EVALUATIONS, xticklabels=EVALUATIONS)
    axes[0].legend()
    figure.savefig(path, dpi=80)


def plot_errors(pyplot, lines, path):
    lines = {line["errors"]: line for line in lines}
    figure, axes = pyplot.subplots(1, 5, figsize=(19, 4), layout="constrained")
    maps = lines["25 %"]["maps"]
    for axis, means, when in zip(axes, maps, ("first", "middle", "last")):
        grid = torch.tensor([[m or torch.nan for m in row] for row in means])
        shown = axis.imshow(grid.T, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=200)
        axis.set(title=f"raw error, {when} tenth", xlabel="t", ylabel="r")
    figure.colorbar(shown, ax=axes[2])
    for name in ("25 %, p = 0", "25 %"):
        for rows, style in (("r = t", "o-"), ("r != t", "s--")):
            label = f"{'p = 0' if 'p = 0' in name else 'p = 1'}, {rows}"
            quantiles = lines[name]["quantiles"][rows]
            axes[3].plot(["50 %", "90 %", "99 %", "100 %"], quantiles, style, label=label)
    axes[3].set(title="quantiles of the raw error", yscale="log")
    axes[3].legend()
    for rows, style in (("r = t", "o-"), ("r != t", "s--")):
        found = {k: v["quantiles"].get(f"mean, {rows}") for k, v in lines.items() if "p" not in k}
        found = {k: found[k] for k in ERRORS if found.get(k)}
        axes[4].plot([*found], [*found.values()], style, label=rows)
    axes[4].set(title="mean raw error by share of r != t", yscale="log", ylim=(10, None))
    axes[4].legend()
    figure.savefig(path, dpi=80)


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", nargs=2, metavar=("STEPS.PNG", "ERRORS.PNG"))
    args = parser.parse_args(argv)
    if not args.plot:
        return run_all(args.steps, args.seeds)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = ablations.read(RESULTS)
    plot_steps(pyplot, [line for line in lines if "errors" not in line], args.plot[0])
    plot_errors(pyplot, [line for line in lines if "errors" in line], args.plot[1])


if __name__ == "__main__":
    main()
