"""FID: Inception features, streaming statistics, Fréchet distance, Inception score.

    python fid.py IMAGES --ref REF.npz --inception FILE         print the distance as a line of JSON
    torchrun --nproc-per-node 8 fid.py IMAGES --ref OTHERS --inception FILE         on eight GPUs
    python fid.py IMAGES --save-stats REF.npz --inception FILE                      make a reference

IMAGES and OTHERS are folders of images, or .npz files with uint8 images (N, H, W, 3) under arr_0,
like ADM's. REF.npz holds a mean and a covariance as mu and sigma, or ref_mu and ref_sigma. FILE is
pt_inception-2015-12-05-6726825d.pth, or its tensors as .safetensors. Without it the features are
raw pixels, and the result says so.

Heusel et al.: GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500, the distance. Szegedy
et al.: Rethinking the Inception Architecture for Computer Vision, arXiv 1512.00567, with weights
that TensorFlow published on 2015-12-05. Salimans et al.: Improved Techniques for Training GANs,
arXiv 1606.03498, the score.

All that takes tensors, and loading the published weights, needs this file alone. To read other
weights, images and references, and for the command line, it takes helpers from data.py.
"""

import hashlib
import json
import math
import os
import re
import zipfile
from contextlib import contextmanager
from functools import reduce
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

