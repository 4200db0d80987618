"""Improved MeanFlow: a loss on the velocity, guidance told to the network, a second head.

Geng, Lu, Wu, Shechtman, Kolter, He: Improved Mean Flows: On the Challenges of Fastforward
Generative Models, arXiv 2512.02012v1, as its authors' code (Lyy-iiis/imeanflow) computes it.

    python imf.py     print the sizes and their parameters

The loss. Solved for v, MeanFlow's identity says which velocity a network u stands for:

    V = u + (t - r) du/dt,    du/dt = (du/dz) v + (derivative of u by t)                (1)

As in flow matching, V is regressed on e - x, a target without the network; no gradient flows
through du/dt. The v in du/dt is the network's own velocity, u(z, t, t) or what a second head says,
and e - x in MeanFlow, of which that is the mean given z: where it is right, both losses have the
same expected gradient at p = 0. The noise of V - (e - x) is then that of e - x; in MeanFlow, it is
multiplied by 1 - (t - r) du/dz, the Jacobian of the flow's map from z_t to z_r.

The guidance. With kappa = 1 - 1/omega, a flow guided with scale omega is

    v_g = v_null + omega (v_class - v_null)    or    v_g = v_class + kappa (v_g - v_null)     (2)

So v_g is the mean of e - x + kappa (V_g - V_null), with the network's own velocities, and their
errors return kappa times as large: they die out. It is MeanFlow's guidance with its omega = 1.
Each row draws a scale, and the network is told kappa: in [0, 1) like the times, for any scale.

A network is any callable net(z, t, r, y, guidance) -> (u, v), both (B, ...), where guidance is
Guidance or Draws. Symbols as in meanflow.py, and

    kappa      1 - 1/omega for a guidance of scale omega                        (B,)
    low, high  times between which it acts                                      (B,)
"""

import json
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import dual
import meanflow
import model
from dual import jvp
from meanflow import adaptive_loss, append_dims, derivative, evaluate, interpolate, mix, replace

EPS = 1e-6  # of RMSNorm
HEAD = 64  # width of an attention head
TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}  # before those of patches
LATENTS = {  # of sd-vae-ft-mse, by channel: an iMF makes (latent - mean) / std
    "mean": (0.86488, -0.27787343, 0.21616915, 0.3738409),
    "std": (4.85503674, 5.31922414, 3.93725398, 3.9870003),
}
GUIDANCE = {  # omega, low, high to sample with in one step, in two or more: the authors'
    (64, 4): [(1.5, 0.0, 1.0)],  # ours, for the digits
    (768, 12): [(8.0, 0.40, 0.65)],  # (width, blocks on the way to u) of B
    (768, 24): [(10.5, 0.40, 0.60)],
    (1024, 32): [(10.5, 0.40, 0.60)],
    (1024, 48): [(8.0, 0.42, 0.62), (4.0, 0.36, 0.64)],
}
SIZES = {  # width, shared blocks, blocks of a head, patch
    "iT/2": (64, 2, 2, 2),  # not the paper's: for the 8x8 digits
    "iB/2": (768, 4, 8, 2),
    "iM/2": (768, 16, 8, 2),
    "iL/2": (1024, 24, 8, 2),
    "iXL/2": (1024, 40, 8, 2),
}


# --- the method ---


class Guidance(NamedTuple):
    kappa: torch.Tensor  # (B,) in [0, 1)
    low: torch.Tensor  # (B,) in [0, 1]
    high: torch.Tensor  # (B,) in [0, 1]


class Draws(NamedTuple):
    """All randomness of one training step."""

    e: torch.Tensor  # (B, ...)   Gaussian noise
    t: torch.Tensor  # (B,)       time
    r: torch.Tensor  # (B,)       earlier time, r <= t
    drop: torch.Tensor  # (B,) bool  rows whose label is dropped
    kappa: torch.Tensor  # (B,)      and its interval, as in Guidance
    low: torch.Tensor  # (B,)
    high: torch.Tensor  # (B,)


