"""MeanFlow: the average velocity of a flow, its loss, its guidance and its sampler, as pure functions.

Geng, Deng, Bai, Kolter, He: Mean Flows for One-step Generative Modeling, arXiv 2505.13447v1. "Eq." is an equation of it.

    python meanflow.py          trains a two-dimensional toy in seconds and says how far from the truth it lands

A network is any callable net(z, t, r, y) -> u: a lambda, an analytic flow, an nn.Module, partial(dit, params).

    x, e   data, Gaussian noise                                       (B, ...)
    t, r   times, 0 <= r <= t <= 1; t = 1 is noise, t = 0 is data     (B,)
    z      the point on the path between them, (1 - t) x + t e        (B, ...)
    v      conditional velocity, e - x                                (B, ...)
    u      average velocity: (t - r) u(z, t, r) = integral of the
           velocity along the flow from r to t                        (B, ...)
    y      class labels; `null` is the label that means "no class"    (B,) int64

Nothing here holds state or draws a random number, except `draw`, which is handed its generator.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def column(s, like):
    """The (B,) tensor s with as many trailing axes of length 1 as broadcast it over `like`, (B, ...)."""
    return s.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x, e, t):
    """The point z on the straight path from data to noise and its velocity there (Sec. 3).

    x, e: (B, ...) floating; t: (B,) in [0, 1]. Returns (z, v), both (B, ...): z = (1 - t) x + t e and v = e - x.
    """
    t = column(t, x)
    return (1 - t) * x + t * e, e - x


class Draws(NamedTuple):
    """All randomness of one step of `loss`. Any rows may be put in; `draw` makes those of the paper."""

    e: torch.Tensor  # (B, ...)  Gaussian noise
    t: torch.Tensor  # (B,)      time, r <= t
    r: torch.Tensor  # (B,)      earlier time
    drop: torch.Tensor  # (B,) bool  rows that lose their label


def draw(shape, *, generator, share=0.75, drop=0.1, mean=-0.4, std=1.0):
    """Noise, times and dropped labels for a batch of data of `shape` = (B, ...), on the generator's device, float32.

    t and r are the larger and the smaller of two logit-normal(mean, std) draws (Sec. 4.3; Table 1d), but for the
    first int(share * B) rows, which have r = t (Table 1a: r differs in 25 % of the batch). Their number is fixed, not
    drawn, so a step always costs the same. Each row drops its label with probability `drop`; the rows that do are
    then moved to the front.
    """
    batch, device = shape[0], generator.device
    e = torch.randn(shape, generator=generator, device=device)
    r, t = torch.sigmoid(mean + std * torch.randn(2, batch, generator=generator, device=device)).sort(0).values
    row = torch.arange(batch, device=device)
    r = torch.where(row < int(share * batch), t, r)
    # First rows, as in the authors' code: the null class is learnt only at r = t, the only place guidance reads it.
    dropped = (torch.rand(batch, generator=generator, device=device) < drop).sum()
    return Draws(e, t, r, row < dropped)


@torch.no_grad()
def guide(net, z, t, v, y, *, null, omega, kappa, interval=(0.0, 1.0), v_class=None):
    """The guided velocity that takes v's place, (B, ...), without gradient (Eq. 19, with kappa as in appendix B):

        v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)

    for rows whose t lies in the closed `interval`; v for the others and for those with y = null. The field that
    reproduces itself under it has guidance scale omega / (1 - kappa), at one evaluation per sampling step.

    z, v: (B, ...); t: (B,); y: (B,) int64; v_class: (B, ...), u(z, t, t | y) where the caller has it, else evaluated.
    """
    if omega == 1 and kappa == 0 or len(z) == 0:
        return v.detach()
    v_g = omega * v + (1 - omega - kappa) * net(z, t, t, torch.full_like(y, null))
    if kappa:
        v_g = v_g + kappa * (net(z, t, t, y) if v_class is None else v_class)
    guided = (interval[0] <= t) & (t <= interval[1]) & (y != null)
    return torch.where(column(guided, v), v_g, v)


@torch.no_grad()
def derivative(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """du/dt of u = net(z, t, r, y) along dz/dt = v, dt/dt = 1, dr/dt = 0 (Eq. 8), (B, ...), without gradient: the
    product of net's Jacobian with (v, 1, 0), made in one forward-mode pass. `jvp` has torch.func.jvp's signature."""
    if len(z) == 0:
        return v.detach()
    with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with forward-mode derivatives
        # clone: the compiler cannot take derivatives by tensors that are slices of others
        return jvp(lambda z, t: net(z, t, r, y), (z.clone(), t.clone()), (v, torch.ones_like(t)))[1]


@torch.no_grad()
def target(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """What u(z, t, r) should be, by the MeanFlow identity u = v - (t - r) du/dt (Eq. 6, 10, 11), without gradient.

    With the marginal velocity for v, the true average velocity is a fixed point; the target is affine in v, so the
    conditional velocity e - x has the same expectation. z, v: (B, ...); t, r: (B,); y: (B,) int64. Returns (B, ...).
    """
    return v - column(t - r, z) * derivative(net, z, t, r, v, y, jvp=jvp)


def loss(net, x, y, draws, *, null, omega=1.0, kappa=0.0, interval=(0.0, 1.0), p=1.0, c=0.01, dual=None, equal=None):
    """The MeanFlow loss of each row (Eq. 9) with adaptive weight (Sec. 4.3; appendix B): sg(1 / (s + c)^p) s, where
    s = |u - sg(u_tgt)|^2 is summed over all but the batch axis.

    x: (B, ...); y: (B,) int64, below `null`; draws: Draws. `equal`: how many of the first rows have r = t; None counts
    them, which makes the host wait for a GPU and cannot be compiled. Rows may come in any order: one with r = t further
    down costs a jvp, no more. Returns the loss, (B,), to be averaged, and a dict of the raw squared errors s, without
    gradient: "equal", (equal,), of the leading r = t rows and "differ", (B - equal,), of the others. Watch these: for
    p = 1 the weighted loss is close to 1 from the first step to the last.

    dual(z, t, r, y, v) -> (u, du/dt) gives u = net(z, t, r, y) of all rows and, for the last len(v) rows, du/dt along
    (v, 1, 0). None makes the two of net, by a forward and a torch.func.jvp; for a DiT, partial(model.dit_jvp, params)
    makes them in one pass.

    differs from the paper: c = 0.01 (the paper has 1e-3), as in the authors' ImageNet code; for CIFAR-10 theirs has
    c = 1e-3 and p = 0.75.
    """
    e, t, r, drop = draws
    y = torch.where(drop, null, y)
    z, v = interpolate(x, e, t)
    n = int((t == r).cumprod(0).sum()) if equal is None else equal
    guided = partial(guide, net, null=null, omega=omega, kappa=kappa, interval=interval)
    v_differ = guided(z[n:], t[n:], v[n:], y[n:])
    if dual is None:
        u, dudt = net(z, t, r, y), derivative(net, z[n:], t[n:], r[n:], v_differ, y[n:])
    else:
        u, dudt = dual(z, t, r, y, v_differ)
    v_equal = guided(z[:n], t[:n], v[:n], y[:n], v_class=u[:n])  # where r = t, u is the class velocity
    u_tgt = torch.cat((v_equal, v_differ - column(t - r, z)[n:] * dudt))  # Eq. 10; where r = t it is the velocity
    s = (u - u_tgt.detach()).square().flatten(1).sum(1)
    raw = s.detach()
    return s / (raw + c) ** p, {"equal": raw[:n], "differ": raw[n:]}


@torch.no_grad()
def sample(net, e, y, steps=1):
    """Data from noise in `steps` evaluations of net: z_r = z_t - (t - r) u(z_t, t, r) from t = 1 to 0 (Eq. 12).

    e: (B, ...) noise; y: (B,) int64. steps: a number of equal steps, or the falling times themselves, e.g. (1, 0.5, 0);
    the first may be less than 1 if e is a point of the flow at that time. Returns (B, ...).
    """
    times = [1 - i / max(steps, 1) for i in range(steps + 1)] if isinstance(steps, int) else list(steps)
    if len(times) < 2 or not 1 >= times[0] or not times[-1] >= 0 or not all(t > r for t, r in pairwise(times)):
        raise ValueError(f"steps = {steps}: give a whole number >= 1, or at least two falling times within [0, 1]")
    z = e
    for t, r in pairwise(e.new_tensor(times)):
        t, r = t.expand(len(e)), r.expand(len(e))
        z = z - column(t - r, z) * net(z, t, r, y)
    return z


def toy(iterations=2000, batch=512, seed=0):
    """Trains a small MLP to carry a Gaussian to four Gaussians on a circle; prints the distance of its samples from
    where the exact flow takes the same noise, and of those that Euler steps along the exact velocity give."""
    torch.manual_seed(seed)  # the network's initial weights; all else comes from the generator
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(4) * torch.pi / 2
    centres, width = torch.stack((angle.cos(), angle.sin()), 1), 0.3

    def velocity(z, t, r, y):  # the marginal velocity E[e - x | z] of the mixture, in closed form
        t = t[:, None]
        variance = (1 - t) ** 2 * width**2 + t**2
        offset = z[:, None] - (1 - t)[..., None] * centres
        posterior = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)[..., None]
        gain = (t - (1 - t) * width**2) / variance
        return (posterior * (gain[..., None] * offset - centres)).sum(1)

    mlp = torch.nn.Sequential(torch.nn.Linear(4, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128), torch.nn.SiLU(),
                              torch.nn.Linear(128, 128), torch.nn.SiLU(), torch.nn.Linear(128, 2))

    def net(z, t, r, y):
        return mlp(torch.cat((z, t[:, None], (t - r)[:, None]), 1))

    y = torch.zeros(batch, dtype=torch.int64)
    adam = torch.optim.Adam(mlp.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        x = centres[torch.randint(4, (batch,), generator=generator)]
        x = x + width * torch.randn(x.shape, generator=generator)
        # p = 0: adaptive weights of p = 1 assume |u - u_tgt|^2 much alike in all rows, which two dimensions do not give.
        each, _ = loss(net, x, y, draw(x.shape, generator=generator, share=0.5), null=1, p=0)
        adam.zero_grad()
        each.mean().backward()
        adam.step()
        schedule.step()

    e = torch.randn(2000, 2, generator=generator)
    y = torch.zeros(len(e), dtype=torch.int64)
    truth = sample(velocity, e, y, 1000)
    print("root mean square distance from where the exact flow takes the same noise (the data have radius 1)")
    for steps in (1, 2, 4):
        ours, euler = (((sample(f, e, y, steps) - truth) ** 2).sum(1).mean().sqrt() for f in (net, velocity))
        print(f"{steps} evaluation{'s' * (steps > 1)}: MeanFlow {ours:.3f}, Euler on the exact velocity {euler:.3f}")


if __name__ == "__main__":
    toy()
