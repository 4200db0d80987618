"""What a training step costs: flow matching, plain formulations of MeanFlow or iMF, and ours.

    python benchmarks/step.py --size S/2 --batch 8                     on the CPU; --size iS/2: iMF
    python benchmarks/step.py --size XL/2 --batch 256 --only ours      on a GPU, in bfloat16

A step is loss and backward. Each formulation runs eager and compiled (the plain ones as one graph,
ours one block that serves for all, as in train.py), without guidance and with (kappa = 0.5: null
and class velocity are both needed; iMF is always guided). GFLOP per image are counted by torch's
flop counter; a unit is one forward of one image, of iMF without its v head. Times are medians, with
quartiles, of steps that take turns with steps of flow matching, which trains no v head; memory is
the peak above what parameters and data take (on a CPU, under Linux only).
A formulation that lacks memory, or takes longer than --limit to compile, has a row that says so.
--profile lists the kernels of a step of each by the time that they take.
"""

import argparse
import ctypes
import gc
import platform
import signal
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import imf
import meanflow
import model

SIZES = {"S/2": (384, 12, 2), **model.SIZES, "iS/2": (384, 4, 8, 2), **imf.SIZES}
CLASSES = 1000


def flow_matching(params, x, y, draws, *, null, p, c, **guidance):
    """Regression on the conditional velocity: what all is compared with. Never guided."""
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    u = model.dit(params, z, draws.t, draws.t, torch.where(draws.drop, null, y))
    return meanflow.adaptive_loss(u, v, p, c)[0]


def jvp_with_graph(params, x, y, draws, *, null, p, c, net=model.dit, **guidance):
    """As in the authors' JAX code, one jvp of the whole batch gives u with its graph and du/dt."""
    e, t, r, drop = draws
    net, y = partial(net, params), torch.where(drop, null, y)
    z, v = meanflow.interpolate(x, e, t)
    v = meanflow.guide(net, z, t, v, y, null=null, **guidance)
    with sdpa_kernel(SDPBackend.MATH):
        primals, tangents = (z, t.clone()), (v, torch.ones_like(t))
        u, dudt = torch.func.jvp(lambda z, t: net(z, t, r, y), primals, tangents)
    return meanflow.adaptive_loss(u, meanflow.identity(v, t, r, dudt), p, c)[0]


def jvp_and_forward(params, x, y, draws, **options):
    """The usual rewrite in PyTorch: a jvp of the whole batch without graph, then a forward."""
    return meanflow.loss(partial(model.dit, params), x, y, draws, **options)[0]


def ours(params, x, y, draws, *, block=model.block, block_jvp=model.block_jvp, **options):
    net = partial(model.dit, params, block=block)
    dual = partial(model.dit_jvp, params, block_jvp=block_jvp)
    equal = int(0.75 * len(x))
    return meanflow.fast_loss(net, x, y, draws, dual=dual, equal=equal, **options)[0]


def imf_flow_matching(params, x, y, draws, *, null, p, c, **guidance):
    """Regression of the u path of an iMF on the conditional velocity."""
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    params = {name: w for name, w in params.items() if not name.startswith("v_")}
    u, _ = imf.imf(params, z, draws.t, draws.t, torch.where(draws.drop, null, y), draws)
    return meanflow.adaptive_loss(u, v, p, c)[0]


def imf_jvp_with_graph(params, x, y, draws, *, null, p, c, **guidance):
    """As in the authors' JAX code: three velocities, then u, v and du/dt by one jvp of all rows."""
    e, t, r, drop, kappa, *_ = draws
    net, velocity = partial(imf.imf, params), partial(imf.imf_velocity, params)
    z, v = meanflow.interpolate(x, e, t)
    with torch.no_grad():
        inside = imf.gate(t, draws)
        v_null = velocity(z, t, torch.full_like(y, null), 0 * kappa)
        v_full, v_class = velocity(z, t, y, kappa), velocity(z, t, y, inside)
        v_guided = torch.where((t == r)[:, None, None, None], v_full, v_class)
        v_guided = imf.guide(v, inside, v_guided, v_null, drop)
    y = torch.where(drop, null, y)
    with sdpa_kernel(SDPBackend.MATH):
        primals, tangents = (z, t.clone()), (v_class, torch.ones_like(t))
        u, dudt, v_head = torch.func.jvp(
            lambda z, t: net(z, t, r, y, draws), primals, tangents, has_aux=True
        )
    return imf.velocity_loss(u, v_head, dudt.detach(), v_guided, t, r, p, c)[0]