def draw(shape, *, generator, share=0.5, most=8.0):
    """Draw a step's randomness for data of `shape` = (B, ...), float32.

    As meanflow.draw, with r = t in half of the rows. omega is log-uniform from 1 to `most` (1: no
    guidance); it acts for t in [low, high], uniform in the halves of [0, 1], always where r = t.
    """
    e, t, r, drop = meanflow.draw(shape, generator=generator, share=share)
    kappa, low, high = torch.rand(3, shape[0], generator=generator, device=t.device)
    kappa, low, high = 1 - most**-kappa, low / 2, (1 + high) / 2
    low, high = torch.where(r == t, 0, low), torch.where(r == t, 1, high)
    return Draws(e, t, r, drop, kappa, low, high)


def gate(t, guidance):
    """Return kappa where t lies in the closed interval, and 0 elsewhere."""
    inside = (guidance.low <= t) & (t <= guidance.high)
    return torch.where(inside, guidance.kappa, 0)


def at_all_times(kappa):
    return Guidance(kappa, torch.zeros_like(kappa), torch.ones_like(kappa))


def loss(net, x, y, draws, *, null, p=1, c=0.01):
    """Return the iMF loss of each row, (B,), and its raw squared errors of u and v, (B, 2).

    x: (B, ...); y: (B,) int64, below `null`. Average the loss over the batch.

    differs from the paper: the v head learns the guided velocity, not e - x, as in the authors'
    code; they agree without guidance.
    """
    e, t, r, drop, *_ = draws
    z, v = interpolate(x, e, t)
    with torch.no_grad():
        kappa = gate(t, draws)
        v_class = net(z, t, t, y, at_all_times(kappa))[1]
        v_null = net(z, t, t, torch.full_like(y, null), at_all_times(0 * kappa))[1]
        v_guided = mix(v, v_class, v_null, t, drop, 1, append_dims(kappa, v), (0, 1))
    y = torch.where(drop, null, y)
    given = partial(net, guidance=draws)
    (u, v_head), (dudt, _) = derivative(given, z, t, r, v_class, y)
    return velocity_loss(u, v_head, dudt, v_guided, t, r, p, c)


def velocity_loss(u, v_head, dudt, v_guided, t, r, p, c):
    """Return the loss of V = u + (t - r) sg(du/dt) and of the v head, both on v_guided."""
    rows_u, s_u = adaptive_loss(u + append_dims(t - r, u) * dudt, v_guided, p, c)
    rows_v, s_v = adaptive_loss(v_head, v_guided, p, c)
    return rows_u + rows_v, torch.stack((s_u, s_v), 1)


def fast_loss(net, x, y, draws, *, null, p=1, c=0.01, velocity=None, jvp=jvp, equal=None):
    """Return what `loss` returns at least cost, by not evaluating what is known.

    Where r = t no du/dt is needed, and the class velocity is the v head of the forward pass itself:
    there, guidance must act at all times, as `draw` has it.
    velocity(z, t, y, kappa) -> v at r = t alone, such as partial(imf_velocity, params); None takes
    that of net. jvp, equal: as in meanflow.fast_loss.
    """
    e, t, r, drop, *_ = draws
    z, v = interpolate(x, e, t)
    n = meanflow.count_equal(t, r) if equal is None else equal
    kappa = gate(t, draws)
    velocity = velocity or (lambda z, t, y, kappa: net(z, t, t, y, at_all_times(kappa))[1])
    with torch.no_grad():  # null velocities of all rows and class velocities where r != t
        rows = torch.cat((z, z[n:])), torch.cat((t, t[n:]))
        labels = torch.cat((torch.full_like(y, null), y[n:]))
        v_null, v_class = velocity(*rows, labels, torch.cat((0 * kappa, kappa[n:]))).split(
            [len(x), len(x) - n]
        )
    whole, outputs = (z, t, r, torch.where(drop, null, y), Guidance(*draws[4:])), []
    if n > 0:
        *rows, guidance = tree_map(lambda a: a[:n], whole)
        u, v_head = evaluate(partial(net, guidance=guidance), *rows)
        outputs.append((u, v_head, torch.zeros_like(u), v_head))
    if n < len(x):
        z_, t_, r_, y_, guidance = tree_map(lambda a: a[n:], whole)
        given = partial(net, guidance=guidance)
        (u, v_head), (dudt, _) = derivative(given, z_, t_, r_, v_class, y_, jvp=jvp)
        outputs.append((u, v_head, dudt, v_class))
    u, v_head, dudt, v_class = (torch.cat(parts) for parts in zip(*outputs))
    v_guided = mix(v, v_class, v_null, t, drop, 1, append_dims(kappa, v), (0, 1))
    return velocity_loss(u, v_head, dudt, v_guided, t, r, p, c)


