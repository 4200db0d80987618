"""data.py: the digits, and batches that depend on (seed, step) alone."""

from itertools import islice

import torch
from hypothesis import given
from hypothesis import strategies as st

import data

seeds = st.integers(0, 2**20)


def test_the_digits_are_all_there():
    images, labels = data.digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1 and len(images.unique()) == 17
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # UCI's own count
    assert len(images.flatten(1).unique(dim=0)) == 1797


@given(seeds, st.integers(1, 50), st.integers(1, 70), st.integers(1, 4))
def test_every_epoch_visits_every_item_once(seed, count, batch, epochs):
    steps = -(-count * epochs // batch)
    rows = torch.cat([data.order(count, batch, seed=seed, step=k) for k in range(steps)])[: count * epochs]
    for epoch in rows.split(count):
        assert (epoch.sort().values == torch.arange(count)).all()


def test_epochs_and_seeds_differ_in_order():
    orders = [data.order(100, 100, seed=seed, step=k) for seed in (0, 1) for k in (0, 1)]
    assert all((a != b).any() for i, a in enumerate(orders) for b in orders[:i])


@given(seeds, st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_batches_are_the_same_from_any_step_and_for_any_number_of_processes(seed, start, world):
    images, labels = torch.arange(30.0), torch.arange(30)
    whole = list(islice(data.batches(images, labels, 8, seed=seed), start, start + 3))
    shares = [list(islice(data.batches(images, labels, 8, seed=seed, step=start, rank=rank, world=world), 3))
              for rank in range(world)]
    for k, (x, y) in enumerate(whole):
        assert (x == y).all()
        for rank in range(world):
            assert (shares[rank][k][0] == x[rank::world]).all() and (shares[rank][k][1] == y[rank::world]).all()


def test_the_cpu_generator_takes_no_more_than_32_bits_of_a_seed():
    """Why `generator` does not simply shift the run's seed up."""
    a, b = (torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32))
    assert (a == b).all()


@given(seeds, st.integers(0, 2**29))
def test_random_numbers_of_different_things_differ(seed, k):
    keys = [(seed + a, stream, k + b) for a in range(3) for stream in data.STREAMS for b in range(5)]
    firsts = [tuple(torch.rand(4, generator=data.generator(*key)).tolist()) for key in keys]
    assert len(set(firsts)) == len(keys)
    assert firsts[7] == tuple(torch.rand(4, generator=data.generator(*keys[7])).tolist())