def imf_jvp_and_forward(params, x, y, draws, *, null, p, c, **guidance):
    """The paper's algorithm as imf.loss writes it."""
    return imf.loss(partial(imf.imf, params), x, y, draws, null=null, p=p, c=c)[0]


def imf_ours(
    params, x, y, draws, *, null, p, c, block=imf.block, block_jvp=imf.block_jvp, **guidance
):
    dual = partial(imf.imf_jvp, params, block=block, block_jvp=block_jvp)
    velocity = partial(imf.imf_velocity, params, block=block)
    options = dict(null=null, p=p, c=c, equal=int(0.5 * len(x)))
    return imf.fast_loss(x, y, draws, dual=dual, velocity=velocity, **options)[0]


FORMULATIONS = {"flow": flow_matching, "authors": jvp_with_graph, "plain": jvp_and_forward}
FORMULATIONS["ours"] = ours
IMPROVED = {"flow": imf_flow_matching, "authors": imf_jvp_with_graph, "plain": imf_jvp_and_forward}
IMPROVED["ours"] = imf_ours
NAMES = {
    "flow": "flow matching",
    "authors": "one jvp with graph (authors)",
    "plain": "jvp without graph, then forward",
    "ours": "ours",
}

COLUMNS = (
    "formulation",
    "guided",
    "",
    "GFLOP / image",
    "units",
    "first step, s",
    "step, ms (quartiles)",
    "images/s",
    "x flow matching",
    "of the ceiling",
    "peak memory, MiB",
)


def is_improved(size):
    return size.startswith("i")


def options(guided):
    kappa = 0.5 if guided else 0
    return dict(null=CLASSES, omega=1, kappa=kappa, interval=(0, 1), p=1, c=0.01)


def problem(size, batch, device):
    """Return parameters none of which is zero, and a batch with its draws."""
    g = torch.Generator().manual_seed(0)
    init, draw = (imf.init, imf.draw) if is_improved(size) else (model.init, meanflow.draw)
    params = init(SIZES[size], classes=CLASSES, generator=g)
    for p in params.values():
        p.add_(torch.randn(p.shape, generator=g), alpha=0.02)
    params = {name: p.to(device).requires_grad_() for name, p in params.items()}
    x, y = torch.randn(batch, 4, 32, 32, generator=g), torch.randint(CLASSES, (batch,), generator=g)
    draws = draw(x.shape, generator=g)
    return params, x.to(device), y.to(device), type(draws)(*(d.to(device) for d in draws))


def gigaflop(formulation, size, guided, batch=8):
    """Return the GFLOP per image of loss and backward, counted without computing them."""
    shapes, draw = model.shapes(model.Config(*SIZES[size][:3], 4, CLASSES)), meanflow.draw
    if is_improved(size):
        shapes, draw = imf.shapes(imf.Config(*SIZES[size], 4, CLASSES, True)), imf.draw
    meta = partial(torch.empty, device="meta")
    params = {name: meta(shape, requires_grad=True) for name, shape in shapes.items()}
    x, y = meta(batch, 4, 32, 32), meta(batch, dtype=torch.int64)
    draws = draw(x.shape, generator=torch.Generator())
    draws = type(draws)(*(d.to("meta") for d in draws))
    with FlopCounterMode(display=False) as counter:
        formulation(params, x, y, draws, **options(guided)).mean().backward()
    return counter.get_total_flops() / batch / 1e9


