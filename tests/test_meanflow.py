"""Properties of meanflow.py, in float64, on flows whose average velocity is known.

test_mutants.py breaks the code on purpose and checks that the tests here notice.
"""

import runpy
import shutil
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dual
import meanflow as mf
import model

seeds = st.integers(0, 2**31)
unit = st.floats(0.02, 0.98)
NULL = 4
JVPS = torch.func.jvp, dual.jvp


def plain(*inputs, **options):
    return mf.loss(*inputs, **options)


def fast(*inputs, **options):
    return mf.fast_loss(*inputs, jvp=torch.func.jvp, **options)


def fast_dual(*inputs, **options):
    return mf.fast_loss(*inputs, jvp=dual.jvp, **options)


LOSSES = plain, fast, fast_dual


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(seed, batch):
    """Return (t, r) with r < t, both (B,)."""
    r, t = (
        torch.rand(2, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .sort(0)
        .values
    )
    return t, r


def points(seed, batch=6, dim=3):
    """Return (z, t, r, y): a batch of points, times r < t and labels."""
    y = torch.randint(NULL, (batch,), generator=torch.Generator().manual_seed(seed))
    return randn(seed, batch, dim), *times(seed, batch), y


def close(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max()), (a - b).abs().max()


class Gaussian:
    """The flow from N(0, 1) at t = 1 to N(m, s^2) at t = 0, in closed form.

    It keeps (z - mean) / deviation constant, where mean = (1 - t) m and
    deviation^2 = (1 - t)^2 s^2 + t^2; m may depend on the class.
    """

    def __init__(self, m, s):
        self.m, self.s = m, s

    def mean(self, t, y):
        m = self.m[y] if isinstance(self.m, torch.Tensor) and self.m.ndim else self.m
        return (1 - t) * m, m

    def deviation(self, t):
        return ((1 - t) ** 2 * self.s**2 + t**2).sqrt()

    def velocity(self, z, t, r, y):
        t = t[:, None]
        mean, m = self.mean(t, y[:, None])
        return (t - (1 - t) * self.s**2) / self.deviation(t) ** 2 * (z - mean) - m

    def average(self, z, t, r, y):
        """Return (z_t - z_r) / (t - r), rearranged so that r = t needs no special case."""
        t, r = t[:, None], r[:, None]
        mean, m = self.mean(t, y[:, None])
        slope = ((1 + self.s**2) * (t + r) - 2 * self.s**2) / (
            self.deviation(t) + self.deviation(r)
        )
        return (z - mean) / self.deviation(t) * slope - m

    def flow(self, z, t, r, y):
        t, r = t[:, None], r[:, None]
        before, after = self.mean(t, y[:, None])[0], self.mean(r, y[:, None])[0]
        return after + self.deviation(r) / self.deviation(t) * (z - before)


def mixture_velocity(z, t, r, y):
    """Return the marginal velocity of the flow from N(0, 1) to three Gaussians in the plane."""
    centres, width = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]], dtype=z.dtype), 0.4
    t = t[:, None]
    variance = (1 - t) ** 2 * width**2 + t**2
    offset = z[:, None] - (1 - t)[..., None] * centres
    posterior = torch.softmax(-offset.square().sum(-1) / (2 * variance), 1)[..., None]
    return (posterior * (((t - (1 - t) * width**2) / variance)[..., None] * offset - centres)).sum(
        1
    )


def integrate(velocity, z, t, r, y, steps=30):
    """Return where the flow of `velocity` takes z from t to r, by classical Runge-Kutta."""
    h = (r - t) / steps
    for i in range(steps):
        s = t + i * h
        k1 = velocity(z, s, s, y)
        k2 = velocity(z + h[:, None] / 2 * k1, s + h / 2, s, y)
        k3 = velocity(z + h[:, None] / 2 * k2, s + h / 2, s, y)
        k4 = velocity(z + h[:, None] * k3, s + h, s, y)
        z = z + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


def network(seed, dim=3, width=16):
    """Return a generic smooth net and its parameters."""
    w = [
        randn(seed, dim + 2, width) / 2,
        randn(seed + 1, width, dim) / 4,
        randn(seed + 2, NULL + 1, width),
    ]
    w = [p.requires_grad_() for p in w]

    def net(z, t, r, y):
        # Dynamo, which compiles it, asks no dual that is in a tuple or after an @
        x = torch.cat([z, t[:, None], (t - r)[:, None]], 1)
        return torch.matmul(torch.tanh(torch.matmul(x, w[0]) + w[2][y]), w[1])

    return net, w


# --- the path ---


