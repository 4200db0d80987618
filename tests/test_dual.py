"""dual.py: the derivative of any network, against torch.func.jvp, and what must not go wrong.

Oracles are torch's own database of operators and networks that others wrote.
"""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import einops
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dual

B = 3


pytestmark = pytest.mark.usefixtures("double")


def close(a, b, tolerance=1e-10):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True), (a - b).abs().max()


def func_jvp(f, primals, tangents):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, primals, tangents)


def agree(f, *primals, oracle=func_jvp, tolerance=1e-10):
    """Compare dual.jvp of f with the plain program and with an oracle, along random tangents."""
    tangents = tuple(torch.randn_like(x) for x in primals)

    def seeded(jvp):
        torch.manual_seed(7)
        return jvp(f, tuple(x.clone() for x in primals), tangents)

    got = seeded(dual.jvp)
    assert not any(isinstance(a, dual.Dual) or a.requires_grad for a in tree_leaves(got[1]))
    want = seeded(oracle)
    plain = seeded(lambda f, primals, _: f(*primals))
    for ours, theirs in ((got[0], plain), (got[1], want[1])):
        for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            close(a, b.detach() if a.requires_grad is False else b, tolerance)
    return got


def differences(f, primals, tangents, h=2e-4):
    """Return f and its derivative by differences of fourth order."""

    def at(s):
        torch.manual_seed(7)
        with torch.no_grad():
            return f(*(x + s * dx for x, dx in zip(primals, tangents)))

    ahead, behind, further, back = map(tree_leaves, map(at, (h, -h, 2 * h, -2 * h)))
    slope = [(8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in zip(ahead, behind, further, back)]
    return at(0), slope if len(slope) > 1 else slope[0]


# --- torch's own database ---


def real(a):
    return isinstance(a, torch.Tensor) and (a.is_floating_point() or a.is_complex())


def compare(function, sample, only=slice(None)):
    """Return whether a sample of the database can be compared, and raise if it differs."""
    leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, a in enumerate(leaves) if real(a)][only]
    primals = tuple(leaves[i].detach() for i in places)
    tangents = tuple(torch.randn_like(p) for p in primals)

    def f(*moving):
        inputs = list(leaves)
        for i, x in zip(places, moving):
            inputs[i] = x.clone()  # some functions write to it
        input, args, kwargs = tree_unflatten(inputs, spec)
        return tuple(a for a in tree_leaves(function(input, *args, **kwargs)) if real(a))

    torch.manual_seed(1)
    try:
        want = func_jvp(f, primals, tangents)
    except Exception:  # has no forward mode, or no floating output
        return False
    torch.manual_seed(1)
    got = dual.jvp(f, primals, tangents)
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert type(a) is torch.Tensor
        close(a, b, 1e-9)
    return True


DUALS = {"all": slice(None), "first": slice(1), "others": slice(1, None)}


def variants(op):
    """Yield the forms of an operator, which samples it is compared on, and what is dual."""
    yield op.name, op.op, slice(None), "all"
    yield f"{op.name} of its first argument", op.op, slice(1), "first"
    yield f"{op.name} of all but its first argument", op.op, slice(1), "others"
    if op.method_variant:
        yield f".{op.name}", op.method_variant, slice(1, None), "all"
    if op.inplace_variant:
        yield f"{op.name}_", op.inplace_variant, slice(1, None), "all"


