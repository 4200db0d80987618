"""fid.py: statistics that lose no digits, and the Fréchet distance where it is known.

test_inception.py covers the network.
"""

import importlib
from functools import reduce

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import fid

seeds = st.integers(0, 2**31)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, d, rank=None):
    a = randn(seed, d, rank or 2 * d)
    return a @ a.T / a.shape[1]


@given(
    seeds,
    st.lists(st.integers(1, 20), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    st.sampled_from([0.0, 1e6]),
)
def test_statistics_are_those_of_all_items_at_once_however_they_come(seed, sizes, offset):
    features = randn(seed, sum(sizes), 5)
    count, mean, scatter = reduce(fid.accumulate, (features + offset).split(sizes), None)
    mu, sigma = fid.statistics((count, mean, scatter))
    assert count == len(features)
    # At 1e6 the items themselves are rounded to 1e-10; sums of raw products would be off by 1e-4
    # or more.
    tolerance = 1e-12 + offset * 2e-15
    assert (mu - offset - features.mean(0)).abs().max() <= tolerance
    assert np.abs(sigma.numpy() - np.cov(features.numpy().T)).max() <= tolerance


def test_statistics_of_single_precision_features_are_double():
    mu, sigma = fid.statistics(fid.accumulate(None, randn(0, 9, 3).float()))
    assert mu.dtype == sigma.dtype == torch.float64


def test_one_item_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 items, not 1"):
        fid.statistics(fid.accumulate(None, randn(0, 1, 3)))


@given(seeds, st.integers(1, 12))
def test_equal_covariances_leave_the_distance_of_the_means(seed, d):
    sigma, mu1, mu2 = covariance(seed, d), randn(seed + 1, d), randn(seed + 2, d)
    assert abs(
        fid.frechet_distance(mu1, sigma, mu2, sigma) - (mu1 - mu2).square().sum()
    ) < 1e-11 * (1 + d)


@given(seeds, st.integers(1, 12), st.floats(0, 9), st.data())
def test_scaled_covariance(seed, d, c, more):
    sigma, mu = (
        covariance(seed, d, more.draw(st.integers(1, d))),
        randn(seed + 1, d),
    )  # of full rank and of less
    want = (c**0.5 - 1) ** 2 * sigma.trace()
    assert abs(fid.frechet_distance(mu, sigma, mu, c * sigma) - want) < 1e-11 * (1 + sigma.trace())


@given(seeds, st.integers(2, 12))
def test_commuting_covariances(seed, d):
    a, b = randn(seed, d).square(), randn(seed + 1, d).square()
    a[0], b[-1] = 0, 0
    basis, mu = torch.linalg.qr(randn(seed + 2, d, d)).Q, randn(seed + 3, d)
    want = (a.sqrt() - b.sqrt()).square().sum()
    assert (
        abs(fid.frechet_distance(mu, basis * a @ basis.T, mu, basis * b @ basis.T) - want) < 1e-10
    )


@given(seeds, st.integers(1, 12))
def test_agrees_with_the_eigenvalues_of_the_product_and_is_symmetric(seed, d):
    s1, s2, mu1, mu2 = (
        covariance(seed, d),
        covariance(seed + 1, d),
        randn(seed + 2, d),
        randn(seed + 3, d),
    )
    root = np.sqrt(np.linalg.eigvals((s1 @ s2).numpy()).real).sum()
    want = float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * root
    got = fid.frechet_distance(mu1, s1, mu2, s2)
    assert abs(got - want) < 1e-8 and abs(got - fid.frechet_distance(mu2, s2, mu1, s1)) < 1e-10
    assert fid.frechet_distance(mu1, s1, mu1, s1) < 1e-11 * (1 + s1.trace())


def test_fewer_items_than_dimensions():
    """In orthogonal subspaces, the distance is the sum of the traces, with little rounding."""
    basis = torch.linalg.qr(randn(0, 300, 300)).Q
    s1, s2 = (
        basis[:, part] * randn(1, 100).square() @ basis[:, part].T
        for part in (slice(0, 100), slice(100, 200))
    )
    zero = torch.zeros(300, dtype=torch.float64)
    assert abs(fid.frechet_distance(zero, s1, zero, s2) - s1.trace() - s2.trace()) < 1e-10
    assert fid.frechet_distance(zero, s1, zero, s1) < 1e-10


def test_nearest():
    reals, points = randn(0, 50, 4), randn(1, 20, 4)
    index, distance = fid.nearest(points, reals)
    table = np.linalg.norm(points.numpy()[:, None] - reals.numpy(), axis=2)
    assert (index.numpy() == table.argmin(1)).all() and np.allclose(
        distance, table.min(1), rtol=1e-12
    )
    index, distance = fid.nearest(reals, reals, exclude_self=True)
    assert (index != torch.arange(50)).all() and (distance > 0).all()
    assert (fid.nearest(reals, reals)[1] == 0).all()


def test_agrees_with_scipys_square_root():
    """Compare at full rank, where scipy's is accurate."""
    sigma1, sigma2, mu = covariance(0, 64), covariance(1, 64), randn(2, 64)
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    want = mu.square().sum() + sigma1.trace() + sigma2.trace() - 2 * np.trace(root).real
    assert abs(fid.frechet_distance(0 * mu, sigma1, mu, sigma2) - want) < 1e-10 * want


@pytest.mark.slow
@pytest.mark.parametrize("d, n", [(2048, 1500)])
def test_at_full_size_with_fewer_items_than_dimensions(d, n):
    """The distance is known in closed form: one covariance is a multiple of the other."""
    x = randn(0, n, d) * torch.arange(1, d + 1) ** -0.5
    mu, sigma = fid.statistics(fid.accumulate(None, x))
    want = 0.5**2 * sigma.trace()
    assert abs(fid.frechet_distance(mu, sigma, mu, 2.25 * sigma) - want) < 1e-6 * want
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-6


def test_it_prints_inceptions_layers(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fid.py"])
    fid.main()
    _, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert [line[0] for line in lines] == list(fid.ARCHITECTURE)
    assert lines[5] == ["Mixed_5b", "4", "256,832"]
    whole = sum(int(line[2].replace(",", "")) for line in lines)
    assert whole == 23_885_392 - 1008 * 2049  # all but the last, linear one


@pytest.mark.parametrize("features", [(2, 5), (5,), (2, 3, 1), (), (0, 3), (2, 0)])
def test_features_of_another_shape_change_no_statistics(features):
    """None are broadcast, and a mean of nothing would be NaN."""
    state = fid.accumulate(None, randn(0, 4, 3))
    before = [torch.as_tensor(value).clone() for value in state]
    with pytest.raises(
        ValueError, match="^features are|^items have 3 and 5 features: give as many"
    ):
        fid.accumulate(state, torch.zeros(features))
    assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(state, before))
    with pytest.raises(ValueError, match="^items have 3 and 1 features: give as many of each$"):
        fid.merge(state, fid.accumulate(None, randn(1, 4, 1)))


def negative(sigma):
    """Return it with its largest eigenvalue at -2e-6 of what the others add up to."""
    values, vectors = torch.linalg.eigh(sigma)
    values[-1] = -2e-6 * values[:-1].sum()
    return vectors * values @ vectors.T


@pytest.mark.parametrize(
    "change",
    [lambda s: -s, negative, lambda s: torch.eye(len(s)) - 0.9999, lambda s: s - s.diag().diag()],
)
def test_what_is_no_covariance_has_no_distance(change):
    sigma, mu = covariance(0, 192), randn(1, 192)
    for pair in ((change(sigma), sigma), (sigma, change(sigma)), (change(sigma),) * 2):
        with pytest.raises(
            ValueError, match="^no covariance has an eigenvalue -.*: compute it anew"
        ):
            fid.frechet_distance(mu, pair[0], mu, pair[1])


@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
def test_single_precision_keeps_a_covariance_one(sums):
    """Of fewer items than dimensions, whose mean is as large as their deviation."""
    x = (randn(0, 100, 64) @ randn(1, 64, 300) / 8 + 1).relu().to(sums)
    mu, sigma = x.mean(0), x.T @ x / 100 - x.mean(0).outer(x.mean(0))
    mu, sigma = mu.float(), ((sigma + sigma.T) / 2).float()
    assert torch.linalg.eigvalsh(sigma.double())[0] < -1e-10 * sigma.trace()
    assert fid.frechet_distance(mu, sigma, mu, sigma) < 1e-4 * sigma.trace()
    assert fid.frechet_distance(mu, 0 * sigma, mu, 0 * sigma) == 0


@pytest.mark.parametrize("shapes", [((1,), (3, 3)), ((3,), (3,)), ((3, 1), (3, 3)), ((), ())])
def test_statistics_of_other_shapes_have_no_distance(shapes):
    mu, sigma = randn(0, 3), covariance(1, 3)
    bad = [torch.ones(shape) for shape in shapes]
    for inputs in ((mu, sigma, *bad), (*bad, mu, sigma), (*bad, *bad)):
        with pytest.raises(ValueError, match=r"^statistics are \[.*\]: give \(d,\), \(d, d\)"):
            fid.frechet_distance(*inputs)


@pytest.mark.parametrize("name", ["meanflow", "dual", "model", "imf", "vae", "fid"])
def test_every_terminal_can_show_what_a_file_to_copy_says_of_itself(name):
    assert importlib.import_module(name).__doc__.isascii()  # which is what --help prints
