"""MeanFlow: the average velocity of a flow, its loss, guidance and sampler, as pure functions.

Geng, Deng, Bai, Kolter, He: Mean Flows for One-step Generative Modeling, arXiv 2505.13447v1.
"Eq." refers to its equations, "Sec." to its sections.

    python meanflow.py     train a two-dimensional toy in seconds, print how close its samples are

A network is any callable net(z, t, r, y) -> u: a lambda, an analytic flow, an nn.Module, or
partial(dit, params).

    x, e   data, Gaussian noise                                         (B, ...)
    t, r   times, 0 <= r <= t <= 1; t = 1 is noise, t = 0 is data       (B,)
    z      the point (1 - t) x + t e on the path between them           (B, ...)
    v      conditional velocity e - x                                   (B, ...)
    u      average velocity: (t - r) u(z, t, r) = integral of the
           velocity along the flow from r to t                          (B, ...)
    y      condition: class labels, (B,) int64, or any nested tuple or dict of tensors (B, ...),
           such as a text and its mask, or None; `null` stands for "no condition": the label of
           no class, or the same structure of tensors without batch axis

`loss` is the algorithm as the paper writes it. `fast_loss` computes the same number at about half
the cost. Nothing here holds state; `draw` alone is random, through the generator it is given (the
toy uses torch's default one).

A network embeds t in [0, 1] as it is, not 1000 t as diffusion models do: du/dt, and its noise, grow
by the same factor. Where data have padding, multiply x, e and the network's output by its mask.
"""

import numbers
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map


def append_dims(s, like):
    """Reshape s, (B,), to (B, 1, ..., 1) so that it broadcasts over `like`, (B, ...)."""
    return s.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x, e, t):
    """Return the point on the straight path from data to noise and its velocity (Sec. 3).

    x, e: (B, ...) floating; t: (B,) in [0, 1]. Returns (z, v), both (B, ...). Raises ValueError if
    x and e differ in shape.
    """
    if x.shape != e.shape:
        raise ValueError(f"data of shape {(*x.shape,)} and noise of shape {(*e.shape,)}")
    t = append_dims(t, x)
    return (1 - t) * x + t * e, e - x


class Draws(NamedTuple):
    """All randomness of one training step. `draw` samples the paper's; any other will do."""

    e: torch.Tensor  # (B, ...)   Gaussian noise, or other data to start from: image to image
    t: torch.Tensor  # (B,)       time
    r: torch.Tensor  # (B,)       earlier time, r <= t
    drop: torch.Tensor  # (B,) bool  rows whose label is dropped


def draw(shape, *, generator, share=0.75, drop=0.1, mean=-0.4, std=1.0):
    """Draw noise, times and dropped labels for data of `shape` = (B, ...), float32.

    t and r are the larger and the smaller of two logit-normal(mean, std) samples (Sec. 4.3,
    Table 1d). The first int(share * B) rows have r = t instead (Table 1a: r differs from t in 25 %
    of the batch); their number is fixed, so every step costs the same. Each row drops its label
    with probability `drop`, and the dropped rows are moved to the front. Tensors are on the
    generator's device.
    """
    batch, device = shape[0], generator.device
    e = torch.randn(shape, generator=generator, device=device)
    logits = mean + std * torch.randn(2, batch, generator=generator, device=device)
    r, t = torch.sigmoid(logits).sort(0).values
    row = torch.arange(batch, device=device)
    r = torch.where(row < int(share * batch), t, r)
    # The first rows, as in the authors' code: the null class is then learnt only at r = t, which is
    # the only place where guidance reads it.
    dropped = (torch.rand(batch, generator=generator, device=device) < drop).sum()
    return Draws(e, t, r, row < dropped)


def evaluate(net, z, t, r, y):
    """Return net(z, t, r, y). Raise ValueError if it has another shape than z."""
    u = net(z, t, r, y)
    for out in tree_leaves(u):
        if not hasattr(out, "shape") or out.shape != z.shape:
            found = f"shape {(*out.shape,)}" if hasattr(out, "shape") else type(out).__name__
            raise ValueError(f"the network returned {found} for data of shape {(*z.shape,)}")
    return u