@pytest.mark.slow
def test_every_operator_of_torchs_database(capsys):
    """All floating arguments are duals, or some of them; as functions, methods and in place."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    compared, refused = {}, {}
    warnings.simplefilter("ignore")
    for op in op_db:
        if not op.supports_forward_ad or torch.float64 not in op.dtypes:
            continue
        samples = [*islice(op.sample_inputs("cpu", torch.float64), 3)]
        for name, function, which, dual_ones in variants(op):
            key = f"{name} {op.variant_test_name}"
            for sample in samples[which]:
                try:
                    if compare(function, sample, DUALS[dual_ones]):
                        compared[key] = compared.get(key, 0) + 1
                except NotImplementedError as error:
                    refused[key] = str(error)
                except Exception as error:
                    raise AssertionError(f"{key}: {error}") from error
    operators = {key for key in compared if key[0] != "." and " of " not in key and "_ " not in key}
    with capsys.disabled():
        print(
            f"\n{len(operators)} operators of torch's database in {len(compared)} forms and",
            end=" ",
        )
        print(f"{sum(compared.values())} samples equal torch.func.jvp; refused: {[*refused]}")
    assert len(operators) > 480 and len(compared) > 1200
    assert len(refused) <= 5 and all("\n" not in message for message in refused.values())


# --- networks that others wrote, unchanged ---


def diffusers_net(kind):
    """Return a network of diffusers and net(x, t) -> u of it, with x."""
    import diffusers  # takes seconds

    shape, rest = (B, 4, 16, 16), {}
    unet = dict(sample_size=16, in_channels=4, out_channels=4, layers_per_block=1)
    unet |= dict(block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=8)
    if kind == "UNet1DModel":
        shape = (B, 4, 64)
        net = diffusers.UNet1DModel(
            sample_size=64,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            act_fn="mish",
            norm_num_groups=8,
        )
    elif kind == "UNet2DModel":
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        types = dict(down_block_types=down, up_block_types=up)
        net = diffusers.UNet2DModel(**unet, **types, num_class_embeds=5)
        rest = {"class_labels": torch.arange(B)}
    elif kind == "UNet2DConditionModel":
        down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        types = dict(down_block_types=down, up_block_types=up)
        net = diffusers.UNet2DConditionModel(**unet, **types, cross_attention_dim=24)
        rest = {"encoder_hidden_states": torch.randn(B, 7, 24)}
        rest["encoder_attention_mask"] = torch.rand(B, 7) > 0.3
    else:
        shape = (B, 4, 8, 8)
        net = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=8,
        ).eval()  # in training it drops labels
        rest = {"class_labels": torch.arange(B)}
    return net, lambda x, t: net(x, t, **rest).sample, torch.randn(shape)


def encoder(training, **options):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    masks = dict(mask=torch.ones(10, 10, dtype=torch.bool).triu(1))
    masks["src_key_padding_mask"] = torch.arange(10).expand(B, -1) > 7
    return net, lambda x, t: net(x * t[:, None, None], **masks), torch.randn(B, 10, 32)


def multihead(need_weights):
    net = nn.MultiheadAttention(32, 4, batch_first=True, dropout=0.1)
    options = dict(attn_mask=torch.randn(10, 10), need_weights=need_weights)
    f = lambda x, t: net(x, x, x * t[:, None, None], **options)[0]  # noqa: E731
    return net, f, torch.randn(B, 10, 32)


def patches():
    """Einops inside, with dropout."""
    there = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
    back = Rearrange("b (h w) (p q c) -> b c (h p) (w q)", p=2, q=2, h=4)
    layers = there, nn.Linear(12, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 12), back
    net = nn.Sequential(*layers)

    def f(x, t):
        return net(x * einops.rearrange(t, "b -> b 1 1 1")) + einops.reduce(
            einops.einsum(x, x, "b c h w, b c h v -> b c w v"), "b c h w -> b c 1 w", "mean"
        )

    return net, f, torch.randn(B, 3, 8, 8)


def convolutions(training):
    """Everything in place that can be, circular padding, a norm with running statistics."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, groups=4, padding_mode="circular"),
        nn.InstanceNorm2d(16, affine=True),
        nn.Mish(inplace=True),
        nn.GroupNorm(4, 16),
        nn.Dropout2d(0.1, inplace=True),
        nn.ConvTranspose2d(16, 16, 2, 2),
        nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Softplus(),
        nn.PixelShuffle(2),
        nn.RMSNorm([32, 32]),
        nn.Conv2d(4, 3, 2, stride=2, padding=8, padding_mode="reflect"),
    ).train(training)
    return net, lambda x, t: net(x * t[:, None, None, None]), torch.randn(B, 3, 8, 8)


def normalised_weights():
    norms = nn.utils.parametrizations
    layers = norms.weight_norm(nn.Linear(8, 16)), nn.Tanh(), norms.spectral_norm(nn.Linear(16, 8))
    net = nn.Sequential(*layers).eval()
    return net, lambda x, t: net(x * t[:, None]), torch.randn(B, 8)


def checkpointed():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))
    return (
        net,
        lambda x, t: checkpoint(net, x * t[:, None], use_reentrant=False),
        torch.randn(B, 8),
    )


