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
    y      class labels; `null` is the label for "no class"             (B,) int64

`loss` is the algorithm as the paper writes it. `fast_loss` computes the same number at about half
the cost. Nothing here holds state; `draw` alone is random, through the generator it is given (the
toy uses torch's default one).
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def append_dims(s, like):
    """Reshape s, (B,), to (B, 1, ..., 1) so that it broadcasts over `like`, (B, ...)."""
    return s.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x, e, t):
    """Return the point on the straight path from data to noise and its velocity (Sec. 3).

    x, e: (B, ...) floating; t: (B,) in [0, 1]. Returns (z, v), both (B, ...).
    """
    t = append_dims(t, x)
    return (1 - t) * x + t * e, e - x


class Draws(NamedTuple):
    """All randomness of one training step. `draw` samples the paper's; any other will do."""

    e: torch.Tensor  # (B, ...)   Gaussian noise
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


@torch.no_grad()
def guide(net, z, t, v, y, *, null, omega, kappa, interval=(0, 1), v_class=None):
    """Return the guided velocity, the regression target that replaces v (Eq. 19, appendix B):

        v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)

    for rows with t in the closed `interval`; v elsewhere and where y = null. A network trained on
    it has guidance of scale omega / (1 - kappa) built in and samples with one evaluation a step.

    z, v: (B, ...); t: (B,); y: (B,) int64. v_class: u(z, t, t | y), (B, ...), if already known.
    Returns (B, ...), without gradient.
    """
    if omega == 1 and kappa == 0:  # no guidance
        return v.detach()
    v_g = omega * v + (1 - omega - kappa) * net(z, t, t, torch.full_like(y, null))
    if kappa:
        v_g = v_g + kappa * (net(z, t, t, y) if v_class is None else v_class)
    guided = (interval[0] <= t) & (t <= interval[1]) & (y != null)
    return torch.where(append_dims(guided, v), v_g, v)


@torch.no_grad()
def derivative(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """Return du/dt of u = net(z, t, r, y) along dz/dt = v, dt/dt = 1, dr/dt = 0 (Eq. 8).

    The Jacobian-vector product of net with (v, 1, 0), (B, ...), in one forward-mode pass, without
    gradient. `jvp` has the signature of torch.func.jvp.
    """
    with sdpa_kernel(SDPBackend.MATH):  # the only attention kernel with forward-mode derivatives
        # clone: compiled code cannot take derivatives with respect to slices of other tensors
        return jvp(lambda z, t: net(z, t, r, y), (z.clone(), t.clone()), (v, torch.ones_like(t)))[1]


def identity(v, t, r, dudt):
    """Return v - (t - r) du/dt, the right-hand side of the MeanFlow identity (Eq. 6, 10)."""
    return v - append_dims(t - r, v) * dudt


@torch.no_grad()
def target(net, z, t, r, v, y, *, jvp=torch.func.jvp):
    """Return the regression target u_tgt = v - (t - r) du/dt, without gradient (Eq. 10, 11).

    Given the marginal velocity as v, the true average velocity reproduces itself. The target is
    affine in v, so the conditional velocity e - x gives the same expectation. z, v: (B, ...);
    t, r: (B,); y: (B,) int64. Returns (B, ...).
    """
    return identity(v, t, r, derivative(net, z, t, r, v, y, jvp=jvp))


def adaptive_loss(u, u_tgt, p, c):
    """Return the adaptively weighted loss and the raw squared error of each row, both (B,).

    s = |u - sg(u_tgt)|^2 is summed over all but the batch axis (Eq. 9); the loss is s times
    sg(1 / (s + c)^p) (Sec. 4.3, appendix B). u, u_tgt: (B, ...). The raw error has no gradient.
    """
    s = (u - u_tgt.detach()).square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p, s.detach()


def loss(net, x, y, draws, *, null, omega=1, kappa=0, interval=(0, 1), p=1, c=0.01):
    """Return the MeanFlow loss of each row (Algorithm 1) and its raw squared error, both (B,).

    x: (B, ...); y: (B,) int64, below `null`; draws: Draws. omega, kappa, interval: see `guide`.
    Average the loss over the batch. Watch the raw error: at p = 1 the loss stays close to 1.

    differs from the paper: c = 0.01, as in the authors' ImageNet code, where the paper has 1e-3.
    Their CIFAR-10 code has c = 1e-3 and p = 0.75.
    """
    e, t, r, drop = draws
    y = torch.where(drop, null, y)
    z, v = interpolate(x, e, t)
    v = guide(net, z, t, v, y, null=null, omega=omega, kappa=kappa, interval=interval)  # Eq. 19
    u_tgt = target(net, z, t, r, v, y)  # Eq. 10, 11
    return adaptive_loss(net(z, t, r, y), u_tgt, p, c)  # Eq. 9


def count_equal(t, r):
    """Return how many of the first rows have r = t. The host waits for the tensors."""
    return [*(t == r).tolist(), False].index(False)


def fast_loss(
    net, x, y, draws, *, null, omega=1, kappa=0, interval=(0, 1), p=1, c=0.01, dual=None, equal=None
):
    """Return what `loss` returns at about half its cost, by not evaluating what is known.

    Where r = t, the target is the velocity, without du/dt, and the class velocity is the forward
    pass itself. No layer mixes rows, so evaluating only the other rows changes no number.

    equal: how many of the first rows have r = t. None counts them, which makes the host wait for a
    GPU and does not compile. A row with r = t further down is right too, and merely costs more.
    dual(z, t, r, y, v) -> (u, du/dt): the network for all rows and du/dt along (v, 1, 0) for the
    last len(v) rows. partial(model.dit_jvp, params) computes both in one pass of a DiT; None
    takes a forward pass and a torch.func.jvp of net.
    """
    e, t, r, drop = draws
    y = torch.where(drop, null, y)
    z, v = interpolate(x, e, t)
    n = count_equal(t, r) if equal is None else equal
    guided = partial(guide, net, null=null, omega=omega, kappa=kappa, interval=interval)
    v_differ = guided(z[n:], t[n:], v[n:], y[n:])
    if dual is None:
        u, dudt = net(z, t, r, y), derivative(net, z[n:], t[n:], r[n:], v_differ, y[n:])
    else:
        u, dudt = dual(z, t, r, y, v_differ)
    v_equal = guided(z[:n], t[:n], v[:n], y[:n], v_class=u[:n])
    u_tgt = torch.cat((v_equal, identity(v_differ, t[n:], r[n:], dudt)))
    return adaptive_loss(u, u_tgt, p, c)


@torch.no_grad()
def sample(net, e, y, steps=1):
    """Return data from noise: z_r = z_t - (t - r) u(z_t, t, r) from t = 1 to t = 0 (Eq. 12).

    e: (B, ...) noise; y: (B,) int64. steps: the number of equal steps, or the decreasing times
    themselves, such as (1, 0.5, 0). Times may start below 1 if e is a point of the flow there.
    Each step evaluates net once. Returns (B, ...). Raises ValueError for other steps.
    """
    times = steps
    if isinstance(steps, int):
        times = [i / max(steps, 1) for i in range(steps, -1, -1)]
    decreasing = all(t > r for t, r in pairwise(times))
    if len(times) < 2 or not decreasing or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"steps = {steps}: give an integer >= 1, or decreasing times in [0, 1]")
    z = e
    for t, r in pairwise(e.new_tensor(times).expand(len(e), -1).unbind(1)):
        z = z - append_dims(t - r, z) * net(z, t, r, y)
    return z


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