@given(seeds, unit)
def test_path_runs_from_data_to_noise_at_velocity_v(seed, time):
    x, e = randn(seed, 4, 3, 2, 2), randn(seed + 1, 4, 3, 2, 2)
    t = torch.full((4,), time, dtype=torch.float64)
    (z, v), (dz, _) = torch.func.jvp(lambda t: mf.interpolate(x, e, t), (t,), (torch.ones_like(t),))
    close(dz, v)
    close(z - mf.append_dims(t, z) * v, x)
    close(z + (1 - mf.append_dims(t, z)) * v, e)


# --- the identity ---


@given(seeds, st.floats(-2, 2), st.floats(0.1, 3))
def test_true_average_velocity_is_a_fixed_point_of_the_target(seed, m, s):
    z, t, r, y = points(seed)
    flow = Gaussian(m, s)
    close(mf.target(flow.average, z, t, r, flow.velocity(z, t, r, y), y), flow.average(z, t, r, y))


@given(seeds)
@settings(max_examples=8)
def test_true_average_velocity_is_a_fixed_point_on_a_mixture(seed):
    y = torch.zeros(3, dtype=torch.int64)
    z, (t, r) = randn(seed, 3, 2), times(seed, 3)
    t, r = 0.1 + 0.9 * t, 0.1 + 0.8 * r

    def average(z, t, r, y):
        return (z - integrate(mixture_velocity, z, t, r, y)) / (t - r)[:, None]

    r = torch.minimum(r, t - 0.05)
    close(mf.target(average, z, t, r, mixture_velocity(z, t, r, y), y), average(z, t, r, y), 1e-6)


def test_conditional_velocity_has_another_target():
    flow, (_, t, r, y) = Gaussian(1.0, 0.5), points(0, batch=64)
    z, v = mf.interpolate(1 + 0.5 * randn(1, 64, 3), randn(2, 64, 3), t)
    gap = (mf.target(flow.average, z, t, r, v, y) - flow.average(z, t, r, y)).abs().mean()
    assert gap > 0.1, gap


@given(seeds, st.floats(-3, 3))
def test_target_is_affine_in_v(seed, a):
    (z, t, r, y), (net, _) = points(seed), network(seed)
    v1, v2 = 3 * randn(seed + 1, 6, 3), 3 * randn(seed + 2, 6, 3)
    goal = partial(mf.target, net, z, t, r, y=y)
    close(goal(v=a * v1 + (1 - a) * v2), a * goal(v=v1) + (1 - a) * goal(v=v2), 1e-11)


@given(seeds)
def test_target_is_v_where_r_equals_t(seed):
    (z, t, _, y), (net, _) = points(seed), network(seed)
    v = randn(seed + 1, 6, 3)
    close(mf.target(net, z, t, t, v, y), v)


@given(seeds)
def test_no_gradient_flows_through_target_and_guidance(seed):
    (z, t, r, y), (net, _) = points(seed), network(seed)
    v, drop = randn(seed + 1, 6, 3).requires_grad_(), torch.zeros(6, dtype=torch.bool)
    for jvp in JVPS:
        u, dudt = mf.derivative(net, z, t, r, v, y, jvp=jvp)
        assert u.requires_grad and not dudt.requires_grad
        assert not mf.target(net, z, t, r, v, y, jvp=jvp).requires_grad
    for omega, kappa in ((2.0, 0.5), (1.0, 0.0)):
        v_g = mf.guide(net, z, t, v, y, drop, null=NULL, omega=omega, kappa=kappa)
        assert not v_g.requires_grad


# --- sampling ---


@given(seeds, st.floats(-2, 2), st.floats(0.1, 3), unit, unit)
def test_displacements_add_up_along_the_flow(seed, m, s, a, b):
    flow, (z, _, _, y) = Gaussian(m, s), points(seed)
    t, middle, r = 1.0, max(a, b) - 1e-3, min(a, b) - 2e-3
    direct = mf.sample(flow.average, z, y, (t, r))
    close(mf.sample(flow.average, z, y, (t, middle, r)), direct)
    close(
        mf.sample(flow.average, mf.sample(flow.average, z, y, (t, middle)), y, (middle, r)), direct
    )


@given(seeds, st.floats(-2, 2), st.floats(0.1, 3), st.integers(1, 5))
def test_any_number_of_steps_lands_where_the_ode_does(seed, m, s, steps):
    flow, (e, _, _, y) = Gaussian(m, s), points(seed)
    ones = torch.ones(len(e), dtype=torch.float64)
    exact = flow.flow(e, ones, 0 * ones, y)
    close(integrate(flow.velocity, e, ones, 0 * ones, y, 400), exact, 1e-5)
    close(mf.sample(flow.average, e, y, steps), exact)
    close(mf.sample(flow.average, e, y, np.int64(steps)), exact)
    close(mf.sample(flow.average, e, y, [1 - i / steps for i in range(steps + 1)]), exact)


