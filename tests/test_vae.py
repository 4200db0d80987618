"""vae.py computes what diffusers' AutoencoderKL does, and reads its files under old names too.

test_weights.py has the files that are refused.
"""

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

import vae
from weights import load_vae

pytestmark = pytest.mark.slow  # the network takes seconds
FULL, SMALL = (128, 256, 512, 512), (64, 96, 128, 128)


@contextmanager
def widths(widths):
    """Give the network fewer channels, for speed; only `shapes` reads WIDTHS."""
    with mock.patch.object(vae, "WIDTHS", widths):
        yield


def weights(channels=SMALL, dtype=torch.float64, seed=0):
    """Return random parameters, none of them zero or one, that keep activations near unit size."""
    g = torch.Generator().manual_seed(seed)
    with widths(channels):
        shapes = vae.shapes()
    params = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name, p in params.items():
        if p.ndim == 1:
            p.mul_(0.2).add_(1 if "norm" in name and name.endswith("weight") else 0)
        else:
            p.mul_(math.prod(p.shape[1:]) ** -0.5)
    return {name: p.to(dtype) for name, p in params.items()}


def inputs(batch, height, width, dtype=torch.float64, seed=0):
    """Return images, (batch, 3, height, width) in [-1, 1], and latents for that size."""
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, height, width, generator=g, dtype=dtype) * 2 - 1
    return images, torch.randn(batch, 4, height // 8, width // 8, generator=g, dtype=dtype)


def oracle(params, channels=SMALL):
    """Return diffusers' AutoencoderKL with these parameters."""
    config = dict(
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    with torch.device("meta"):  # do not spend time on drawing initial weights
        model = AutoencoderKL(**config)
    model.load_state_dict(params, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def error(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
    return ((a - b).norm() / b.norm()).item()


# --- what it computes ---


def test_count():
    shapes = vae.shapes()
    assert len(shapes) == 248 and sum(map(math.prod, shapes.values())) == 83_653_863


def test_scale():
    assert vae.SCALE == oracle(weights()).config.scaling_factor


@pytest.mark.parametrize(
    "channels, size, dtype, tolerance",
    [
        (SMALL, (40, 24), torch.float64, 1e-12),
        (SMALL, (8, 8), torch.float64, 1e-12),
        (FULL, (16, 24), torch.float64, 1e-12),
        (FULL, (64, 40), torch.float32, 2e-5),
    ],
)
def test_agrees_with_diffusers(channels, size, dtype, tolerance):
    params, (images, z) = weights(channels, dtype), inputs(2, *size, dtype)
    theirs = oracle(params, channels)
    latents = theirs.encode(images).latent_dist
    for ours, want in zip(
        (*vae.encode(params, images), vae.decode(params, z)),
        (latents.mean, latents.std, theirs.decode(z).sample),
    ):
        assert want.std() > 0.1 and error(ours, want) < tolerance
        assert ours.is_contiguous()


def test_log_variance_is_clamped():
    params, (images, _) = weights(), inputs(2, 16, 16)
    params["quant_conv.bias"][4:] = torch.tensor([-100, 100, 0, 0])
    _, std = vae.encode(params, images)
    assert (
        (std[:, 0] == math.exp(-15)).all()
        and (std[:, 1] == math.exp(10)).all()
        and std[:, 2:].std() > 0.1
    )
    assert error(std, oracle(params).encode(images).latent_dist.std) < 1e-12


def test_every_parameter_matters():
    """All but the keys' biases, which add the same to all scores of a query."""
    params, (images, z) = (
        {name: p.requires_grad_() for name, p in weights().items()},
        inputs(1, 16, 24),
    )
    g = torch.Generator().manual_seed(1)
    outputs = (*vae.encode(params, images), vae.decode(params, z))
    sum(
        (out * torch.randn(out.shape, generator=g, dtype=out.dtype)).sum() for out in outputs
    ).backward()
    for name, p in params.items():
        most = p.grad.abs().max()
        assert (
            most < 1e-12 if name.endswith("to_k.bias") else most > 1e-3 and (p.grad != 0).all()
        ), (name, most)


def test_bfloat16_is_close_and_gives_the_inputs_dtype():
    exact, (images, z) = weights(dtype=torch.float32), inputs(2, 40, 24, torch.float32)
    rounded = {name: p.bfloat16() for name, p in exact.items()}
    want = (*vae.encode(exact, images), vae.decode(exact, z))
    for ours, want in zip((*vae.encode(rounded, images), vae.decode(rounded, z)), want):
        assert 1e-4 < error(ours, want) < 0.03
    half = (*vae.encode(rounded, images.bfloat16()), vae.decode(rounded, z.bfloat16()))
    assert all(out.dtype == torch.bfloat16 for out in half)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_do_not_matter(chunk):
    params, (images, z) = weights(), inputs(5, 16, 24)
    whole, rows = (*vae.encode(params, images), vae.decode(params, z)), []

    def counted(
        params, name, x, middle=vae.middle
    ):  # every image goes through it once on either way
        rows.append(len(x))
        return middle(params, name, x)

    with mock.patch.object(vae, "middle", counted):
        parts = (*vae.encode(params, images, chunk=chunk), vae.decode(params, z, chunk=chunk))
    assert max(rows) == chunk and sum(rows) == 10
    for ours, want in zip(parts, whole):
        assert error(ours, want) < 1e-13 and ours.is_contiguous()


def test_compiles_without_a_break():
    params, (images, z) = weights(), inputs(3, 16, 16)

    def run(params, images, z):
        return *vae.encode(params, images, chunk=2), vae.decode(params, z, chunk=2)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, want in zip(compiled(params, images, z), run(params, images, z)):
        assert error(ours, want) < 1e-13


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 3, 36, 32), torch.float32, r"\(2, 3, 36, 32\)"),
        ((2, 3, 32, 36), torch.float32, r"\(2, 3, 32, 36\)"),
        ((3, 32, 32), torch.float32, r"\(3, 32, 32\)"),
        ((2, 32, 32, 3), torch.float32, r"\(2, 32, 32, 3\)"),
        ((2, 3, 32, 32), torch.uint8, "uint8"),
    ],
)
def test_images_that_cannot_be_encoded(shape, dtype, message):
    with pytest.raises(ValueError, match=f"images are .*{message}.*: give ") as error:
        vae.encode(weights(), torch.zeros(shape, dtype=dtype))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((2, 3, 4, 4), torch.float32, r"\(2, 3, 4, 4\)"),
        ((4, 4, 4), torch.float32, r"\(4, 4, 4\)"),
        ((2, 4, 4, 4), torch.int64, "int64"),
    ],
)
def test_latents_that_cannot_be_decoded(shape, dtype, message):
    with pytest.raises(ValueError, match=f"latents are .*{message}.*: give "):
        vae.decode(weights(), torch.zeros(shape, dtype=dtype))


