"""Files of weights as Samplers, networks and their losses as Methods, and the saves of a run.

    sampler = load("runs/digits")
    net = sampler.net(sampler.params, *sampler.guidance)          net(z, t, r, y) -> u

    method = dit_method("T/2", channels=1, classes=10)             what train.fit trains

Ours are safetensors files whose metadata says what they make. `convert` and imf.convert say which
of others are read; names and shapes decide what a file is.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_flatten_with_path

import dual
import imf
import meanflow
import model
from model import config, dit, positions, shapes, sinusoids
from runtime import agree, check_tensors, read_tensors, reading, refuse, save_tensors, say, sha256
from vae import SCALE
from vae import convert as convert_vae
from vae import shapes as vae_shapes

KEEP = 2  # saves of a run, in case the last is damaged
NO_GUIDANCE = 1.0, 0.0, (0.0, 1.0)  # omega, kappa, times between which it acts
LASTING = 50_000  # steps between averaged weights that are kept for good
WEIGHTS = (
    "give a run's folder, or .safetensors, .pt or .pth weights of a DiT or iMF, or else --network"
)
VAE = "fetch diffusion_pytorch_model.safetensors of stabilityai/sd-vae-ft-mse from Hugging Face"
CONVENTIONS = {
    "repa": "predicts e - x, t = 1 is noise (as REPA's SiT)",
    "sit": "predicts x - e, t = 1 is data (as SiT)",
}
PATCHES, LABELS = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
AVERAGED = r"\b(ema|model_ema|ema_model|ema_state_dict|state_dict_ema|net_ema)(?=[./])"
WRAPPERS = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_flax_\w+)[./]"


# When a run is continued; earlier versions wrote the last two.
MAY_CHANGE = ("steps", "warmup", "precision", "commit", "torch", "epochs", "images")
EARLIER = {"betas": [0.9, 0.95], "ema_every": 1}  # what earlier versions did not write


class Sampler(NamedTuple):
    params: dict  # {name: tensor}
    net: Callable  # net(params, *guidance) -> net(z, t, r, y), as meanflow.sample takes it
    classes: list  # their names, by label
    kind: str  # what it makes: "pixels" or "latents"
    shape: tuple  # of a sample: (channels, height, width)
    guidance: tuple = ()  # what may be chosen when sampling: of an iMF (omega, low, high)
    shift: float | torch.Tensor = 0.0  # samples are (latents - shift) * scale
    scale: float | torch.Tensor = SCALE
    vae: dict | None = None  # decodes latents
    weights: str = ""  # "PATH sha256 DIGEST" of its file
    vae_sha256: str = ""  # of the VAE that encoded what it was trained on, if known
    floor: bool = False  # whether pixels are rounded down, not to the nearest


def image_shape(kind, shape):
    """Return the shape of the images that samples of this kind and shape become."""
    channels, height, width = shape
    return (3, 8 * height, 8 * width) if kind == "latents" else shape


# --- reading ---


def checkpoints(folder, kind):
    """Return {step: path} of the files KIND-STEP.safetensors in a run's folder, newest last."""
    paths = Path(folder).glob(f"{kind}-{'[0-9]' * 8}.safetensors")
    return {int(path.stem[-8:]): path for path in sorted(paths)}


def checkpoint(folder, kind, step):
    return folder / f"{kind}-{step:08}.safetensors"


def newest(folder):
    """Return the last step of which a run's folder holds both files, or 0."""
    ema, state = (checkpoints(folder, kind) for kind in ("ema", "state"))
    return max(ema.keys() & state.keys(), default=0)


def find_checkpoint(path):
    """Return the file named, or the newest ema-STEP.safetensors of the run's folder named."""
    if not os.path.isdir(path):
        return Path(path)
    if files := checkpoints(path, "ema"):
        return list(files.values())[-1]
    how = f"train one with python train.py --out {path}"
    raise FileNotFoundError(f"{path} holds no ema-STEP.safetensors: {how}")


def orphans(folder):
    """Return the files, newest last, of saves after `newest`: each lacks the other of its step."""
    files = [file for kind in ("ema", "state") for file in checkpoints(folder, kind).items()]
    return [path for step, path in sorted(files) if step > newest(folder)]


