"""fid.py's Inception agrees with torch-fidelity's on the same weights, and with recorded values."""

import hashlib
import importlib
import os
import pickle
import sys
import types
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import fid

pytestmark = pytest.mark.slow  # the network takes seconds

# What torch-fidelity 0.4.0 computed for `weights` and `images(0, 2, 37, 51)`, in float64: every
# 128th feature and every 126th logit without the bias, for each image. They serve where
# torch-fidelity is not installed.
FEATURES = [
    [
        11.46168,
        8.52665,
        6.66382,
        3.0595,
        0.0,
        0.49668,
        5.80444,
        4.16741,
        8.7072,
        0.62941,
        0.01452,
        0.78257,
        0.00097,
        4.48057,
        2.87799,
        0.0,
    ],
    [
        11.20488,
        9.16491,
        6.38585,
        2.61548,
        0.0,
        0.41143,
        5.64577,
        3.62789,
        7.47361,
        0.58281,
        0.01824,
        0.86466,
        0.01544,
        4.13715,
        2.74512,
        0.0,
    ],
]
LOGITS = [
    [-1.51576, 5.31204, 0.73555, 7.04696, -1.30751, -0.32596, -1.91076, 4.95527],
    [-1.37702, 5.52621, 0.53784, 6.93821, -0.9832, -0.42314, -1.58319, 4.63616],
]


@lru_cache
def weights():
    """Return random weights in the published layout.

    They keep the second moment of the activations constant (nothing is centred), so rounding
    errors do not grow from layer to layer.
    """
    random = np.random.RandomState(0)  # NumPy has frozen this stream: the values above stay valid
    tensors = {}
    for name, shape in fid.inception_shapes().items():
        r = torch.from_numpy(random.standard_normal(shape)).float()
        if name.endswith("conv.weight"):
            tensors[name] = r * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name == "fc.weight":
            tensors[name] = r * shape[1] ** -0.5
        elif name.endswith("bn.weight"):
            tensors[name] = 1 + 0.3 * r.clamp(-2, 2)
        else:
            tensors[name] = 0.5 + r.square().clamp(max=1) if name.endswith("var") else 0.2 * r
    return tensors


@lru_cache(1)
def folded(module):
    return module.fold(weights())


def params():
    return folded(fid)