def each(f, *conditions):
    """Apply f to each tensor of nested conditions that are built alike; None stays None."""
    return tree_map(lambda a, *rest: None if a is None else f(a, *rest), *conditions)


def replace(y, null, rows):
    """Return the condition y with `null` in the rows that are marked, (B,) bool.

    Raises ValueError if `null` does not fit y.
    """

    def one(y, null):
        is_tensor = isinstance(null, torch.Tensor)
        shape = null.shape if is_tensor else y.shape[1:]  # a number fits all
        if (len(rows), *shape) != y.shape:
            found = f"a condition of shape {(*y.shape,)} and null of shape {(*shape,)}"
            raise ValueError(f"{found}, for a batch of {len(rows)}")
        kind = null.dtype if is_tensor else type(null)
        floating = kind is float or is_tensor and null.is_floating_point()
        if null is None or floating and not y.is_floating_point():
            raise ValueError(f"a null of {kind} for a condition of {y.dtype}")
        null = null.to(y) if is_tensor else null
        return torch.where(append_dims(rows, y), null, y).to(y.dtype)

    return each(one, y, null)


def mix(v, v_class, v_null, t, drop, omega, kappa, interval):
    """Return omega v + kappa v_class + (1 - omega - kappa) v_null where guidance acts, or v."""
    v_g = omega * v + (1 - omega - kappa) * v_null
    if isinstance(kappa, torch.Tensor) or kappa:
        v_g = v_g + kappa * v_class
    guided = (interval[0] <= t) & (t <= interval[1]) & ~drop
    return torch.where(append_dims(guided, v), v_g, v)


@torch.no_grad()
def guide(net, z, t, v, y, drop, *, null, omega, kappa, interval=(0, 1)):
    """Return the guided velocity, the regression target that replaces v (Eq. 19, appendix B):

        v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)

    for rows with t in the closed `interval`; v elsewhere and where the condition is dropped. A
    network trained on it has guidance of scale omega / (1 - kappa) built in and samples with one
    evaluation a step.

    z, v: (B, ...); t: (B,); drop: (B,) bool. Returns (B, ...), without gradient.
    """
    if omega == 1 and kappa == 0:  # no guidance
        return v.detach()
    v_null = evaluate(net, z, t, t, replace(y, null, torch.ones_like(drop)))
    v_class = evaluate(net, z, t, t, y) if kappa else None
    return mix(v, v_class, v_null, t, drop, omega, kappa, interval)


