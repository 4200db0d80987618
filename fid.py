"""FID: Inception-v3's features, streaming statistics, their distance, Inception score.

    python fid.py     print the layers of Inception and their parameters

Heusel et al.: GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500, the distance. Szegedy
et al.: Rethinking the Inception Architecture for Computer Vision, arXiv 1512.00567, with weights
that TensorFlow published on 2015-12-05. Salimans et al.: Improved Techniques for Training GANs,
arXiv 1606.03498, the score. evaluate.py measures checkpoints and images by these functions.
"""

import argparse
import hashlib
import os
import re
from contextlib import contextmanager
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

INCEPTION = (  # 95,628,359 bytes; torch-fidelity's release has the same file
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# --- Inception ---
#
# A block is a tuple of branches whose outputs are concatenated. A branch is a string of steps, each
# a pool or a convolution: "name=64:1x7" has 64 output channels and a kernel 1 high and 7 wide,
# zero-padded to keep the size; "/2" is a stride of 2 and "/1" one of 1, both without padding. Two
# convolutions joined by "|" have the same input, and their outputs are concatenated.


def mixed_5(pool):  # 35 x 35
    return (
        "branch1x1=64:1x1",
        "branch5x5_1=48:1x1 branch5x5_2=64:5x5",
        "branch3x3dbl_1=64:1x1 branch3x3dbl_2=96:3x3 branch3x3dbl_3=96:3x3",
        f"average branch_pool={pool}:1x1",
    )


def mixed_6(c):  # 17 x 17
    return (
        "branch1x1=192:1x1",
        f"branch7x7_1={c}:1x1 branch7x7_2={c}:1x7 branch7x7_3=192:7x1",
        f"branch7x7dbl_1={c}:1x1 branch7x7dbl_2={c}:7x1 branch7x7dbl_3={c}:1x7 "
        f"branch7x7dbl_4={c}:7x1 branch7x7dbl_5=192:1x7",
        "average branch_pool=192:1x1",
    )


def mixed_7(pool):  # 8 x 8
    return (
        "branch1x1=320:1x1",
        "branch3x3_1=384:1x1 branch3x3_2a=384:1x3|branch3x3_2b=384:3x1",
        "branch3x3dbl_1=448:1x1 branch3x3dbl_2=384:3x3 "
        "branch3x3dbl_3a=384:1x3|branch3x3dbl_3b=384:3x1",
        f"{pool} branch_pool=192:1x1",
    )


ARCHITECTURE = {
    "Conv2d_1a_3x3": ("=32:3x3/2",),
    "Conv2d_2a_3x3": ("=32:3x3/1",),
    "Conv2d_2b_3x3": ("=64:3x3 max/2",),
    "Conv2d_3b_1x1": ("=80:1x1",),
    "Conv2d_4a_3x3": ("=192:3x3/1 max/2",),
    "Mixed_5b": mixed_5(32),
    "Mixed_5c": mixed_5(64),
    "Mixed_5d": mixed_5(64),
    "Mixed_6a": (
        "branch3x3=384:3x3/2",
        "branch3x3dbl_1=64:1x1 branch3x3dbl_2=96:3x3 branch3x3dbl_3=96:3x3/2",
        "max/2",
    ),
    "Mixed_6b": mixed_6(128),
    "Mixed_6c": mixed_6(160),
    "Mixed_6d": mixed_6(160),
    "Mixed_6e": mixed_6(192),
    "Mixed_7a": (
        "branch3x3_1=192:1x1 branch3x3_2=320:3x3/2",
        "branch7x7x3_1=192:1x1 branch7x7x3_2=192:1x7 branch7x7x3_3=192:7x1 branch7x7x3_4=192:3x3/2",
        "max/2",
    ),
    "Mixed_7b": mixed_7("average"),
    "Mixed_7c": mixed_7("max"),  # only in the graph of 2015-12-05, not in torchvision's
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def parse(block, branch):
    """Return a branch as a list of steps: a pool's name, or the convolutions of one input.

    A convolution is (name, outputs, (height, width), stride, padding).
    """
    steps = []
    for step in branch.split():
        convs = []
        for name, *numbers, stride in re.findall(r"(\w*)=(\d+):(\d)x(\d)/?(\d?)", step):
            outputs, *kernel = map(int, numbers)
            name, padding = f"{block}.{name}".rstrip("."), 0 if stride else "same"
            convs.append((name, outputs, kernel, int(stride or 1), padding))
        steps.append(convs or step)
    return steps


BLOCKS = [[parse(name, branch) for branch in block] for name, block in ARCHITECTURE.items()]


def inception_shapes():
    """Return {name: shape} of the published tensors, without the batch norms' counters."""
    tensors, inputs = {}, 3
    for block in BLOCKS:
        widths = [inputs] * len(block)
        for i, branch in enumerate(block):
            for convs in (step for step in branch if isinstance(step, list)):
                for name, outputs, kernel, _, _ in convs:
                    tensors[f"{name}.conv.weight"] = (outputs, widths[i], *kernel)
                    tensors |= {f"{name}.bn.{part}": (outputs,) for part in BATCH_NORM}
                widths[i] = sum(outputs for _, outputs, *_ in convs)
        inputs = sum(widths)
    return tensors | {"fc.weight": (1008, inputs), "fc.bias": (1008,)}


def fold(tensors):
    """Fold each batch norm (eps 1e-3) of the published tensors into its convolution: return
    NAME.weight, NAME.bias and fc.weight, float32. A tenth faster, and as close to float64."""
    params = {"fc.weight": tensors["fc.weight"]}
    for name in [k.removesuffix(".conv.weight") for k in tensors if k.endswith(".conv.weight")]:
        weight, bias, mean, variance = (tensors[f"{name}.bn.{k}"].double() for k in BATCH_NORM)
        scale = weight / (variance + 1e-3).sqrt()
        kernel = tensors[f"{name}.conv.weight"] * scale[:, None, None, None]
        params[f"{name}.weight"] = kernel.to(torch.float32, memory_format=torch.channels_last)
        params[f"{name}.bias"] = (bias - mean * scale).float()
    return params


def load_inception(path):
    """Return the parameters for `inception`, {name: float32 tensor}, and the file's sha256 in hex.

    path: the published file, told by its checksum, or a safetensors file of float32 tensors with
    its names and shapes. No other pickle is opened. Raises FileNotFoundError or ValueError.
    """
    fetch = f"fetch {INCEPTION}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: {fetch}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == INCEPTION_SHA256:
        return fold(torch.load(path, map_location="cpu", weights_only=True)), digest
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        found = f"sha256 {digest[:8]}..., not the published {INCEPTION_SHA256[:8]}..."
        raise ValueError(f"{path} has {found}, and is no safetensors ({error}): {fetch}") from None
    found = {k: (p.dtype, *p.shape) for k, p in tensors.items() if "num_batches" not in k}
    wanted = {name: (torch.float32, *shape) for name, shape in inception_shapes().items()}
    for name in wanted | found:
        got, want = found.get(name, "missing"), wanted.get(name, "absent")
        if got != want:
            raise ValueError(f"{path}: {name} is {got}, should be {want}: {fetch}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: {fetch}")
    return fold(tensors), digest


def resize(images):
    """Resize uint8 (B, 3, H, W) to float32 (B, 3, 299, 299) in [-1, 1), as TensorFlow 1 does.

    Bilinear: pixel i of 299 is read at i H / 299, without half pixels and without smoothing where
    it shrinks, then (x - 128) / 128. A better resize gives other FIDs than those published.
    Positions are float32, as TensorFlow's: other rounding shows in the fifth digit.
    """
    x = images.float()
    for size in (x.shape[3], x.shape[2]):  # columns, then rows
        at = torch.arange(299, dtype=torch.float32, device=x.device) * (size / 299)
        low = at.long()
        left, right = (x.index_select(3, i) for i in (low, (low + 1).clamp(max=size - 1)))
        x = (left + (right - left) * (at - low)).mT
    return (x - 128) / 128


def network(params, x):
    """Return the features, (B, 2048), of images from `resize`, with parameters from `fold`."""

    def step(x, kind):
        if kind == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if kind == "max":
            return F.max_pool2d(x, 3, 1, 1)
        if kind == "max/2":
            return F.max_pool2d(x, 3, 2)
        outputs = []
        for name, _, _, stride, padding in kind:
            weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
            outputs.append(F.conv2d(x, weight, bias, stride, padding).relu_())
        return torch.cat(outputs, 1)

    for block in BLOCKS:
        x = torch.cat([reduce(step, branch, x) for branch in block], 1)
    return x.mean((2, 3))


@contextmanager
def full_precision(device):
    """Compute in float32 proper: not in TF32, CUDA's default for convolutions, nor in autocast."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        conv.fp32_precision = before


@torch.no_grad()
def inception(params, images, *, network=network):
    """Return pooled features, (B, 2048), and logits, (B, 1008), float32, of uint8 images.

    images: (B, 3, H, W), or B of any sizes in a list, (3, H, W). params: from `load_inception`, on
    the images' device. The logits leave out fc.bias, as in the Inception score's first code, ADM's
    evaluator and torch-fidelity ("logits_unbiased"). To compile, pass a compiled `network`. Raises
    ValueError for anything but uint8 RGB.
    """
    parts = [images] if torch.is_tensor(images) else [image[None] for image in images]
    for part in parts:
        shape = tuple(part.shape)
        if part.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"images are {part.dtype} {shape}: give torch.uint8 (B, 3, H, W)")
    x = torch.cat([resize(part) for part in parts])
    with full_precision(x.device):  # channels last: 1.5 times as fast
        features = network(params, x.contiguous(memory_format=torch.channels_last))
    logits = features.double() @ params["fc.weight"].double().T  # double: no TF32 here either
    return features, logits.float()


def inception_score(logits, splits=10, *, shuffle=True):
    """Return mean and deviation over `splits` parts of exp(mean KL(p(y|x) || p(y))).

    float64, as torch-fidelity computes it, in the order of np.random.RandomState(2020), which NumPy
    has frozen: sorted by class, a split would hold few classes and score too low. shuffle=False and
    splits = N / 5000 give the mean of ADM's evaluator. Raises ValueError for too few images.
    """
    count, scores = len(logits), []
    if not 1 <= splits <= count:
        raise ValueError(f"{count} images cannot be cut into {splits} splits: give more or fewer")
    if shuffle:
        logits = logits[torch.from_numpy(np.random.RandomState(2020).permutation(count))]
    for i in range(splits):
        log_p = logits[i * count // splits : (i + 1) * count // splits].double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        divergence = (p * log_p).sum(1).mean() - torch.special.xlogy(marginal, marginal).sum()
        scores.append(divergence.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# --- statistics ---


def merge(a, b):
    """Return the statistics of the items of both, (count, mean (d,), scatter (d, d)) each.

    A scatter is about its own mean, and the means are combined (Chan, Golub, LeVeque 1983), so a
    large common offset costs no digits. Raises ValueError if they have other numbers of features.
    """
    (n, mean, scatter), (m, other, more) = a, b
    if mean.shape != other.shape:
        raise ValueError(f"items have {len(mean)} and {len(other)} features: give as many of each")
    shift, total = other - mean, n + m
    scatter = scatter + more + shift.outer(shift) * (n * m / total)
    return total, mean + shift * (m / total), scatter


def accumulate(state, features):
    """Add features, (n, d), to running statistics as `merge` takes them, float64, or None."""
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features are {tuple(features.shape)}: give (n, d), neither of them 0")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    new = len(features), mean, centred.T @ centred
    return merge(state, new) if state else new


def statistics(state):
    """Return mean (d,) and unbiased covariance (d, d). Raise ValueError for fewer than 2 items."""
    count, mean, scatter = state
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 items, not {count}")
    return mean, scatter / (count - 1)


def root(sigma):
    """Return A (d, rank) with A A^T = sigma, symmetric (d, d) float64. Raise ValueError if that has
    an eigenvalue too far below 0 for rounding: float32 made -1e-8 of their sum, float16 -4e-6."""
    values, vectors = torch.linalg.eigh(sigma)
    if values[0] < -1e-6 * values.sum():
        raise ValueError(f"no covariance has an eigenvalue {values[0]:.3g}: compute it anew")
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), float64 and >= 0.

    mu: (d,); sigma: (d, d) as of `root`. The trace of the square root is the sum of the singular
    values of A^T B, where A A^T = sigma1 and B B^T = sigma2. Square roots of their product's
    eigenvalues would turn a rounding error of 1e-16 into 1e-8 in every direction that one lacks.
    """
    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    shapes = [tuple(s.shape) for s in (mu1, sigma1, mu2, sigma2)]
    if shapes != 2 * [(d := mu1.numel(),), (d, d)]:
        raise ValueError(f"statistics are {shapes}: give (d,), (d, d), (d,), (d, d)")
    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).clamp(min=0)


def nearest(features, reals, *, exclude_self=False):
    """Return the index of each feature's nearest item in `reals`, (m, d), and the distance, (n,).
    exclude_self: `features` is `reals`, and an item is not its own neighbour."""
    distance = torch.cdist(features, reals, compute_mode="donot_use_mm_for_euclid_dist")
    if exclude_self:
        distance.fill_diagonal_(torch.inf)
    distance, index = distance.min(1)
    return index, distance


def main():
    layout = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args()
    print("layer            branches  parameters")
    for name, block in zip(ARCHITECTURE, BLOCKS):
        tensors = inception_shapes().items()
        count = sum(torch.Size(shape).numel() for key, shape in tensors if key.startswith(name))
        print(f"{name:15}{len(block):10}{count:12,}")


if __name__ == "__main__":
    main()
