"""The cost of each part of an evaluation: one step of XL/2, the VAE at 256 x 256, Inception, with
random weights, and the Fréchet distance at 2048 dimensions beside scipy's matrix square root.

    python benchmarks/evaluation.py [--threads 2] [--seconds 20]
"""

import argparse
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402
import model  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
import vae  # noqa: E402
import weights  # noqa: E402


def random_tensors(shapes):
    g = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.rand(shape, generator=g)
        if len(shape) == 1
        else torch.randn(shape, generator=g) * math.prod(shape[1:]) ** -0.5
        for name, shape in shapes.items()
    }


def rate(run, count, seconds, device):
    """Return the median items/s of run(), which makes `count`, over at least three runs."""
    run()
    rates, end = [], time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def to(tensors, device, dtype=None, layout=torch.channels_last):
    layouts = {4: layout}
    return {
        name: p.to(device, dtype, memory_format=layouts.get(p.ndim, torch.contiguous_format))
        for name, p in tensors.items()
    }


def parts(device, batch):
    """Yield (name, a function that returns another, which makes `batch` images)."""

    def images(channels, side):
        return torch.randn(batch, channels, side, side, device=device).clamp(-1, 1)

    def xl():
        params = to(model.init("XL/2", generator=torch.Generator().manual_seed(0)), device)
        names = [str(k) for k in range(1000)]
        sampler = weights.Sampler(params, weights.dit_net, names, "latents", (4, 32, 32))
        return partial(sample.generate, sampler, torch.arange(batch))

    def coder(half, dtype, layout, channels, side):
        params = to(random_tensors(vae.shapes()), device, dtype, layout)
        return partial(half, params, images(channels, side))

    def inception(network):
        params = fid.fold(to(random_tensors(fid.inception_shapes()), device))
        pixels = ((images(3, 256) + 1) * 127.5).byte()
        return partial(fid.inception, params, pixels, network=network)

    yield "XL/2, one step, float32", xl
    layouts = {"": torch.channels_last}
    if device.type == "cuda":
        layouts[", weights not channels last"] = torch.contiguous_format
    for way, layout in layouts.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield f"VAE, encoding, {dtype}{way}", partial(coder, vae.encode, dtype, layout, 3, 256)
            yield f"VAE, decoding, {dtype}{way}", partial(coder, vae.decode, dtype, layout, 4, 32)
    yield "Inception, float32", partial(inception, fid.network)
    if device.type == "cuda":
        yield "Inception, float32, compiled", partial(inception, torch.compile(fid.network))


def distance(count=3000):
    """Return the seconds that fid.py and scipy's sqrtm take for a distance, and how they differ.

    The distance is between two sets of `count` items.
    """
    g = torch.Generator().manual_seed(0)
    x = [
        torch.randn(count, 2048, generator=g, dtype=torch.float64)
        * torch.arange(1, 2049) ** -0.5
        * (1 + k)
        for k in (0, 1)
    ]
    stats = [fid.statistics(fid.accumulate(None, part)) for part in x]
    began = time.perf_counter()
    ours = fid.frechet_distance(*stats[0], *stats[1])
    between = time.perf_counter()
    root = scipy.linalg.sqrtm((stats[0][1] @ stats[1][1]).numpy())
    theirs = (
        (stats[0][0] - stats[1][0]).square().sum()
        + stats[0][1].trace()
        + stats[1][1].trace()
        - 2 * root.trace().real
    )
    return between - began, time.perf_counter() - between, abs(ours - theirs).item() / ours.item()


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each figure")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = runtime.pick_device(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} threads"
    batch = 100 if device.type == "cuda" else 4
    print(
        f"{name}, torch {torch.__version__}, batches of {batch}\n\n| part | images/s |\n|---|---|"
    )
    for part, make in parts(device, batch):
        try:
            figure = f"{rate(make(), batch, args.seconds, device):.2f}"
        except torch.OutOfMemoryError:  # the next part may do better
            figure = "out of memory"
        print(f"| {part} | {figure} |", flush=True)
    for count in (3000, 1500):
        ours, theirs, apart = distance(count)
        print(
            f"\nFréchet distance, 2048 dimensions, {count} items: {ours:.1f} s, "
            f"by scipy's sqrtm {theirs:.1f} s, {apart:.0e} apart"
        )


if __name__ == "__main__":
    main()
