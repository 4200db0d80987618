"""Two figures on the digits: how many steps are needed, and what a run's errors look like.

    python benchmarks/curves.py                            run what is missing, into curves.jsonl
    python benchmarks/curves.py --plot steps.png errors.png      draw both

Steps: MeanFlow beside plain flow matching (p = 0) of the same network and data in the same time, by
Euler's and by Heun's method, judged as in ablations.py by the number of evaluations of the network.
Errors: raw squared errors by (t, r) in the first, a middle and the last tenth of the training, and
their quantiles in the last, also with p = 0; and the part of them that is the variance of the
target, by the share of r != t.
"""

import argparse
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import ablations
import torch
from ablations import Setting, draw_samples, fit, judge, train_classifier
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import meanflow
import runtime

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


FLOW = {"share": 1.0, "p": 0.0}  # flow matching
METHODS = {  # sampler, what is trained, evaluations
    "MeanFlow": (meanflow.sample, {}, EVALUATIONS),
    "flow matching, Euler": (euler, FLOW, EVALUATIONS),
    "flow matching, Heun": (heun, FLOW, EVALUATIONS[1:]),
}
COST = 1.09  # of a step of MeanFlow, in flow matching's
ERRORS = {  # runs whose errors are watched
    "0 %": {"share": 1.0},
    "25 %": {},
    "50 %": {"share": 0.5},
    "100 %": {"share": 0.0},
    "25 %, p = 0": {"p": 0.0},
}


def steps_line(job):
    """Return the job with the METRICS by number of evaluations, of each method."""
    dataset, found = ablations.prepare.dataset, {}
    nets = [
        fit(dataset, Setting(**change), job["seed"], round(steps))
        for change, steps in (({}, job["steps"]), (FLOW, COST * job["steps"]))
    ]
    for name, (sampler, change, evaluations) in METHODS.items():
        for n in evaluations:
            samples = draw_samples(nets[change == FLOW], dataset, n, sampler)
            judged = judge(*samples, ablations.prepare.reference)
            found.setdefault(name, {})[str(n)] = judged
    return job | found


def target_variance(net, dataset, rows=2000):
    """Return the variance of the target given z, where r = t and elsewhere.

    Another image of the class, drawn with the chance that it became z, has the same z and another
    velocity, and so another target; half of their squared distance is the variance.
    """
    x, labels = ablations.all_images(dataset)
    g = runtime.generator(0, "samples", 0)
    chosen = torch.randint(len(x), (rows,), generator=g)
    e, t, r, _ = meanflow.draw((rows, *dataset.shape), generator=g, share=0.5)
    z, v = meanflow.interpolate(x[chosen], e, t)
    y, a = labels[chosen], (1 - t)[:, None]
    squares = (x.flatten(1) ** 2).sum(1) * a**2 - 2 * a * z.flatten(1) @ x.flatten(1).T
    logits = (-squares / (2 * t[:, None] ** 2)).masked_fill(y[:, None] != labels, -torch.inf)
    other = torch.multinomial(logits.double().softmax(1), 1, generator=g)[:, 0]
    t4 = meanflow.append_dims(t, z)
    u = (z - (1 - t4) * x[other]) / t4 - x[other]
    targets = [meanflow.target(net, z, t, r, velocity, y) for velocity in (v, u)]
    variance = (targets[0] - targets[1]).square().flatten(1).sum(1) / 2
    return {"r = t": variance[t == r].mean().item(), "r != t": variance[t > r].mean().item()}


