"""The DiT of MeanFlow as a pure function of a parameter dict: dit(params, z, t, r, y) -> u.

Peebles, Xie: Scalable Diffusion Models with Transformers, arXiv 2212.09748, conditioned on
(t, t - r) as in MeanFlow, arXiv 2505.13447v1 (Table 1c). Parameters have the names of
facebookresearch/DiT, with `h_embedder` for t - r beside `t_embedder`. Width, depth, patch, channels
and classes are read off the tensors' shapes, so a file of weights needs no config beside it.

    python model.py     print the sizes, their parameters and the cost of a forward pass

Shapes: B samples of C channels, N = H W / patch^2 tokens, D = width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

EPS = 1e-6  # of LayerNorm
SINUSOIDS = 256  # width of the time embedding: 128 cosines, 128 sines

SIZES = {  # width, depth, patch (Table 4); train.RECIPES says how each is trained
    "T/2": (64, 4, 2),  # not the paper's: for the 8x8 digits
    "S/2": (384, 12, 2),  # DiT's
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
    """Return {name: shape} of every parameter of a DiT of this Config."""
    width, depth, patch, channels, classes = config

    def linear(name, outputs, *inputs):
        return {f"{name}.weight": (outputs, *inputs), f"{name}.bias": (outputs,)}

    tensors = linear("x_embedder.proj", width, channels, patch, patch)
    for name in ("t_embedder", "h_embedder"):
        tensors |= linear(f"{name}.mlp.0", width, SINUSOIDS) | linear(f"{name}.mlp.2", width, width)
    tensors["y_embedder.embedding_table.weight"] = (classes + 1, width)
    for i in range(depth):
        tensors |= linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        tensors |= linear(f"blocks.{i}.attn.proj", width, width)
        tensors |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
        tensors |= linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        tensors |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    tensors |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return tensors | linear("final_layer.linear", patch * patch * channels, width)


def depth(params):
    """Return the number of transformer blocks."""
    return sum(name.endswith("attn.qkv.weight") for name in params)


def config(params):
    """Return the Config of a DiT's parameters. Raise ValueError if these are not a DiT's."""
    try:
        width, channels, patch, _ = params["x_embedder.proj.weight"].shape
        labels, _ = params["y_embedder.embedding_table.weight"].shape
    except (KeyError, ValueError):
        names = "x_embedder.proj.weight and y_embedder.embedding_table.weight"
        raise ValueError(f"not the weights of a DiT, which have {names}") from None
    return Config(width, depth(params), patch, channels, labels - 1)


def init(size="B/2", *, channels=4, classes=1000, generator):
    """Return fresh parameters, {name: float32 tensor} on the generator's device.

    size: a key of SIZES, or (width, depth, patch). Linears are Xavier uniform (the patch projection
    as one), the time MLPs and the label table N(0, 0.02), biases zero. Modulations and the output
    are zero (adaLN-Zero), so that u = 0 at first. Raises ValueError for an unknown size.
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
            torch.nn.init.xavier_uniform_(p.flatten(1), generator=generator)
    return params


# --- the layers ---


def linear(params, name, x):
    return F.linear(x, params[f"{name}.weight"], params.get(f"{name}.bias"))


def sinusoids(t):
    """Embed times, (B,) in [0, 1] and not scaled by 1000, as (B, 1, SINUSOIDS), cosines first."""
    half = SINUSOIDS // 2
    exponents = torch.arange(half, device=t.device, dtype=t.dtype) / half
    angles = t[:, None, None] * 10000**-exponents
    return torch.cat([angles.cos(), angles.sin()], -1)


def without_autocast(t):
    """Keep the precision of times, which need more than the 8 bits of bfloat16."""
    return torch.autocast("cuda" if t.is_cuda else "cpu", enabled=False)


def embed_time(params, name, t):
    """Embed times, (B,), as (B, 1, D)."""
    with without_autocast(t):
        x = sinusoids(t).to(params[f"{name}.mlp.0.weight"].dtype)
        x = F.silu(linear(params, f"{name}.mlp.0", x))
        return linear(params, f"{name}.mlp.2", x)


def embed_label(params, y):
    """Embed labels, (B,) int64, as (B, 1, D)."""
    return F.embedding(y, params["y_embedder.embedding_table.weight"])[:, None]


def patchify(z, patch):
    """Cut z, (B, C, H, W), into patches, (B, N, C * patch * patch), row by row."""
    z = z.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # b c (row p) (col q)
    return z.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # b (row col) (c p q)


def unpatchify(x, patch, like):
    """Join tokens, (B, N, patch * patch * C), to an image of the size and dtype of `like`."""
    rows = like.shape[2] // patch
    x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, -1))  # b row col p q c
    x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # b c (row p) (col q)
    return x.to(like.dtype)


