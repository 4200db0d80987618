"""Data: the embedded digits, and batches that depend on (seed, step) alone, however many processes share them.

digits.npz holds the 1,797 grey 8x8 images of the test part of *Optical Recognition of Handwritten Digits* (E. Alpaydin,
C. Kaynak; UCI Machine Learning Repository, 1998, CC BY 4.0), as scikit-learn's package carries them: `images`,
(1797, 8, 8) uint8 from 0 to 16, and `labels`, (1797,) uint8 from 0 to 9.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

STREAMS = ("order", "draws", "samples", "init")  # what random numbers are for: each has its own


def generator(seed, stream, k):
    """The random numbers of item k (an epoch, a step, a sample; below 2^30) of one of STREAMS of the run `seed`.

    Torch's CPU generator takes no more than the low 32 bits of its seed. This map into them keeps apart all (stream, k)
    of one run, and starts neighbouring runs' streams 2^32 / 1.618 apart.
    """
    return torch.Generator().manual_seed((seed * 2654435769 + STREAMS.index(stream) * 2**30 + k) % 2**32)


def digits():
    """The embedded digits: images (1797, 1, 8, 8) float32 in [-1, 1], -1 being blank paper, and labels (1797,) int64."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    return images[:, None] / 8 - 1, labels.long()


@lru_cache(2)  # of the last epochs: a permutation of ImageNet takes longer than a step
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def order(count, batch, *, seed, step):
    """Which of `count` items the global batch of this step holds, (batch,) int64: every epoch is a permutation of all
    items of its own, and batches are cut from the epochs laid end to end, so none is left out, not even at the seam."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // count
    return torch.cat([permutation(count, seed, k)[places[epochs == k] % count] for k in epochs.unique().tolist()])


def batches(images, labels, batch, *, seed, step=0, rank=0, world=1):
    """Endless (x, y) from `step` on: this rank's rows, rank::world, of the global batches of `order`."""
    while True:
        rows = order(len(images), batch, seed=seed, step=step)[rank::world]
        yield images[rows], labels[rows]
        step += 1