def read_weights(path, mark=PATCHES, averaged=AVERAGED):
    """Return tensors, {name: tensor}, metadata, {key: str}, and "PATH sha256 DIGEST" of a file.

    A safetensors file, or a pickle, in which code is refused; `select` finds the network in those
    of others. Raises ValueError or OSError, with one line.
    """
    with reading(path, WEIGHTS) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if Path(path).suffix.lower() == ".safetensors":
            with safe_open(path, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
                metadata = opened.metadata() or {}
        else:
            tensors, metadata = read_pickle(path), {}
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise ValueError("it changed while it was read: run the same command again")
        tensors = tensors if "run" in metadata else select(path, tensors, mark, averaged)
    return tensors, metadata, f"{path} sha256 {digest}"


def read_pickle(path):
    """Return what a pickle holds. Raise ValueError for code, or what is no pickle."""
    options = dict(map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in DiT's and SiT's files
            return torch.load(path, **options)
    except pickle.UnpicklingError:  # which says how to run the code
        raise ValueError("it is no file of tensors without code") from None


def select(path, content, mark, averaged):
    """Return the tensors, {name: tensor}, of the network that nested dicts of others hold.

    mark: the name of a tensor that each network has; averaged: a pattern in the names of averages.
    What DDP, torch.compile, FSDP and activation checkpoints add to names is removed. Averaged
    weights are preferred, with a line that says so. Raises ValueError for several networks.
    """
    found, tensors = [], {}
    for keys, p in tree_flatten_with_path(content)[0]:
        if torch.is_tensor(p) and (p.ndim or p.is_floating_point()):  # no counter
            name = "".join(f"/{getattr(key, 'key', '')}" for key in keys)  # /ema/blocks.0.mlp ...
            found.append((re.sub(WRAPPERS, "", name), p))
    networks = sorted({name.removesuffix(mark) for name, _ in found if name.endswith(mark)})
    taken, *more = [name for name in networks if re.search(averaged, name)] or networks or ["/"]
    if more:
        raise ValueError(f"several networks, {', '.join([taken, *more])}: save one of them alone")
    averages = re.findall(averaged, " ".join(name for name, _ in found))
    if left := {*networks, *averages} - {taken, *re.findall(averaged, taken)}:
        say(f"{path}: {taken} is taken, not {', '.join(sorted(left))}", file=sys.stderr)
    for name, p in found:
        inner = re.sub("^r_embedder", "h_embedder", name.removeprefix(taken))
        if name.startswith(taken) and "/" not in inner:
            if inner in tensors:
                raise ValueError(f"{inner} is there twice, under two names")
            tensors[inner] = p
    return tensors


def check_positions(path, found, width):
    """Raise ValueError unless these are DiT's fixed positions, (1, N, width)."""
    rows = math.isqrt(found.numel() // width)
    fixed = positions(width, rows, rows, found.double())[None]
    if found.shape != fixed.shape or not torch.allclose(found.double(), fixed, atol=1e-3):
        raise ValueError(f"{path}: pos_embed is not DiT's fixed positions: {WEIGHTS}")


def is_imf(tensors):
    return any("shared_blocks." in name for name in tensors)


def is_velocity(params):
    """Return whether a DiT has no embedding of t - r, and so predicts a velocity."""
    return not any(name.startswith("h_embedder") or "shared_blocks." in name for name in params)


def dit_params(tensors):
    """Return a DiT's parameters and the shapes, {name: shape}, that they should have.

    Early files of REPA count `decoder_blocks` anew. Fixed positions, and REPA's projectors, which
    serve its training, are left out.
    """
    encoder_depth = sum(bool(re.match(r"blocks\.\d+\.attn\.qkv\.weight", k)) for k in tensors)

    def block(match):
        return f"blocks.{int(match[1]) + encoder_depth}."

    kept = {k: p for k, p in tensors.items() if not re.match(r"pos_embed$|projectors\.", k)}
    params = {re.sub(r"^decoder_blocks\.(\d+)\.", block, name): p for name, p in kept.items()}
    architecture = config(params)
    outputs = architecture.patch**2 * architecture.channels
    for name in OUTPUT:
        if name in params and params[name].shape[:1] == (2 * outputs,):
            params[name] = torch.cat(params[name].split(architecture.channels)[::2])  # p q 2 (c ..)
    wanted = shapes(architecture)
    if is_velocity(params):
        wanted = {k: shape for k, shape in wanted.items() if not k.startswith("h_embedder")}
    return params, wanted


def convert(path, tensors, convention=None):
    """Return our parameters from tensors with the names of DiT, its descendants or an iMF.

    Of eight output channels the first four are kept. A DiT without an embedding of t - r predicts a
    velocity, in one of CONVENTIONS, and what is returned has no `h_embedder`. Raises ValueError for
    anything else.
    """
    check_tensors(path, tensors, {k: tuple(p.shape) for k, p in tensors.items()}, WEIGHTS)
    try:
        if is_imf(tensors):
            params = imf.convert(tensors)
            wanted = imf.shapes(imf.config(params))
        else:
            params, wanted = dit_params(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {WEIGHTS}") from None
    check_tensors(path, params, wanted, WEIGHTS)
    if "pos_embed" in tensors:
        check_positions(path, tensors["pos_embed"], config(params).width)

    is_repa = any(name.startswith("projectors.") for name in tensors)
    if convention and not is_velocity(params) or convention == "sit" and is_repa:
        kind = "REPA's" if is_repa else "a MeanFlow"
        raise ValueError(f"{path} is {kind}, whose convention is known: leave out --convention")
    if is_velocity(params) and not convention and not is_repa:
        words = "; ".join(f"--convention {name} if it {what}" for name, what in CONVENTIONS.items())
        what = f"{path} has no embedding of t - r, so it is no MeanFlow: give {words}"
        raise ValueError(f"{what}. DiT's own predict noise on another path and cannot be used")
    if convention == "sit":
        reverse_time(params)
    return {name: p.float() for name, p in params.items()}


def reverse_time(params):
    """Change the parameters of v(z, t) in place to those of -v(z, 1 - t).

    The cosine and sine of w (1 - t) are combinations of those of w t, which the first linear layer
    after them takes in.
    """
    for name in OUTPUT:
        params[name] = -params[name]
    cos, sin = sinusoids(torch.ones(1, dtype=torch.float64)).flatten().chunk(2)
    a, b = params["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    params["t_embedder.mlp.0.weight"] = torch.cat((a * cos + b * sin, a * sin - b * cos), 1)


def image_size(path, architecture, tensors, metadata):
    """Return what a checkpoint makes, "pixels" or "latents", and their (height, width).

    Of a file without metadata, this follows from its positions; four channels are latents, and of
    ImageNet's 1,000 classes they are 32 wide, as of 256x256 images.
    """
    patch, channels, classes = architecture.patch, architecture.channels, architecture.classes
    if not {"kind", "resolution"} & metadata.keys():
        kind = "latents" if channels == 4 else "pixels"
        if "pos_embed" in tensors:
            return kind, 2 * (patch * math.isqrt(tensors["pos_embed"].shape[1]),)
        if (channels, classes) == (4, 1000):
            return kind, (32, 32)
    kind, resolution = (metadata.get(key, "")[:20] for key in ("kind", "resolution"))
    known = re.fullmatch(r"\d{1,4}(x\d{1,4})?", resolution, re.ASCII)  # 64, or 64x96
    sides = [int(side) for side in (resolution.split("x") * 2)[:2]] if known else [0]
    unit = 8 if kind == "latents" else 1
    if kind not in ("pixels", "latents") or any(n % (patch * unit) or not n for n in sides):
        found = f"kind {kind or None!r}, resolution {resolution or None!r} and no pos_embed"
        hint = "save it as .safetensors with metadata kind (pixels or latents) and resolution"
        raise ValueError(f"{path}: metadata has {found}: {hint}")
    return kind, tuple(side // unit for side in sides)


def class_names(path, metadata, count, default):
    """Return the names of a checkpoint's classes by label, or `default` if it is not ours."""
    if not metadata.keys() >= {"run", "classes"}:
        if count + 1 in (10, 100, 1000):
            say(f"{path}: the last of {count + 1} labels is taken for no class", file=sys.stderr)
        return default
    try:
        names = json.loads(metadata["classes"])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or [type(name) for name in names] != count * [str]:
        raise ValueError(f"{path}: metadata classes are not {count} names: mend the file")
    return names


# --- to draw from, or to start from ---


def dit_net(params):
    return partial(dit, params)


def load(path, device="cpu", *, convention=None, steps=1):
    """Return the Sampler of a checkpoint, in float32 and without a VAE.

    path: a file, or a run's folder. A velocity is made to ignore t - r, so that sampling is Euler's
    method; an iMF comes without its v head, with its guidance for so many steps. Raises
    FileNotFoundError or ValueError, with one line.
    """
    path = find_checkpoint(path)
    tensors, metadata, identity = read_weights(path)
    params = convert(path, tensors, convention)
    improved = is_imf(params)
    architecture = (imf.config if improved else config)(params)
    kind, sides = image_size(path, architecture, tensors, metadata)
    numbers = [str(label) for label in range(architecture.classes)]
    classes = class_names(path, metadata, architecture.classes, numbers)
    net, guidance, latents = dit_net, (), (0.0, SCALE)
    if improved:
        net, params = imf.guided, {k: p for k, p in params.items() if not k.startswith("v_")}
        try:
            guidance, latents = imf.read_metadata(metadata, architecture, steps)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        latents = (a.to(device) for a in latents)
    if is_velocity(params):
        if steps < 10:
            say(f"{path} predicts a velocity: give --steps 50 or more", file=sys.stderr)
        zeros = {name: torch.zeros(shape) for name, shape in shapes(architecture).items()}
        params = zeros | params
    params, shape = {k: p.to(device) for k, p in params.items()}, (architecture.channels, *sides)
    known = dict(weights=identity, vae_sha256=metadata.get("vae", ""))
    return Sampler(params, net, classes, kind, shape, guidance, *latents, **known)


def choose_guidance(path, sampler, omega=None, interval=None):
    """Return the Sampler of `path` with this omega and (low, high), or else its own.

    Raises ValueError if the guidance is fixed by training, or for numbers out of range.
    """
    if not sampler.guidance:
        refuse(f"as {path} was trained with its guidance", omega=omega, interval=interval)
        return sampler
    own, *times = sampler.guidance
    omega = own if omega is None else omega
    return sampler._replace(guidance=imf.check_guidance(omega, *(interval or times)))


@lru_cache
def first_sha256(path):
    """Return the sha256 of a file as it was when this was first asked, for what results name."""
    return sha256(path)


def load_vae(path, device="cpu", wanted=""):
    """Return the VAE's parameters, {name: float32 tensor}, from its safetensors file.

    wanted: the sha256 of the VAE that encoded the latents; of another, a line is printed. Raises
    FileNotFoundError or ValueError, with one line, for a file with other tensors.
    """
    tensors, _ = read_tensors(path, VAE)
    check_tensors(path, tensors, {k: tuple(p.shape) for k, p in tensors.items()}, VAE)
    params = convert_vae(tensors, device)
    check_tensors(path, params, vae_shapes(), VAE)
    if sha256(path) != first_sha256(path):
        raise ValueError(f"{path} has changed since it was first read: run the same command again")
    if wanted and first_sha256(path) != wanted:
        say(f"{path}: latents were encoded by another VAE, sha256 {wanted[:64]}", file=sys.stderr)
    return params


@lru_cache
def find_function(place):
    """Return the function at FILE.py:NAME, or FILE.py:load. This runs the file, a user's own."""
    path, name = re.fullmatch(r"(.*?)(?::(\w+))?", place).groups()
    spec = spec_from_file_location(f"network {path}", path)  # a name that no other module has
    if spec and os.path.isfile(path):
        module = sys.modules[spec.name] = module_from_spec(spec)
        sys.path.append(str(Path(path).parent))  # for what it imports
        spec.loader.exec_module(module)
        if callable(function := getattr(module, name or "load", None)):
            return function
    hint = "give FILE.py, where it is load, or FILE.py:NAME"
    raise ValueError(f"{place} is no function in a file: {hint}")


def open_sampler(path, device, *, convention=None, steps=1, vae=None, scale=None, network=None):
    """Return the Sampler of a checkpoint, as `load`, with what its images need.

    vae: a path; scale: of latents; network: where a function like `load` for another network is,
    see `find_function`. Raises ValueError if one is missing or would be ignored.
    """
    if network:
        refuse("with --network", convention=convention)
        sampler = find_function(network)(path, device)
    else:
        sampler = load(path, device, convention=convention, steps=steps)
    agree(sampler.weights, f"weights in {path}")
    if sampler.kind == "pixels":
        refuse(f"as {path} makes pixels", vae=vae, scale=scale)
        return sampler
    if vae is None:
        raise ValueError(f"{path} makes latents: give --vae, sd-vae-ft-mse's file")
    if sampler.shape[0] != 4:
        raise ValueError(f"{path} makes latents of {sampler.shape[0]} channels: the VAE has 4")
    if torch.is_tensor(sampler.scale):
        refuse(f"as {path} has a scale for each channel", scale=scale)
    vae = load_vae(vae, device, sampler.vae_sha256)
    return sampler._replace(vae=vae, scale=scale or sampler.scale)


def start_from(path, convention, classes, fresh, *, generator):
    """Return the parameters of fresh(generator=) with the values of a checkpoint of the same size.

    path, convention: as for `load`. A missing `h_embedder` is created so that it adds nothing: at
    first u(z, t, r) is the checkpoint's v(z, t). A label that the checkpoint does not know by name,
    or else by number among as many, starts as its null label.
    """
    path, params = find_checkpoint(path), fresh(generator=generator)
    hint = "give --init weights of the same --size and channels"
    hint += " (of an iMF with v_heads)" if is_imf(params) else ""
    tensors, metadata, _ = read_weights(path)
    if is_imf(tensors) != is_imf(params):
        raise ValueError(f"{path} is {'no' if is_imf(params) else 'an'} iMF: {hint}")
    taken = convert(path, tensors, convention)
    *rows, null = taken[LABELS]
    default = classes if len(classes) == len(rows) else []
    rows = dict(zip(class_names(path, metadata, len(rows), default), rows))
    taken[LABELS] = torch.stack([*(rows.get(name, null) for name in classes), null])
    created = {k: p for k, p in params.items() if k.startswith("h_embedder") and k not in taken}
    created |= {k: torch.zeros_like(p) for k, p in created.items() if ".mlp.2." in k}
    wanted = {name: tuple(p.shape) for name, p in params.items()}
    check_tensors(path, taken | created, wanted, hint)
    new = sum(name not in rows for name in classes)
    say(f"{path}: {len(taken)} tensors taken, created {sorted(created)}, {new} labels are new")
    return taken | created


# --- methods ---


class Method(NamedTuple):
    """All that training knows of a network and its loss."""

    name: str  # for the checkpoint's metadata
    init: Callable  # init(generator=) -> {name: float32 tensor}; the loss depends on all of them
    draw: Callable  # draw(shape, generator=) -> a NamedTuple of tensors (B, ...) with t and r
    loss: Callable  # loss(params, x, y, draws, equal) -> loss (B,), raw errors (B,) or (B, k)
    net: Callable  # net(params, *guidance) -> net(z, t, r, y), as meanflow.sample takes it
    guidance: tuple = ()  # the arguments of `net` for grids
    mirror: bool = True  # whether mirror images are trained on, where the data set has them
    latents: tuple = (0.0, SCALE)  # shift and scale of latents
    errors: tuple = ()  # names of the raw errors after the first
    floor: bool = False  # whether pixels are rounded down, not to the nearest
    metadata: dict = {}  # what else checkpoints say of themselves, {key: str}


def dit_method(size, *, channels, classes, guidance=NO_GUIDANCE, improved=False, compiled=False):
    """Return the Method of MeanFlow's DiT. size: as of model.init; guidance: (omega, kappa, times
    between which it acts); improved: by iMF's loss and share of rows with r = t."""
    omega, kappa, interval = guidance
    block = dual.compile(model.block, dynamic=False) if compiled else model.block
    guided = dict(null=classes, omega=omega, kappa=kappa, interval=interval)
    fast_loss = imf.fast_one_head_loss if improved else meanflow.fast_loss

    def loss(params, x, y, draws, equal):
        net = partial(dit, params, block=block)
        return fast_loss(net, x, y, draws, **guided, jvp=dual.jvp, equal=equal)

    return Method(
        f"MeanFlow (arXiv {'2512.02012' if improved else '2505.13447'}) of size {size}",
        init=partial(model.init, size, channels=channels, classes=classes),
        draw=partial(meanflow.draw, share=0.5) if improved else meanflow.draw,
        loss=loss,
        net=dit_net,
    )


def imf_method(size, *, channels, classes, kind, compiled=False):
    """Return the Method of improved MeanFlow. size: as of imf.init; kind: of the data."""
    if kind == "latents" and channels != 4:
        raise ValueError(
            f"an iMF takes latents of 4 channels, not {channels}: choose a DiT's --size"
        )
    block = dual.compile(imf.block, dynamic=False) if compiled else imf.block
    config = imf.Config(*imf.SIZES.get(size, size), channels, classes, True)

    def loss(params, x, y, draws, equal):
        net = partial(imf.imf, params, block=block)
        velocity = partial(imf.imf_velocity, params, block=block)
        options = dict(null=classes, velocity=velocity, jvp=dual.jvp, equal=equal)
        return imf.fast_loss(net, x, y, draws, **options)

    return Method(
        f"improved MeanFlow (arXiv 2512.02012) of size {size}",
        init=partial(imf.init, size, channels=channels, classes=classes),
        draw=partial(imf.draw, most=8.0 if classes > 1 else 1.0),
        loss=loss,
        net=imf.guided,
        guidance=imf.default_guidance(config)[0],
        mirror=False,  # as in the authors' code
        latents=imf.normalization(),
        errors=("v",),
        metadata=imf.metadata(config, kind),
    )


# --- the saves of a run ---


def save_checkpoint(folder, step, tensors, metadata):
    """Write a save. Remove older ones, except the last KEEP and each LASTING-th step's averages.

    tensors: {"state": {name: tensor}, perhaps other averages, "ema": the averaged weights}. The
    latter come last, so that their presence says that all are whole.
    """
    save = {"step": step, "run": json.loads(metadata.get("run", "{}"))}
    state, average = {"save": json.dumps(save)}, metadata | {"step": str(step)}
    for kind, part in tensors.items():
        about = state if kind == "state" else average
        save_tensors(checkpoint(folder, kind, step), part, about)
    whole = checkpoints(folder, "ema").keys() & checkpoints(folder, "state").keys()
    first = sorted(whole)[-KEEP] if len(whole) >= KEEP else 0
    for kind in tensors:
        for old, path in checkpoints(folder, kind).items():
            if old < first and (kind == "state" or old % LASTING):
                path.unlink()


def check_run(where, before, run, hint="choose another --out"):
    """Raise ValueError if the run `before`, found at `where`, may not be continued as `run`."""
    for key in run | before:
        old = before.get(key, EARLIER.get(key))
        if key not in MAY_CHANGE and old != run.get(key):
            found = f"{key} {old}, not {run.get(key)}"
            raise ValueError(f"{where} holds a run with {found}: {hint}")


def restore(folder, step, tensors, run):
    """Copy the save of `step` into `tensors`, as save_checkpoint takes them.

    Raises ValueError for tensors of other names, shapes or dtypes, another step or another run.
    """
    hint = "delete the files of this step to continue from the save before"
    for kind, part in tensors.items():
        path = checkpoint(folder, kind, step)
        saved, about = read_tensors(path, hint)
        wanted = {name: tuple(p.shape) for name, p in part.items()}
        check_tensors(path, saved, wanted, hint, {p.dtype for p in part.values()})
        try:
            if kind == "state":  # without metadata where it is of an earlier version
                save = json.loads(about["save"]) if about else {"step": step, "run": run}
            else:
                save = {key: json.loads(about.get(key, "{}")) for key in ("step", "run")}
            before = dict(save["run"], step=save["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{path}: metadata are not those of a save: {hint}") from None
        check_run(path, before, run | {"step": step}, hint)
        for name, p in part.items():
            p.detach().copy_(saved[name])


def last_good(folder):
    """Say how to go on after values that are not finite."""
    files = list(checkpoints(folder, "ema").values())
    last = f"the last good checkpoint is {files[-1]}: give it to --init" if files else ""
    return f"{last or 'nothing was saved'}; choose another --out and a smaller --lr"
