"""What only a GPU shows: kernels, bfloat16, compiled steps, NCCL, fused Adam.

The other tests run on the CPU, also where there is a GPU. Without one these would prove nothing, so
conftest.py leaves the file out and says so. GPU=cpu runs what a CPU can run of it.
"""

import json
import os
from functools import partial
from unittest import mock

import pytest
import test_inception
import test_model
import torch
import torch.nn.functional as F
from processes import ENVIRONMENT, LAUNCH, finish, start
from torch.nn.attention import SDPBackend, sdpa_kernel

import dual
import evaluate
import fid
import imf
import meanflow
import model
import sample
import train
import vae
import weights
from runtime import World

pytestmark = pytest.mark.slow
DEVICE = torch.device(os.environ.get("GPU", "cuda"))
bfloat16 = partial(torch.autocast, DEVICE.type, torch.bfloat16)


def relative(got, want):
    return ((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm()).item()


def on_gpu(tensors):
    return {name: p.float().to(DEVICE) for name, p in tensors.items()}


@pytest.mark.parametrize("tokens, width", [(64, 64), (256, 64), (256, 72)])
def test_attention_in_bfloat16_is_attention(tokens, width):
    """Values and gradients of the kernel that runs by default, at the sizes of B to XL."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(8, 16, tokens, width, generator=g) for _ in range(4))

    def run(dtype, *backends):
        inputs = [x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(list(backends)):
            out = F.scaled_dot_product_attention(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad.to(DEVICE, dtype))

    default = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
    exact = run(torch.float32, SDPBackend.MATH)
    for got, want in zip(run(torch.bfloat16, *default), exact):
        assert relative(got, want) < 0.01


@pytest.mark.parametrize("width", [768, 1152])
def test_the_derivative_in_bfloat16(width):
    """du/dt is right to 2 % and no worse than torch.func.jvp's, at the widths of B and XL."""
    g = torch.Generator().manual_seed(0)
    w = model.init((width, 4, 2), channels=4, classes=10, generator=g)
    w = {name: (p + 0.02 * torch.randn(p.shape, generator=g)).double() for name, p in w.items()}
    z, v = (torch.randn(8, 4, 16, 16, generator=g).double() for _ in range(2))
    t, r = torch.rand(2, 8, generator=g).double().sort(0, descending=True).values
    y = torch.arange(8)
    _, exact = meanflow.derivative(partial(model.dit, w), z, t, r, v, y)
    net, (z, t, r, v) = partial(model.dit, on_gpu(w)), (a.float().to(DEVICE) for a in (z, t, r, v))
    with bfloat16(), torch.no_grad():
        ours, theirs = (
            meanflow.derivative(net, z, t, r, v, y.to(DEVICE), jvp=jvp)[1]
            for jvp in (dual.jvp, torch.func.jvp)
        )
    assert relative(ours, exact) < 0.02 and relative(ours, exact) <= 1.1 * relative(theirs, exact)


def objective(size, compiled, precision):
    """Return the objective of a narrow network like XL/2 or iXL/2, its weights, and a batch."""
    g = torch.Generator().manual_seed(0)
    improved = size.startswith("i")
    draw, equal = (imf.draw, 8) if improved else (meanflow.draw, 12)
    init, sizes = (imf.init, (128, 2, 2, 2)) if improved else (model.init, (256, 2, 2))
    w = init(sizes, channels=4, classes=10, generator=g)
    w = {name: p + 0.02 * torch.randn(p.shape, generator=g) for name, p in w.items()}
    w = {name: torch.nn.Parameter(p.to(DEVICE)) for name, p in w.items()}
    x, y = torch.randn(16, 4, 16, 16, generator=g), torch.arange(16) % 10
    draws = draw(x.shape, generator=g)
    draws = type(draws)(*(d.to(DEVICE) for d in draws))
    options = dict(channels=4, classes=10, compiled=compiled)
    if improved:
        method = train.imf_method(size, kind="latents", **options)
    else:
        method = train.dit_method(size, guidance=train.RECIPES[size].guidance, **options)
    made = train.Objective(method.loss, w, precision)
    return made, w, (x.to(DEVICE), y.to(DEVICE), draws, equal)


@pytest.mark.parametrize("size", ["XL/2", "iXL/2"])
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-3), ("bfloat16", 0.03)])
def test_a_compiled_step_is_the_eager_one(size, precision, tolerance):
    """Values and gradients; after three steps nothing is compiled again."""
    gradients = {}
    for compiled in (False, True):
        made, w, batch = objective(size, compiled, precision)
        for step in range(4):
            with mock.patch.object(torch._dynamo.config, "error_on_recompile", step == 3):
                loss, rows = made(*batch)
                for p in w.values():
                    p.grad = None
                loss.backward()
        gradients[compiled] = {name: p.grad for name, p in w.items()}
        assert rows.isfinite().all()
    for name, want in gradients[False].items():
        assert relative(gradients[True][name], want) < tolerance, name