class Fourier(nn.Module):
    """A layer of a Fourier neural operator, and a rotation by complex numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.randn(4, 4, 4, 5, dtype=torch.complex128))

    def forward(self, x, t):
        f = torch.fft.rfft2(x)
        out = torch.zeros_like(f)
        out[:, :, :4, :5] = torch.einsum("bixy,ioxy->boxy", f[:, :, :4, :5], self.w)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.exp(1j * t)[:, None, None, None]
        return torch.fft.irfft2(out, s=x.shape[-2:]) + torch.view_as_real(turned).flatten(-2)


def fourier():
    net = Fourier()
    return net, net, torch.randn(B, 4, 8, 8)


NETWORKS = {
    name: lambda name=name: diffusers_net(name)
    for name in ("UNet1DModel", "UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
}
NETWORKS |= {
    "encoder, training": lambda: encoder(True, dropout=0.1, activation="gelu"),
    "encoder, eval": lambda: encoder(False),
    "encoder, norm first": lambda: encoder(False, norm_first=True, activation="gelu"),
    "attention with weights": lambda: multihead(True),
    "attention without weights": lambda: multihead(False),
    "einops": patches,
    "convolutions, training": lambda: convolutions(True),
    "convolutions, eval": lambda: convolutions(False),
    "weight norm": normalised_weights,
    "checkpoint": checkpointed,
    "Fourier": fourier,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_others(name):
    """Value and gradients are the plain program's, the tangent is torch.func.jvp's, buffers are
    written once, and all costs at most 2.35 forwards."""
    net, f, x = NETWORKS[name]()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    t, before = torch.rand(B), copy.deepcopy(net.state_dict())
    # torch.func.jvp refuses buffers that are written and a group norm of what was transposed, and
    # draws other numbers for attention
    other = name in ("convolutions, training", "encoder, training", "UNet2DModel")
    # differences in t drown in the float32 of the network's time embedding
    tangents = torch.randn_like(x), (t * 0 if name == "UNet2DModel" else t * 0 + 1)

    def run(jvp):
        net.load_state_dict(before)
        torch.manual_seed(7)
        return jvp(f, (x, t), tangents)

    def trained(jvp):
        u, du = run(jvp)
        with warnings.catch_warnings(action="ignore"):
            gradients = torch.autograd.grad(u.square().sum(), net.parameters(), allow_unused=True)
        return u, du, gradients, copy.deepcopy([*net.buffers()])

    u, du, gradients, buffers = trained(dual.jvp)
    plain, _, plain_gradients, plain_buffers = trained(lambda f, primals, _: (f(*primals), None))
    assert not du.requires_grad and type(u) is type(du) is torch.Tensor
    close(u, plain)
    assert all(map(torch.equal, buffers, plain_buffers))
    for a, b in zip(gradients, plain_gradients):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-10 * (1 + b.norm())
    _, want = run(differences if other else func_jvp)
    assert (du - want).norm() <= (1e-8 if other else 1e-10) * want.norm()

    costs = []
    for jvp in (lambda f, primals, _: f(*primals), dual.jvp):
        with FlopCounterMode(display=False) as counter:
            run(jvp)
        costs.append(counter.get_total_flops())
    assert costs[1] <= 2.35 * costs[0], costs[1] / costs[0]


# --- never silently wrong ---


def test_views_and_writes_in_place_alias_as_in_torch():
    """Writing to a view writes to what it is a view of, in value and tangent."""

    def f(x, t):
        h = x * 2
        a, b = h[:, :3], t[:, None].expand(-1, 3)
        a += b
        h[:, 4:] *= t[:, None]
        h[0, 0] = t[0]
        h.view(-1).mul_(1.5)
        a.copy_(a * a)
        h.t().add_(1)
        h.diagonal().sin_()
        F.silu(h[1], inplace=True)
        F.relu(h[2], True)
        h.expand_as(h)[:, 2] /= 3
        h.unflatten(1, (2, 3)).transpose(1, 2)[..., 0].neg_()
        torch.broadcast_tensors(h, torch.ones(1))[0][0].exp_()
        h.squeeze_().unsqueeze_(0).squeeze_(0)
        h.masked_fill_(h > 1, 0.5)
        h.index_add_(1, torch.tensor([0, 2]), h[:, :2])
        return h

    agree(f, torch.randn(B, 6), torch.rand(B))


def test_a_new_tensor_like_a_dual_can_be_written_to():
    def f(x, t):
        out = torch.zeros_like(x)
        out[:2] = x[1:].sin()
        out.index_copy_(0, torch.tensor([2]), x[:1] * t[0])
        more = x.new_zeros(2, 6)
        more[0], more[1] = x[0], t.sum()
        wiped = x * 1
        wiped[0] = 0.0
        wiped[1].zero_()
        wiped[2].fill_(2.0)
        return out, more, wiped, torch.full_like(x, 3.0).mul_(t[:, None])

    agree(f, torch.randn(B, 6), torch.rand(B))


def test_results_do_not_share_memory_that_the_plain_program_keeps_apart():
    """Adding a constant copies the tangent; the caller's tangents stay as they are."""

    def f(x):
        y = x + 1
        z = torch.where(torch.ones(4, dtype=torch.bool), y, 0.0)
        y *= 3
        x += y
        return x, y, z, F.dropout(x, 0.5, False).mul_(2), x

    agree(f, torch.randn(2, 4))
    v = torch.randn(2, 4)
    kept = v.clone()
    dual.jvp(lambda x: x.mul_(2), (torch.randn(2, 4),), (v,))
    assert torch.equal(v, kept)


def test_a_tangent_is_laid_out_as_its_value():
    """A view of the one is then a view of the other; under autocast both have one precision."""
    x, v = torch.randn(4, 4).t(), torch.randn(4, 4)

    def f(x):
        y = x * 1
        y.t().reshape(-1).mul_(3)
        return y

    close(dual.jvp(f, (x,), (v,))[1], 3 * v)
    x, w = torch.randn(4, 4, dtype=torch.float32), torch.randn(4, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        u, du = dual.jvp(lambda x: F.linear(x, w) + torch.ones(4, dtype=torch.float32), (x,), (x,))
    assert u.dtype == du.dtype == torch.float32


def test_nothing_of_the_tangent_is_kept_for_the_backward_pass():
    net = nn.Sequential(
        nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(12, 8), nn.LayerNorm(8), nn.SiLU()
    )
    net, x = nn.Sequential(net, nn.Softmax(1), nn.Linear(8, 8), nn.Mish()), torch.randn(B, 4, 3)
    kept = [0, 0]
    w = torch.randn(8, requires_grad=True)

    def f(x):
        return net(x) / w + torch.mul(net(x), other=w)

    for k, run in enumerate((lambda: f(x), lambda: dual.jvp(f, (x,), (x,)))):

        def count(saved, k=k):
            kept[k] += saved.numel()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            run()
    assert kept[0] == kept[1] > 0


def test_constants_are_those_of_torch():
    """detach(), item() and the sign of a number have no derivative; no_grad() does not matter."""

    def f(x):
        with torch.no_grad():
            y = x * x
        i = x.argmax(1)
        return x.detach() * x.sum().item() + (x > 0) * y + x.sign() * float(x.max()) + x[:, i[:1]]

    agree(f, torch.randn(B, 4))


def test_complex_numbers_keep_their_tangents():
    def f(x):
        c = torch.fft.fft(torch.complex(x, x**2)) * (1 + 2j)
        parts = c.abs(), c.real, c.conj().imag, torch.view_as_real(c), (c @ c.mH), c.angle()
        return *parts, F.silu(c), c.exp() / (2 + c.sqrt()), c.tanh() * c.sin()

    agree(f, torch.randn(B, 4))


def test_random_numbers_are_drawn_once():
    """The tangent sees the mask of the value, and the generator goes on as in the plain program."""

    def f(x):
        y = F.alpha_dropout(x, 0.5, True) + F.rrelu(x, training=True) + F.dropout(x, 0.3)
        y = y + torch.randn_like(x) * x + F.feature_alpha_dropout(x, 0.4, True)
        q = torch.stack((y, x, x * y))
        y = y + F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)[0]
        g = torch.Generator().manual_seed(3)
        return y * torch.bernoulli(torch.sigmoid(x)), torch.rand(3), torch.rand(3, generator=g)

    x = torch.randn(16, 8)
    agree(f, x, oracle=differences, tolerance=1e-7)
    ones = torch.ones(1000)
    u, du = dual.jvp(lambda x: F.dropout(x, 0.5), (ones,), (ones,))
    assert torch.equal(u, du) and 300 < (u == 0).sum() < 700
    g = torch.Generator().manual_seed(3)
    u, du = dual.jvp(lambda x: x * torch.bernoulli(x / 2, generator=g), (ones,), (ones,))
    assert torch.equal(u, du)
    want = torch.bernoulli(ones / 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(u, want)


def test_attention_of_every_kind():
    """Masks, causal, scales, grouped queries, rows where all is masked, a mask with a tangent."""
    q, k, v = torch.randn(B, 4, 5, 8), torch.randn(B, 4, 7, 8), torch.randn(B, 4, 7, 6)
    some = torch.rand(5, 7) > 0.4
    some[2] = False
    for options in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": some},
        {"attn_mask": torch.randn(4, 5, 7)},
    ):
        f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # noqa: E731
        agree(f, q, k, v)
        agree(lambda q: f(q, k, v), q)
        agree(lambda v: f(q, k, v), v)
        agree(lambda k: F.scaled_dot_product_attention(query=q, key=k, value=v, **options), k)
    agree(lambda q, m: F.scaled_dot_product_attention(q, k, k, m), q, torch.randn(5, 7))
    grouped = {"enable_gqa": True}
    agree(lambda q, k: F.scaled_dot_product_attention(q, k, k, **grouped), q, k[:, :2])


