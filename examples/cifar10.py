"""The paper's other experiment: unconditional CIFAR-10 in pixels, by the U-Net of its authors.

    python data.py cifar10/train data/cifar10                  50,000 image files become shards
    python examples/cifar10.py data/cifar10 --width 32 --batch 64 --steps 5000      on a laptop
    torchrun --nproc-per-node 8 examples/cifar10.py data/cifar10                    as the paper
    python sample.py runs/cifar10 --network examples/cifar10.py
    python evaluate.py model.pth --network examples/cifar10.py --ref data/cifar10 --inception FILE

The house knows nothing of this: the U-Net of Song et al. (DDPM++, arXiv 2011.13456) on t and t - r,
the augmentation of Karras et al. (EDM, arXiv 2206.00364), which the network is told so that samples
have none of it, dropout, three averages. All have the numbers of the authors' PyTorch code,
py-meanflow; a step costs 3.75 forwards, theirs 5. The same command resumes a run.

differs from the authors: r = t in a fixed share of the rows; averages forget the initial weights at
first (train.update); lr grows from 0, not 1e-8; epochs are whole; linear and attention in float32.
"""

# ruff: noqa: E402
import math
import re
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import dual
import meanflow
import runtime
import train
import weights
from model import linear

EPS = 1e-6  # of group norms
DROPOUT = 0.2
LABELS = 6  # of the augmentation
WARPED = 0.12  # probability of each kind of warp
HINT = "give a run's folder or the weights of a U-Net with the names of py-meanflow's"


def shapes(width=128, mult=(2, 2, 2), blocks=4, *, side=32, attention=16, channels=3):
    """Return {name: shape} of every parameter of a U-Net, 55,932,419 of the authors'.

    mult: the channels of each resolution, side, side / 2, ..., in widths; blocks: at each on the
    way down, and one more on the way up; attention: the side where they attend.
    """
    levels = [(side >> k, factor * width) for k, factor in enumerate(mult)]
    layers = dict.fromkeys(("map_layer0", "map_layer1"), (4 * width, 4 * width))
    layers[f"enc.{side}x{side}_conv"] = (width, channels, 3, 3)
    a, skips = width, [width]  # channels

    def add(name, a, b, *, resampled=False, attends=False):
        parts = {"norm0": (a,), "conv0": (b, a, 3, 3), "affine": (b, 4 * width)}
        parts |= {"norm1": (b,), "conv1": (b, b, 3, 3)}
        if a != b or resampled:
            parts["skip"] = (b, a, 1, 1)
        if attends:
            parts |= {"norm2": (b,), "qkv": (3 * b, b, 1, 1), "proj": (b, b, 1, 1)}
        layers.update({f"{name}.{part}": shape for part, shape in parts.items()})
        return b

    for n, b in levels:
        if n < side:
            skips.append(add(f"enc.{n}x{n}_down", a, a, resampled=True))
        for k in range(blocks):
            a = add(f"enc.{n}x{n}_block{k}", a, b, attends=n == attention)
            skips.append(a)
    add(f"dec.{n}x{n}_in0", a, a, attends=True)
    add(f"dec.{n}x{n}_in1", a, a)
    for n, b in reversed(levels):
        if n > levels[-1][0]:
            add(f"dec.{n}x{n}_up", a, a, resampled=True)
        for k in range(blocks + 1):
            attends = n == attention and k == blocks
            a = add(f"dec.{n}x{n}_block{k}", a + skips.pop(), b, attends=attends)
    layers[f"dec.{side}x{side}_aux_norm"] = (a,)
    layers[f"dec.{side}x{side}_aux_conv"] = (channels, a, 3, 3)
    tensors = {f"{name}.weight": shape for name, shape in layers.items()}
    tensors |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return tensors | {"map_augment.weight": (4 * width, LABELS)}


def init(*, generator, **architecture):
    """Return fresh parameters, {name: float32 tensor}, of the U-Net of these `shapes`.

    Xavier uniform; what ends a branch is 1e-5 of that, so that u is nearly 0 at first.
    """
    params = {}
    for name, shape in shapes(**architecture).items():
        p = params[name] = torch.zeros(shape, device=generator.device)
        if len(shape) > 1:
            gain = 1e-5 if re.search("conv1|proj|aux_conv", name) else 1
            gain = 0.2**0.5 if "qkv" in name else gain
            torch.nn.init.xavier_uniform_(p, gain, generator=generator)
        elif name.endswith("weight"):
            p.fill_(1)
    return params


