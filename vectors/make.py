"""Write vectors.json: numbers that any implementation of MeanFlow must give, in float64.

    python vectors/make.py

They come from meanflow.py and imf.py, and README.md says what they are. A new setting is a line in
LOSS or IMF, or a further table beside them in `build`, which a loss of its own signature needs.
"""

# ruff: noqa: E402
import json
import sys
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from mistakes import imf_network, network

import imf
import meanflow

BATCH, SHAPE, WIDTH, CLASSES = 7, (2, 2, 3), 5, 3  # products all differ
LOSS = {  # how meanflow.loss is called, beside null
    "no guidance, p and c of ImageNet": dict(omega=1.0, kappa=0.0, p=1.0, c=0.01),
    "no guidance, p and c of CIFAR-10": dict(omega=1.0, kappa=0.0, p=0.75, c=0.001),
    "omega": dict(omega=2.0, kappa=0.0, p=1.0, c=0.01),
    "omega and kappa": dict(omega=0.2, kappa=0.92, p=1.0, c=0.01),
    "an interval": dict(omega=0.2, kappa=0.92, interval=(0.0, 0.75), p=1.0, c=0.01),
    "all together": dict(omega=0.7, kappa=0.5, interval=(0.3, 0.8), p=0.75, c=0.001),
}
IMF = {  # imf.loss
    "p and c of ImageNet": dict(p=1.0, c=0.01),
    "p and c of CIFAR-10": dict(p=0.75, c=0.001),
}
SAMPLE = {
    "1 step": 1,
    "2 steps": 2,
    "4 steps": 4,
    "uneven times": [1.0, 0.85, 0.4, 0.15, 0.0],
}
LEVELS = 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99  # of the quantiles of times


def decimals(generator, *shape, scale=1.0):
    """Return normal numbers with two decimals, which are short to read and to print."""
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).round(decimals=2)


def inputs():
    """Return all tensors that the losses take, {name: tensor}.

    Rows 0 to 2 have r = t. Labels are dropped in one of them and in two others, of which one has t
    outside of all intervals but [0, 1].
    """
    g = torch.Generator().manual_seed(0)
    number = partial(torch.tensor, dtype=torch.float64)
    return {
        "x": decimals(g, BATCH, *SHAPE, scale=0.3),
        "e": decimals(g, BATCH, *SHAPE, scale=0.3),
        "y": torch.tensor([0, 1, 2, 0, 1, 2, 2]),
        "t": number([0.62, 0.35, 0.91, 0.55, 0.78, 0.97, 0.41]),
        "r": number([0.62, 0.35, 0.91, 0.12, 0.45, 0.33, 0.05]),
        "drop": torch.tensor([1, 0, 0, 1, 0, 1, 0]).bool(),
        "kappa": number([0.5, 0.8, 0.3, 0.6, 0.75, 0.4, 0.85]),
        "low": number([0.0, 0.0, 0.0, 0.3, 0.2, 0.1, 0.45]),
        "high": number([1.0, 1.0, 1.0, 0.9, 0.95, 0.7, 0.8]),
    }


def weights(heads, told=()):
    """Return the weights of the network, {name: tensor}; `told`: what it is told besides."""
    g, inner = torch.Generator().manual_seed(1), int(np.prod(SHAPE))
    shapes = {"z": (inner, WIDTH), "t": (1, WIDTH), "r": (1, WIDTH), "y": (CLASSES + 1, WIDTH)}
    shapes |= {name: (1, WIDTH) for name in told}
    for name in heads:
        shapes |= {name: (WIDTH, inner), f"{name}_bias": (1, inner)}
    return {name: decimals(g, *s, scale=0.5).requires_grad_() for name, s in shapes.items()}


def gradients(rows, w):
    """Return the gradient of the mean over the rows by each weight."""
    return dict(zip(w, torch.autograd.grad(rows.mean(), [*w.values()])))