def test_weights_may_have_tangents():
    """As of a hypernetwork."""

    def f(x, w, b):
        y = F.linear(x, w, b) + F.layer_norm(x, (4,), b, b) + F.rms_norm(x, (4,), b)
        images = x.reshape(1, 4, 3, 1).expand(1, 4, 3, 3)
        y = y + F.group_norm(images, 2, b, b).mean() + F.batch_norm(x, None, None, b, b, True)
        return y + F.conv2d(images, w[..., None, None], b).mean() + torch.addmm(b, x, w, beta=2)

    agree(f, torch.randn(B, 4), torch.randn(4, 4), torch.randn(4))


class Product(torch.autograd.Function):
    """With a jvp of the first style, and a gradient that is not that of its forward."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return 10 * g @ b.T, 10 * a.T @ g

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return (0 if da is None else da @ b) + (0 if db is None else a @ db)


class NewProduct(Product):
    """The same in the second style."""

    @staticmethod
    def forward(a, b):
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class WithoutJvp(torch.autograd.Function):
    forward, backward = Product.forward, Product.backward


@pytest.mark.parametrize("function", [Product, NewProduct])
def test_an_autograd_function_with_a_jvp_keeps_its_own_gradient(function):
    x, w = torch.randn(B, 4), torch.randn(4, 4, requires_grad=True)
    u, du = dual.jvp(lambda x: function.apply(x, w).sin(), (x,), (x,))
    close(u, (x @ w).sin())
    close(du, ((x @ w).cos() * (x @ w)).detach())
    [got] = torch.autograd.grad(u.sum(), w)
    close(got, 10 * x.T @ (x @ w).cos())


@torch.library.custom_op("test_dual::sine", mutates_args=())
def operator_without_forward_mode(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("test_dual::double", mutates_args=("x",))
def operator_that_writes(x: torch.Tensor) -> None:
    x.mul_(2)


REFUSED = {  # what is done to x, (3, 4), and the function and the way out that the error names
    "a plain tensor": (lambda x: torch.zeros(3, 4).__setitem__(0, x[0]), "__setitem__.*zeros_like"),
    "copy_": (lambda x: torch.zeros(3, 4).copy_(x), "copy_.*zeros_like"),
    "a plain buffer": (lambda x: torch.zeros(4).mul_(0.9).add_(x.mean(0)), "add_.*detach"),
    "+=": (lambda x: torch.zeros(3, 4).__iadd__(x), "add_.*zeros_like"),
    "out=": (lambda x: torch.sin(x, out=torch.zeros(3, 4)), "sin.*use what it returns"),
    "a Function": (lambda x: WithoutJvp.apply(x, x.T), "WithoutJvp.*write its jvp"),
    "reentrant": (lambda x: checkpoint(torch.sin, x, use_reentrant=True), "use_reentrant=False"),
    "torch.tensor": (lambda x: torch.tensor(x), "torch.tensor"),
    "vmap": (lambda x: torch.vmap(torch.sin)(x), "vmap"),
    "closed vmap": (lambda x: torch.vmap(lambda i: x[i].sin())(torch.arange(3)), "vmap"),
    "numpy": (lambda x: x.numpy(), "numpy.*detach"),
    "asarray": (lambda x: np.sin(x), "__array__.*detach"),
    "data_ptr": (lambda x: x * (x.data_ptr() > 0), "data_ptr.*dual.rule"),
    "dlpack": (lambda x: torch.from_dlpack(x), "__dlpack__"),
    "deepcopy": (lambda x: copy.deepcopy(x), "__deepcopy__"),
    "data =": (lambda x: setattr(x * 1, "data", x), "__set__"),
    "torch.func.jvp": (lambda x: torch.func.jvp(torch.sin, (x,), (x,))[1], "_make_dual"),
    "forward_ad": (lambda x: inner_forward_mode(x), "_make_dual"),
    "torch.func.grad": (lambda x: torch.func.grad(lambda x: (x**3).sum())(x), "pow"),
    "autograd.grad": (lambda x: energy_gradient(x), "grad has no forward mode"),
    "itself": (lambda x: dual.jvp(torch.sin, (x,), (x,))[1], "inside of dual.jvp"),
    "closed itself": (
        lambda x: dual.jvp(lambda s: s * x, (x.detach(),), (x,)),
        "inside of dual.jvp",
    ),
    "an operator": (lambda x: operator_without_forward_mode(x), "test_dual|sine.*no forward mode"),
    "a writing operator": (lambda x: operator_that_writes(x * 1), "writes to its arguments"),
    "linspace": (lambda x: torch.linspace(x[0, 0], x[0, 1], 4), "linspace"),
    "foreach": (lambda x: torch._foreach_mul_([x * 1], 2.0), "writes to its arguments"),
    "quantised": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 9), "fake_quant"),
}


def inner_forward_mode(x):
    with forward_ad.dual_level():
        return forward_ad.make_dual(x, x)


def energy_gradient(x):
    x.requires_grad_()
    return torch.autograd.grad((x**3).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_lose_a_tangent_is_refused_in_a_line(name):
    f, message = REFUSED[name]
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=message) as error:
        dual.jvp(f, (x,), (x,))
    assert "\n" not in str(error.value)
    dual.jvp(torch.sin, (x,), (x,))  # and all is well afterwards


def test_a_script_is_refused():
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.script(twice_and_sine)
    with pytest.raises(NotImplementedError, match="a script .* call the function"):
        dual.jvp(scripted, (torch.randn(3),), (torch.randn(3),))


def twice_and_sine(x):
    return x * 2 + x.sin()


def test_a_checkpoint_computes_functions_anew_in_the_backward_pass():
    """There, outside of jvp, a Function without a graph would be silent."""
    x, w = torch.randn(B, 4), torch.randn(4, 4, requires_grad=True)
    f = lambda x: checkpoint(lambda x: Product.apply(x, w).sin(), x, use_reentrant=False)  # noqa: E731
    u, _ = dual.jvp(f, (x,), (x,))
    [got] = torch.autograd.grad(u.sum(), w)
    close(got, 10 * x.T @ (x @ w).cos())


def test_functions_without_duals_are_left_alone():
    a, b = torch.randn(2, 2, requires_grad=True), torch.randn(2, 2)
    dual.jvp(torch.sin, (b,), (b,))
    close(torch.autograd.grad(WithoutJvp.apply(a, b).sum(), a)[0], 10 * torch.ones(2, 2) @ b.T)


def test_inference_mode_is_refused():
    """It has no forward mode, without a word; no_grad() has."""
    x = torch.randn(3)
    with torch.no_grad():
        close(dual.jvp(torch.erf, (x,), (x,))[1], func_jvp(torch.erf, (x,), (x,))[1])
    with torch.inference_mode():
        y = x * 1
        with pytest.raises(NotImplementedError, match="no_grad"):
            dual.jvp(torch.erf, (x,), (x,))
    with pytest.raises(NotImplementedError, match="no_grad"):
        dual.jvp(torch.erf, (y,), (x,))


@pytest.mark.parametrize(
    "primals, tangents, error",
    [
        (lambda x: x, lambda x: x, TypeError),
        (lambda x: (x,), lambda x: (x[0],), ValueError),
        (lambda x: (x.long(),), lambda x: (x,), TypeError),
        (lambda x: (x, None), lambda x: (x, x), TypeError),
        (lambda x: (x,), lambda x: (1.0,), TypeError),
        (lambda x: (x,), lambda x: (x * 1j,), ValueError),
        (lambda x: (x,), lambda x: (x, x), ValueError),
    ],
)
def test_primals_and_tangents_must_fit(primals, tangents, error):
    x = torch.randn(2, 2)
    with pytest.raises(error, match="primal|tangent|arity"):
        dual.jvp(lambda *x: x[0], primals(x), tangents(x))


def test_a_result_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="returns a Holder, no tensor"):
        dual.jvp(Holder, (torch.randn(2),), (torch.randn(2),))


class Holder:
    def __init__(self, x):
        self.x = x


def test_nested_arguments_and_results():
    def f(a, b):
        return {
            "sum": a["x"] + b[0],
            "pair": (a["x"].max(0), [b[1].sin(), None]),
            "one": torch.ones(2),
        }

    primals = {"x": torch.randn(3, 2)}, [torch.randn(3, 2), torch.randn(2)]
    (value, tangent) = dual.jvp(f, primals, primals)
    close(tangent["sum"], primals[0]["x"] + primals[1][0])
    i = primals[0]["x"].argmax(0)
    close(tangent["pair"][0].values, primals[0]["x"].gather(0, i[None])[0])
    assert torch.equal(value["pair"][0].indices, i) and value["pair"][1][1] is None
    close(tangent["pair"][1][0], primals[1][1].cos() * primals[1][1])
    assert torch.equal(tangent["one"], torch.zeros(2))


def test_it_is_a_tensor_to_others():
    seen = []

    def f(x):
        seen.append((isinstance(x, torch.Tensor), torch.is_tensor(x), torch.is_floating_point(x)))
        seen.append((x.shape, x.dtype, x.device.type, x.ndim, len(x), x.requires_grad))
        return sum(row * k for k, row in enumerate(x)) + einops.rearrange(x, "a b -> b a")[:, 0]

    x = torch.randn(3, 4, requires_grad=True)
    agree(f, x.detach())
    dual.jvp(f, (x,), (x,))
    assert seen[0] == (True, True, True)
    assert seen[-1] == (torch.Size((3, 4)), torch.float64, "cpu", 2, 3, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_in_half_precision(dtype):
    """The eps that torch takes for rms_norm is that of float32, in which it computes."""
    eps = torch.finfo(torch.float32).eps
    x, v = (0.02 * torch.randn(2, 8, 16)).to(dtype), torch.randn(2, 8, 16).to(dtype)
    for f in (
        lambda x: F.rms_norm(x, (16,), eps=eps if x.dtype == torch.float64 else None),
        lambda x: F.layer_norm(x, (16,)),
        lambda x: F.group_norm(x, 4),
        lambda x: F.softmax(x, -1),
    ):
        got, want = dual.jvp(f, (x,), (v,))[1], func_jvp(f, (x.double(),), (v.double(),))[1]
        assert got.dtype == dtype
        assert (got - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_edges():
    """Where a closed form would be 0 / 0, or a function of torch returns its own argument."""
    nothing = nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace=True))

    def f(x):
        h = x * 1
        zero = x - x
        y = x**0 + zero**0 + zero**1 + torch.relu(-torch.sqrt(zero)) + F.silu(x * 1j).abs()
        return h + nothing(h), y, F.relu(-zero.abs().log())

    agree(f, torch.randn(B, 4))
    agree(lambda x: F.group_norm(x, 2), torch.randn(0, 4, 3))
    agree(lambda x: x.new(x.shape).copy_(x) + x.new_zeros(x.size()), torch.randn(B, 4))
    agree(lambda x: (x * 1).view(2, 2).t_() + torch.ones(2, 2), torch.randn(2, 2))

    def turned(x):
        h = x * 1
        v = h.view(2, 2)
        v.t_().mul_(torch.arange(4.0).view(2, 2))
        return h, v

    agree(turned, torch.randn(2, 2))


def test_every_spelling_of_arguments():
    q, w = torch.randn(B, 4), torch.randn(4, 4)

    def f(x):
        s = F.linear(input=x, weight=w) + torch.mul(input=x, other=2.0) + torch.mul(x, other=x)
        s = s + torch.cat(tensors=[x, x]).sum(dim=0) + torch.softmax(input=x, dim=-1)
        s = s + torch.addmm(q, mat1=x, mat2=w, beta=2) + torch.where(x > 0, input=x, other=0.0)
        s = s + torch.dropout(x, 0.0, train=True) + F.pad(input=x, pad=(0, 0)) + torch.sin(input=x)
        s = (
            s
            + torch.rsub(x, 1.0, alpha=2)
            + torch.add(x, q, alpha=3)
            + torch.div(q, other=2 + x * x)
        )
        h = x * 1
        torch.clamp_(min=-0.5, max=0.5, input=h)
        torch.dropout_(p=0.0, train=True, input=h)
        return (
            s,
            h,
            F.layer_norm(x, normalized_shape=(4,), bias=q[0]),
            torch.einsum(x, [0, 1], w, [1, 2]),
        )

    agree(f, torch.randn(B, 4))


def test_primals_are_copies():
    """Slices of other tensors as well, to whose memory f writes."""

    def f(x):
        x.swapdims(0, 1).mul_(3)
        y = x.contiguous()
        y.mul_(2)
        torch.hsplit(x, 2)[0].add_(1)
        return x * 1, y

    whole = torch.randn(6, 8)
    kept = whole.clone()
    for x in (whole[2:5, :4], whole[:, ::2], whole[:1].expand(6, 8)):
        v = torch.randn(x.shape)
        want = func_jvp(f, (x.clone(),), (v.clone(),))  # which it writes to
        for a, b in zip(tree_leaves(dual.jvp(f, (x,), (v,))), tree_leaves(want)):
            close(a, b)
    assert torch.equal(whole, kept)


def test_duals_of_different_runs_do_not_meet():
    """A module that keeps one from an earlier call would add its tangent to another's."""
    kept = []

    def f(x):
        kept.append(x * 2)
        return x + sum(kept)

    x = torch.randn(3)
    dual.jvp(f, (x,), (x,))
    with pytest.raises(NotImplementedError, match="kept from an earlier jvp.*detach"):
        dual.jvp(f, (x,), (x,))