def derivative(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """Return u = net(z, t, r, y) and du/dt along dz/dt = v, dt/dt = 1, dr/dt = 0 (Eq. 8).

    One forward-mode pass, so that both see the same dropout. u has its graph, du/dt, the
    Jacobian-vector product of net with (v, 1, 0), has none; both (B, ...). `jvp` has the signature
    of torch.func.jvp.
    """
    # torch.func.jvp knows no other kernel of attention, and dual.jvp lets the value take any
    kernel = sdpa_kernel(SDPBackend.MATH) if jvp.__module__.startswith("torch") else nullcontext()
    # clone: compiled code cannot take derivatives with respect to slices of other tensors
    primals, tangents = (z.clone(), t.clone()), (v, torch.ones_like(t))
    with kernel:
        u, dudt = jvp(lambda z, t: evaluate(net, z, t, r, y), primals, tangents)
    return u, tree_map(torch.Tensor.detach, dudt)


def identity(v, t, r, dudt):
    """Return v - (t - r) du/dt, the right-hand side of the MeanFlow identity (Eq. 6, 10)."""
    return v - append_dims(t - r, v) * dudt


def target(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """Return the regression target u_tgt = v - (t - r) du/dt, without gradient (Eq. 10, 11).

    Given the marginal velocity as v, the true average velocity reproduces itself. The target is
    affine in v, so the conditional velocity e - x gives the same expectation. z, v: (B, ...);
    t, r: (B,). Returns (B, ...).
    """
    return identity(v, t, r, derivative(net, z, t, r, v, y, jvp=jvp)[1]).detach()


def adaptive_loss(u, u_tgt, p, c):
    """Return the adaptively weighted loss and the raw squared error of each row, both (B,).

    s = |u - sg(u_tgt)|^2 is summed over all but the batch axis (Eq. 9); the loss is s times
    sg(1 / (s + c)^p) (Sec. 4.3, appendix B). u, u_tgt: (B, ...). The raw error has no gradient.
    """
    s = (u - u_tgt.detach()).square().reshape(len(u), -1).sum(1)
    return s / (s.detach() + c) ** p, s.detach()


def loss(net, x, y, draws, *, null, omega=1, kappa=0, interval=(0, 1), p=1, c=0.01):
    """Return the MeanFlow loss of each row (Algorithm 1) and its raw squared error, both (B,).

    x: (B, ...); y, null: the condition and what stands for none; draws: Draws. omega, kappa,
    interval: see `guide`. Average the loss over the batch. Watch the raw error: at p = 1 the loss
    stays close to 1. Raises ValueError if noise, data and network differ in shape.

    differs from the paper: c = 0.01, as in the authors' ImageNet code, where the paper has 1e-3.
    Their CIFAR-10 code has c = 1e-3 and p = 0.75.
    """
    e, t, r, drop = draws
    y = replace(y, null, drop)
    z, v = interpolate(x, e, t)
    v = guide(net, z, t, v, y, drop, null=null, omega=omega, kappa=kappa, interval=interval)  # 19
    u, dudt = derivative(net, z, t, r, v, y)  # Eq. 8
    return adaptive_loss(u, identity(v, t, r, dudt), p, c)  # Eq. 10, 9


def count_equal(t, r):
    """Return how many of the first rows have r = t. The host waits for the tensors."""
    return [*(t == r).tolist(), False].index(False)


@torch.no_grad()
def velocities(net, z, t, y, null, n):
    """Return the velocities of all rows without their condition, and from row n on with it."""
    nothing = replace(y, null, torch.ones_like(t, dtype=torch.bool))
    both = each(lambda a, b: torch.cat((a, b[n:])), (z, t, t, nothing), (z, t, t, y))
    return evaluate(net, *both).split([len(z), len(z) - n])


def fast_loss(
    net,
    x,
    y,
    draws,
    *,
    null,
    omega=1,
    kappa=0,
    interval=(0, 1),
    p=1,
    c=0.01,
    jvp=torch.func.jvp,
    equal=None,
):
    """Return what `loss` returns at about half its cost, by not evaluating what is known.

    Where r = t, the target is the velocity, without du/dt, and the class velocity is the forward
    pass itself. So net sees these rows and the others apart, and never no rows. Nothing changes if
    no layer mixes rows; batch norm in training does, and this is then another function than `loss`.

    jvp: dual.jvp is the cheap one; torch.func.jvp takes three forwards where that takes two. equal:
    how many of the first rows have r = t; others merely cost more. None counts them: the host waits
    for a GPU, nothing compiles. A number is not checked: too many rows have the error of v alone.
    """
    e, t, r, drop = draws
    z, v = interpolate(x, e, t)
    n = count_equal(t, r) if equal is None else equal
    rows, us, dudt = (z, t, r, replace(y, null, drop)), [], torch.zeros_like(v)
    if n > 0:
        us.append(evaluate(net, *each(lambda a: a[:n], rows)))
    if omega != 1 or kappa != 0:
        v_null, v_class = velocities(net, z, t, y, null, n if kappa else len(x))
        v = mix(v, torch.cat((*us, v_class)).detach(), v_null, t, drop, omega, kappa, interval)
    if n < len(x):
        z_, t_, r_, y_, v_ = each(lambda a: a[n:], (*rows, v))
        u, differ = derivative(net, z_, t_, r_, v_, y_, jvp=jvp)
        us.append(u)
        dudt = torch.cat((dudt[:n], differ))
    return adaptive_loss(torch.cat(us), identity(v, t, r, dudt), p, c)


@torch.no_grad()
def sample(net, e, y, steps=1):
    """Return data from noise: z_r = z_t - (t - r) u(z_t, t, r) from t = 1 to t = 0 (Eq. 12).

    e: (B, ...) noise; y: condition. steps: the number of equal steps, or the decreasing times
    themselves, such as (1, 0.5, 0). Times may start below 1 if e is a point of the flow there.
    Each step evaluates net once, on z in the dtype of e; times and the running z are at least
    float32. Returns (B, ...) in the dtype of e. Raises ValueError for other steps.
    """
    whole = isinstance(steps, numbers.Integral)
    times = [i / max(steps, 1) for i in range(steps, -1, -1)] if whole else steps
    try:
        times = [float(t) for t in times]
    except TypeError:  # not even a sequence
        times = []
    decreasing = all(t > r for t, r in pairwise(times))
    if len(times) < 2 or not decreasing or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"steps = {steps}: give an integer >= 1, or decreasing times in [0, 1]")
    z = e.to(torch.promote_types(e.dtype, torch.float32))
    for t, r in pairwise(z.new_tensor(times).expand(len(e), -1).unbind(1)):
        z = z - append_dims(t - r, z) * evaluate(net, z.to(e.dtype), t, r, y)
    return z.to(e.dtype)


CENTRES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # of the toy's data
WIDTH = 0.3  # standard deviation around each


def toy_velocity(z, t, r, y):
    """Return the marginal velocity E[e - x | z] of the toy's four Gaussians, in closed form."""
    t = t[:, None]
    variance = (1 - t) ** 2 * WIDTH**2 + t**2
    offset = z[:, None] - (1 - t)[..., None] * CENTRES
    posterior = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)[..., None]
    gain = ((t - (1 - t) * WIDTH**2) / variance)[..., None]
    return (posterior * (gain * offset - CENTRES)).sum(1)