INCEPTION = (  # 95,628,359 bytes; torch-fidelity's release has the same file
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
REFERENCE = (  # ADM's, for ImageNet 256x256
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)

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

    path: the published file, told by its checksum, or a .safetensors file of float32 tensors with
    its names and shapes. No other pickle is opened. Raises FileNotFoundError or ValueError.
    """
    fetch = f"fetch {INCEPTION}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: {fetch}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == INCEPTION_SHA256:
        return fold(torch.load(path, map_location="cpu", weights_only=True)), digest
    if Path(path).suffix != ".safetensors":
        found = f"sha256 {digest[:8]}..., not the published {INCEPTION_SHA256[:8]}..."
        raise ValueError(f"{path} has {found}: {fetch}, or give weights as .safetensors")
    from data import check_tensors, read_tensors

    tensors, _ = read_tensors(path, fetch)
    tensors = {name: p for name, p in tensors.items() if not name.endswith("num_batches_tracked")}
    check_tensors(path, tensors, inception_shapes(), fetch)
    if dtypes := {str(p.dtype) for p in tensors.values()} - {"torch.float32"}:
        raise ValueError(f"{path} has tensors of {min(dtypes)}, not torch.float32: {fetch}")
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


def accumulate(state, features):
    """Add features, (n, d), to running statistics (count, mean (d,), scatter (d, d)), or None.

    float64. Each batch is centred on its own mean and the means are combined (Chan, Golub, LeVeque
    1983), so a large common offset costs no digits.
    """
    features = features.double()
    n, mean = len(features), features.mean(0)
    centred = features - mean
    scatter = centred.T @ centred
    if state is None:
        return n, mean, scatter
    count, old_mean, old_scatter = state
    shift, total = mean - old_mean, count + n
    scatter = old_scatter + scatter + shift.outer(shift) * (count * n / total)
    return total, old_mean + shift * (n / total), scatter


def all_gather(value):
    """Return a list of every process's value."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather(state):
    """Return the statistics of all processes' items, on each of them and on the CPU.

    Means are exchanged, then each process moves its scatter to the common mean: one all-reduce of
    d x d numbers, and no digit is lost. A process without items has None.
    """
    parts = [part for part in all_gather(state and (state[0], state[1].cpu())) if part]
    if len({len(mean) for _, mean in parts}) > 1:
        raise ValueError("images have several sizes: give --inception, or images of one size")
    total, origin = sum(n for n, _ in parts), parts[0][1]
    mean = origin + sum((m - origin) * (n / total) for n, m in parts)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    if state:
        shift = state[1].cpu() - mean
        scatter = state[2].cpu() + shift.outer(shift) * state[0]
    if dist.is_initialized():
        dist.all_reduce(scatter)
    return total, mean, scatter


def gather_rows(rows):
    """Return the rows of all processes, (N, ...), in order; this one has those rank::world."""
    parts = all_gather(rows)
    whole = rows.new_empty(sum(map(len, parts)), *rows.shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def statistics(state):
    """Return mean (d,) and unbiased covariance (d, d). Raise ValueError for fewer than 2 items."""
    count, mean, scatter = state
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 items, not {count}")
    return mean, scatter / (count - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), float64 and >= 0.

    mu: (d,); sigma: (d, d) symmetric positive semi-definite, of any rank. The trace of the square
    root is the sum of the singular values of A^T B, where A A^T = sigma1 and B B^T = sigma2. Square
    roots of their product's eigenvalues would turn a rounding error of 1e-16 into 1e-8 in every
    direction that a covariance lacks.
    """

    def root(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        rounding = values[-1] * len(values) * torch.finfo(torch.float64).eps
        kept = values > rounding
        return vectors[:, kept] * values[kept].sqrt()

    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.svdvals(root(sigma1).T @ root(sigma2)).sum()
    traces = sigma1.trace() + sigma2.trace()
    return ((mu1 - mu2).square().sum() + traces - 2 * cross).clamp(min=0)


def nearest(features, reals, *, exclude_self=False):
    """Return the index of each feature's nearest item in `reals`, (m, d), and the distance, (n,).
    exclude_self: `features` is `reals`, and an item is not its own neighbour."""
    distance = torch.cdist(features, reals, compute_mode="donot_use_mm_for_euclid_dist")
    if exclude_self:
        distance.fill_diagonal_(torch.inf)
    distance, index = distance.min(1)
    return index, distance


# --- images and references from files ---


@contextmanager
def readable(path):
    """Turn any error of decoding an .npz file into a one-line ValueError."""
    try:
        yield
    except Exception as error:  # zipfile, zlib and NumPy raise many types
        why, hint = (
            " ".join(str(error).split())[:200],
            f"give images or an .npz, such as {REFERENCE}",
        )
        raise ValueError(f"{path} cannot be read ({why}): {hint}") from None


def load_statistics(path):
    """Return the mean (d,) and covariance (d, d), float64, of an .npz, or None if it has none.

    Raises ValueError unless they are finite, fit each other, and the covariance is symmetric.
    """
    with readable(path), zipfile.ZipFile(path), np.load(path) as file:
        prefix = "ref_" if "ref_mu" in file else ""
        if f"{prefix}mu" not in file:
            return None
        arrays = file[f"{prefix}mu"], file[f"{prefix}sigma"]
        mu, sigma = (torch.from_numpy(a.astype(np.float64, casting="safe")) for a in arrays)
    if not mu.numel() or sigma.shape != (*mu.shape, *mu.shape) or mu.ndim > 1:
        found = f"{tuple(mu.shape)} and {tuple(sigma.shape)}"
        raise ValueError(f"{path}: mu and sigma are {found}, they should be (d,) and (d, d)")
    symmetric = (sigma - sigma.T).abs().max() <= 1e-6 * sigma.abs().max()  # false for NaN, inf
    if not (symmetric and mu.isfinite().all() and sigma.diagonal().min() >= 0):
        raise ValueError(f"{path}: mu and sigma are not a finite mean and covariance: redo it")
    return mu, (sigma + sigma.T) / 2


def npz_images(path):
    """Return the number of images in an .npz and a generator of them, (3, H, W) uint8.

    One at a time: as a whole, ADM's 50,000 would take 10 GB of memory in each process.
    """
    with readable(path):
        file = zipfile.ZipFile(path).open("arr_0.npy")
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not the format of plain arrays")
        (count, *shape), fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or fortran:
        raise ValueError(f"{path}: arr_0 is {dtype} {(count, *shape)}: give uint8 (N, H, W, 3)")

    def images():
        for i in range(count):
            with readable(path):
                values = file.read(math.prod(shape))
            if len(values) < math.prod(shape):
                raise ValueError(f"{path} ends after {i} of {count} images: fetch it again")
            image = torch.frombuffer(bytearray(values), dtype=torch.uint8)
            yield image.reshape(shape).permute(2, 0, 1)

    return count, images()


def load_images(path, count=None, rank=0, world=1):
    """Return an iterator over the images rank::world, (C, H, W) uint8, of the first `count` or all.

    path: a folder of images, an .npz, what data.py wrote as pixels, or "digits". Raises ValueError
    if there are fewer than `count`, or than two.
    """
    import data

    files = None
    if path == "digits" or any(Path(path).glob("shard-*.safetensors")):
        dataset = data.load_data(path, rank, world)
        if dataset.kind != "pixels":
            raise ValueError(f"{path} holds latents: give images or their statistics")
        total, images = len(dataset.labels), iter(dataset.items)
        if path == "digits":
            images = (((x + 1) * 127.5).round().byte() for x in images)
    elif os.path.isdir(path):
        suffixes = data.Image.registered_extensions()
        files = [file for file in data.files_below(path) if file.suffix.lower() in suffixes]
        total = len(files)
    else:
        total, images = npz_images(path)
    if total < (count or 2):
        raise ValueError(f"{path} has {total} images, at least {count or 2} are needed")
    if files is None:
        return islice(images, rank, count, world)

    def read(file):
        return torch.from_numpy(np.array(data.read_image(file))).permute(2, 0, 1)

    return data.prefetch(read, files[rank:count:world], depth=256, threads=os.cpu_count())


# --- the evaluation ---


def pixels(images):
    """Return raw pixels as features, (B, C H W) in [-1, 1], of uint8 (B, C, H, W); no logits."""
    features = images.flatten(1) / 127.5 - 1
    if features.shape[1] > 20_000:
        raise ValueError(f"{features.shape[1]:,} pixels are too many features: give --inception")
    return features, None


def load_features(path, device):
    """Return the features of --inception `path` and a description.

    The features are a function of uint8 images, (B, 1 or 3, H, W), or a list of images of several
    sizes, that returns (features, logits or None). On a GPU the network is compiled.
    """
    if path is None:
        return pixels, {"features": "raw pixels in [-1, 1]"}
    params, digest = load_inception(path)
    params = {name: p.to(device) for name, p in params.items()}
    compiled = torch.compile(network) if device.type == "cuda" else network
    about = {
        "features": "Inception-v3 of 2015-12-05",
        "inception": digest,
        "resize": "TensorFlow 1's bilinear, 299 x 299",
        "precision of features": "float32",
    }

    def features(images):
        if torch.is_tensor(images):
            images = images.expand(-1, 3, -1, -1)
        return inception(params, images, network=compiled)

    return features, about


def collect(batches, features, keep_logits=True):
    """Return the statistics of all processes' batches of uint8 images, and their logits, if any."""
    state, logits = None, [torch.empty(0, 1008)]
    for images in batches:
        values, more = features(images)
        state = accumulate(state, values)
        if keep_logits and more is not None:
            logits.append(more.cpu())
    return gather(state), gather_rows(torch.cat(logits))


def measure(path, features, world, count=None, keep_logits=True, shape=None):
    """Return what `collect` does for the images of `path`, see `load_images`.

    Raw pixels are compared only between images of one shape: of `shape`, if given.
    """
    images = load_images(path, count, world.rank, world.size)
    seen = {shape} if shape else set()

    def check(shapes):
        if len(shapes) > 1 and features is pixels:
            found = " and ".join(map(str, sorted(shapes)[:2]))
            raise ValueError(f"{path}: images of {found} cannot be compared: give --inception")

    def batches():
        while part := [image.to(world.device) for image in islice(images, 64)]:
            here = {tuple(image.shape) for image in part}
            seen.update(here)
            check(seen)
            yield part if len(here) > 1 else torch.stack(part)

    result = collect(batches(), features, keep_logits)
    check(set().union(*all_gather(seen)))
    return result


def load_reference(path, features, shape, world):
    """Return mean, covariance and description of an .npz of statistics, or else of images.

    ADM's references have both: the statistics are of the whole data set, the images a few of it.
    Raises ValueError unless images of `shape`, which are to be compared, have as many features.
    """
    from data import sha256

    digest = f", sha256 {sha256(path)}" if os.path.isfile(path) else ""
    if not digest or (known := load_statistics(path)) is None:
        state, _ = measure(path, features, world, keep_logits=False, shape=shape)
        known, digest = statistics(state), f", {state[0]} images" + digest
    image = torch.zeros(1, *shape, dtype=torch.uint8, device=world.device)
    found, wanted = features(image)[0].shape[1], len(known[0])
    if found != wanted:
        hint = "give or leave out --inception, or give another reference"
        raise ValueError(f"{path} has {wanted} features, images of {shape} have {found}: {hint}")
    return *known, path + digest


def scores(state, logits, mu, sigma):
    """Return {"fid", "count"} and, with logits, {"is", "is_std", "is_splits"}."""
    result = {"fid": frechet_distance(*statistics(state), mu, sigma).item(), "count": state[0]}
    if len(logits):
        result["is_splits"] = min(10, len(logits))
        result["is"], result["is_std"] = inception_score(logits, result["is_splits"])
    return result


def scorer(ref, inception, shape, world):
    """Return a function from batches of uint8 images of `shape` to their scores against `ref`.

    Each process passes its own images; all get the same dict, which says what it was computed with.
    """
    features, about = load_features(inception, world.device)
    mu, sigma, about["reference"] = load_reference(ref, features, shape, world)
    return lambda batches: scores(*collect(batches, features), mu, sigma) | about


def main(argv, world):
    from data import atomic_write, parser

    arguments = parser(__doc__)
    add = arguments.add_argument
    add("images", help="a folder of images, or an .npz with images under arr_0")
    add("--ref", help="compare with this: an .npz of statistics or images, or a folder of images")
    add("--save-stats", type=Path, help="the .npz to write mean and covariance to")
    add("--inception", help="pt_inception-2015-12-05-6726825d.pth (default: raw pixels)")
    add("--count", type=int, help="take the first COUNT of IMAGES (default: all)")
    args = arguments.parse_args(argv)
    if args.count is not None and args.count < 2:
        raise ValueError(f"--count {args.count}: give a number above 1")
    if args.save_stats and (args.save_stats.is_dir() or not args.save_stats.parent.is_dir()):
        raise ValueError(f"--save-stats {args.save_stats}: give a file in a folder that exists")
    if not args.ref and not args.save_stats:
        raise ValueError("nothing to do: give --ref, or --save-stats, or both")

    features, about = load_features(args.inception, world.device)
    if args.ref:
        shape = tuple(next(load_images(args.images, 2)).shape)
        mu, sigma, about["reference"] = load_reference(args.ref, features, shape, world)
    state, logits = measure(args.images, features, world, args.count, keep_logits=bool(args.ref))
    if args.save_stats and world.rank == 0:
        mean, covariance = statistics(state)
        with atomic_write(args.save_stats) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=mean.numpy(), sigma=covariance.numpy())
    if args.ref and world.rank == 0:
        print(json.dumps(scores(state, logits, mu, sigma) | about | {"images": args.images}))


if __name__ == "__main__":
    from data import launch

    launch(main)