@pytest.mark.parametrize(
    "steps",
    [
        0,
        -1,
        2.0,
        torch.tensor(2.0),
        (1.0,),
        (0.0, 1.0),
        (1.0, 1.0),
        (1.5, 0.0),
        (1.0, -0.1),
        (1.0, float("nan")),
    ],
)
def test_impossible_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps"):
        mf.sample(
            Gaussian(0.0, 1.0).average, randn(0, 2, 3), torch.zeros(2, dtype=torch.int64), steps
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 50, 250, 1000])
def test_half_precision_takes_any_number_of_steps(steps, dtype):
    """On a straight flow: no time step vanishes, and the result is rounded once."""
    e, u = randn(0, 64, 3).to(dtype), randn(1, 64, 3).to(dtype)

    def net(z, t, r, y):
        assert (t > r).all() and z.dtype == dtype
        return u

    x, exact = mf.sample(net, e, None, steps), e.double() - u.double()
    assert x.dtype == dtype
    assert ((x - exact).abs() <= 4 * torch.finfo(dtype).eps * (1 + exact.abs())).all()


# --- guidance ---


@given(seeds, st.floats(0.1, 3), st.floats(0, 0.95))
def test_guided_field_is_a_fixed_point_at_scale_omega_over_one_minus_kappa(seed, omega, kappa):
    z, t, _, y = points(seed)
    flow, scale = Gaussian(randn(seed, NULL + 1), 0.7), omega / (1 - kappa)
    null = torch.full_like(y, NULL)

    def guided(z, t, r, y):
        return scale * flow.velocity(z, t, r, y) + (1 - scale) * flow.velocity(z, t, r, null)

    def net(z, t, r, y):
        return torch.where((y == NULL)[:, None], flow.velocity(z, t, r, y), guided(z, t, r, y))

    v, drop = flow.velocity(z, t, t, y), torch.zeros_like(t, dtype=torch.bool)
    got = mf.guide(net, z, t, v, y, drop, null=NULL, omega=omega, kappa=kappa)
    close(got, guided(z, t, t, y), 1e-10)


@given(seeds)
def test_omega_1_kappa_0_is_no_guidance_and_needs_no_network(seed):
    z, t, _, y = points(seed)
    v, drop = randn(seed + 1, 6, 3), torch.zeros_like(t, dtype=torch.bool)
    close(mf.guide(None, z, t, v, y, drop, null=NULL, omega=1.0, kappa=0.0), v, 0)


@given(seeds, unit, unit, st.floats(0.5, 3), st.floats(0, 0.9))
def test_guidance_leaves_alone_dropped_rows_and_times_outside_the_interval(
    seed, a, b, omega, kappa
):
    (z, t, _, y), (net, _) = points(seed, batch=40), network(seed)
    v, low, high = randn(seed + 1, 40, 3), min(a, b), max(a, b)
    drop = torch.arange(40) % 3 == 0
    kw = dict(null=NULL, omega=omega, kappa=kappa)
    got, everywhere = (
        mf.guide(net, z, t, v, y, drop, interval=(low, high), **kw),
        mf.guide(net, z, t, v, y, drop, **kw),
    )
    inside = (low <= t) & (t <= high) & ~drop
    close(got[~inside], v[~inside], 0) if (~inside).any() else None
    close(got[inside], everywhere[inside], 0) if inside.any() else None
    if abs(omega - 1) + kappa > 0.1:
        assert (everywhere[~drop] != v[~drop]).any(1).all()


# --- the loss ---


def draws(seed, batch, dim=3, equal=None):
    """Return draws with r = t in random rows or the first `equal`, and labels dropped at random."""
    g = torch.Generator().manual_seed(seed)
    t, r = times(seed, batch)
    same = torch.rand(batch, generator=g) < 0.5 if equal is None else torch.arange(batch) < equal
    return mf.Draws(
        randn(seed + 1, batch, dim),
        t,
        torch.where(same, t, r),
        torch.rand(batch, generator=g) < 0.3,
    )


MODES = [
    dict(omega=1.0, kappa=0.0),
    dict(omega=2.0, kappa=0.0),
    dict(omega=1.0, kappa=0.5),
    dict(omega=0.2, kappa=0.92),
]