def stepper(formulation, guided, compiled, params, x, y, draws):
    """One step as a function without arguments; gradients are dropped after it."""
    compile = partial(torch.compile, fullgraph=True, dynamic=False)
    blocks = {ours: model, imf_ours: imf}.get(formulation)
    if compiled and blocks:  # as train.py does it: a block serves for all
        compiled_blocks = dict(block=compile(blocks.block), block_jvp=compile(blocks.block_jvp))
        formulation = partial(formulation, **compiled_blocks)

    def mean(params, x, y, draws):
        return formulation(params, x, y, draws, **options(guided)).mean()

    if compiled and not blocks:
        mean = compile(mean)

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

    def held(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**10

    # M_MMAP_THRESHOLD: tensors go back to the system as soon as they are freed
    ctypes.CDLL(None).mallopt(-3, 2**16)
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = held("VmRSS")
    step()
    return held("VmHWM") - before


def kernels(step, device):
    """Return a table of the kernels of one step, those that take longest first."""
    activities = torch.profiler.supported_activities()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    order = f"self_{device}_time_total"
    return "\n\n" + profile.key_averages().table(sort_by=order, row_limit=25)


def matmul_ceiling(device, seconds=1.0):
    """Return the TFLOP/s of a large square matmul, bfloat16 on a GPU, float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, best, start = torch.randn(n, n, device=device, dtype=dtype), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        for _ in range(10):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 20 * n**3 / (time.perf_counter() - before) / 1e12)
    return best


class limit:
    """Raise TimeoutError in the main thread after so many seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def expire(self, *_):
        raise TimeoutError(f"no first step in {self.seconds} s")

    def __enter__(self):
        signal.signal(signal.SIGALRM, self.expire)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)


def measure(make, base, rounds, seconds):
    """Return (step, time of its first, times, times of `base` in turn with it, or None).

    make() returns the step, a function without arguments; its first call compiles.
    """
    step, start = make(), time.perf_counter()
    with limit(seconds):
        step()
    first, times, of_base = time.perf_counter() - start, [], [] if base else None
    for _ in range(rounds):
        for run, taken in ((base, of_base), (step, times)):
            start = time.perf_counter()
            if run:
                run()
                taken.append(time.perf_counter() - start)
    return step, first, times, of_base


def reason(error):
    """Return what a row says of a formulation that failed."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:80]


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--size", default="S/2", choices=SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7, help="counted steps of each, at least 2")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled ones")
    parser.add_argument("--profile", action="store_true", help="list the kernels of each")
    parser.add_argument("--limit", type=float, default=600, help="seconds to compile one, at most")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    inputs, ceiling = problem(args.size, args.batch, device), matmul_ceiling(device)

    machine = f"{torch.get_num_threads()} threads of {processor()}"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{args.size}, batch {args.batch}, 4x32x32 latents, {machine}, torch {torch.__version__}")
    print(f"matmul ceiling {ceiling:.2f} TFLOP/s\n\n| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    formulations = IMPROVED if is_improved(args.size) else FORMULATIONS
    unit = gigaflop(formulations["flow"], args.size, False) / 3
    for compiled in (False,) if args.eager else (False, True):
        base = None
        for guided, key in ((guided, key) for guided in (False, True) for key in NAMES):
            if key not in (*args.only, "flow") or guided and key == "flow":
                continue
            if is_improved(args.size) and not guided and key != "flow":
                continue
            f, how = formulations[key], "compiled" if compiled else "eager"
            count = gigaflop(f, args.size, guided)
            cells = [NAMES[key], "yes" if guided else "no", how]
            cells += [f"{count:.1f}", f"{count / unit:.2f}"]
            try:
                make = partial(stepper, f, guided, compiled, *inputs)
                step, first, times, of_base = measure(make, base, args.rounds, args.limit)
                low, median, high = statistics.quantiles(times, n=4)
                ratio = median / statistics.median(of_base or times)
                cells += [
                    f"{first:.1f}",
                    f"{1e3 * median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})",
                    f"{args.batch / median:.1f}",
                    f"{ratio:.2f}" if base or key == "flow" else "",
                    f"{count * args.batch / median / 1e3 / ceiling:.0%}",
                    f"{peak_memory(step, device):.0f}",
                ]
                base = step if key == "flow" else base
                profile = kernels(step, device) if args.profile else ""
            except Exception as error:  # the next formulation may do better
                cells += [reason(error)] + [""] * (len(COLUMNS) - len(cells) - 1)
                profile = ""
            print(f"| {' | '.join(cells)} |{profile}", flush=True)
            step = None
            gc.collect()
            torch.cuda.empty_cache()


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()