def test_a_function_on_a_dual_that_it_closes_over_is_refused():
    x, p = torch.randn(3), torch.randn(3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="CheckpointFunction .*none of its arguments"):
        dual.jvp(lambda x: checkpoint(lambda p: x * p, p, use_reentrant=True), (x,), (x,))


def test_hooks_on_modules():
    """Their gradients are those of the plain program."""
    x, seen = torch.randn(B, 4), []
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].register_full_backward_hook(lambda module, before, after: seen.append(after[0]))
    net.register_forward_hook(lambda module, args, out: out * 2)
    for run in (lambda: net(x), lambda: dual.jvp(net, (x,), (x,))[0]):
        run().square().sum().backward()
    close(*seen)
    agree(net, x)


def test_functions_that_are_replaced():
    """The Python of torch is run as it is now."""
    net, q = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)
    agree(lambda q: net(q, q, q, need_weights=False)[0], q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: q * k + v)
        agree(lambda q: net(q, q, q, need_weights=False)[0], q)


def test_threads_take_turns():
    x, net = torch.randn(64), nn.Sequential(nn.Softplus(), nn.Mish())
    want = dual.jvp(net, (x,), (x,))[1]
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: dual.jvp(net, (x,), (x,))[1], range(40)):
            close(got, want)


# --- programs at random ---