@given(
    seeds,
    st.sampled_from(MODES),
    st.sampled_from([(0.0, 1.0), (0.2, 0.7)]),
    st.integers(1, 9),
    st.data(),
)
def test_the_fast_loss_is_the_loss(seed, mode, interval, batch, data):
    """Compare value, raw error and every gradient, wherever the rows with r = t are."""
    equal = data.draw(st.none() | st.integers(0, batch))
    kw = dict(null=NULL, interval=interval, p=0.75, c=1e-3, **mode)
    d, x = draws(seed, batch, equal=equal), randn(seed + 5, batch, 3)
    y = torch.randint(NULL, (batch,), generator=torch.Generator().manual_seed(seed))
    net, w = network(seed)
    want, want_raw = mf.loss(net, x, y, d, **kw)
    want_gradients = torch.autograd.grad(want.sum(), w)
    for count, jvp in product({None, equal}, JVPS):
        got, raw = mf.fast_loss(net, x, y, d, equal=count, jvp=jvp, **kw)
        close(got, want)
        close(raw, want_raw)
        for a, b in zip(torch.autograd.grad(got.sum(), w), want_gradients):
            close(a, b)


def test_rows_counted_too_many_have_the_error_of_v_alone():
    """As the docstring warns: to check the count, the host would have to wait for a GPU."""
    (net, _), d, x = network(0), draws(0, 5, equal=2), randn(5, 5, 3)
    y = torch.zeros(5, dtype=torch.int64)
    _, raw = mf.fast_loss(net, x, y, d, null=NULL, equal=4)
    _, right = mf.fast_loss(net, x, y, d, null=NULL)
    z, v = mf.interpolate(x, d.e, d.t)
    error = (net(z, d.t, d.r, torch.where(d.drop, NULL, y)) - v).square().sum(1)
    close(raw[:4], error[:4])
    assert not torch.isclose(raw[2:4], right[2:4]).any()
    close(raw[4:], right[4:])


def test_rows_with_r_equal_t_are_known_without_a_jvp():
    """The fast loss counts the leading rows with r = t and asks for no derivative of them."""
    (net, _), seen = network(0), []

    def jvp(f, primals, tangents):
        seen.append(len(primals[0]))
        return dual.jvp(f, primals, tangents)

    for equal in (0, 2, 5):
        d = draws(0, 5, equal=equal)
        mf.fast_loss(net, randn(1, 5, 3), torch.zeros(5).long(), d, null=NULL, jvp=jvp)
    assert seen == [5, 3]


@pytest.mark.parametrize("batch, equal", [(5, 0), (5, 2), (5, 5), (1, 0), (1, 1)])
def test_the_network_is_evaluated_no_more_than_it_must(batch, equal):
    """And never on no rows."""
    d, seen = draws(0, batch, equal=equal), []

    def net(z, t, r, y):
        assert len(z) == len(t) == len(r) == len(y)
        seen.append(len(z))
        return z

    for mode, loss in product(MODES, LOSSES):
        seen.clear()
        loss(net, randn(1, batch, 3), torch.zeros(batch).long(), d, null=NULL, **mode)
        null = 0 if mode["omega"] == 1 and mode["kappa"] == 0 else batch
        differ = batch if loss is plain else batch - equal
        assert sum(seen) == batch + null + (differ if mode["kappa"] else 0) and 0 not in seen


@given(seeds, st.sampled_from(MODES), st.sampled_from([(0.0, 1.0), (0.2, 0.7)]))
def test_the_loss_is_the_papers_algorithm(seed, mode, interval):
    """Compare with the equations, with Jacobian-vector products computed by reverse mode."""
    (net, w), x, d = network(seed), randn(seed + 5, 7, 3), draws(seed, 7)
    y = torch.randint(NULL, (7,), generator=torch.Generator().manual_seed(seed))
    omega, kappa, (t, r), null = (
        mode["omega"],
        mode["kappa"],
        (d.t[:, None], d.r[:, None]),
        0 * y + NULL,
    )
    z, v, label = (1 - t) * x + t * d.e, d.e - x, torch.where(d.drop, NULL, y)
    classes, none = net(z, d.t, d.t, label), net(z, d.t, d.t, null)
    guided = ~d.drop & (interval[0] <= d.t) & (d.t <= interval[1])
    v_g = omega * v + kappa * classes + (1 - omega - kappa) * none
    v = torch.where(guided[:, None], v_g, v).detach()
    jacobian = torch.autograd.functional.jvp(
        lambda z, t, r: net(z, t, r, label),
        (z, d.t, d.r),
        (v, torch.ones_like(d.t), torch.zeros_like(d.r)),
    )
    u = net(z, d.t, d.r, label)
    s = (u - (v - (t - r) * jacobian[1]).detach()).square().sum(1)
    got, raw = mf.loss(net, x, y, d, null=NULL, interval=interval, p=0.75, c=1e-3, **mode)
    close(raw, s.detach())
    close(got, s / (s.detach() + 1e-3) ** 0.75)
    want = torch.autograd.grad((s / (s.detach() + 1e-3) ** 0.75).sum(), w)
    for a, b in zip(torch.autograd.grad(got.sum(), w), want):
        close(a, b)