def errors_line(job):
    """Return the job with mean errors by (t, r) in three tenths of the training, QUANTILES and
    means of the last, and the target's variance at its end."""
    steps, rows = job["steps"], {0: [], 1: [], 2: []}
    starts = 0, steps * 9 // 20, steps - steps // 10

    def watch(step, draws, raw, state):
        for k, start in enumerate(starts):
            if start < step <= start + steps // 10:
                rows[k].append(torch.stack((draws.t, draws.r, raw), 1))

    dataset = ablations.prepare.dataset
    net = fit(dataset, Setting(**ERRORS[job["errors"]]), job["seed"], steps, watch)
    maps = []
    for t, r, raw in (torch.cat(part).unbind(1) for part in rows.values()):
        place = [(a * BINS).long().clamp(max=BINS - 1) for a in (t, r)]
        total, count = (
            torch.zeros(BINS, BINS).index_put_(place, w, accumulate=True)
            for w in (raw, torch.ones_like(raw))
        )
        means = (total / count).masked_fill(count < 10, torch.nan)
        maps.append([[None if m.isnan() else round(m.item(), 2) for m in row] for row in means])
    quantiles, means = {}, {}
    for name, chosen in (("r = t", t == r), ("r != t", t != r)):
        if chosen.any():
            of = raw[chosen].quantile(torch.tensor(QUANTILES))
            quantiles[name] = [round(q.item(), 2) for q in of]
            means[name] = round(raw[chosen].mean().item(), 2)
    variance = {name: round(v, 2) for name, v in target_variance(net, dataset).items()}
    return job | {"maps": maps, "quantiles": quantiles, "means": means, "variance": variance}


def run(job):
    return steps_line(job) if "errors" not in job else errors_line(job)


def jobs(steps, seeds):
    found = [{"seed": seed, "steps": steps} for seed in range(seeds)]
    return found + [{"errors": name, "seed": 0, "steps": steps // 3} for name in ERRORS]


def key(line):
    return line.get("errors"), line["seed"], line["steps"]


def run_all(steps, seeds):
    done = {key(line) for line in ablations.read(RESULTS)}
    todo = [job for job in jobs(steps, seeds) if key(job) not in done]
    features, _ = train_classifier(*ablations.all_images(data.digits()), 10)
    ablations.run_missing(run, todo, RESULTS, ablations.machine(), ("digits", features))


def plot_steps(lines, path):
    """Draw the distances by number of evaluations, mean and deviation over seeds."""
    figure = Figure((11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
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


def plot_errors(lines, path):
    lines = {line["errors"]: line for line in lines}
    figure = Figure((19, 4), layout="constrained")
    axes = figure.subplots(1, 5)
    maps = lines["25 %"]["maps"]
    for axis, means, when in zip(axes, maps, ("first", "middle", "last")):
        grid = torch.tensor([[m or torch.nan for m in row] for row in means])
        shown = axis.imshow(grid.T, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=100)
        axis.set(title=f"raw error, {when} tenth", xlabel="t", ylabel="r")
    figure.colorbar(shown, ax=axes[2])
    for name in ("25 %, p = 0", "25 %"):
        for rows, style in (("r = t", "o-"), ("r != t", "s--")):
            label = f"{'p = 0' if 'p = 0' in name else 'p = 1'}, {rows}"
            quantiles = lines[name]["quantiles"][rows]
            axes[3].plot(["50 %", "90 %", "99 %", "100 %"], quantiles, style, label=label)
    axes[3].set(title="quantiles of the raw error", yscale="log")
    axes[3].legend()
    shares = [name for name in ERRORS if "p" not in name]
    for what, style in (("means", "-"), ("variance", ":")):
        for rows, marker in (("r = t", "o"), ("r != t", "s")):
            found = [name for name in shares if rows in lines[name][what]]
            values = [lines[name][what][rows] for name in found]
            label = f"{'raw error' if what == 'means' else 'variance of the target'}, {rows}"
            axes[4].plot(found, values, marker + style, label=label)
    axes[4].set(title="by share of r != t", yscale="log")
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
    wanted = set(map(key, jobs(args.steps, args.seeds)))
    lines = [line for line in ablations.read(RESULTS) if key(line) in wanted]
    plot_steps([line for line in lines if "errors" not in line], args.plot[0])
    plot_errors([line for line in lines if "errors" in line], args.plot[1])


if __name__ == "__main__":
    main()