PIECES = [
    lambda a, b: a + b,
    lambda a, b: a - 2 * b,
    lambda a, b: 1 - a * b,
    lambda a, b: a / (2 + b * b),
    lambda a, b: torch.tanh(a @ b),
    lambda a, b: torch.cat((a, b), 1)[:, ::2],
    lambda a, b: torch.stack((a, b)).amax(0),
    lambda a, b: torch.where(a > b, a, b.sin()),
    lambda a, b: F.softmax(a, 1) * b,
    lambda a, b: F.layer_norm(a, (4,)) + b.mean(0),
    lambda a, b: F.linear(a, torch.ones(4, 4) / 4, torch.ones(4)) * b[:, :1],
    lambda a, b: a.t().reshape(4, 4).contiguous(),
    lambda a, b: a[[1, 0, 3, 2]] + b.flip(1).cumsum(1) / 4,
    lambda a, b: a.view(2, 2, 4).transpose(0, 1).flatten(0, 1),
    lambda a, b: a.exp().clamp(max=2) - b.abs().sqrt(),
    lambda a, b: F.silu(a) + F.gelu(b) + torch.erf(a) + (a**2 + 1).rsqrt() + b.cos(),
    lambda a, b: torch.einsum("ij,kj->ik", a, b) / 4,
    lambda a, b: a.unfold(1, 2, 1).sum(-1).repeat(1, 2)[:, :4],
    lambda a, b: F.pad(a, (1, 1), value=3.0)[:, :4] * b.norm(),
    lambda a, b: a.add_(1),
    lambda a, b: a.mul_(b * 1),
    lambda a, b: a[:, 1:3].copy_(b[:, :2].clone()) if a is not b else a,
    lambda a, b: a.t().mul_(0.5).t(),
    lambda a, b: torch.zeros_like(a).index_add_(0, torch.tensor([0, 2]), b[:2]),
    lambda a, b: a[1, ::2].sin_().sum() + b,
    lambda a, b: F.silu(a.view(4, 4), inplace=True),
]


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(0, len(PIECES) - 1), st.integers(0), st.integers(0)), max_size=12
    ),
    st.integers(0, 2**31),
)
def test_programs_at_random(steps, seed):
    """Compositions of functions, views and writes in place, on what came before, shared or not."""

    def program(x, y):
        pool = [x, y, torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)]
        for piece, i, j in steps:
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            if a is pool[2]:  # what has no tangent is not written to
                a = a * 1 + 0 * x
            out = PIECES[piece](a, b)
            pool.append(out if out.shape == (4, 4) else out.sum() + x)
        return torch.stack(pool[3:]).tanh().sum(0) if steps else x * y

    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 4, 4, generator=g, dtype=torch.float64)
    agree(program, x, y, tolerance=1e-8)