def images(seed, count, height, width):
    """Return uint8 images of noise on 5x4 patches of colour."""
    random = np.random.RandomState(seed)
    coarse = random.standard_normal((count, 3, 5, 4))
    coarse = coarse[:, :, np.arange(height) * 5 // height][..., np.arange(width) * 4 // width]
    noise = random.standard_normal((count, 3, height, width)) * random.uniform(
        size=(count, 1, 1, 1)
    )
    return torch.from_numpy(np.clip(128 + 60 * coarse + 30 * noise, 0, 255).astype(np.uint8))


def differ(got, want):
    """Return the largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module")
def fidelity():
    """Import torch-fidelity with empty modules in place of torchvision.

    It imports torchvision, though not for Inception, and torchvision may not fit the installed
    torch.
    """
    names = [
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    ]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        module = sys.modules[name] = types.ModuleType(name)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(sys.modules["torchvision.datasets"], name, object)
    try:
        return importlib.import_module("torch_fidelity")
    finally:
        for name in names:
            sys.modules.pop(name)
            if before[name]:
                sys.modules[name] = before[name]


@pytest.fixture(scope="module")
def extractor(fidelity, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(weights(), path)
    return fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path
    )


def test_tensors_are_those_of_the_published_file(extractor):
    tensors = {
        name: tuple(t.shape)
        for name, t in extractor.state_dict().items()
        if "num_batches" not in name
    }
    assert fid.inception_shapes() == tensors


def test_number_of_tensors_and_parameters():
    shapes = fid.inception_shapes()
    assert (
        len(shapes) == 94 * 5 + 2 and sum(np.prod(shape) for shape in shapes.values()) == 23_885_392
    )
    kernels = {
        "6b.branch7x7_2": (128, 128, 1, 7),
        "6c.branch7x7dbl_2": (160, 160, 7, 1),
        "7c.branch3x3_2b": (384, 384, 3, 1),
    }
    assert all(shapes[f"Mixed_{name}.conv.weight"] == shape for name, shape in kernels.items())


@pytest.mark.parametrize(
    "size", [(32, 32), (64, 64), (256, 256), (299, 299), (37, 51), (1, 1), (600, 411)]
)
def test_agrees_with_torch_fidelity(extractor, size):
    batch = images(1, 2, *size)
    (features, logits), want = fid.inception(params(), batch), extractor(batch)
    assert differ(features, want[0]) < 1e-5 and differ(logits, want[1]) < 1e-5
    assert differ(features[:1], features[1:]) > 0.01  # the images differ by more than the tolerance


def test_agrees_with_what_torch_fidelity_once_gave():
    features, logits = fid.inception(params(), images(0, 2, 37, 51))
    assert features.dtype == logits.dtype == torch.float32
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert differ(features[:, ::128], torch.tensor(FEATURES)) < 1e-5
    assert differ(logits[:, ::126], torch.tensor(LOGITS)) < 1e-5


def test_folding_leaves_a_convolution_and_its_batch_norm_what_they_do():
    name, x = (
        "Conv2d_1a_3x3",
        torch.from_numpy(np.random.RandomState(8).standard_normal((2, 3, 9, 9))).float(),
    )
    norm = [
        weights()[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    ]
    want = F.batch_norm(F.conv2d(x, weights()[f"{name}.conv.weight"]), *norm, eps=1e-3)
    folded = fid.fold(weights())
    assert {p.dtype for p in folded.values()} == {torch.float32}
    assert differ(F.conv2d(x, folded[f"{name}.weight"], folded[f"{name}.bias"]), want) < 1e-6


def test_the_batch_size_makes_no_difference():
    batch = images(2, 5, 40, 30)
    whole = fid.inception(params(), batch)
    parts = [
        torch.cat(parts)
        for parts in zip(*(fid.inception(params(), part) for part in batch.split([2, 1, 2])))
    ]
    assert differ(parts[0], whole[0]) < 2e-6 and differ(parts[1], whole[1]) < 2e-6


def test_images_of_several_sizes_make_one_batch():
    sizes, seen = [(40, 24), (24, 40), (40, 24), (299, 299)], []

    def network(params, x):
        seen.append(tuple(x.shape))
        return fid.network(params, x)

    parts = [images(k, 1, *size)[0] for k, size in enumerate(sizes)]
    got = fid.inception(params(), parts, network=network)
    assert seen == [(4, 3, 299, 299)]
    for i, part in enumerate(parts):
        assert differ(got[0][i], fid.inception(params(), part[None])[0][0]) < 1e-5


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 3, 8, 8), torch.float32),
        ((3, 8, 8), torch.uint8),
        ((2, 1, 8, 8), torch.uint8),
        ((2, 8, 8, 3), torch.uint8),
        ((2, 3, 0, 8), torch.uint8),
    ],
)
def test_anything_but_uint8_rgb_is_refused(shape, dtype):
    with pytest.raises(
        ValueError, match=r"^images are torch\.\w+ \([\d, ]+\): give torch.uint8 \(B, 3, H, W\)$"
    ):
        fid.inception(params(), torch.zeros(shape, dtype=dtype))


def test_precision_is_full_whatever_is_set_around_it():
    batch, conv = images(3, 1, 32, 32), torch.backends.cudnn.conv
    before = conv.fp32_precision  # tf32, unless someone has chosen
    want = fid.inception(params(), batch)

    def network(params, x):
        assert conv.fp32_precision == "ieee", "convolutions on CUDA may use TF32"
        return fid.network(params, x)

    with torch.autocast("cpu", torch.bfloat16):
        got = fid.inception(params(), batch, network=network)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    with pytest.raises(ZeroDivisionError):
        fid.inception(params(), batch, network=lambda params, x: 1 / 0)
    assert conv.fp32_precision == before and not torch.is_autocast_enabled("cpu")


def test_compiles_in_one_piece():
    batch = images(4, 1, 32, 32)
    network = torch.compile(fid.network, fullgraph=True, backend="eager")
    assert (
        differ(
            fid.inception(params(), batch, network=network)[0], fid.inception(params(), batch)[0]
        )
        < 1e-6
    )


def test_nothing_asks_for_gradients():
    alive = {name: p.requires_grad_() for name, p in fid.fold(weights()).items()}
    assert not any(x.requires_grad for x in fid.inception(alive, images(5, 1, 32, 32)))


# The resize.


def tensorflow_resize(image):
    """Resize (3, H, W) uint8 to (3, 299, 299) float32 pixel by pixel, as TensorFlow 1 does."""
    image = image.numpy().astype(np.float32)
    out = np.empty((3, 299, 299), np.float32)
    steps = [np.float32(size) / np.float32(299) for size in image.shape[1:]]
    for i in range(299):
        for j in range(299):
            y, x = np.float32(i) * steps[0], np.float32(j) * steps[1]
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
            upper = image[:, top, left] + (image[:, top, right] - image[:, top, left]) * (
                x - np.float32(left)
            )
            lower = image[:, bottom, left] + (image[:, bottom, right] - image[:, bottom, left]) * (
                x - np.float32(left)
            )
            out[:, i, j] = upper + (lower - upper) * (y - np.float32(top))
    return out


@pytest.mark.parametrize("size", [(37, 51), (512, 300)])
def test_resize_is_tensorflows_to_the_bit(size):
    batch = images(6, 1, *size)
    assert (
        fid.resize(batch)[0].numpy() * 128 + 128
        == (tensorflow_resize(batch[0]) - 128) / 128 * 128 + 128
    ).all()


def test_resize_of_299_leaves_the_pixels():
    batch = images(7, 1, 299, 299)
    assert torch.equal(fid.resize(batch), (batch.float() - 128) / 128)


def test_resize_reads_places_without_half_pixels():
    ramp = torch.arange(51, dtype=torch.uint8).expand(1, 3, 40, 51)
    places = fid.resize(ramp) * 128 + 128
    assert (places - (torch.arange(299) * 51 / 299).clamp(max=50)).abs().max() < 1e-4
    assert torch.equal(places, fid.resize(ramp.mT.contiguous()).mT * 128 + 128)


# The file of weights.


def refuses(path, *words, error=ValueError):
    """Check that loading raises one line with the path, the words and the published file's URL."""
    with warnings.catch_warnings(), pytest.raises(error) as caught:
        warnings.simplefilter("error")
        fid.load_inception(path)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in (str(path), fid.INCEPTION, *words)), (
        line
    )


