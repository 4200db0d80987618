"""From MeanFlow on a DiT to improved MeanFlow, one change a row, at a scale for two CPU cores.

    python benchmarks/walk.py                              run what is missing, on the digits
    python benchmarks/walk.py --data data/cifar16          on pixels that data.py wrote
    python benchmarks/walk.py --table                      print all results as Markdown

Each row of WALK changes one thing of the row above; each of MENDS changes one thing of iMF back.
All train on equally many images and are judged without guidance, by samples in one, two and four
steps of the averaged weights (see ablations.py), and by two errors of these weights on draws that
are the same for all: of the velocity at r = t, and of u where t > r, against MeanFlow's target
along that velocity. Lines of results go to walk.jsonl as ablations.py writes its own.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ablations
import torch
import torch.nn.functional as F
from ablations import cell, collect, read
from torch import nn

import data
import dual
import imf
import meanflow
import model
import runtime
import train

RESULTS = Path(__file__).with_name("walk.jsonl")
STEPS, SEEDS, WIDTH, DEPTH, PATCHES = 600, 3, 64, 4, 16
JUDGED, IMAGES = (1, 2, 4), 1000  # steps of samples; images whose errors are averaged
METRICS = [f"{steps} step{'s' * (steps > 1)}" for steps in JUDGED] + ["v", "u"]


class Setting(NamedTuple):
    """What a row may change; the defaults are MeanFlow on the DiT, without guidance."""

    share: float = 0.75  # of the rows have r = t
    own: bool = False  # du/dt along the network's own velocity: iMF's loss
    heads: int = 1  # the second learns v, by blocks of its own
    embeds: str = "t, t - r"
    tokens: bool = False  # conditions are tokens before the patches, not adaLN
    places: tuple = ("sines",)  # positions: sines of patches; rotary, learned of all tokens
    gated: bool = False  # iMF's blocks: RMS norms, of queries and keys too, and SwiGLU
    init: str = "DiT"  # or "iMF"
    gates: float = 0.0  # what static gates of blocks begin at
    bias: float = 0.0  # deviation of the patches' bias at first
    most: float | None = None  # scale up to which guidance is drawn and told
    lr: float = 3e-3
    batch: int = 64


def changed(*changes):
    """Return {label: all changes so far} of successive changes (label, {field: value})."""
    rows, so_far = {}, {}
    for label, change in changes:
        so_far = so_far | change
        rows[label] = so_far
    return rows


WALK = changed(
    ("MeanFlow on the DiT", {}),
    ("50 % of the rows have r = t", {"share": 0.5}),
    ("iMF's loss: du/dt along u(z, t, t)", {"own": True}),
    ("a second head, for v", {"heads": 2}),
    ("embeds t - r alone", {"embeds": "t - r"}),
    ("conditions are tokens, no adaLN", {"tokens": True}),
    ("rotary positions, no sines", {"places": ("rotary",)}),
    ("RMS norms and SwiGLU", {"gated": True}),
    ("iMF's init", {"init": "iMF"}),
    ("guidance drawn to 8 and told", {"most": 8.0}),
    ("batch 32, lr 6e-3: iT/2", {"batch": 32, "lr": 6e-3}),
)
UNGUIDED = WALK["iMF's init"]
MENDS = {
    f"iMF unguided, but {label}": UNGUIDED | change
    for label, change in {
        "sines beside rotary positions": {"places": ("rotary", "sines")},
        "learned positions beside rotary": {"places": ("rotary", "learned")},
        "adaLN, no tokens": {"tokens": False},
        "t beside t - r": {"embeds": "t, t - r"},
        "gates begin at 1": {"gates": 1.0},
        "the patches' bias begins at N(0, 1/16)": {"bias": 0.25},
        "gates and bias": {"gates": 1.0, "bias": 0.25},
        "gates and learned positions": {"places": ("rotary", "learned"), "gates": 1.0},
    }.items()
}
ROWS = WALK | MENDS


# --- the networks between the two ---


def conditions(setting):
    """Return {condition: (its embedder, number of its tokens)}."""
    found = {"class": ("y_embedder", 8)}
    if setting.most:
        found["kappa"] = ("omega_embedder", 4)
        found |= {"low": ("cfg_t_start_embedder", 2), "high": ("cfg_t_end_embedder", 2)}
    found["t - r"] = ("h_embedder", 4)
    if setting.embeds == "t, t - r":
        found["t"] = ("t_embedder", 4)
    return found


def kinds(setting):
    """Return {kind of blocks: how many}: the trunk's, then those of u, then those of v."""
    if setting.heads == 1:
        return {"blocks": DEPTH}
    return {"shared_blocks": DEPTH // 2, "u_heads": DEPTH // 2, "v_heads": DEPTH // 2}


def shapes(setting, channels, classes, patch):
    """Return {name: shape} of every parameter, most of them named as in model.py."""
    width, tensors = WIDTH, {}

    def linear(name, outputs, inputs, bias=True):
        tensors[f"{name}.weight"] = (outputs, inputs)
        tensors.update({f"{name}.bias": (outputs,)} if bias else {})

    tensors["x_embedder.proj.weight"] = (width, channels, patch, patch)
    tensors["x_embedder.proj.bias"] = (width,)
    for name, (embedder, count) in conditions(setting).items():
        if name == "class":
            tensors[f"{embedder}.embedding_table.weight"] = (classes + 1, width)
        else:
            linear(f"{embedder}.mlp.0", width, model.SINUSOIDS)
            linear(f"{embedder}.mlp.2", width, width)
        tensors.update({f"{name}_tokens": (count, width)} if setting.tokens else {})
    if "learned" in setting.places:
        before = setting.tokens * sum(count for _, count in conditions(setting).values())
        tensors["places"] = (before + PATCHES, width)
    for block in (f"{kind}.{i}" for kind, depth in kinds(setting).items() for i in range(depth)):
        linear(f"{block}.attn.qkv", 3 * width, width, not setting.gated)
        linear(f"{block}.attn.proj", width, width, not setting.gated)
        if setting.gated:
            norms = {"norm1": width, "norm2": width, "attn.q_norm": 64, "attn.k_norm": 64}
            tensors |= {f"{block}.{name}.weight": (size,) for name, size in norms.items()}
            hidden = int(width * 8 / 3)
            linear(f"{block}.mlp.w1", hidden, width, False)
            linear(f"{block}.mlp.w3", hidden, width, False)
            linear(f"{block}.mlp.w2", width, hidden, False)
        else:
            linear(f"{block}.mlp.fc1", 4 * width, width)
            linear(f"{block}.mlp.fc2", width, 4 * width)
        if setting.tokens:
            tensors[f"{block}.attn_scale"] = tensors[f"{block}.mlp_scale"] = (width,)
        else:
            linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    for kind in "uv"[: setting.heads]:
        if setting.gated:
            tensors[f"{kind}_final.norm.weight"] = (width,)
        if not setting.tokens:
            linear(f"{kind}_final.adaLN_modulation.1", 2 * width, width)
        linear(f"{kind}_final.linear", patch * patch * channels, width)
    return tensors


def parameters(setting, channels, classes, patch, generator):
    """Return fresh parameters, by the rules of model.init or imf.init."""
    params = {}
    for name, shape in shapes(setting, channels, classes, patch).items():
        p = params[name] = torch.zeros(shape)
        by_width = name.endswith("_tokens") or name == "places" or "embedding_table" in name
        if name.endswith("_scale"):
            p.fill_(setting.gates)
        elif "norm" in name:
            p.fill_(1)
        elif name == "x_embedder.proj.bias" and setting.bias:
            p.normal_(0, setting.bias, generator=generator)
        elif name.endswith("bias") or "adaLN" in name or "final" in name:
            continue
        elif setting.init == "DiT" and (by_width or "embedder.mlp" in name):
            p.normal_(0, 0.02, generator=generator)
        elif setting.init == "DiT" or name.startswith("x_embedder"):
            nn.init.xavier_uniform_(p.flatten(1), generator=generator)
        else:
            gain = 1 if by_width or "embedder" in name else 0.32
            p.normal_(0, gain * shape[1] ** -0.5, generator=generator)
    return params


def norm(w, name, x):
    weight = w.get(f"{name}.weight")
    return model.norm(x) if weight is None else imf.rms_norm(x, weight)


def attention(w, x, rope):
    q, k, v = model.split_heads(model.linear(w, "attn.qkv", x))
    if "attn.q_norm.weight" in w:
        q, k = norm(w, "attn.q_norm", q), norm(w, "attn.k_norm", k)
    if rope:
        q, k = imf.rotate(q, rope), imf.rotate(k, rope)
    return model.linear(w, "attn.proj", model.merge_heads(F.scaled_dot_product_attention(q, k, v)))


def mlp(w, x):
    return imf.mlp(w, x) if "mlp.w1.weight" in w else model.mlp(w, "mlp", x)


def block(w, x, c, rope):
    if "attn_scale" in w:
        x = x + w["attn_scale"] * attention(w, norm(w, "norm1", x), rope)
        return x + w["mlp_scale"] * mlp(w, norm(w, "norm2", x))
    changes = model.linear(w, "adaLN_modulation.1", c).chunk(6, -1)
    shift1, scale1, gate1, shift2, scale2, gate2 = changes
    x = x + gate1 * attention(w, model.modulate(norm(w, "norm1", x), shift1, scale1), rope)
    return x + gate2 * mlp(w, model.modulate(norm(w, "norm2", x), shift2, scale2))


def embed(setting, params, z, t, r, y, guidance):
    """Return tokens, (B, S, D), and the condition of adaLN, (B, 1, D) or None."""
    values = {"t": t, "t - r": t - r, **(guidance._asdict() if setting.most else {})}
    embedded = {
        name: model.embed_label(params, y)
        if name == "class"
        else model.embed_time(params, embedder, values[name])
        for name, (embedder, _) in conditions(setting).items()
    }
    x = (model.embed_places if "sines" in setting.places else model.embed_patches)(params, z)
    tokens = [params[f"{name}_tokens"] + c for name, c in embedded.items() if setting.tokens]
    c = None if setting.tokens else F.silu(sum(embedded.values()))
    return torch.cat([*tokens, x], 1) + params.get("places", 0), c


def head(params, kind, blocks, x, c, rope, like):
    """Return the output of a head, shaped like `like`."""
    for w in model.block_params(params, blocks) if blocks else ():
        x = block(w, x, c, rope)
    patch = params["x_embedder.proj.weight"].shape[-1]
    x = x[:, -(like.shape[2] // patch) * (like.shape[3] // patch) :]
    x = norm(params, f"{kind}_final.norm", x)
    if c is not None:
        modulation = model.linear(params, f"{kind}_final.adaLN_modulation.1", c)
        x = model.modulate(x, *modulation.chunk(2, -1))
    return model.unpatchify(model.linear(params, f"{kind}_final.linear", x), patch, like)


def network(setting, params, z, t, r, y, guidance=None):
    """Return u, or (u, v) where there are two heads, each shaped like z."""
    x, c = embed(setting, params, z, t, r, y, guidance)
    rope = imf.rotary(x.shape[1], x) if "rotary" in setting.places else None
    trunk, *heads = kinds(setting)
    for w in model.block_params(params, trunk):
        x = block(w, x, c, rope)
    if not heads:
        return head(params, "u", None, x, c, rope, z)
    u = head(params, "u", heads[0], x, c, rope, z)
    x, c = dual.value_of(x), c if c is None else dual.value_of(c)
    return u, head(params, "v", heads[1], x, c, rope, z)


# --- a run ---


def one_output(setting, params):
    """Return net(z, t, r, y) -> u without guidance, as meanflow.sample takes it."""

    def net(z, t, r, y):
        out = network(setting, params, z, t, r, y, imf.at_all_times(torch.zeros_like(t)))
        return out[0] if setting.heads == 2 else out

    return net


def draw(setting, shape, generator):
    """Return the draws of a step; without drawn guidance, kappa is 0."""
    if setting.heads == 2:
        return imf.draw(shape, generator=generator, share=setting.share, most=setting.most or 1)
    return meanflow.draw(shape, generator=generator, share=setting.share)


def loss(setting, params, x, y, draws, null, equal):
    """Return the loss of each row, (B,), by the setting."""
    options = dict(null=null, jvp=dual.jvp, equal=equal)
    if setting.heads == 2:
        rows, _ = imf.fast_loss(partial(network, setting, params), x, y, draws, **options)
    else:
        fast = imf.fast_one_head_loss if setting.own else meanflow.fast_loss
        rows, _ = fast(partial(network, setting, params), x, y, draws, **options)
    return rows


def fit(dataset, setting, seed, steps):
    """Train from this seed on steps x 64 images. Return the averaged weights, or None."""
    steps = steps * Setting().batch // setting.batch
    plan = train.make_plan(train.RECIPES["T/2"], len(dataset.items), steps, seed)
    plan = plan._replace(lr=setting.lr, batch=setting.batch)
    channels, side, _ = dataset.shape
    classes, g = len(dataset.classes), runtime.generator(seed, "init", 0)
    params = parameters(setting, channels, classes, side // 4, g)
    params = {name: nn.Parameter(p) for name, p in params.items()}
    ema = {name: p.detach().clone() for name, p in params.items()}
    adam = torch.optim.Adam(params.values(), plan.lr, betas=plan.betas, fused=True)
    state, equal = train.State(params, {plan.ema: ema}, adam), int(setting.share * plan.batch)
    for step in range(1, steps + 1):
        x, y = data.batch(dataset, plan.batch, seed=seed, step=step)
        draws = draw(setting, x.shape, runtime.generator(seed, "draws", step))
        loss(setting, params, x, y, draws, classes, equal).mean().backward()
        if not train.update(state, plan, step).isfinite():
            return None
    return ema


def errors(net, dataset):
    """Return the mean squared errors, summed over an image, of v at r = t and of u where r < t."""
    x, y = data.batch(dataset, IMAGES, seed=0, step=0)
    draws = meanflow.draw(x.shape, generator=runtime.generator(0, "draws", 0), share=0.5)
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    z, t, r, v, y = (part[IMAGES // 2 :] for part in (z, draws.t, draws.r, v, y))
    with torch.no_grad():
        own = net(z, t, t, y)
        u, dudt = meanflow.derivative(net, z, t, r, own, y, jvp=dual.jvp)
    found = {"v": own - v, "u": u - meanflow.identity(v, t, r, dudt)}
    return {name: error.square().flatten(1).sum(1).mean().item() for name, error in found.items()}


def run(job):
    """Return the line of a job: its key, and METRICS, none of them if the training diverged."""
    prepare, metrics, begun = ablations.prepare, {}, time.time()
    setting = Setting(**job["change"])
    if params := fit(prepare.dataset, setting, job["seed"], job["steps"]):
        net = one_output(setting, params)
        for name, steps in zip(METRICS, JUDGED):
            samples = ablations.draw_samples(net, prepare.dataset, steps)
            metrics[name] = ablations.judge(*samples, prepare.reference)["pixels"]
        metrics |= errors(net, prepare.dataset)
    metrics = {name: float(f"{value:.4g}") for name, value in metrics.items()}
    return job | metrics | {"seconds": round(time.time() - begun)}


# --- all runs ---


def missing(name, seeds, steps):
    """Return the jobs whose lines are not there yet, those of the first seed first."""
    found = {ablations.key(line) for line in read(RESULTS)}
    jobs = [
        {"data": name, "steps": steps, "seed": seed, "change": how}
        for seed in range(seeds)
        for how in ROWS.values()
    ]
    return [job for job in jobs if ablations.key(job) not in found]


def table(lines):
    """Print the rows as Markdown: mean and deviation over seeds."""
    names = list(dict.fromkeys(line["data"] for line in lines))
    for name in names:
        found = [line for line in lines if line["data"] == name]
        about = [sorted({str(line[key]) for line in found}) for key in ("steps", "commit", "torch")]
        hours = sum(line["seconds"] for line in found) / 3600
        steps, *about = (", ".join(values) for values in about)
        print(f"- {name}: {len(found)} runs of {steps} steps of 64, {hours:.1f} hours of one core,")
        print(f"  commit {about[0]}, torch {about[1]}, {found[0]['machine']}")
    shown = [(name, metric) for name in names for metric in METRICS]
    print(f"\n| | {' | '.join(f'{name} {metric}' for name, metric in shown)} |")
    print("|---" * (len(shown) + 1) + "|")
    for label, how in ROWS.items():
        cells = [cell(collect(lines, name, how, metric), metric, SEEDS) for name, metric in shown]
        print(f"| {label} | {' | '.join(cells)} |")


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", default="digits", help="digits, or a folder of pixels")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of 64 images (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if args.table:
        return table([line for line in read(RESULTS) if line["steps"] == args.steps])
    dataset, name = data.load_data(args.data), Path(args.data).name
    x, y = ablations.all_images(dataset)
    features, _ = ablations.train_classifier(x, y, len(dataset.classes))
    todo = missing(name, args.seeds, args.steps)
    about = ablations.machine()
    ablations.run_missing(run, todo, RESULTS, about, (args.data, features), args.workers)


if __name__ == "__main__":
    main()
