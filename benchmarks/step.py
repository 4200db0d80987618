"""What a training step costs: plain flow matching, the plain formulations of MeanFlow, and ours, side by side.

    python benchmarks/step.py --size S/2 --batch 8              on the CPU
    python benchmarks/step.py --size XL/2 --batch 256           on a GPU: bfloat16 autocast

A step is loss and backward, each formulation eager and compiled (the plain ones as one graph, ours a block that serves
for all, as in train.py), without guidance and with (kappa = 0.5: null and class velocity are both asked for). GFLOP per
image is what torch's flop counter counts, a unit one forward of one image. The times are medians of interleaved steps,
with the quartiles; memory is the peak above what parameters and data take (on the CPU, Linux only). The formulations
here are written from the paper, without regard to cost; the tests compare ours with them.
"""

import argparse
import ctypes
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import meanflow  # noqa: E402
import model  # noqa: E402

SIZES = {"S/2": (384, 12, 2), **model.SIZES}
CLASSES = 1000


def path(x, y, draws, null):
    e, t, r, drop = draws
    t_ = t.reshape(-1, *[1] * (x.ndim - 1))
    return (1 - t_) * x + t_ * e, e - x, t, r, torch.where(drop, null, y)


def weighted(error, p, c):
    s = error.square().flatten(1).sum(1)
    return s / (s.detach() + c) ** p


def guided_velocity(net, z, t, v, y, null, omega, kappa, interval):
    """Null and class velocity of the whole batch, each in a forward of its own."""
    if omega == 1 and kappa == 0:
        return v
    with torch.no_grad():
        v_g = omega * v + (1 - omega - kappa) * net(z, t, t, torch.full_like(y, null))
        if kappa:
            v_g = v_g + kappa * net(z, t, t, y)
    inside = (t >= interval[0]) & (t <= interval[1]) & (y != null)
    return torch.where(inside.reshape(-1, *[1] * (z.ndim - 1)), v_g, v)


def flow_matching(params, x, y, draws, *, null, omega, kappa, interval, p, c):
    """Regression onto the conditional velocity: what everything is compared with. Never guided."""
    z, v, t, _, y = path(x, y, draws, null)
    return weighted(model.dit(params, z, t, t, y) - v, p, c)


def jvp_with_graph(params, x, y, draws, *, null, omega, kappa, interval, p, c, net=model.dit):
    """As the authors' JAX code forms it: one jvp of the whole batch gives u, through which the gradient flows, and du/dt."""
    z, v, t, r, y = path(x, y, draws, null)
    net = partial(net, params)
    v_g = guided_velocity(net, z, t, v, y, null, omega, kappa, interval)
    tangents = (v_g, torch.ones_like(t), torch.zeros_like(r))
    with sdpa_kernel(SDPBackend.MATH):
        u, dudt = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t.clone(), r.clone()), tangents)
    u_tgt = v_g - (t - r).reshape(-1, *[1] * (x.ndim - 1)) * dudt
    return weighted(u - u_tgt.detach(), p, c)


def jvp_and_forward(params, x, y, draws, *, null, omega, kappa, interval, p, c, net=model.dit):
    """The usual rewrite in PyTorch: a jvp of the whole batch without graph, then a forward with one."""
    z, v, t, r, y = path(x, y, draws, null)
    net = partial(net, params)
    v_g = guided_velocity(net, z, t, v, y, null, omega, kappa, interval)
    tangents = (v_g, torch.ones_like(t), torch.zeros_like(r))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, dudt = torch.func.jvp(lambda z, t, r: net(z, t, r, y), (z, t.clone(), r.clone()), tangents)
    u_tgt = v_g - (t - r).reshape(-1, *[1] * (x.ndim - 1)) * dudt
    return weighted(net(z, t, r, y) - u_tgt, p, c)


def ours(params, x, y, draws, *, block=model.block, block_jvp=model.block_jvp, **kw):
    net, dual = partial(model.dit, params, block=block), partial(model.dit_jvp, params, block_jvp=block_jvp)
    return meanflow.loss(net, x, y, draws, dual=dual, equal=int(0.75 * len(x)), **kw)[0]


FORMULATIONS = [flow_matching, jvp_with_graph, jvp_and_forward, ours]
NAMES = ["flow matching", "one jvp with graph (authors)", "jvp without graph, then forward", "ours"]


def options(guided):
    return dict(null=CLASSES, omega=1.0, kappa=0.5 if guided else 0.0, interval=(0.0, 1.0), p=1.0, c=0.01)


