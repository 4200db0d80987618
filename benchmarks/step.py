"""What a training step costs: flow matching, plain formulations of MeanFlow or iMF, and ours.

    python benchmarks/step.py --size S/2 --batch 8                     on the CPU; --size iS/2: iMF
    python benchmarks/step.py --size UNet --batch 8                    diffusers' UNet2DModel
    python benchmarks/step.py --size cifar10/32 --batch 16             examples/cifar10.py, 32 wide
    python benchmarks/step.py --size XL/2 --batch 256 --only ours      on a GPU, in bfloat16
    python benchmarks/step.py --derivative --weights runs/digits       ways to get du/dt

A step is loss and backward, of 4x32x32 latents; of the paper's CIFAR-10 network of 3x32x32 pixels.
Each formulation runs eager and compiled (ours block by block, as in train.py; the others as one
graph), without guidance and with (kappa = 0.5: null and class velocity are both needed; iMF is
always guided, CIFAR-10 never). GFLOP per image are counted by torch's flop counter; a unit is one
forward of one image, of iMF with one of its heads. Times are medians, with quartiles, of
steps that take turns with steps of flow matching, which trains one head of an iMF; memory is the
peak above what parameters and data take (on a CPU, under Linux only).
A formulation that lacks memory, or takes longer than --limit to compile, has a row that says so.
--profile lists the kernels of a step of each by the time that they take.

--derivative prints, of a DiT that train.py trained on the digits, what each way to get du/dt
together with u costs beside a forward with its graph, and how far du/dt is from that of forward
mode in float64: |difference| / |du/dt| over all rows. Rows have r != t and v = e - x. Forwards are
counted; times are medians of the ratios to forwards that take turns, eager, in bfloat16 on a GPU.
"""

import argparse
import ctypes
import gc
import importlib.util
import platform
import signal
import statistics
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import cifar10

import data
import dual
import imf
import meanflow
import model
import weights

SIZES = {**model.SIZES, "iS/2": (384, 4, 8, 2), **imf.SIZES}
SIZES["UNet"] = (64, 128, 128)  # channels at 1, 1/2 and 1/4 of the height
SIZES |= {"cifar10": 128, "cifar10/32": 32}  # width
CLASSES = 1000