# --- the loss of any network with one head ---


def one_head_loss(net, x, y, draws, *, null, omega=1, kappa=0, interval=(0, 1), p=1, c=0.01):
    """Return the iMF loss of net(z, t, r, y) -> u and its raw squared error, both (B,).

    It is meanflow.loss, with the same arguments, but for the direction of du/dt: u(z, t, t | y),
    not v_g. To tell the network its guidance as well, make it part of y, with kappa = 0 in null;
    kappa is then (B, 1, ...), and the ends of the interval are (B,).
    """
    e, t, r, drop = draws
    z, v = interpolate(x, e, t)
    y = replace(y, null, drop)
    with torch.no_grad():
        v_class = evaluate(net, z, t, t, y)
        v_null = evaluate(net, z, t, t, replace(y, null, torch.ones_like(drop)))
    v_guided = mix(v, v_class, v_null, t, drop, omega, kappa, interval)
    u, dudt = derivative(net, z, t, r, v_class, y)
    return adaptive_loss(u + append_dims(t - r, u) * dudt, v_guided, p, c)


def fast_one_head_loss(
    net, x, y, draws, *, null, omega=1, kappa=0, interval=(0, 1), p=1, c=0.01, jvp=jvp, equal=None
):
    """Return what `one_head_loss` returns at least cost. jvp, equal: as in meanflow.fast_loss.

    In forwards of the batch, of whose rows a share s has r = t: 3 for u and its gradient, 1 - s for
    du/dt, 1 - s for its direction and, guided, 1 for null velocities.
    """
    e, t, r, drop = draws
    z, v = interpolate(x, e, t)
    n = meanflow.count_equal(t, r) if equal is None else equal
    rows, outputs = (z, t, r, replace(y, null, drop)), []
    if n > 0:
        u = evaluate(net, *meanflow.each(lambda a: a[:n], rows))
        outputs.append((u, u.detach(), torch.zeros_like(u)))
    if n < len(x):
        z_, t_, r_, y_ = meanflow.each(lambda a: a[n:], rows)
        with torch.no_grad():
            v_class = evaluate(net, z_, t_, t_, y_)
        u, dudt = derivative(net, z_, t_, r_, v_class, y_, jvp=jvp)
        outputs.append((u, v_class, dudt))
    u, v_class, dudt = (torch.cat(parts) for parts in zip(*outputs))
    if isinstance(kappa, torch.Tensor) or (omega, kappa) != (1, 0):
        with torch.no_grad():
            v_null = evaluate(net, z, t, t, replace(y, null, torch.ones_like(drop)))
        v = mix(v, v_class, v_null, t, drop, omega, kappa, interval)
    return adaptive_loss(u + append_dims(t - r, u) * dudt, v, p, c)


# --- the network ---


class Config(NamedTuple):
    width: int
    shared: int  # blocks before the heads
    heads: int  # blocks of the u head, and of the v head
    patch: int
    channels: int
    classes: int
    trains: bool  # has the blocks of the v head