def problem(size, batch, device):
    """Parameters none of which is zero, and a batch with its draws."""
    g = torch.Generator().manual_seed(0)
    params = model.init(SIZES[size], classes=CLASSES, generator=g)
    params = {name: (p + 0.02 * torch.randn(p.shape, generator=g)).to(device).requires_grad_() for name, p in params.items()}
    x, y = torch.randn(batch, 4, 32, 32, generator=g), torch.randint(CLASSES, (batch,), generator=g)
    return params, x.to(device), y.to(device), meanflow.Draws(*(d.to(device) for d in meanflow.draw(x.shape, generator=g)))


def gigaflop(formulation, size, guided, batch=8):
    """GFLOP per image of loss and backward, counted without computing them."""
    shapes = model.shapes(model.Config(*SIZES[size], 4, CLASSES))
    params = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in shapes.items()}
    x, y = torch.empty(batch, 4, 32, 32, device="meta"), torch.empty(batch, device="meta", dtype=torch.int64)
    draws = meanflow.draw(x.shape, generator=torch.Generator())
    with FlopCounterMode(display=False) as counter:
        formulation(params, x, y, meanflow.Draws(*(d.to("meta") for d in draws)), **options(guided)).mean().backward()
    return counter.get_total_flops() / batch / 1e9


def stepper(formulation, guided, compiled, params, x, y, draws):
    """One step as a function without arguments; gradients are dropped after it."""
    compile = partial(torch.compile, fullgraph=True, dynamic=False)
    if compiled and formulation is ours:  # as train.py does it: a block serves for all
        formulation = partial(ours, block=compile(model.block), block_jvp=compile(model.block_jvp))
    mean = lambda params, x, y, draws: formulation(params, x, y, draws, **options(guided)).mean()
    mean = compile(mean) if compiled and formulation in FORMULATIONS else mean

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            value = mean(params, x, y, draws)
        value.backward()
        for p in params.values():
            p.grad = None
        if x.is_cuda:
            torch.cuda.synchronize()

    return step


def peak_memory(step, device):
    """MiB that a step takes at most, above what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    held = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 2**10
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: tensors go back to the system as soon as they are freed
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = held("VmRSS")
    step()
    return held("VmHWM") - before


def matmul_ceiling(device, seconds=1.0):
    """TFLOP/s of a large square matmul, in bfloat16 on a GPU and in float32 on a CPU: the best of a second."""
    n, best, start = 8192 if device == "cuda" else 1024, 0, time.perf_counter()
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        for _ in range(10):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 20 * n**3 / (time.perf_counter() - before) / 1e12)
    return best


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each, at least 2")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled ones")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    inputs, ceiling = problem(args.size, args.batch, device), matmul_ceiling(device)

    variants = [(guided, name, f, compiled) for guided in (False, True) for name, f in zip(NAMES, FORMULATIONS)
                for compiled in ((False,) if args.eager else (False, True)) if not (guided and f is flow_matching)]
    steps, first = {}, {}
    for variant in variants:
        guided, name, f, compiled = variant
        steps[variant], start = stepper(f, guided, compiled, *inputs), time.perf_counter()
        steps[variant]()
        first[variant] = time.perf_counter() - start
        print(f"{name}, {'guided, ' * guided}{'compiled' if compiled else 'eager'}: first step {first[variant]:.1f} s",
              file=sys.stderr)
    times = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant in variants:
            start = time.perf_counter()
            steps[variant]()
            times[variant].append(time.perf_counter() - start)

    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of {processor()}"
    print(f"{args.size}, batch {args.batch}, 4x32x32 latents, {machine}, torch {torch.__version__}, "
          f"matmul ceiling {ceiling:.2f} TFLOP/s\n")
    print("| formulation | guided | | GFLOP / image | units | first step, s | step, ms (quartiles) | images/s | "
          "x flow matching | of the ceiling | peak memory, MiB |\n|---|---|---|---|---|---|---|---|---|---|---|")
    unit = gigaflop(flow_matching, args.size, False) / 3
    for variant in variants:
        guided, name, f, compiled = variant
        low, median, high = statistics.quantiles(times[variant], n=4)
        base = statistics.median(times[False, NAMES[0], flow_matching, compiled])
        count = gigaflop(f, args.size, guided)
        print(f"| {name} | {'yes' if guided else 'no'} | {'compiled' if compiled else 'eager'} | {count:.1f} | "
              f"{count / unit:.2f} | {first[variant]:.1f} | {1e3 * median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f}) | "
              f"{args.batch / median:.1f} | {median / base:.2f} | {count * args.batch / median / 1e3 / ceiling:.0%} | "
              f"{peak_memory(steps[variant], device):.0f} |", flush=True)


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