def test_loads_safetensors(tmp_path):
    tensors = weights() | {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    path = tmp_path / "weights.SAFETENSORS"  # whatever its name
    save_file(tensors, path)
    loaded, digest = fid.load_inception(str(path))
    assert loaded.keys() == params().keys() and all(
        torch.equal(loaded[name], p) for name, p in params().items()
    )
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_loads_the_published_file_alone_of_pickles(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)  # the format of 2020
    refuses(path, "sha256", "6726825d", "is no safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "INCEPTION_SHA256", digest)
    loaded, found = fid.load_inception(path)
    assert found == digest and all(torch.equal(loaded[name], p) for name, p in params().items())


def test_missing_file(tmp_path):
    refuses(tmp_path / "none.pth", "is not a file", error=FileNotFoundError)
    refuses(tmp_path, "is not a file", error=FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:6726825d\nsize 95628359\n",
        b"\n<!DOCTYPE html>\n<html lang=en>",
        b"",
        b"\0" * 99,
        pickle.dumps([1, 2]),
        pickle.dumps({"fc.weight": 1}),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_other_files(tmp_path, content, suffix):
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    refuses(path, "not the published", "is no safetensors")


def test_truncated_files(tmp_path):
    tensors = {"fc.weight": torch.zeros(1008, 64)}
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "safe.safetensors")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-999])
        refuses(path, "not the published", "is no safetensors")