def positions(width, rows, columns, like):
    """Return the fixed 2-D positions, (rows * columns, width).

    The first half encodes the column, the second the row, each by width / 4 sines, then cosines.
    """
    quarter = torch.arange(width // 4, device=like.device, dtype=like.dtype) / (width // 4)
    frequencies = 10000**-quarter
    n = torch.arange(rows * columns, device=like.device)[:, None]
    angles = [place * frequencies for place in (n % columns, n // columns)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1)


def embed_patches(params, z):
    """Embed the patches of z, (B, C, H, W), as tokens (B, N, D), without their positions.

    A convolution would do the same, but leave D outermost in memory, for which torch 2.13's
    compiler gets the gradient of a block wrong by 2 %, silently, on a CPU.
    """
    w, bias = params["x_embedder.proj.weight"], params["x_embedder.proj.bias"]
    return F.linear(patchify(z, w.shape[-1]), w.flatten(1), bias)


def embed_places(params, z):
    """Embed the patches of z, (B, C, H, W), with their positions, as tokens (B, N, D)."""
    width, _, patch, _ = params["x_embedder.proj.weight"].shape
    places = positions(width, z.shape[2] // patch, z.shape[3] // patch, z)
    return embed_patches(params, z) + places


def norm(x):
    """LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(x, shift, scale):
    """Scale and shift tokens x, (B, N, D), for each sample: shift, scale (B, 1, D)."""
    return x * (1 + scale) + shift


def split_heads(qkv):
    """Split (B, N, 3 D) into queries, keys and values, each (B, heads, N, D / heads)."""
    heads = max(1, min(16, qkv.shape[-1] // 3 // 64))  # 64 wide, but at most 16: 72 in XL/2
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)


def attention(params, name, x):
    x = F.scaled_dot_product_attention(*split_heads(linear(params, f"{name}.qkv", x)))
    return linear(params, f"{name}.proj", merge_heads(x))


def mlp(params, name, x):
    x = F.gelu(linear(params, f"{name}.fc1", x), approximate="tanh")
    return linear(params, f"{name}.fc2", x)


def block_params(params, kind="blocks"):
    """Return the parameters of each block, [{name without "blocks.i.": tensor}]."""
    parts = [name.split(".", 2) for name in params if name.startswith(f"{kind}.")]
    names = dict.fromkeys(name for _, _, name in parts)  # which every block must have
    count = len({i for _, i, _ in parts})
    return [{k: params[f"{kind}.{i}.{k}"] for k in names} for i in range(count)]


def block(w, x, c):
    """Apply a transformer block with adaLN-Zero to tokens x, (B, N, D), under condition c."""
    modulation = linear(w, "adaLN_modulation.1", c)  # (B, 1, 6 D)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)  # (B, 1, D) each
    x = x + gate1 * attention(w, "attn", modulate(norm(x), shift1, scale1))  # (B, N, D)
    return x + gate2 * mlp(w, "mlp", modulate(norm(x), shift2, scale2))  # (B, N, D)


def embed_condition(params, t, r, y):
    """Return the condition of every block, (B, 1, D): t, t - r (Table 1c) and the label."""
    c = embed_time(params, "t_embedder", t) + embed_time(params, "h_embedder", t - r)
    return F.silu(c + embed_label(params, y))


def dit(params, z, t, r, y, *, block=block, condition=embed_condition):
    """Return the average velocity u(z, t, r | y), shaped like z.

    z: (B, C, H, W), H and W divisible by the patch, in the parameters' dtype unless under autocast;
    t, r: (B,) in [0, 1], also of higher precision. y: (B,) int64 in [0, classes], where `classes`
    means "no class". To compile, pass block=dual.compile(model.block): it serves all blocks, of
    tensors and of duals. To condition on something else, pass another `condition`.
    """
    patch = params["x_embedder.proj.weight"].shape[-1]
    x = embed_places(params, z)  # (B, N, D)
    c = condition(params, t, r, y)  # (B, 1, D)
    for w in block_params(params):
        x = block(w, x, c)  # (B, N, D)
    shift, scale = linear(params, "final_layer.adaLN_modulation.1", c).chunk(2, -1)  # (B, 1, D)
    x = linear(params, "final_layer.linear", modulate(norm(x), shift, scale))  # (B, N, patch^2 C)
    return unpatchify(x, patch, z)  # (B, C, H, W)


def main():
    print("size  width  depth  patch  parameters  forward of a 4x32x32 latent, 2 x multiply-adds")
    for size, (width, depth, patch) in SIZES.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            tensors = shapes(Config(width, depth, patch, 4, 1000))
            params = {name: torch.empty(shape) for name, shape in tensors.items()}
            t = torch.empty(1)
            dit(params, torch.empty(1, 4, 32, 32), t, t, t.long())
        millions = sum(p.numel() for p in params.values()) / 1e6
        gigaflop = counter.get_total_flops() / 1e9
        print(f"{size:5}{width:6}{depth:7}{patch:7}{millions:10.1f} M{gigaflop:8.1f} GFLOP")


if __name__ == "__main__":
    main()