def blocks_of(params):
    """Return {name: {name within: tensor}} of the blocks in the order of execution: the encoder's
    resolutions fall, the decoder's rise, and what changes the resolution comes first."""
    found = {}
    for name, p in params.items():
        part, block, *inner = name.split(".", 2)  # enc, 32x32_block0, conv0.weight
        if match := len(inner) == 1 and re.fullmatch(r"(\d+)x\d+_(down|up|in|block)(\d*)", block):
            side, kind, number = match.groups()
            rising = int(side) if part == "dec" else -int(side)
            key = part == "dec", rising, kind == "block", int(number or 0)
            found.setdefault((key, f"{part}.{block}"), {})[inner[0]] = p
    return {name: found[key, name] for key, name in sorted(found)}


def conv(w, name, x):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding="same")


def group_norm(w, name, x):
    groups = min(32, x.shape[1] // 4)
    return F.group_norm(x, groups, w[f"{name}.weight"], w[f"{name}.bias"], EPS)


def triangle(like):
    """Return the filter of resampling, (4, 4): (1, 3, 3, 1) / 8 on each axis."""
    g = (2 - (torch.arange(4, device=like.device, dtype=like.dtype) - 1.5).abs()) / 4
    return g.outer(g)


def resample(x, direction, like):
    """Halve ("down") or double ("up") the sides of x, (B, C, H, W)."""
    filter = triangle(like).expand(x.shape[1], 1, 4, 4)
    if direction == "down":
        return F.conv2d(x, filter, stride=2, padding=1, groups=len(filter))
    return F.conv_transpose2d(x, 4 * filter, stride=2, padding=1, groups=len(filter))


def attention(w, x):
    """Let the pixels of x, (B, C, H, W), attend to each other, in one head."""
    qkv = conv(w, "qkv", group_norm(w, "norm2", x)).flatten(2).mT  # (B, H W, 3 C)
    q, k, v = (a[:, None] for a in qkv.chunk(3, 2))
    a = F.scaled_dot_product_attention(q, k, v)[:, 0]
    return conv(w, "proj", a.mT.contiguous().view(x.shape))


def block(w, x, e, direction="", keep=None):
    """Apply a residual block to x, (B, a, H, W), under the condition e, (B, 4 width).

    direction: "down" or "up" where it changes the resolution; keep: what dropout keeps.
    """
    h = F.silu(group_norm(w, "norm0", x))
    if direction:
        h, x = (resample(a, direction, w["conv0.weight"]) for a in (h, x))
    h = conv(w, "conv0", h) + linear(w, "affine", e)[:, :, None, None]
    h = F.silu(group_norm(w, "norm1", h))
    if keep is not None:
        h = h * keep / (1 - DROPOUT)
    h = conv(w, "conv1", h)
    x = (h + (conv(w, "skip", x) if "skip.weight" in w else x)) * 0.5**0.5
    return (attention(w, x) + x) * 0.5**0.5 if "qkv.weight" in w else x


def embed(params, t, h, labels=None):
    """Return the condition of every block, (B, 4 width), of times t and h = t - r, (B,).

    The times are in [0, 1] as they are, so that no phase is above 1. labels: (B, LABELS) or None.
    """
    like = params["map_layer0.weight"]
    width = like.shape[1] // 4
    falling = -torch.arange(width, device=like.device, dtype=like.dtype) / (width - 1)
    phases = [s[:, None] * 10000**falling for s in (t, h)]
    e = torch.cat([f(phase) for phase in phases for f in (torch.sin, torch.cos)], 1)
    if labels is not None:
        e = e + F.linear(labels.to(like.dtype), params["map_augment.weight"])
    e = F.silu(linear(params, "map_layer0", e))
    return F.silu(linear(params, "map_layer1", e))


def unet(params, z, t, r, labels=None, masks=None, *, block=block):
    """Return the average velocity u(z, t, r), shaped like z, (B, C, H, W); t, r: (B,).

    labels: (B, LABELS), of the augmentation, or None for none. masks(k, shape): which values of
    this shape the dropout of block k keeps. To compile, pass block=dual.compile(block).
    """
    e, blocks = embed(params, t, t - r, labels), blocks_of(params)
    top = re.search(r"\d+x\d+", next(iter(blocks)))[0]
    x = conv(params, f"enc.{top}_conv", z)
    skips = [x]
    for k, (name, w) in enumerate(blocks.items()):
        if name.startswith("dec") and "_block" in name:
            x = torch.cat((x, skips.pop()), 1)
        direction = (re.findall("down|up", name) or [""])[0]
        sides = [n << (direction == "up") >> (direction == "down") for n in x.shape[2:]]
        keep = masks and masks(k, (len(z), len(w["conv1.bias"]), *sides))
        x = block(w, x, e, direction, keep)
        if name.startswith("enc"):
            skips.append(x)
    return conv(params, f"dec.{top}_aux_conv", F.silu(group_norm(params, f"dec.{top}_aux_norm", x)))


class Draws(NamedTuple):
    """All randomness of a step, a row each."""

    e: torch.Tensor  # (B, C, H, W)  Gaussian noise
    t: torch.Tensor  # (B,)          time
    r: torch.Tensor  # (B,)          earlier time, r <= t
    seed: torch.Tensor  # (B,) int64 of dropout
    flip: torch.Tensor  # (B,) int64 0 or 1: whether the image is mirrored
    warp: torch.Tensor  # (B, 4)     normal: scale, stretch, shift to the right and down
    chance: torch.Tensor  # (B, 5)   uniform: whether to scale, stretch, shift, turn; how far


def draw_times(n_t, n_r, u, sampler="v0"):
    """Return t and r, (B,), of two standard normals and a number in [0, 1): r = t where it is low.

    "v0" is the paper's; model.pth was trained with "v1".
    """
    if sampler == "v0":
        r, t = torch.sigmoid(2 * torch.stack((n_t, n_r)) - 2).sort(0).values
    else:
        t, r = torch.sigmoid(1.6 * n_t - 0.6), torch.sigmoid(1.6 * n_r - 4)
    return t, torch.where(u < 0.25, t, r).minimum(t)


def draw(shape, *, generator, sampler="v0"):
    """Draw a step's randomness for images of `shape` = (B, C, H, W), float32."""
    batch, place = shape[0], dict(generator=generator, device=generator.device)
    e, n = torch.randn(shape, **place), torch.randn(2, batch, **place)
    t, r = draw_times(*n, torch.arange(batch, device=e.device) / batch, sampler)
    seed, flip = torch.randint(2**62, (2, batch), **place)
    warp, chance = torch.randn(batch, 4, **place), torch.rand(batch, 5, **place)
    return Draws(e, t, r, seed, flip % 2, warp, chance)


def masks(seeds, k, shape):
    """Return what dropout keeps, `shape` bool: a hash of each row's seed, the block and the place,
    so that a row has the same mask in any process, and in every pass of a step."""
    key = (seeds[:, None] + k) * -7046029254386353131  # 2^64 / 1.618, in integers that wrap around
    h = torch.arange(math.prod(shape[1:]), device=seeds.device, dtype=torch.int32) + key.int()
    h = (h ^ h >> 16 & 0xFFFF) * -2048144789 ^ (key >> 32).int()  # & takes the sign's copies away
    h = (h ^ h >> 13 & 0x7FFFF) * -1028477387
    return ((h ^ h >> 16 & 0xFFFF) >= round((2 * DROPOUT - 1) * 2**31)).view(shape)


@lru_cache
def low_pass(dtype, device):
    """Return the low-pass filter of the wavelet sym6, orthogonal to its even shifts, (12, 12)."""
    f = 0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633
    f += 0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252
    f += -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148
    f = torch.tensor(f, dtype=dtype, device=device)
    return f.outer(f)


def warp(x, matrix, shift):
    """Return images x, (B, C, W, W), whose pixels come from elsewhere, with hardly any blur.

    What is at p, (right, down) from the centre, comes from matrix (B, 2, 2) @ (p + shift (B, 2)).
    Images, and their reflections around, are doubled by a wavelet's filter, read bilinearly at that
    resolution and halved by the same filter.
    """
    channels, side = x.shape[1:3]
    margin, centre = side - 1, (side - 1) / 2
    filter = low_pass(x.dtype, x.device).expand(channels, 1, -1, -1)
    x = F.pad(x, 4 * [margin], mode="reflect")
    x = F.conv_transpose2d(x, filter, stride=2, padding=5, groups=channels)
    at = torch.arange(2 * side + 12, dtype=x.dtype, device=x.device) / 2 - 3 - centre
    places = torch.stack(torch.meshgrid(at, at, indexing="xy"), 2) + shift[:, None, None]
    found = torch.einsum("bkl,bijl->bijk", matrix, places) + centre + margin
    grid = 4 * found / (x.shape[3] - 1) - 1  # from -1 to 1 between the outermost samples
    x = F.grid_sample(x, grid, align_corners=True)[:, :, 1:, 1:]
    return F.conv2d(x, filter, stride=2, groups=channels)


def augment(x, draws):
    """Return augmented images and what was done to them, (B, LABELS); zeros mean nothing.

    x: (B, C, W, W) in [-1, 1]. EDM's, without rotations and colours: mirror images; each with
    probability WARPED, a scale, a stretch along some axis and a shift.
    """
    acts, (turned, angle) = draws.chance[:, :3] < WARPED, draws.chance[:, 3:].T
    n = torch.where(torch.cat((acts, acts[:, 2:]), 1), draws.warp, 0)
    turn = torch.where(turned < 0.5, (2 * angle - 1) * math.pi, 0)
    scale, stretch, *shift = n.T
    labels = draws.flip, scale, stretch * turn.cos(), stretch * turn.sin(), *shift
    # R(-turn) diag(1 / k, k) R(turn) / 2^(scale / 5), where k = 2^(stretch / 5)
    mean, half = (stretch * math.log(2) / 5).cosh(), (-stretch * math.log(2) / 5).sinh()
    cos, sin = half * (2 * turn).cos(), half * (2 * turn).sin()
    matrix = torch.stack((mean + cos, -sin, -sin, mean - cos), 1).view(-1, 2, 2)
    matrix = matrix * 2 ** (-scale / 5)[:, None, None]
    x = torch.where(draws.flip.bool()[:, None, None, None], x.flip(3), x)
    moved = warp(x, matrix, -x.shape[3] / 8 * n[:, 2:])
    return torch.where(n.any(1)[:, None, None, None], moved, x), torch.stack(labels, 1)


def loss(params, x, y, draws, equal, *, block=block, masks=masks):
    """Return the loss and the raw error of each row, as of train.Method. There are no classes."""
    x, labels = augment(x, draws)
    equal = min(equal, -(-len(x) // 4))  # v1 has more at times, and each number is compiled anew

    def net(z, t, r, condition):
        labels, seeds = condition
        return unet(params, z, t, r, labels, partial(masks, seeds), block=block)

    given = meanflow.Draws(draws.e, draws.t, draws.r, draws.t > 1)  # no label
    options = dict(p=0.75, c=1e-3, jvp=dual.jvp, equal=equal)
    return meanflow.fast_loss(net, x, (labels, draws.seed), given, null=(0.0, 0), **options)


def drawer(params):
    """Return net(z, t, r, y), as meanflow.sample takes it, of a network without classes."""
    return lambda z, t, r, y: unet(params, z, t, r)


def unet_method(width, shape, sampler="v0", compiled=False):
    """Return the Method of images of this shape, (C, W, W)."""
    architecture = dict(width=width, side=shape[1], attention=shape[1] // 2, channels=shape[0])
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks, with and without tangents
    compiled_block = dual.compile(block, dynamic=False) if compiled else block
    functions = partial(init, **architecture), partial(draw, sampler=sampler)
    functions += partial(loss, block=compiled_block), drawer
    return train.Method("MeanFlow of DDPM++", *functions, floor=True)


def read_architecture(params):
    """Return the arguments of `shapes` for parameters. Raise LookupError for another network's."""
    blocks = blocks_of(params)
    firsts = {
        int(k[4:].split("x")[0]): w for k, w in blocks.items() if re.match("enc.*_block0$", k)
    }
    side, width = max(firsts, default=0), len(params["map_layer0.bias"]) // 4
    mult = tuple(len(firsts[n]["conv1.bias"]) // width for n in sorted(firsts, reverse=True))
    attention = max((n for n in firsts if "qkv.weight" in firsts[n]), default=0)
    count = sum(name.startswith(f"enc.{side}x{side}_block") for name in blocks)
    channels = params[f"enc.{side}x{side}_conv.weight"].shape[1]
    found = dict(width=width, mult=mult, blocks=count)
    return found | dict(side=side, attention=attention, channels=channels)


def load(path, device="cpu", *, average="net_ema1"):
    """Return the weights.Sampler of a run's folder or file, or of the authors' model.pth, of which
    `average` is taken: net_ema1 (decay 0.99995), whose FID they give, net_ema (0.9999) or net_ema2
    (0.9996). Raises OSError or ValueError, with one line."""
    path = weights.find_checkpoint(path)
    named = rf"\b({average})(?=[./])"
    params, about, identity = weights.read_weights(path, "map_layer0.weight", named)
    if "run" in about and average != "net_ema1":
        raise ValueError(f"{path} holds one average: give another file, as ema0.9996-STEP")
    runtime.check_tensors(path, params, {k: tuple(p.shape) for k, p in params.items()}, HINT)
    params = {name: p.float().to(device) for name, p in params.items()}
    filters = [params.pop(name) for name in [*params] if name.endswith("resample_filter")]
    try:
        architecture = read_architecture(params)
        runtime.check_tensors(path, params, shapes(**architecture), HINT)
        if any((f - triangle(f)).abs().max() > 1e-6 for f in filters):
            raise LookupError
    except (LookupError, ArithmeticError, RuntimeError, TypeError):
        raise ValueError(f"{path} holds another network: {HINT}") from None
    shape = (architecture["channels"], *2 * (architecture["side"],))
    return weights.Sampler(params, drawer, ["image"], "pixels", shape, weights=identity, floor=True)


net_ema, net_ema2 = partial(load, average="net_ema"), partial(load, average="net_ema2")


def main(argv, world):
    arguments = runtime.parser(__doc__)
    add, whole = arguments.add_argument, runtime.number(int, 1, 99_999_999)
    add("data", help="pixels that data.py wrote")
    add("--out", type=Path, default=Path("runs", "cifar10"), help="the run's folder")
    add("--width", type=runtime.number(int, 4), default=128, help="of the network (default: 128)")
    add("--sampler", choices=("v0", "v1"), default="v0", help="v0: the paper's, v1: model.pth's")
    add("--steps", type=whole, default=768_000, help="16,000 epochs of 48 by default")
    add("--batch", type=whole, default=1024, help="images a step, over all processes")
    add("--lr", type=runtime.number(float, 0), default=6e-4, help="Adam's step size")
    add("--seed", type=runtime.number(int, -(2**63), 2**63 - 1), default=0)
    add("--accumulate", type=whole, default=1, help="parts of a batch, if memory is short")
    add("--compile", action="store_true", help="compile the blocks")
    args = arguments.parse_args(argv)
    dataset = data.load_data(args.data, world.rank, world.size)
    if dataset.kind != "pixels" or dataset.shape[1] % 4 or dataset.shape[1] != dataset.shape[2]:
        raise ValueError(f"{args.data}: {dataset.kind} {dataset.shape}: give pixels of side 4n")
    if args.width % (32 if args.width > 32 else 4):
        raise ValueError(f"--width {args.width}: give a multiple of 4 up to 32, or of 32")
    dataset = dataset._replace(classes=["image"], labels=torch.zeros_like(dataset.labels))
    method = unet_method(args.width, dataset.shape, args.sampler, args.compile)
    options = dict(seed=args.seed, warmup=round(args.steps / 80), betas=(0.9, 0.999))
    averages = dict(ema=(0.99995, 0.9999, 0.9996), ema_every=16)  # the first is drawn from
    plan = train.Plan(args.lr, args.batch, args.steps, **averages, **options)
    about = {"method": method.name, "width": args.width, "sampler": args.sampler}
    train.fit(method, dataset, plan, args.out, world, about=about, parts=args.accumulate)


if __name__ == "__main__":
    runtime.launch(main)
