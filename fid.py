"""How far samples are from data: streaming statistics of features and the Fréchet distance, in float64.

Heusel et al.: GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500 (the distance and its use).
"""

import torch


def accumulate(state, features):
    """Adds features, (n, d), to the running statistics `state`: (count, mean (d,), scatter (d, d)), or None at first.

    float64. Each batch is centred on its own mean, and the means are then combined (Chan, Golub, LeVeque 1983), so a
    large common offset costs no digits; in sums of raw products it would.
    """
    features = features.double()
    n, mean = len(features), features.mean(0)
    centred = features - mean
    scatter = centred.T @ centred
    if state is None:
        return n, mean, scatter
    count, old_mean, old_scatter = state
    shift, total = mean - old_mean, count + n
    return total, old_mean + shift * (n / total), old_scatter + scatter + shift.outer(shift) * (count * n / total)


def statistics(state):
    """Mean (d,) and unbiased covariance (d, d) of what was accumulated. Raises ValueError below two items."""
    count, mean, scatter = state
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 items, not {count}")
    return mean, scatter / (count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), a float64 scalar tensor >= 0.

    mu: (d,); sigma: (d, d) symmetric positive semi-definite, of any rank. The trace of the square root is the sum of the
    singular values of A^T B, where A A^T = sigma1 and B B^T = sigma2. No square root is taken of their product's
    eigenvalues, which would turn a rounding error of 1e-16 into 1e-8 in each direction that a covariance lacks.
    """
    def root(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        floor = values[-1] * len(values) * torch.finfo(torch.float64).eps  # what is below is rounding
        return vectors * values.where(values > floor, 0).sqrt()

    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp(min=0)


def nearest(features, reals, *, exclude_self=False):
    """The index in `reals`, (m, d), of each feature's nearest item and the Euclidean distance to it, both (n,).

    exclude_self: `features` is `reals`, and an item is not its own neighbour.
    """
    distance = torch.cdist(features, reals, compute_mode="donot_use_mm_for_euclid_dist")
    if exclude_self:
        distance.fill_diagonal_(torch.inf)
    distance, index = distance.min(1)
    return index, distance