@given(seeds, st.floats(0, 1.5), st.floats(1e-4, 1))
def test_gradient_is_that_of_the_squared_error_times_a_constant_weight(seed, p, c):
    (net, w), d, x = network(seed), draws(seed, 7), randn(seed + 5, 7, 3)
    y = torch.zeros(7, dtype=torch.int64)
    each, raw = mf.loss(net, x, y, d, null=NULL, p=p, c=c)
    plain, _ = mf.loss(net, x, y, d, null=NULL, p=0.0, c=c)
    s = raw
    assert not s.requires_grad
    close(plain.detach(), s)
    close(each.detach(), s / (s + c) ** p)
    for a, b in zip(
        torch.autograd.grad(each.sum(), w), torch.autograd.grad((plain / (s + c) ** p).sum(), w)
    ):
        close(a, b)


@given(seeds)
def test_the_target_is_held_fixed(seed):
    """Even if the data, and the tangents that `jvp` returns, have a graph."""
    (net, w), d, x = network(seed), draws(seed, 7, equal=3), randn(seed + 5, 7, 3).requires_grad_()
    y = torch.zeros(7, dtype=torch.int64)

    def jvp(f, primals, tangents):
        u, dudt = torch.func.jvp(f, primals, tangents)
        assert dudt.requires_grad
        return u, dudt

    for kappa in (0, 0.5):
        (a, _), (b, _) = (
            loss(net, x, y, d, null=NULL, kappa=kappa)
            for loss in (mf.loss, partial(mf.fast_loss, jvp=jvp))
        )
        close(b, a)
        for g, h in zip(*(torch.autograd.grad(rows.sum(), [*w, x]) for rows in (a, b))):
            close(g, h)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_dropout_mask_serves_u_and_its_derivative(loss):
    """If u is (1 + t) z, doubled or dropped, the error of a row is one of two numbers."""
    d, x = draws(0, 200, dim=1, equal=0), randn(5, 200, 1)
    (z, v), t, r = mf.interpolate(x, d.e, d.t), d.t[:, None], d.r[:, None]
    u, dudt = (1 + t) * z, (1 + t) * v + z
    either = torch.cat([(m * u - v + (t - r) * m * dudt).square() for m in (0, 2)], 1)
    torch.manual_seed(0)
    _, raw = loss(lambda z, t, r, y: F.dropout((1 + t[:, None]) * z), x, None, d, null=None)
    gap, which = (either - raw[:, None]).abs().min(1)
    assert gap.max() < 1e-12 and 60 < which.sum() < 140


@given(seeds, st.integers(2, 5))
def test_squared_error_is_summed_not_averaged(seed, copies):
    """Data of n equal copies have n times the error, if the net acts on each copy alone."""
    net, _ = network(seed)
    d, x, y = draws(seed, 5), randn(seed + 5, 5, 3), torch.zeros(5, dtype=torch.int64)

    def wide(z, t, r, y):
        return torch.stack([net(copy, t, r, y) for copy in z.unbind(1)], 1)

    def repeat(a):
        return a[:, None].expand(-1, copies, -1)

    one, _ = mf.loss(net, x, y, d, null=NULL, p=0.0)
    many, _ = mf.loss(wide, repeat(x), y, d._replace(e=repeat(d.e)), null=NULL, p=0.0)
    close(many, copies * one)