# --- files ---


def load(path, channels=SMALL):
    with widths(channels):
        return load_vae(path)


def same(params, want):
    assert params.keys() == want.keys()
    assert all(
        p.dtype == torch.float32 and p.shape == want[name].shape and (p == want[name]).all()
        for name, p in params.items()
    )


def test_a_file_of_diffusers_loads(tmp_path):
    params = weights(FULL, torch.float32)
    oracle(params, FULL).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    loaded = load(str(path), FULL)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # what was loaded must not hang on the file
    path.unlink()  # 335 MB
    same(loaded, params)
    assert loaded["decoder.conv_in.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axes", [2, 4])
def test_a_file_with_the_old_names_loads(tmp_path, axes):
    old, params = {}, weights(dtype=torch.float16)
    for name, p in params.items():
        for new, was in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            if f"attentions.0.{new}." in name:
                name, p = (
                    name.replace(new, was),
                    p[:, :, None, None] if axes == 4 and p.ndim == 2 else p,
                )
        old[name] = p
    assert sum(name not in params for name in old) == 16
    save_file(old, tmp_path / "vae.safetensors")
    same(load(tmp_path / "vae.safetensors"), params)


def test_it_prints_its_halves(capsys):
    vae.main()
    _, encoder, decoder = (line.split() for line in capsys.readouterr().out.splitlines())
    assert encoder[0] == "encoder" and decoder[0] == "decoder"
    counts = [int(half[1].replace(",", "")) for half in (encoder, decoder)]
    assert sum(counts) == 83_653_863 - 8 * 9 - 4 * 5  # all but the two 1x1 convolutions between