# --- rules of one's own ---


def test_a_rule_for_a_function_of_ones_own():
    """A kernel that reads memory, behind a function, an operator, or an autograd.Function."""

    def kernel(x, k=1):
        return torch.from_numpy(np.sin(k * x.detach().numpy()))

    @dual.rule(kernel)
    def fast_sine(function, x, k=1):
        x, dx = dual.split(x)
        return function(x, k), dx * k * torch.cos(k * x)

    x = torch.randn(4)
    with pytest.raises(NotImplementedError, match="numpy"):
        dual.jvp(lambda x: torch.from_numpy(np.sin(x.numpy())), (x,), (x,))
    u, du = dual.jvp(lambda x: fast_sine(x * 2, k=3) + 1, (x,), (x,))
    close(u, torch.sin(6 * x) + 1)
    close(du, 6 * x * torch.cos(6 * x))
    assert torch.equal(fast_sine(x), torch.sin(x)) and type(fast_sine(x)) is torch.Tensor

    def cosine(x):
        return x.cos()

    @dual.rule(cosine)
    def wrong(function, x):
        raise TypeError("of the rule")

    with pytest.raises(TypeError, match="of the rule"):
        dual.jvp(wrong, (x,), (x,))

    @dual.rule(WithoutJvp)
    def product(function, a, b):
        (a, da), (b, db) = dual.split(a), dual.split(b)
        assert db is None
        return function(a, b), da @ b.detach()

    try:
        w = torch.randn(4, 4, requires_grad=True)
        u, du = dual.jvp(lambda x: WithoutJvp.apply(x, w), (x[None],), (x[None],))
        close(du, (x[None] @ w).detach())
        close(torch.autograd.grad(u.sum(), w)[0], 10 * x[:, None].expand(4, 4))
    finally:
        del dual.RULES[WithoutJvp], dual.RULES[kernel], dual.RULES[cosine]


def test_under_torch_func_grad():
    """Parameters' gradients by torch.func.grad are those of autograd."""
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 4))
    params, x = dict(net.named_parameters()), torch.randn(B, 4)

    def loss(params):
        f = lambda x: torch.func.functional_call(net, params, (x,))  # noqa: E731
        u, du = dual.jvp(f, (x,), (x,))
        return (u - du).square().sum()

    want = torch.autograd.grad(loss(params), params.values())
    for got, g in zip(torch.func.grad(loss)(params).values(), want):
        close(got, g)