def shapes(config):
    """Return {name: shape} of every parameter of this Config."""
    width, shared, heads, patch, channels, classes, trains = config
    hidden = int(width * 8 / 3)
    tensors = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for name in ("h_embedder", "omega_embedder", "cfg_t_start_embedder", "cfg_t_end_embedder"):
        for k, inputs in ((0, 256), (2, width)):
            tensors[f"{name}.mlp.{k}.weight"] = (width, inputs)
            tensors[f"{name}.mlp.{k}.bias"] = (width,)
    tensors |= {f"{name}_tokens": (n, width) for name, n in TOKENS.items()}
    kinds = {"shared_blocks": shared, "u_heads": heads} | ({"v_heads": heads} if trains else {})
    for block in (f"{kind}.{i}" for kind, depth in kinds.items() for i in range(depth)):
        tensors[f"{block}.norm1.weight"] = tensors[f"{block}.norm2.weight"] = (width,)
        tensors[f"{block}.attn.qkv.weight"] = (3 * width, width)
        tensors[f"{block}.attn.out_proj.weight"] = (width, width)
        tensors[f"{block}.attn.q_norm.weight"] = tensors[f"{block}.attn.k_norm.weight"] = (HEAD,)
        tensors[f"{block}.mlp.w1.weight"] = tensors[f"{block}.mlp.w3.weight"] = (hidden, width)
        tensors[f"{block}.mlp.w2.weight"] = (width, hidden)
        tensors[f"{block}.attn_scale"] = tensors[f"{block}.mlp_scale"] = (width,)
    for name in ("u_final_layer", "v_final_layer"):
        tensors[f"{name}.norm.weight"] = (width,)
        tensors[f"{name}.linear.weight"] = (patch * patch * channels, width)
        tensors[f"{name}.linear.bias"] = (patch * patch * channels,)
    return tensors


def config(params):
    """Return the Config of these parameters. Raise ValueError if they are not iMF's."""
    try:
        width, channels, patch, _ = params["x_embedder.proj.weight"].shape
        labels, _ = params["y_embedder.embedding_table.weight"].shape
    except (KeyError, ValueError):
        raise ValueError("not the weights of an iMF") from None
    if width % HEAD or width > 16 * HEAD:
        raise ValueError(f"width {width}, where an iMF has a multiple of {HEAD} up to {16 * HEAD}")

    def depth(kind):
        return sum(f"{kind}.{i}.attn.qkv.weight" in params for i in range(len(params)))

    shared, heads, trains = depth("shared_blocks"), depth("u_heads"), depth("v_heads") > 0
    return Config(width, shared, heads, patch, channels, labels - 1, trains)


def default_guidance(config):
    """Return [(omega, low, high) for one step, for two or more] of this size, or of iMF-B.

    With a single class there is none: omega = 1.
    """
    if config.classes == 1:
        return [(1.0, 0.0, 1.0)]
    return GUIDANCE.get((config.width, config.shared + config.heads), GUIDANCE[768, 12])


def check_guidance(omega, low, high):
    """Return the three. Raise ValueError unless omega >= 1 and 0 <= low <= high <= 1."""
    if not (1 <= omega < math.inf and 0 <= low <= high <= 1):
        hint = "give omega >= 1 and an interval of two times in [0, 1], the lower first"
        raise ValueError(f"omega {omega:g}, interval {low:g},{high:g}: {hint}, as 8 and 0.4,0.65")
    return omega, low, high


def normalization(latents=LATENTS):
    """Return (shift, scale), (4, 1, 1) each: an iMF makes (latents - shift) * scale."""
    mean, std = (torch.tensor(latents[key]).view(4, 1, 1) for key in ("mean", "std"))
    if not (std > 0).all():
        raise ValueError("deviations of latents are not above 0")
    return mean, 1 / std


def metadata(config, kind):
    """Return what a checkpoint says of its default guidance and its latents, {key: JSON}."""
    values = {"guidance": default_guidance(config)}
    if kind == "latents":
        values["latents"] = LATENTS
    return {key: json.dumps(value) for key, value in values.items()}