def run(folder, *flags, steps):
    words = ["--batch", "16", "--save", "2", "--steps", str(steps), "--out", str(folder), *flags]
    with mock.patch.object(evaluate, "report", lambda *_: None):
        train.main(words, World(0, 1, DEVICE))
    lines = (folder / "log.jsonl").read_text().splitlines()[1:]
    return [json.loads(line)["raw_equal"] for line in lines]


def test_a_run_goes_on_and_parts_make_no_difference(tmp_path):
    """With fused Adam, in bfloat16, compiled by default."""
    whole = run(tmp_path / "whole", steps=6)
    run(tmp_path / "half", steps=4)
    assert run(tmp_path / "half", steps=6) == pytest.approx(whole, rel=1e-2)
    assert run(tmp_path / "parts", "--accumulate", "4", steps=6) == pytest.approx(whole, rel=1e-2)
    gpu, cpu = (weights.load(tmp_path / "whole", device) for device in (DEVICE, "cpu"))
    labels = torch.tensor([3, 1, 4])
    assert relative(sample.generate(gpu, labels), sample.generate(cpu, labels)) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
def test_two_gpus_train_the_run_of_one(tmp_path):
    words = "train.py --batch 16 --save 2 --steps 6 --out".split()
    seen = {k: v for k, v in ENVIRONMENT.items() if k != "CUDA_VISIBLE_DEVICES"}
    seen |= {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"}
    finish(start(*LAUNCH, "2", *words, tmp_path / "two", env=seen))
    lines = (tmp_path / "two" / "log.jsonl").read_text().splitlines()[1:]
    two = [json.loads(line)["raw_equal"] for line in lines]
    assert two == pytest.approx(run(tmp_path / "one", steps=6), rel=1e-2)


def test_inception_and_the_vae_are_those_of_the_cpu():
    images = test_inception.images(3, 4, 64, 48)
    params = test_inception.params()
    want = fid.inception(params, images)
    got = fid.inception(on_gpu(params), images.to(DEVICE), network=torch.compile(fid.network))
    assert all(relative(a, b) < 1e-4 for a, b in zip(got, want))
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=g)
        * (max(1, shape[-1] * shape[1]) ** -0.5 if len(shape) > 1 else 0.1)
        for name, shape in vae.shapes().items()
    }
    x = images[:2] / 127.5 - 1
    mean, _ = vae.encode(tensors, x)
    assert relative(vae.encode(on_gpu(tensors), x.to(DEVICE))[0], mean) < 5e-3  # TF32
    images = vae.decode(tensors, mean)
    assert relative(vae.decode(on_gpu(tensors), mean.to(DEVICE)), images) < 5e-3


def test_small_sizes_of_the_model_agree():
    """The whole forward pass in float32, without TF32, is the CPU's."""
    params, inputs = (
        test_model.small(dtype=torch.float32),
        test_model.inputs(4, dtype=torch.float32),
    )
    got = model.dit(on_gpu(params), *(a.to(DEVICE) for a in inputs))
    assert relative(got, model.dit(params, *inputs)) < 1e-4