def test_minimising_the_loss_finds_the_flow():
    """Fit a Gaussian flow by the plain squared loss, from a distant start, to the true one."""
    truth, g = (0.8, 0.5), torch.Generator().manual_seed(0)
    # mean and log of the deviation
    w = torch.tensor([-1.0, 0.7], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.05, betas=(0.9, 0.95))
    y, path = torch.zeros(4096, dtype=torch.int64), []
    for k in range(300):
        adam.param_groups[0]["lr"] = 0.05 * (1 - k / 300)
        x = truth[0] + truth[1] * torch.randn(4096, 1, generator=g, dtype=torch.float64)
        d = mf.draw(x.shape, generator=g, share=0.25)
        d = mf.Draws(d.e.double(), d.t.double(), d.r.double(), d.drop)
        each, _ = mf.loss(Gaussian(w[0], w[1].exp()).average, x, y, d, null=1, p=0.0)
        adam.zero_grad()
        each.mean().backward()
        adam.step()
        path.append((w[0].item(), w[1].exp().item()))
    mean, deviation = torch.tensor(path[-50:]).mean(0)
    assert abs(mean - truth[0]) < 0.02 and abs(deviation - truth[1]) < 0.02, (mean, deviation)


def test_the_loss_of_any_net_compiles_to_one_graph():
    (net, w), d, x = network(0), draws(0, 8, equal=6), randn(5, 8, 3)
    y = torch.zeros(8, dtype=torch.int64)
    for jvp in JVPS:
        run = partial(mf.fast_loss, net, null=NULL, kappa=0.5, equal=6, jvp=jvp)
        a = torch.compile(run, fullgraph=True, backend="aot_eager")(x, y, d)[0]
        b = run(x, y, d)[0]
        close(a, b)
        for g, h in zip(torch.autograd.grad(a.sum(), w), torch.autograd.grad(b.sum(), w)):
            close(g, h)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_transformer_of_torch_is_trained(loss):
    """In eval mode too, where torch takes another way if there is no graph."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    net = torch.nn.ModuleList((torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(2, 8)))
    encoder, embed = net.double()
    d, x = draws(0, 6, dim=40, equal=3), randn(5, 6, 5, 8)
    d, found = d._replace(e=d.e.view(6, 5, 8)), []
    for form, training in ((plain, True), (loss, True), (loss, False)):
        net.train(training)
        rows, raw = form(
            lambda z, t, r, y: encoder(z + embed(torch.stack((t, t - r), 1))[:, None]),
            x,
            None,
            d,
            null=None,
            kappa=0.5,
        )
        found.append([rows, raw, *torch.autograd.grad(rows.sum(), net.parameters())])
    for want, *others in zip(*found, strict=True):
        for got in others:
            close(got, want)


# --- conditions and shapes ---


def conditions(seed):
    """Return a table of texts, their masks and a scale, by class."""
    texts, scales = randn(seed, NULL + 1, 4, 3), randn(seed + 1, NULL + 1)
    return {"text": (texts, randn(seed + 2, NULL + 1, 4) < 0.5), "scale": scales}


@given(seeds, st.sampled_from(MODES), st.sampled_from(LOSSES), st.integers(0, 7))
def test_a_condition_may_be_any_tensors(seed, mode, loss, equal):
    """A loss with rows of a table for conditions is the loss with labels that look them up."""
    (net, w), d, x = network(seed), draws(seed, 7, equal=equal), randn(seed + 5, 7, 3)
    table, y = conditions(seed), torch.arange(7) % NULL

    def look_up(k):
        return mf.each(lambda a: a[k], table)

    def conditioned(z, t, r, y):
        text, mask = y["text"]
        assert mask.dtype == torch.bool
        z = z * y["scale"][:, None] + (text * mask[..., None]).sum(1)
        return net(z, t, r, torch.zeros(len(z), dtype=torch.int64))

    def labelled(z, t, r, y):
        return conditioned(z, t, r, look_up(y))

    found = []
    for f, y, null in ((labelled, y, NULL), (conditioned, look_up(y), look_up(NULL))):
        rows, raw = loss(f, x, y, d, null=null, **mode)
        found.append([rows, raw, *torch.autograd.grad(rows.sum(), w[:2])])
    for want, got in zip(*found, strict=True):
        close(got, want)


@given(seeds, st.sampled_from(MODES), st.sampled_from(LOSSES), st.integers(0, 7))
def test_there_may_be_no_condition(seed, mode, loss, equal):
    (net, w), d, x = network(seed), draws(seed, 7, equal=equal), randn(seed + 5, 7, 3)

    def unconditional(z, t, r, y):
        assert y is None
        return net(z, t, r, torch.zeros(len(z), dtype=torch.int64))

    found = []
    for f, y, null in ((net, torch.zeros(7, dtype=torch.int64), 0), (unconditional, None, None)):
        rows, raw = loss(f, x, y, d, null=null, **mode)
        found.append([rows, raw, *torch.autograd.grad(rows.sum(), w)])
    for want, got in zip(*found, strict=True):
        close(got, want)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 3), (5, 1, 4, 3), (7, 3)])
def test_a_null_that_does_not_fit_is_refused(loss, shape):
    """By its shape, beside that of the condition, or as it is built otherwise."""
    d, x, y = draws(0, 7), randn(5, 7, 3), (randn(1, 7, 4, 3), randn(2, 7))
    run = partial(loss, lambda z, t, r, y: z, x, y, d)
    with pytest.raises(
        ValueError, match="a condition of shape .* and null of shape .* for a batch of 7"
    ) as error:
        run(null=(torch.zeros(shape), torch.zeros(())))
    assert str(shape) in str(error.value) and str((7, 4, 3)) in str(error.value)
    with pytest.raises(ValueError):
        run(null=(torch.zeros(4, 3),))
    for null in (0.5, torch.tensor([0.5])[0], None):
        with pytest.raises(ValueError, match="a null of .* for a condition of torch.int64"):
            loss(lambda z, t, r, y: z, x, torch.arange(7), d, null=null)
    with pytest.raises(ValueError, match="returned NoneType for data of shape"):
        loss(lambda z, t, r, y: None, x, None, d, null=None)
    with pytest.raises(ValueError, match=r"\(1,\) and null of shape \(\), for a batch of 7"):
        loss(lambda z, t, r, y: z, x, y[1][:1], d, null=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_data_may_be_single_numbers(loss):
    d, x = draws(0, 7, dim=1), randn(5, 7, 1)
    net = lambda z, t, r, y: z * (2 + t.view_as(z) - r.view_as(z))  # noqa: E731
    want, _ = loss(lambda z, t, r, y: net(z, t[:, None], r[:, None], y), x, None, d, null=None)
    got, _ = loss(net, x[:, 0], None, d._replace(e=d.e[:, 0]), null=None)
    close(got, want)


def test_null_takes_the_dtype_of_the_condition():
    """And only in the rows that are marked."""
    y = randn(0, 3, 2), torch.arange(3), torch.ones(3, dtype=torch.bool)
    null = torch.full((2,), 0.5), torch.tensor(7, dtype=torch.int32), 0
    new = mf.replace(y, null, torch.tensor([True, False, True]))
    assert [a.dtype for a in new] == [a.dtype for a in y]
    assert (new[0][1] == y[0][1]).all() and (new[0][::2] == 0.5).all()
    assert new[1].tolist() == [7, 1, 7] and new[2].tolist() == [False, True, False]


@pytest.mark.parametrize(
    "shape, wrong",
    [
        ((8, 2), lambda z: z[:, :1]),
        ((8, 2), lambda z: z[:, 0]),
        ((8, 3, 4, 4), lambda z: z.mean((1, 2, 3), keepdim=True)),
        ((8, 3, 4, 4), lambda z: z[:, :, :, :1]),
        ((8, 3, 4, 4), lambda z: z[:1]),
        ((8, 3, 4, 4), lambda z: z.flatten(1)),
        ((8, 3, 4, 4), lambda z: z[None]),
    ],
)
def test_other_shapes_are_refused(shape, wrong):
    """Of what the network returns, and of noise, even if they broadcast; both are named."""
    x, t, y = randn(0, *shape), torch.full((8,), 0.5, dtype=torch.float64), torch.zeros(8).long()
    seen = []

    def net(z, t, r, y):
        seen[:] = z, wrong(z)
        return seen[1]

    def refused(run, *tensors):
        with pytest.raises(ValueError) as error:
            run()
        assert all(str((*a.shape,)) in str(error.value) for a in (*tensors, *seen))

    refused(lambda: mf.sample(net, x, y))
    for loss, r, kappa in product(LOSSES, (t, 0 * t), (0, 0.5)):
        d, options = mf.Draws(x, t, r, t > 1), dict(null=NULL, kappa=kappa)
        refused(lambda: loss(net, x, y, d, **options))
        seen.clear()
        d = d._replace(e=wrong(x))
        refused(lambda: loss(lambda z, t, r, y: z, x, y, d, **options), x, d.e)


# --- the draws ---


@given(seeds, st.integers(1, 300), st.floats(0, 1))
def test_a_fixed_share_of_the_rows_has_r_equal_t_and_comes_first(seed, batch, share):
    e, t, r, drop = mf.draw((batch, 2), generator=torch.Generator().manual_seed(seed), share=share)
    equal = int(share * batch)
    assert (
        e.shape == (batch, 2)
        and t.shape == r.shape == drop.shape == (batch,)
        and drop.dtype == torch.bool
    )
    assert (t[:equal] == r[:equal]).all() and (t[equal:] > r[equal:]).all()
    assert (0 < r).all() and (t < 1).all()
    assert (drop.int().diff() <= 0).all()  # dropped rows come first


@pytest.mark.parametrize("mean, std", [(-0.4, 1.0), (-2.0, 2.0)])
def test_draws_have_the_distribution_of_the_paper(mean, std):
    n = 200_000
    e, t, r, drop = mf.draw(
        (n, 2), generator=torch.Generator().manual_seed(0), share=0.0, drop=0.1, mean=mean, std=std
    )
    logits = torch.logit(torch.cat((t, r)).double())
    grid = mean + std * torch.linspace(-2, 2, 9, dtype=torch.float64)
    normal = 0.5 * (1 + torch.erf((grid - mean) / std / 2**0.5))
    assert ((logits[:, None] < grid).double().mean(0) - normal).abs().max() < 0.004
    # The larger of two independent draws has the square of their distribution function.
    assert (
        (torch.logit(t.double())[:, None] < grid).double().mean(0) - normal**2
    ).abs().max() < 0.005
    assert abs(drop.double().mean() - 0.1) < 0.003
    assert abs(e.mean()) < 0.01 and abs(e.std() - 1) < 0.01


def test_default_draws_are_those_of_the_imagenet_recipe():
    d = mf.draw((200_000, 1), generator=torch.Generator().manual_seed(0))
    assert (d.t == d.r).sum() == 150_000
    assert abs(torch.logit(torch.cat((d.t[150_000:], d.r[150_000:]))).mean() + 0.4) < 0.01
    assert abs(d.drop.double().mean() - 0.1) < 0.003


def test_the_number_of_dropped_rows_is_binomial():
    counts = [
        mf.draw((64, 1), generator=torch.Generator().manual_seed(i)).drop.sum().item()
        for i in range(2000)
    ]
    assert abs(np.mean(counts) - 6.4) < 0.2 and abs(np.var(counts) - 5.76) < 0.6


# --- the authors' numbers ---

GOLDEN = np.load(Path(__file__).with_name("authors-tiny.npz"))


@pytest.mark.parametrize(
    "mode, scales", [("none", {}), ("cfg", dict(omega=2.0)), ("mix", dict(kappa=0.5))]
)
def test_agrees_with_the_authors_code(mode, scales):
    """Compare a one-layer DiT with the authors' JAX code.

    The file holds its forward, du/dt, guided velocity, losses and gradients.
    """
    gold = {name.removeprefix(f"{mode}."): torch.from_numpy(GOLDEN[name]) for name in GOLDEN.files}
    params = {
        name[2:]: gold[name].float().requires_grad_() for name in gold if name.startswith("w.")
    }
    net, x, y, t, r = partial(model.dit, params), gold["x"], gold["y"], gold["t"], gold["r"]

    def near(got, want, tolerance=2e-6):
        assert got.shape == want.shape
        assert (got.detach() - want).norm() <= tolerance * want.norm(), (
            got.detach() - want
        ).norm() / want.norm()

    d = mf.Draws(gold["e"], t, r, gold["drop"])
    dropped = torch.where(d.drop, 10, y)
    z, v = mf.interpolate(x, d.e, t)
    scales = {"omega": 1.0, "kappa": 0.0, **scales}
    v_g = mf.guide(net, z, t, v, dropped, d.drop, null=10, **scales)
    near(v_g, gold["vg"])
    near(net(z, t, r, dropped), gold["u"])
    for jvp in JVPS:
        u, dudt = mf.derivative(net, z, t, r, v_g, dropped, jvp=jvp)
        near(u, gold["u"])
        near(dudt, gold["dudt"])
        target = mf.target(net, z, t, r, v_g, dropped, jvp=jvp)
        near(target, v_g - mf.append_dims(t - r, z) * gold["dudt"])
    for loss in LOSSES:
        each, raw = loss(net, x, y, d, null=10, **scales)
        near(raw, gold["raw"])
        near(each.mean(), gold["loss"])
        gradients = torch.autograd.grad(each.mean(), list(params.values()))
        for name, g in zip(params, gradients):
            want = gold[f"g.{name}"]
            near(g if want.numel() > 1 else g.norm().reshape(1), want, 2e-5)


# --- the file by itself ---


def test_the_file_works_alone(monkeypatch, tmp_path, capsys):
    """Run the toy from a copy of the file, with no other file of the repository to import."""
    root = Path(mf.__file__).parent
    copy = shutil.copy(mf.__file__, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != root])
    for file in root.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    runpy.run_path(copy)["toy"](iterations=3, batch=8)
    assert capsys.readouterr().out.count("MeanFlow") == 3