def read_metadata(metadata, config, steps):
    """Return the (omega, low, high) to sample in so many steps with, and (shift, scale) of latents.

    Where the metadata does not say, they are the published. Raises ValueError.
    """
    try:
        guidance = json.loads(metadata.get("guidance", "null")) or default_guidance(config)
        guidance = check_guidance(*guidance[min(steps, len(guidance)) - 1])
        latents = normalization(json.loads(metadata.get("latents", "null")) or LATENTS)
    except (ValueError, TypeError, KeyError, RuntimeError):
        want = "a list of [omega, low, high] and {mean, std > 0} of four numbers each"
        raise ValueError(f"metadata guidance or latents are not {want}: mend the file") from None
    return guidance, latents


def init(size="iB/2", *, channels=4, classes=1000, generator):
    """Return fresh parameters, {name: float32 tensor} on the generator's device.

    size: a key of SIZES, or (width, shared blocks, blocks of a head, patch). Linears are normal,
    with deviation 0.32 / sqrt(inputs) in blocks and 1 / sqrt(inputs) in embedders, labels and
    tokens 1 / sqrt(width), patches Xavier uniform. Biases, scales and outputs are zero, so that u =
    v = 0 at first.
    """
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"size {size!r} is unknown: choose one of {', '.join(SIZES)}")
    width, shared, heads, patch = SIZES[size] if isinstance(size, str) else size
    params = {}
    for name, shape in shapes(Config(width, shared, heads, patch, channels, classes, True)).items():
        p = params[name] = torch.zeros(shape, device=generator.device)
        if "norm" in name:
            p.fill_(1)
        elif name == "x_embedder.proj.weight":
            torch.nn.init.xavier_uniform_(p.flatten(1), generator=generator)
        elif name.endswith("_tokens") or "embedding_table" in name:
            p.normal_(0, width**-0.5, generator=generator)
        elif name.endswith("weight") and "final_layer" not in name:
            gain = 1 if "embedder" in name else 0.32
            p.normal_(0, gain * shape[1] ** -0.5, generator=generator)
    return params


def convert(tensors):
    """Return parameters, float32, from tensors with the published names.

    With or without `net.`, `_flax_linear.` and `_flax_embedding.`; q, k and v become one tensor.
    Raises ValueError with the name of one of these that is missing. Nothing else is checked.
    """
    params = {}
    for name, p in tensors.items():
        name = name.removeprefix("net.").replace("_flax_linear.", "")
        params[name.replace("_flax_embedding.", "")] = p.float()
    for name in [name for name in params if name.endswith("attn.q_proj.weight")]:
        block = name.removesuffix("q_proj.weight")
        parts = [f"{block}{k}_proj.weight" for k in "qkv"]
        if missing := [part for part in parts if part not in params]:
            raise ValueError(f"{missing[0]} is missing")
        params[f"{block}qkv.weight"] = torch.cat([params.pop(part) for part in parts])
    return params


def rms_norm(x, weight):
    """Divide x by its root mean square, in float32 under autocast as well."""
    single = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(single), x.shape[-1:], weight.to(single), EPS)