def toy(iterations=2000, batch=512, seed=0):
    """Train a small MLP to carry a Gaussian to four Gaussians, and print how far its samples land
    from where the exact flow takes the same noise, beside Euler steps along the exact velocity."""
    generator = torch.manual_seed(seed)  # torch's default, which the initial weights use too
    widths = (4, 128, 128, 128, 2)
    layers = [f for a, b in pairwise(widths) for f in (torch.nn.Linear(a, b), torch.nn.SiLU())]
    mlp = torch.nn.Sequential(*layers[:-1])

    def net(z, t, r, y):
        return mlp(torch.cat((z, t[:, None], (t - r)[:, None]), 1))

    y = torch.zeros(batch, dtype=torch.int64)
    adam = torch.optim.Adam(mlp.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        x = CENTRES[torch.randint(4, (batch,))]
        x = x + WIDTH * torch.randn(x.shape)
        draws = draw(x.shape, generator=generator, share=0.5)
        # p = 0: adaptive weights suit rows of similar error, and two dimensions vary too much
        rows, _ = loss(net, x, y, draws, null=1, p=0)
        adam.zero_grad()
        rows.mean().backward()
        adam.step()
        schedule.step()

    e, y = torch.randn(2000, 2), torch.zeros(2000, dtype=torch.int64)
    truth = sample(toy_velocity, e, y, 1000)
    print("root mean square distance from the exact flow's endpoint (the data have radius 1)")
    for steps in (1, 2, 4):
        errors = (sample(f, e, y, steps) - truth for f in (net, toy_velocity))
        ours, euler = (error.square().sum(1).mean().sqrt() for error in errors)
        print(f"{steps} step(s): MeanFlow {ours:.3f}, Euler on the exact velocity {euler:.3f}")


if __name__ == "__main__":
    toy()
