"""The DiT of MeanFlow as a pure function of a parameter dict: dit(params, z, t, r, y) -> u.

Peebles, Xie: Scalable Diffusion Models with Transformers, arXiv 2212.09748, conditioned on (t, t - r) as in MeanFlow,
arXiv 2505.13447v1 (Table 1c). Parameter names are those of facebookresearch/DiT, with `h_embedder` for t - r beside
`t_embedder`. Every size that a network has is read off its tensors, so a file of weights needs nothing beside it.

    python model.py             prints the sizes, their parameters and what a forward costs
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

FREQUENCIES = 256  # width of the sinusoidal time embedding, half cosines, half sines

SIZES = {  # width, depth, patch (Table 4)
    "T/2": (64, 4, 2),  # ours, for the 8x8 digits
    "B/4": (768, 12, 4),
    "B/2": (768, 12, 2),
    "M/2": (1024, 16, 2),
    "L/2": (1024, 24, 2),
    "XL/2": (1152, 28, 2),
}


class Config(NamedTuple):
    width: int
    depth: int
    patch: int
    channels: int
    classes: int  # the label `classes` itself means "no class"


def shapes(config):
    """{name: shape} of every parameter of a DiT of this Config."""
    width, depth, patch, channels, classes = config

    def linear(name, outputs, *inputs):
        return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}

    tensors = linear("x_embedder.proj", width, channels, patch, patch)
    for name in ("t_embedder", "h_embedder"):
        tensors |= linear(f"{name}.mlp.0", width, FREQUENCIES) | linear(f"{name}.mlp.2", width, width)
    tensors["y_embedder.embedding_table.weight"] = (classes + 1, width)
    for i in range(depth):
        tensors |= linear(f"blocks.{i}.attn.qkv", 3 * width, width) | linear(f"blocks.{i}.attn.proj", width, width)
        tensors |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width) | linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        tensors |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    tensors |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return tensors | linear("final_layer.linear", patch * patch * channels, width)


def config(params):
    """The Config of a parameter dict, read off the tensors' shapes.

    Raises ValueError, with a message of one line, unless `params` has exactly the tensors of some DiT.
    """
    anchors = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight")
    for name, axes in zip(anchors, (4, 2)):
        if name not in params or params[name].ndim != axes:
            raise ValueError(f"not a DiT with DiT's names: no {axes}-dimensional tensor {name}")
    width, channels, patch, _ = params[anchors[0]].shape
    depth = len({name.split(".")[1] for name in params if name.startswith("blocks.")})
    found = Config(width, depth, patch, channels, len(params[anchors[1]]) - 1)
    expected = shapes(found)
    for kind, names in (("missing", expected.keys() - params.keys()), ("unknown", params.keys() - expected.keys())):
        if names:
            raise ValueError(f"{len(names)} tensors {kind} for a DiT of {found}, the first is {min(names)}")
    for name, shape in expected.items():
        if tuple(params[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(params[name].shape)}, a DiT of {found} has {shape}")
    return found


def init(size="B/2", *, channels=4, classes=1000, generator):
    """Fresh parameters, {name: float32 tensor} on the generator's device.

    size: a key of SIZES, or (width, depth, patch). Xavier-uniform linears (the patch projection as one), N(0, 0.02) for
    the time MLPs and the label table, zero biases; modulations and output are zero, so u = 0 at first (adaLN-Zero).
    Raises ValueError for an unknown size.
    """
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"size {size!r} is unknown: choose one of {', '.join(SIZES)}")
    width, depth, patch = SIZES[size] if isinstance(size, str) else size
    params = {}
    for name, shape in shapes(Config(width, depth, patch, channels, classes)).items():
        p = params[name] = torch.zeros(shape, device=generator.device)
        if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
            continue
        if "embedder.mlp" in name or "embedding_table" in name:
            p.normal_(0, 0.02, generator=generator)
        else:
            bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
            p.uniform_(-bound, bound, generator=generator)
    return params


def positions(width, height, columns, like):
    """Fixed 2-D positions, (height * columns, width): the column in the first half, the row in the second, each as
    sines, then cosines of width / 4 frequencies from 1 to 1/10000."""
    frequencies = 10000 ** (-torch.arange(width // 4, device=like.device, dtype=like.dtype) / (width // 4))
    row, column = torch.meshgrid(torch.arange(height, device=like.device), torch.arange(columns, device=like.device),
                                 indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def linear(params, name, x):
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def embed(params, name, t):
    """Embeds times, (B,) in [0, 1] and not scaled by 1000, as (B, width): sinusoids, cosines first, and an MLP."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angles = t[:, None] * frequencies
    x = torch.cat((angles.cos(), angles.sin()), 1)
    return linear(params, f"{name}.mlp.2", F.silu(linear(params, f"{name}.mlp.0", x)))


def modulate(x, shift, scale):
    """Adaptive LayerNorm of the tokens x, (B, N, width), by the (B, width) shift and scale of each sample."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def attention(params, name, x, heads):
    q, k, v = linear(params, f"{name}.qkv", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return linear(params, f"{name}.proj", F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(params, name, x):
    return linear(params, f"{name}.fc2", F.gelu(linear(params, f"{name}.fc1", x), approximate="tanh"))


def dit(params, z, t, r, y):
    """The average velocity u(z, t, r | y) that the network gives.

    z: (B, channels, H, W), H and W multiples of the patch; t, r: (B,) in [0, 1]; y: (B,) int64 in [0, classes], where
    `classes` means "no class". Returns u, shaped like z. Computes in the parameters' dtype.
    """
    width, channels, patch, _ = params["x_embedder.proj.weight"].shape
    heads = max(1, min(16, width // 64))  # true of every size of the paper
    height, columns = z.shape[2] // patch, z.shape[3] // patch

    x = F.conv2d(z, params["x_embedder.proj.weight"], params["x_embedder.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + positions(width, height, columns, t)
    c = embed(params, "t_embedder", t) + embed(params, "h_embedder", t - r)
    c = F.silu(c + params["y_embedder.embedding_table.weight"][y])
    depth = sum(name.endswith("attn.qkv.weight") for name in params)
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(params, f"blocks.{i}.adaLN_modulation.1", c).chunk(6, 1)
        x = x + gate1[:, None] * attention(params, f"blocks.{i}.attn", modulate(x, shift1, scale1), heads)
        x = x + gate2[:, None] * mlp(params, f"blocks.{i}.mlp", modulate(x, shift2, scale2))
    shift, scale = linear(params, "final_layer.adaLN_modulation.1", c).chunk(2, 1)
    x = linear(params, "final_layer.linear", modulate(x, shift, scale))
    x = x.unflatten(2, (patch, patch, channels)).unflatten(1, (height, columns))  # B, height, columns, p, q, channels
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def main():
    from torch.utils.flop_counter import FlopCounterMode

    print("size    width  depth  patch  heads  parameters   forward of one 4x32x32 latent, 2 x multiply-adds")
    for size, (width, depth, patch) in SIZES.items():
        params = {name: torch.empty(shape, device="meta")
                  for name, shape in shapes(Config(width, depth, patch, 4, 1000)).items()}
        t, y = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            dit(params, torch.empty(1, 4, 32, 32, device="meta"), t, t, y)
        heads = max(1, min(16, width // 64))
        millions = sum(p.numel() for p in params.values()) / 1e6
        print(f"{size:6}{width:7}{depth:7}{patch:7}{heads:7}{millions:10.1f} M{counter.get_total_flops() / 1e9:10.1f} GFLOP")


if __name__ == "__main__":
    main()