def rotary(length, like):
    """Return the cosines and sines, (length, HEAD / 2), of rotations by place in the sequence."""
    places = torch.arange(length, device=like.device, dtype=torch.float32)
    pairs = torch.arange(0, HEAD, 2, device=like.device, dtype=torch.float32)
    angles = places[:, None] * 10000 ** (-pairs / HEAD)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """Rotate each pair of neighbouring values of x, (B, heads, S, HEAD)."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attention(w, x, rope):
    q, k, v = model.split_heads(model.linear(w, "attn.qkv", x))
    q, k = (rotate(rms_norm(a, w[f"attn.{n}_norm.weight"]), rope) for a, n in ((q, "q"), (k, "k")))
    x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    return model.linear(w, "attn.out_proj", model.merge_heads(x))


def mlp(w, x):
    gated = F.silu(model.linear(w, "mlp.w1", x)) * model.linear(w, "mlp.w3", x)
    return model.linear(w, "mlp.w2", gated)


def block(w, x, rope):
    x = x + w["attn_scale"] * attention(w, rms_norm(x, w["norm1.weight"]), rope)
    return x + w["mlp_scale"] * mlp(w, rms_norm(x, w["norm2.weight"]))


def embed(params, z, h, y, guidance):
    """Return all tokens, (B, 20 + N, D): those of the conditions, then those of the patches."""
    conditions = {
        "class": model.embed_label(params, y),
        "omega": model.embed_time(params, "omega_embedder", guidance.kappa),
        "t_min": model.embed_time(params, "cfg_t_start_embedder", guidance.low),
        "t_max": model.embed_time(params, "cfg_t_end_embedder", guidance.high),
        "time": model.embed_time(params, "h_embedder", h),
    }
    tokens = [params[f"{name}_tokens"] + c for name, c in conditions.items()]
    return torch.cat([*tokens, model.embed_patches(params, z)], 1)


def head(params, kind, x, rope, like, block):
    """Apply the blocks and the output of the head "u" or "v"; return it shaped like `like`."""
    blocks = model.block_params(params, f"{kind}_heads")
    if not blocks:
        raise ValueError(f"there are no {kind}_heads: these parameters can only be drawn from")
    for w in blocks:
        x = block(w, x, rope)
    x = rms_norm(x[:, sum(TOKENS.values()) :], params[f"{kind}_final_layer.norm.weight"])
    x = model.linear(params, f"{kind}_final_layer.linear", x)
    return model.unpatchify(x, params["x_embedder.proj.weight"].shape[-1], like)


def trunk(params, z, h, y, guidance, block):
    """Return what the heads take: tokens and rotations."""
    x = embed(params, z, h, y, guidance)
    rope = rotary(x.shape[1], x)
    for w in model.block_params(params, "shared_blocks"):
        x = block(w, x, rope)
    return x, rope


def imf(params, z, t, r, y, guidance, *, block=block):
    """Return the average velocity u and the velocity v, both shaped like z.

    z: (B, C, H, W); t, r: (B,) in [0, 1], of which only t - r is used; y: (B,) int64 in
    [0, classes]; guidance: Guidance or Draws. v is None if the parameters have no v head.
    """
    x, rope = trunk(params, z, t - r, y, guidance, block)
    u = head(params, "u", x, rope, z, block)
    x = dual.value_of(x)  # no loss needs a tangent of v
    return u, head(params, "v", x, rope, z, block) if config(params).trains else None


def guided(params, omega, low, high):
    """Return net(z, t, r, y) -> u, as meanflow.sample takes it, with one guidance for all rows."""
    params = {name: p for name, p in params.items() if not name.startswith("v_")}

    def net(z, t, r, y):
        guidance = (torch.full_like(t, value) for value in (1 - 1 / omega, low, high))
        return imf(params, z, t, r, y, Guidance(*guidance))[0]

    return net


def imf_velocity(params, z, t, y, kappa, *, block=block):
    """Return the v of imf at r = t, with a guidance for all times."""
    x, rope = trunk(params, z, 0 * t, y, at_all_times(kappa), block)
    return head(params, "v", x, rope, z, block)


def main():
    print("size   width  shared  head  parameters to sample, to train")
    for size, (width, shared, heads, patch) in SIZES.items():
        counts = []
        for trains in (False, True):
            tensors = shapes(Config(width, shared, heads, patch, 4, 1000, trains))
            counts.append(sum(torch.Size(shape).numel() for shape in tensors.values()))
        print(f"{size:6}{width:6}{shared:8}{heads:6}{counts[0]:14,}{counts[1]:14,}")


if __name__ == "__main__":
    main()