def loss_vectors(given, w, options):
    """Return every intermediate of meanflow.loss, {name: tensor}."""
    net, null, x, y = partial(network, w), CLASSES, given["x"], given["y"]
    draws = meanflow.Draws(*(given[name] for name in meanflow.Draws._fields))
    e, t, r, drop = draws
    guidance = {k: options[k] for k in ("omega", "kappa", "interval") if k in options}
    z, v = meanflow.interpolate(x, e, t)
    y_ = torch.where(drop, null, y)
    v_g = meanflow.guide(net, z, t, v, y_, drop, null=null, **guidance)
    u, dudt = meanflow.derivative(net, z, t, r, v_g, y_)
    u_tgt = meanflow.identity(v_g, t, r, dudt)
    rows, s = meanflow.loss(net, x, y, draws, null=null, **options)
    steps = dict(z=z, v=v, v_g=v_g, u=u, dudt=dudt, u_tgt=u_tgt, s=s, loss=rows)
    return steps | {"grad": gradients(rows, w)}


def imf_vectors(given, w, options):
    """Return every intermediate of imf.loss, {name: tensor}."""
    net, null, x, y = partial(imf_network, w), CLASSES, given["x"], given["y"]
    draws = imf.Draws(*(given[name] for name in imf.Draws._fields))
    e, t, r, drop, *_ = draws
    z, v = meanflow.interpolate(x, e, t)
    kappa, nothing = imf.gate(t, draws), torch.full_like(y, null)
    v_class = net(z, t, t, y, imf.at_all_times(kappa))[1]
    v_null = net(z, t, t, nothing, imf.at_all_times(0 * kappa))[1]
    v_g = meanflow.mix(v, v_class, v_null, t, drop, 1, meanflow.append_dims(kappa, v), (0, 1))
    given, label = partial(net, guidance=draws), torch.where(drop, null, y)
    (u, v_head), (dudt, _) = meanflow.derivative(given, z, t, r, v_class.detach(), label)
    V = u + meanflow.append_dims(t - r, u) * dudt
    rows, s = imf.loss(net, x, y, draws, null=null, **options)
    steps = dict(z=z, v=v, v_class=v_class, v_null=v_null, v_g=v_g, u=u, v_head=v_head, dudt=dudt)
    return steps | dict(V=V, s=s, loss=rows, grad=gradients(rows, w))


def draw_vectors():
    """Return the shares and the quantiles of times that meanflow.draw has.

    t is the larger of two logit-normal numbers, r the smaller; where r = t, both are the larger.
    """
    normal = NormalDist(-0.4, 1.0)

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    larger = [sigmoid(normal.inv_cdf(q**0.5)) for q in LEVELS]
    smaller = [sigmoid(normal.inv_cdf(1 - (1 - q) ** 0.5)) for q in LEVELS]
    shares = {"r = t": 0.75, "r < t": 0.25, "r > t": 0.0, "dropped": 0.1}
    quantiles = {"t where r < t": larger, "r where r < t": smaller, "t where r = t": larger}
    return {"shares": shares, "levels": LEVELS, "quantiles": quantiles}


def build():
    """Return the whole content of vectors.json."""
    given, w = inputs(), weights("u")
    w_imf = weights("uv", ("kappa", "low", "high"))
    net = partial(network, w)
    samples = {
        name: {"steps": steps, "x": meanflow.sample(net, given["e"], given["y"], steps)}
        for name, steps in SAMPLE.items()
    }
    default = dict(interval=(0.0, 1.0))
    return {
        "null": CLASSES,
        "inputs": given,
        "weights": w,
        "imf_weights": w_imf,
        "loss": {n: {"options": default | o} | loss_vectors(given, w, o) for n, o in LOSS.items()},
        "imf_loss": {n: {"options": o} | imf_vectors(given, w_imf, o) for n, o in IMF.items()},
        "sample": samples,
        "draw": draw_vectors(),
    }


def plain(tree):
    """Return the tree with lists for tensors."""
    if isinstance(tree, dict):
        return {name: plain(value) for name, value in tree.items()}
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def text(tree, depth=0):
    """Return the tree as JSON: a line for each list, repr of each number."""
    if not isinstance(tree, dict):
        return json.dumps(tree, separators=(",", ":"))
    inner = ",\n".join(f'{" " * (depth + 1)}"{k}": {text(v, depth + 1)}' for k, v in tree.items())
    return f"{{\n{inner}\n{' ' * depth}}}"


def main():
    path = FOLDER / "vectors.json"
    path.write_text(text(plain(build())) + "\n")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