def for_func_jvp():
    """Return a copy of examples/cifar10.py that torch.compile takes within torch.func.jvp."""

    def group_norm(w, name, x):
        groups = x.unflatten(1, (min(32, x.shape[1] // 4), -1)).flatten(2)
        y = F.layer_norm(groups, groups.shape[2:], eps=cifar10.EPS).view(x.shape)
        weight, bias = (w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return y * weight + bias

    spec = importlib.util.find_spec("cifar10")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.group_norm = group_norm
    return copy


# --- the formulations ---
#
# f(net, x, y, draws, **options) -> each row's loss and raw errors, of an iMF with velocity=


def flow_matching(net, x, y, draws, *, null, p, c, **guidance):
    """Regression on the conditional velocity: what all is compared with. Never guided."""
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    u = net(z, draws.t, draws.t, meanflow.replace(y, null, draws.drop))
    return meanflow.adaptive_loss(u, v, p, c)


def jvp_and_forward(net, x, y, draws, *, null, p, c, **guidance):
    """The usual rewrite in PyTorch: a jvp of the whole batch without graph, then a forward."""
    e, t, r, drop = draws
    y = meanflow.replace(y, null, drop)
    z, v = meanflow.interpolate(x, e, t)
    v = meanflow.guide(net, z, t, v, y, drop, null=null, **guidance)
    with torch.no_grad():
        u_tgt = meanflow.target(net, z, t, r, v, y)
    return meanflow.adaptive_loss(net(z, t, r, y), u_tgt, p, c)


def apart(loss, share, jvp, *, x, **options):
    """The rows with r = t, `share` of them, apart from the others, by a fast_loss."""
    return loss(x=x, jvp=jvp, equal=int(share * len(x)), **options)


def imf_flow_matching(net, x, y, draws, *, velocity, null, p, c):
    """Regression of one head of an iMF on the conditional velocity."""
    z, v = meanflow.interpolate(x, draws.e, draws.t)
    u = velocity(z, draws.t, torch.where(draws.drop, null, y), draws.kappa)
    return meanflow.adaptive_loss(u, v, p, c)


def guided_velocity(v, kappa, v_class, v_null, t, drop):
    """Return iMF's guided velocity, for kappa (B,)."""
    kappa = meanflow.append_dims(kappa, v)
    return meanflow.mix(v, v_class, v_null, t, drop, 1, kappa, (0, 1))


def imf_jvp_with_graph(net, x, y, draws, *, velocity, null, p, c):
    """As in the authors' JAX code: three velocities, then u, v and du/dt by one jvp of all rows."""
    e, t, r, drop, kappa, *_ = draws
    z, v = meanflow.interpolate(x, e, t)
    with torch.no_grad():
        inside = imf.gate(t, draws)
        v_null = velocity(z, t, torch.full_like(y, null), 0 * kappa)
        v_full, v_class = velocity(z, t, y, kappa), velocity(z, t, y, inside)
        v_guided = torch.where((t == r)[:, None, None, None], v_full, v_class)
        v_guided = guided_velocity(v, inside, v_guided, v_null, t, drop)
    y, net = torch.where(drop, null, y), partial(net, guidance=draws)
    (u, v_head), (dudt, _) = meanflow.derivative(net, z, t, r, v_class, y)
    return imf.velocity_loss(u, v_head, dudt, v_guided, t, r, p, c)


def imf_jvp_and_forward(net, x, y, draws, *, velocity, null, p, c):
    """The paper's algorithm, with a jvp of the whole batch without graph, then a forward."""
    e, t, r, drop, *_ = draws
    z, v = meanflow.interpolate(x, e, t)
    kappa, nothing = imf.gate(t, draws), torch.full_like(y, null)
    labels, given = torch.where(drop, null, y), partial(net, guidance=draws)
    with torch.no_grad():
        v_class = net(z, t, t, y, imf.at_all_times(kappa))[1]
        v_null = net(z, t, t, nothing, imf.at_all_times(0 * kappa))[1]
        _, (dudt, _) = meanflow.derivative(given, z, t, r, v_class, labels)
    u, v_head = given(z, t, r, labels)
    v_guided = guided_velocity(v, kappa, v_class, v_null, t, drop)
    return imf.velocity_loss(u, v_head, dudt, v_guided, t, r, p, c)


FORMULATIONS = {
    "flow": flow_matching,
    "authors": meanflow.loss,
    "plain": jvp_and_forward,
    "func": partial(apart, meanflow.fast_loss, 0.75, torch.func.jvp),
    "ours": partial(apart, meanflow.fast_loss, 0.75, dual.jvp),
}
IMPROVED = {
    "flow": imf_flow_matching,
    "authors": imf_jvp_with_graph,
    "plain": imf_jvp_and_forward,
    "func": partial(apart, imf.fast_loss, 0.5, torch.func.jvp),
    "ours": partial(apart, imf.fast_loss, 0.5, dual.jvp),
}
CIFAR10 = FORMULATIONS | {
    "func": partial(apart, meanflow.fast_loss, 0.25, torch.func.jvp),
    "ours": partial(apart, meanflow.fast_loss, 0.25, dual.jvp),
}
NAMES = {
    "flow": "flow matching",
    "authors": "one jvp with graph (authors)",
    "plain": "jvp without graph, then forward",
    "func": "rows apart, torch.func.jvp",
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


def is_cifar10(size):
    return size.startswith("cifar10")


def formulations(size):
    others = CIFAR10 if is_cifar10(size) else FORMULATIONS
    return IMPROVED if is_improved(size) else others


def options(size, guided):
    """Return what a formulation takes besides network and batch."""
    if is_cifar10(size):
        return dict(null=(0.0, 0), omega=1, kappa=0, interval=(0, 1), p=0.75, c=1e-3)
    guidance = dict(omega=1, kappa=0.5 if guided else 0, interval=(0, 1))
    return dict(null=CLASSES, p=1, c=0.01) | ({} if is_improved(size) else guidance)


# --- what is trained ---


def unet(widths, device):
    """Return what `build` does for diffusers' UNet2DModel.

    It is told t as its time step, and t - r by a fifth channel of the image, alike in all places.
    """
    from diffusers import UNet2DModel  # here: only the tests require it, and it loads slowly

    with torch.device(device):
        module = UNet2DModel(
            sample_size=32,
            in_channels=4 + 1,
            out_channels=4,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=64,
            num_class_embeds=CLASSES + 1,
        )
    # torch.func.jvp fails at group norms of images whose channels lie innermost in memory, as
    # those after attention do; dual.jvp takes them as they are.
    for norm in [m for m in module.modules() if isinstance(m, torch.nn.GroupNorm)]:
        norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def networks(compile):
        copy = deepcopy(module, {id(p): p for p in module.parameters()})  # shares them
        for block in (*copy.down_blocks, copy.mid_block, *copy.up_blocks):
            block.forward = compile(block.forward)

        def net(z, t, r, y):
            h = meanflow.append_dims(t - r, z).expand(-1, 1, *z.shape[2:])
            return copy(torch.cat([z, h], 1), t, y, return_dict=False)[0]

        return dict(net=net)

    return [*module.parameters()], networks


def build(size, device):
    """Return a list of random parameters, and networks(compile) -> what formulations take of them.

    compile is applied to the blocks.
    """
    if size == "UNet":
        return unet(SIZES[size], device)
    if is_cifar10(size):
        shapes = cifar10.shapes(SIZES[size])
    elif is_improved(size):
        shapes = imf.shapes(imf.Config(*SIZES[size], 4, CLASSES, True))
    else:
        shapes = model.shapes(model.Config(*SIZES[size], 4, CLASSES))
    params = {
        name: 0.02 * torch.randn(shape, device=device) + ("norm" in name)
        for name, shape in shapes.items()
    }
    for p in params.values():
        p.requires_grad_()

    def networks(compile):
        if is_cifar10(size):
            code = for_func_jvp() if compile is unchanged_by_others else cifar10
            block = compile(code.block)

            def net(z, t, r, y):
                masks = partial(code.masks, y[1])
                return code.unet(params, z, t, r, y[0], masks, block=block)

            return dict(net=net)
        if not is_improved(size):
            return dict(net=partial(model.dit, params, block=compile(model.block)))
        block = compile(imf.block)
        velocity = partial(imf.imf_velocity, params, block=block)
        return dict(net=partial(imf.imf, params, block=block), velocity=velocity)

    return [*params.values()], networks


def problem(size, batch, device):
    """Return what `build` returns, and a batch with its draws as a formulation takes them."""
    g = torch.Generator().manual_seed(0)
    if is_cifar10(size):
        x = torch.randn(batch, 3, 32, 32, generator=g)
        e, t, r, seeds, *_ = cifar10.draw(x.shape, generator=g)
        draws = meanflow.Draws(e, t, r, torch.zeros(batch, dtype=torch.bool))
        rows = dict(x=x, y=(torch.randn(batch, cifar10.LABELS, generator=g), seeds), draws=draws)
        return *build(size, device), move(rows, device)
    x, y = torch.randn(batch, 4, 32, 32, generator=g), torch.randint(CLASSES, (batch,), generator=g)
    draws = (imf.draw if is_improved(size) else meanflow.draw)(x.shape, generator=g)
    torch.manual_seed(0)
    return *build(size, device), move(dict(x=x, y=y, draws=draws), device)


def move(tensors, device):
    return tree_map(lambda a: a.to(device), tensors)


def unchanged(f):
    """What stands for a compiler of blocks."""
    return f


def unchanged_by_others(f):
    """The same, where torch.func.jvp differentiates."""
    return f


# --- what is measured ---


def count_flops(f, *args, **kwargs):
    """Return the floating-point operations of f(*args, **kwargs) by torch's counter.

    With tensors on "meta" nothing is computed, and all of attention is counted.
    """
    with FlopCounterMode(display=False) as counter:
        f(*args, **kwargs)
    return counter.get_total_flops()


def gigaflop(key, size, guided, batch=8):
    """Return the GFLOP per image of loss and backward."""
    _, networks, rows = problem(size, batch, "meta")

    def step():
        loss, _ = formulations(size)[key](**networks(unchanged), **rows, **options(size, guided))
        loss.mean().backward()

    return count_flops(step) / batch / 1e9


def stepper(key, size, guided, compiled, params, networks, rows):
    """One step as a function without arguments; gradients are dropped after it."""
    formulation, cuda = formulations(size)[key], rows["x"].is_cuda
    one_graph = compiled and key != "ours"
    how = dict(fullgraph=True, dynamic=False)
    one_block = unchanged if key in ("flow", "ours") else unchanged_by_others
    if compiled and key == "ours":
        one_block = partial(dual.compile, **how)
    arguments = networks(one_block) | options(size, guided)

    def mean(rows):
        return formulation(**arguments, **rows)[0].mean()

    if one_graph:
        mean = torch.compile(mean, **how)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda and not is_cifar10(size)):
            value = mean(rows)
        value.backward()
        for p in params:
            p.grad = None
        if cuda:
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


def time_cells(first, times, of_base, batch, gflop, ceiling):
    low, median, high = statistics.quantiles(times, n=4)
    ratio = f"{median / statistics.median(of_base):.2f}" if of_base else ""
    return [
        f"{first:.1f}",
        f"{1e3 * median:.1f} ({1e3 * low:.1f}-{1e3 * high:.1f})",
        f"{batch / median:.1f}",
        ratio,
        f"{gflop * batch / median / 1e3 / ceiling:.0%}",
    ]


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def machine(device):
    where = f"{torch.get_num_threads()} threads of {processor()}"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    return f"{where}, torch {torch.__version__}"


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_head(columns):
    print_row(columns)
    print("|---" * len(columns) + "|", flush=True)


def asked(args, compiled):
    """Return (guided, key) of each row: flow matching first, never guided, an iMF always."""
    keys = [key for key in NAMES if key in args.only and key != "flow"]
    if compiled and args.size == "UNet":
        # torch 2.13 does not compile torch.func.jvp of a group norm, and computes nothing right
        # after it has failed to.
        keys = [key for key in keys if key == "ours"]
    guidance = (True,) if is_improved(args.size) else (False, True)
    guidance = (False,) if is_cifar10(args.size) else guidance
    return [(False, "flow"), *((guided, key) for guided in guidance for key in keys)]


def costs(args, device):
    """Print what a step of each formulation costs."""
    torch.backends.cuda.matmul.allow_tf32 = True
    if is_cifar10(args.size):
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks
    given, ceiling = problem(args.size, args.batch, device), matmul_ceiling(device)
    print(f"{args.size}, batch {args.batch}, {machine(device)}")
    print(f"matmul ceiling {ceiling:.2f} TFLOP/s\n")
    print_head(COLUMNS)
    unit = gigaflop("flow", args.size, False) / 3
    for compiled in (False,) if args.eager else (False, True):
        base = None
        for guided, key in asked(args, compiled):
            count, profile = gigaflop(key, args.size, guided), ""
            cells = [NAMES[key], "yes" if guided else "no", "compiled" if compiled else "eager"]
            cells += [f"{count:.1f}", f"{count / unit:.2f}"]
            try:
                make = partial(stepper, key, args.size, guided, compiled, *given)
                step, first, times, of_base = measure(make, base, args.rounds, args.limit)
                if key == "flow":
                    base, of_base = step, times
                cells += time_cells(first, times, of_base, args.batch, count, ceiling)
                cells.append(f"{peak_memory(step, device):.0f}")
                profile = kernels(step, device) if args.profile else ""
            except Exception as error:  # the next formulation may do better
                cells = cells[:5] + [reason(error)] + [""] * (len(COLUMNS) - 6)
            print_row(cells)
            print(profile, end="", flush=True)
            step = None
            gc.collect()
            torch.cuda.empty_cache()


# --- ways to get du/dt ---


def difference(f, primals, tangents, *, h, central):
    """Return f and its finite difference along the tangents, which stands for its derivative."""

    @torch.no_grad()
    def shifted(h):
        return f(*(a + h * da for a, da in zip(primals, tangents)))

    u = f(*primals)
    if central:
        return u, (shifted(h) - shifted(-h)) / (2 * h)
    return u, (shifted(h) - u) / h


WAYS = {
    "forward mode, dual.jvp": dual.jvp,
    "forward mode, torch.func.jvp": torch.func.jvp,
    "forward difference, h = 0.01": partial(difference, h=1e-2, central=False),
    "central difference, h = 0.005": partial(difference, h=5e-3, central=True),
    "central difference, h = 0.05": partial(difference, h=5e-2, central=True),
}
DERIVATIVE_COLUMNS = (
    "du/dt by",
    "forwards",
    "x the time of a forward",
    "error, float32",
    "error, bfloat16",
)


def trained(path, batch, device):
    """Return a checkpoint's parameters, and the z, t, r, v and y of so many digits, all r != t.

    Raises FileNotFoundError or ValueError, with one line, if it is not a DiT of the digits.
    """
    how = "train one with python train.py --out"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {how} {path}")
    found, digits = weights.load(path, device), data.digits()
    if found.guidance or found.shape != digits.shape:
        raise ValueError(f"{path} is not a DiT of the digits: {how} runs/digits")
    x, y = data.batch(digits, batch, seed=0, step=0)
    g = torch.Generator().manual_seed(0)
    e, t, r, _ = meanflow.draw(x.shape, generator=g, share=0)
    z, v = meanflow.interpolate(x, e, t)
    params = {name: p.requires_grad_() for name, p in found.params.items()}
    return params, move((z, t, r, v, y), device)


def derive(way, params, rows):
    """Return u with its graph, and du/dt, by one of WAYS."""
    return meanflow.derivative(partial(model.dit, params), *rows, jvp=way)


def relative_time(way, params, rows, rounds, seconds):
    """Return the median of the times of u and du/dt beside those of forwards, in turn."""
    z, t, r, _, y = rows

    def step(f, *args):
        with torch.autocast("cuda", torch.bfloat16, enabled=z.is_cuda):
            f(*args)
        if z.is_cuda:
            torch.cuda.synchronize()

    forward = partial(step, model.dit, params, z, t, r, y)
    _, _, times, of_forward = measure(
        lambda: partial(step, derive, way, params, rows), forward, rounds, seconds
    )
    return statistics.median(a / b for a, b in zip(times, of_forward))


def derivatives(params, rows, args, device):
    """Print what each way to get du/dt costs, and its error."""
    print(f"{args.weights}, {args.batch} digits, {machine(device)}\n")
    print_head(DERIVATIVE_COLUMNS)
    double = tree_map(lambda a: a.detach().double() if a.is_floating_point() else a, (params, rows))
    _, exact = derive(torch.func.jvp, *double)
    on_meta = move((params, rows), "meta")
    z, t, r, _, y = on_meta[1]
    unit = count_flops(model.dit, on_meta[0], z, t, r, y)
    for name, way in WAYS.items():
        ratio = relative_time(way, params, rows, args.rounds, args.limit)
        cells = [name, f"{count_flops(derive, way, *on_meta) / unit:.2f}", f"{ratio:.2f}"]
        for low in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=low):
                _, dudt = derive(way, params, rows)
            cells.append(f"{((dudt - exact).norm() / exact.norm()).item():.1e}")
        print_row(cells)


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--size", default="S/2", choices=SIZES)
    add("--batch", type=int, help="rows (default: 8; with --derivative 512)")
    add("--rounds", type=int, default=7, help="counted steps of each, at least 2")
    add("--only", nargs="+", default=NAMES, choices=NAMES)
    add("--eager", action="store_true", help="leave out the compiled ones")
    add("--profile", action="store_true", help="list the kernels of each")
    add("--limit", type=float, default=600, help="seconds to compile one, at most")
    add("--derivative", action="store_true", help="ways to get du/dt instead of steps")
    what = "for --derivative, a run of train.py or its ema-STEP.safetensors"
    add(
        "--weights",
        type=Path,
        default=Path("runs/digits"),
        help=f"{what} (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    args.batch = args.batch or (512 if args.derivative else 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.derivative:
        return costs(args, device)
    try:
        given = trained(args.weights, args.batch, device)
    except (OSError, ValueError) as error:
        sys.exit(f"step.py: {error}")
    derivatives(*given, args, device)


if __name__ == "__main__":
    main()