# --- compiled ---


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.linear, self.out = nn.Linear(8, 8), nn.Conv2d(8, 3, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, t):
        h = (
            F.mish(self.norm(self.conv(x)))
            * self.linear(t[:, None].expand(-1, 8).sin())[..., None, None]
        )
        h += 1
        h = h * torch.erf(h) + F.softplus(h) - h.clamp(-1, 1) / 2
        h = h.masked_fill(h > 2, 0.0)
        q = h.flatten(2).mT
        q = q + self.attention(q, q, q)[0] + 1 / (2 + q**2) + (1 - q)
        a, b = q.split([4, 4], -1)
        q = torch.cat([a * 2, b], -1).unflatten(1, h.shape[2:]).permute(0, 3, 1, 2).contiguous()
        q[:, 0] = t[:, None, None]
        return self.out(F.interpolate(F.silu(q, inplace=True), scale_factor=2))[:, :, ::2, 1::2]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["compile", "jvp inside"])
def test_a_compiled_module_is_the_eager_one(whole):
    """Values, tangents and gradients, in one graph, by rules and by what has none."""
    torch._dynamo.reset()
    net, x, t = Small(), torch.randn(B, 3, 8, 8), torch.rand(B)
    tangents = torch.randn_like(x), torch.ones_like(t)
    if whole:
        run = torch.compile(
            lambda *a: dual.jvp(net, a, tangents), fullgraph=True, backend="aot_eager"
        )
        u, du = run(x, t)
    else:
        compiled = dual.compile(net, fullgraph=True, dynamic=False, backend="aot_eager")
        u, du = dual.jvp(compiled, (x, t), tangents)
        close(compiled(x, t), net(x, t))
    assert not du.requires_grad and type(du) is torch.Tensor
    want, slope = dual.jvp(net, (x, t), tangents)
    close(u, want)
    close(du, slope)
    gradients = (torch.autograd.grad(a.square().sum(), net.parameters()) for a in (u, want))
    for got, g in zip(*gradients):
        close(got, g)


def written(h, p):
    F.elu(h[1], 1.0, True)
    F.silu(h[2], inplace=True)
    h[:, 0] = p[0]
    h += p
    h *= h.detach() + 1
    return h


MASKED, WEIGHT = nn.MultiheadAttention(3, 1, dropout=0.1), torch.ones(3, 3, requires_grad=True)
HEADS = nn.MultiheadAttention(3, 1, dtype=torch.float64)
OPERATORS = {
    "x + p": lambda x, p: x + p,
    "p - x": lambda x, p: p - x,
    "x - p": lambda x, p: x - p,
    "x / p": lambda x, p: x / p,
    "p / x": lambda x, p: p / x,
    "x ** p": lambda x, p: x**p,
    "p ** x": lambda x, p: p**x,
    "x ** x": lambda x, p: x**x,
    "2 - x": lambda x, p: 2 - x,
    "2 ** x": lambda x, p: 2**x,
    "2 / x": lambda x, p: 2 / x,
    "x < p": lambda x, p: x * (x < p) + x * (p <= x) * 2 + (x > 0) * x,
    "matmul": lambda x, p: torch.matmul(x, p) + torch.matmul(p, x).matmul(x) + p.matmul(p),
    "in place": lambda x, p: written(x - 2, p),
    "abs x % p": lambda x, p: abs(x - 1) + x % 0.7 + (+x),
    "rows": lambda x, p: torch.stack([row * 2 for row in x]),
    "dropout": lambda x, p: F.dropout(x * 1, 0.5, True, True),
    "attention": lambda x, p: F.scaled_dot_product_attention(x, x, p, x * 2, dropout_p=0.5),
    "heads": lambda x, p: HEADS(x, x, x, need_weights=False)[0],
    "batch norm": lambda x, p: F.batch_norm(x, p[0] * 1, p[1] * 1, p[2], p[0], training=True),
    "batch norm, eval": lambda x, p: F.batch_norm(x, p[0], p[1], p[2], p[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_under_torch_compile(name):
    """In both orders: Dynamo swaps the operands of an object and a tensor."""
    torch._dynamo.reset()
    f, x, p, v = OPERATORS[name], *torch.rand(3, 3, 3) + 0.5
    compiled = dual.compile(lambda x: f(x, p), fullgraph=True, backend="aot_eager")
    results = []
    for g in (compiled, lambda x: f(x, p)):
        torch.manual_seed(0)
        results.append(dual.jvp(g, (x,), (v,)))
    for a, b in zip(*results):
        close(a, b)


NOT_COMPILED = [
    lambda x: x @ torch.ones(3, 3),
    lambda x: torch.rand(3, 3) @ x,
    lambda x: x @ x,
    lambda x: F.alpha_dropout(x, 0.5, True),
    lambda x: F.rrelu(x, training=True),
    lambda x: MASKED(x, x, x)[0],
    lambda x: torch.feature_dropout(x, 0.5, True),
    lambda x: torch.tensor(x),
    lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    lambda x: torch.zeros(3, 3).copy_(x),
    lambda x: WithoutJvp.apply(x * WEIGHT, x),
]


@pytest.mark.slow
@pytest.mark.parametrize("f", NOT_COMPILED)
def test_what_cannot_be_compiled_is_refused(f):
    torch._dynamo.reset()
    x = torch.randn(3, 3)
    compiled = dual.compile(f, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="matmul|lost|lose|Observed exception|Mismatch|mismatch"):
        dual.jvp(compiled, (x,), (x,))