def test_torchscript(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but NVIDIA's file stays
        torch.jit.save(
            torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "inception-2015-12-05.pt"
        )
    refuses(tmp_path / "inception-2015-12-05.pt", "sha256")


@pytest.mark.parametrize("protocol", ["zip", "old", "bare"])
def test_pickled_code_is_never_run(tmp_path, protocol):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "weights.pth"
    if protocol == "bare":
        path.write_bytes(pickle.dumps(Attack(), 2))
    else:
        torch.save({"fc.weight": Attack()}, path, _use_new_zipfile_serialization=protocol == "zip")
    refuses(path, "sha256")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"AuxLogits.conv0.conv.weight": torch.zeros(1)},
            ["AuxLogits.conv0.conv.weight is (torch.float32, 1), should be absent"],
        ),
        (
            {"Conv2d_9.conv.weight": torch.zeros(1)},
            ["Conv2d_9.conv.weight is (torch.float32, 1), should be absent"],
        ),
        (
            {"fc.weight": None, "fc.bias": None},
            ["fc.weight is missing, should be (torch.float32, 1008, 2048)"],
        ),
        (
            {"fc.weight": torch.zeros(1000, 2048)},
            ["fc.weight is (torch.float32, 1000, 2048), should be (torch.float32, 1008, 2048)"],
        ),
        (
            {"fc.bias": torch.zeros(1008, dtype=torch.float16)},
            ["fc.bias is (torch.float16, 1008), should be (torch.float32, 1008)"],
        ),
        ({"fc.bias": torch.full((1008,), torch.nan)}, ["fc.bias has values that are not finite"]),
    ],
    ids=["torchvision", "unknown", "missing", "shape", "dtype", "nan"],
)
def test_other_tensors(tmp_path, change, words):
    tensors = {name: t for name, t in (weights() | change).items() if t is not None}
    save_file(tensors, tmp_path / "weights.safetensors")
    refuses(tmp_path / "weights.safetensors", *words)


# The score.


def test_score_is_torch_fidelitys(fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = (
        3 * torch.randn(997, 50, generator=torch.Generator().manual_seed(0))
        + torch.arange(997)[:, None] / 500
    )
    for splits in (1, 7, 10, 997):
        for shuffle in (True, False):
            want = isc_features_to_metric(logits, splits, shuffle)
            got = fid.inception_score(logits, splits, shuffle=shuffle)
            assert np.allclose(got, list(want.values()), rtol=1e-12, atol=1e-12)
    assert fid.inception_score(logits) == fid.inception_score(logits, 10, shuffle=True)


def test_score_of_probabilities_by_hand():
    """Compare with NumPy, in the given order, as in ADM's evaluator, and in torch-fidelity's."""
    p = np.random.default_rng(0).dirichlet(np.ones(8), 60)
    order = np.random.RandomState(2020).permutation(60)
    for q, shuffle in ((p, False), (p[order], True)):
        scores = [
            np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.split(q, 4)
        ]
        got = fid.inception_score(torch.from_numpy(np.log(p)), 4, shuffle=shuffle)
        assert np.allclose(got, (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_score_of_certain_and_of_clueless_networks():
    assert np.allclose(fid.inception_score(torch.zeros(50, 7)), (1, 0))
    certain = 1e5 * torch.eye(5)[torch.arange(100) % 5]
    assert np.allclose(fid.inception_score(certain, 4, shuffle=False), (5, 0))
    assert fid.inception_score(certain[:1], 1) == (1, 0)


@pytest.mark.parametrize("count, splits", [(9, 10), (9, 0), (0, 1)])
def test_score_needs_an_image_a_split(count, splits):
    with pytest.raises(
        ValueError, match=rf"^{count} images cannot be cut into {splits} splits: give more"
    ):
        fid.inception_score(torch.zeros(count, 5), splits)
