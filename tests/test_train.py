"""train.py: a run is the same if it is killed, stopped or shared; bad input gets one line."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import namedtuple
from contextlib import nullcontext
from functools import partial
from glob import glob
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import (
    LAUNCH,
    ROOT,
    children,
    fails,
    finish,
    fork,
    free_port,
    kill,
    nothing,
    run,
    start,
    wait_until,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch._inductor.exc import InductorError

import data
import dual
import evaluate
import imf
import meanflow
import model
import runtime
import sample
import train
import weights
from runtime import World, generator

slow = pytest.mark.slow  # starts processes


def command(out, *flags, steps=60):
    words = f"train.py --batch 16 --steps {steps} --save 10 --out"
    return [*words.split(), str(out), *flags]


def losses(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    clock = ("time", "images_per_second")
    return [{key: value for key, value in entry.items() if key not in clock} for entry in entries]


def assert_close(entry, other, rel):
    """Compare two lines of a log, value by value."""
    assert entry.keys() == other.keys()
    for name, value in other.items():
        assert entry[name] == pytest.approx(value, rel=rel), name


def final(folder, step=60):
    return [load_file(folder / f"{kind}-{step:08}.safetensors") for kind in ("ema", "state")]


def assert_same_bits(a, b):
    for left, right in zip(a, b):
        assert left.keys() == right.keys() and all(
            torch.equal(left[name], right[name]) for name in left
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, run(*command(folder))


@slow
def test_a_run_leaves_what_it_promises(undisturbed):
    folder, printed = undisturbed
    assert {p.name for p in folder.iterdir()} == {"log.jsonl", ".lock", "curve.png"} | {
        f"grid-{k:08}.png" for k in range(10, 61, 10)
    } | {f"{kind}-{k:08}.safetensors" for kind in ("ema", "state") for k in (50, 60)}
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert (
        first["size"] == "T/2"
        and first["batch"] == 16
        and first["seed"] == 0
        and first["torch"] == torch.__version__
    )
    assert [entry["step"] for entry in losses(folder)] == [10, 20, 30, 40, 50, 60]
    assert losses(folder)[-1]["raw_equal"] < losses(folder)[0]["raw_equal"]
    for words in (
        "1 step(s) ",
        "2 step(s)",
        "4 step(s)",
        "raw pixels",
        str(folder / "grid-00000060.png"),
    ):
        assert words in printed


@slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(undisturbed, tmp_path):
    again = fork(*command(tmp_path / "again"))
    finish(again, fork(*command(tmp_path / "other", "--seed", "1", steps=10)))
    assert losses(tmp_path / "again") == losses(undisturbed[0])
    assert_same_bits(final(tmp_path / "again"), final(undisturbed[0]))
    assert losses(tmp_path / "other")[0]["loss"] != losses(undisturbed[0])[0]["loss"]


@slow
def test_a_run_killed_at_random_continues_as_if_nothing_had_happened(undisturbed, tmp_path):
    """Kill a run twenty times, every other time while it saves, then let it finish.

    Its saves are whole after each kill, and the result is bit for bit the undisturbed run's.
    """
    folder, chance, halves = tmp_path / "run", random.Random(0), 0
    for k in range(20):
        before = weights.newest(folder)
        process = fork(*command(folder, "--save", "2"))
        names = ("", "/state-*", "/ema-*", "/grid-*", "/curve.png", "/log.jsonl")
        inside = f"{folder}/.meanflow-*.tmp" + chance.choice(names) if k % 2 else "nothing"
        left = set(glob(inside))  # by the process before; the next one sweeps it up
        while weights.newest(folder) == before and set(glob(inside)) <= left:
            assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0 if k % 2 else 0.1 * chance.random())
        process.kill()
        process.wait()
        halves += any(folder.glob(".meanflow-*"))
        last = weights.newest(folder)
        assert last >= before and (last == 0 or all(final(folder, last)))
        with (folder / "log.jsonl").open("a") as log:
            log.write('{"step": 5')  # what a kill within a write leaves
    finish(fork(*command(folder, "--save", "2")))
    assert halves > 2, "too few kills came in the middle of saving"
    grids = {f"grid-{k:08}.png" for k in range(2, 61, 2)}
    saves = {f"{kind}-{k:08}.safetensors" for kind in ("ema", "state") for k in (58, 60)}
    assert {p.name for p in folder.iterdir()} == grids | saves | {"log.jsonl", ".lock", "curve.png"}
    assert [entry["step"] for entry in losses(folder)] == list(range(2, 61, 2))
    assert (folder / "grid-00000060.png").read_bytes() == (
        undisturbed[0] / "grid-00000060.png"
    ).read_bytes()
    assert_same_bits(final(folder), final(undisturbed[0]))


def interrupt(process, folder):
    """Once a run has saved, send SIGTERM to its last child or, if it has none, to itself.

    Returns what it prints and the step that it saved in response.
    """
    wait_until(lambda: weights.newest(folder), process)
    os.kill((children(process.pid) or [process.pid])[-1], signal.SIGTERM)
    return finish(process)[0], weights.newest(folder)


@slow
def test_sigterm_saves_and_ends_and_the_run_goes_on(undisturbed, tmp_path):
    folder = tmp_path / "run"
    printed, step = interrupt(fork(*command(folder, "--save", "7")), folder)
    assert 7 <= step < 60 and f"stopped by a signal after step {step}, which is saved" in printed
    assert [entry["step"] for entry in losses(folder)] == sorted({*range(7, step + 1, 7), step})
    finish(fork(*command(folder, "--save", "7")))
    assert_same_bits(final(folder), final(undisturbed[0]))


@slow
def test_ctrl_c_saves_too_and_elsewhere_ends_without_a_traceback(tmp_path):
    process, folder = start(*command(tmp_path / "run", "--save", "7", steps=5000)), tmp_path / "run"
    wait_until(lambda: weights.newest(folder), process)
    process.send_signal(signal.SIGINT)
    assert "stopped by a signal after step" in finish(process)[0] and weights.newest(folder) >= 7
    words = ["sample.py", folder, "--images", tmp_path / "x.npz", "--count", 10**6]
    process = start(*words)
    wait_until(lambda: glob(f"{tmp_path}/.meanflow-*.tmp/*.npy"), process)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not printed and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@slow
def test_sigterm_to_the_launcher_saves(tmp_path):
    """Schedulers signal the launcher; torchrun then exits with an error whatever its workers do."""
    folder = tmp_path / "run"
    process = start(*LAUNCH, "2", *command(folder, "--save", "7"))
    wait_until(lambda: weights.newest(folder), process)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    step = weights.newest(folder)
    assert 7 <= step < 60 and f"stopped by a signal after step {step}" in printed


@slow
def test_sigterm_to_one_process_ends_all_after_the_same_step_and_one_process_goes_on(
    undisturbed, tmp_path
):
    folder = tmp_path / "run"
    printed, step = interrupt(start(*LAUNCH, "2", *command(folder, "--save", "7")), folder)
    assert 7 <= step < 60 and printed.count(f"stopped by a signal after step {step}") == 1
    finish(fork(*command(folder)))
    assert_close(losses(folder)[-1], losses(undisturbed[0])[-1], rel=1e-2)


@slow
def test_a_longer_run_continues_a_shorter_one(undisturbed, tmp_path):
    finish(fork(*command(tmp_path / "run", steps=20)))
    finish(fork(*command(tmp_path / "run")))
    assert_same_bits(final(tmp_path / "run"), final(undisturbed[0]))


def share(world, _, *words):
    """Start so many processes that train one run."""
    return start(*LAUNCH, world, "tests/train_without_report.py", *words)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folders of runs shared by processes and cut into parts, {(processes, parts): path}."""
    folders, processes = {}, []
    for world, parts in SHARES:
        folder = folders[world, parts] = tmp_path_factory.mktemp("shared") / "run"
        words = command(folder, "--accumulate", parts, steps=20)
        processes.append(share(world, *words) if world > 1 else fork(*words))
    finish(*processes)
    return folders


SHARES = [(1, 4), (2, 1), (2, 2), (4, 1)]


@slow
@pytest.mark.parametrize("world, parts", SHARES)
def test_processes_and_parts_train_the_same_run(undisturbed, shared, world, parts):
    entries = losses(shared[world, parts])
    for entry, alone in zip(entries, losses(undisturbed[0])[:2], strict=True):
        assert_close(entry, alone, rel=1e-4)


def agents(_, *words):
    """Start two torchrun agents, each as on a node of its own, with one process."""
    port = free_port()
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "run", "--rdzv-endpoint"]
    nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous]
    nodes += [f"localhost:{port}", "--rdzv-conf"]
    script = "tests/train_without_report.py"
    return [start(*nodes, f"is_host={host}", script, *words) for host in (1, 0)]


@slow
def test_two_nodes_train_the_same_run_and_go_on_when_one_was_killed(undisturbed, tmp_path):
    """Without its peer the other node ends as well; the same commands continue from the save."""
    folder = tmp_path / "run"
    first, second = agents(*command(folder))
    wait_until(lambda: weights.newest(folder), first, second)
    kill(second)
    second.communicate()
    assert first.communicate(timeout=120) and first.returncode != 0
    assert 0 < weights.newest(folder) < 60
    finish(*agents(*command(folder)))
    for entry, alone in zip(losses(folder)[:2], losses(undisturbed[0])[:2], strict=True):
        assert_close(entry, alone, rel=1e-4)
    assert [entry["step"] for entry in losses(folder)] == list(range(10, 61, 10))


GRADIENTS = """
import sys, torch
sys.path.insert(0, {root!r})
import meanflow, model, runtime, train

def main(argv, world):
    [way] = argv  # in float32 if compiled: torch 2.11 compiles no attention in float64
    dtype = torch.float32 if way == "compiled" else torch.float64
    g = torch.Generator().manual_seed(0)
    params = model.init((256, 1, 2), channels=1, classes=10, generator=g)
    params = {{name: torch.nn.Parameter((p + 0.02 * torch.randn(p.shape, generator=g)).to(dtype))
              for name, p in params.items()}}
    x, y = torch.randn(16, 1, 8, 8, generator=g).to(dtype), torch.arange(16) % 10
    draws = [d.to(dtype) if d.is_floating_point() else d
             for d in meanflow.draw(x.shape, generator=g)]
    mine = meanflow.Draws(*(d[world.rank :: world.size] for d in draws))
    batch = x[world.rank :: world.size], y[world.rank :: world.size], mine
    guidance = train.RECIPES["XL/2"].guidance
    options = dict(channels=1, classes=10, guidance=guidance, compiled=way == "compiled")
    objective = train.Objective(train.dit_method("XL/2", **options).loss, params)
    if way == "naive":  # the network inside DistributedDataParallel, and the loss around it
        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weights = objective.weights
            def forward(self, *inputs):
                return model.dit(dict(zip(params, self.weights)), *inputs)
        network = torch.nn.parallel.DistributedDataParallel(Network())
        options = dict(zip(("omega", "kappa", "interval"), guidance))
        meanflow.loss(network.module, *batch, null=10, **options)[0].mean().backward()
    else:
        objective = train.parallel(objective, world)
        for _ in range(2):  # nothing is compiled again for the second step
            objective.zero_grad()
            objective(*batch, int((mine.t == mine.r).sum()))[0].backward()
            torch._dynamo.config.error_on_recompile = True
    if world.rank == 0:
        grads = {{name: p.grad for name, p in params.items()}}
        torch.save(grads, {folder!r} + f"/{{way}}-{{world.size}}.pt")

runtime.launch(main)
"""


def gradients(folder, *runs):
    """Return the gradients of each of `runs`, (way, processes), which run at the same time."""
    script = folder / "gradients.py"
    script.write_text(GRADIENTS.format(root=str(ROOT), folder=str(folder)))
    finish(*(start(*([*LAUNCH, n] if n > 1 else []), script, way) for way, n in runs))
    return [torch.load(folder / f"{way}-{n}.pt", weights_only=True) for way, n in runs]


@slow
def test_gradients_are_averaged_over_processes_and_survive_the_compiler(tmp_path):
    """Two processes average their gradients to those of the whole batch, compiled or not.

    The second step compiles nothing. The obvious way, jvp on the network inside
    DistributedDataParallel, leaves each process with its own gradients.
    """
    runs = ("objective", 1), ("objective", 2), ("compiled", 2), ("naive", 2)
    alone, eager, compiled, naive = gradients(tmp_path, *runs)
    for name, want in alone.items():
        for got, tolerance in ((eager, 1e-11), (compiled, 1e-4)):
            assert (got[name] - want).norm() <= tolerance * want.norm(), (name, tolerance)
        assert (naive[name] - want).norm() > 1e-2 * want.norm(), name


# --- what is trained ---


def test_recipes_are_the_papers():
    for size, (omega, kappa, end) in {
        "B/4": (1, 0.5, 1),
        "B/2": (1, 0.5, 1),
        "M/2": (1, 0.5, 1),
        "L/2": (0.2, 0.92, 0.8),
        "XL/2": (0.2, 0.92, 0.75),
    }.items():
        guidance = omega, kappa, (0, end)
        assert train.RECIPES[size] == (guidance, 1e-4, 256, 240, 1281167, 0.9999, 0)
        plan = train.make_plan(train.RECIPES[size], 1281167)
        assert plan.steps == 1_201_100  # 240 * 1281167 / 256 = 1,201,094
    assert train.RECIPES["S/2"] == train.RECIPES["B/2"]
    assert train.RECIPES.keys() == model.SIZES.keys() | imf.SIZES.keys()
    for size, recipe in train.RECIPES.items():
        assert (recipe.guidance is None) == (size in imf.SIZES)


def test_a_plan_is_a_recipe_for_a_data_set():
    recipe = train.Recipe(None, 0.5, 10, 20, 1000, 0.9, warmup=5)
    plan = 0.5, 10, 2000, 0.9, 500, 0, "float32", (0.9, 0.95), 1
    assert train.make_plan(recipe, 1000) == plan
    plan = train.make_plan(recipe, 1000, steps=30, seed=4, precision="bfloat16")
    assert plan == train.Plan(0.5, 10, 30, 0.9, warmup=8, seed=4, precision="bfloat16")
    assert train.make_plan(recipe, 250).steps == 1000  # a quarter of the images, twice the epochs
    assert train.make_plan(recipe, 4000).steps == 8000  # the epochs of the recipe
    assert train.make_plan(recipe._replace(warmup=0), 1, steps=3).warmup == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_three_steps_are_adam_on_the_loss_and_the_average(tmp_path, parts):
    """Compare with Adam as defined in arXiv 1412.6980, algorithm 1, on the paper's loss."""
    words = ["--out", tmp_path / "run", "--batch", "8", "--steps", "3", "--accumulate", parts]
    with mock.patch.object(evaluate, "report", nothing):
        train.main([str(word) for word in words], World())
    ema, state = final(tmp_path / "run", 3)
    dataset, recipe = data.digits(), train.RECIPES["T/2"]
    guided = dict(zip(("omega", "kappa", "interval"), recipe.guidance))
    g = generator(0, "init", 0)
    w = model.init("T/2", channels=1, classes=10, generator=g)
    average, m, v = {k: p.clone() for k, p in w.items()}, dict.fromkeys(w, 0), dict.fromkeys(w, 0)
    errors = []
    for k in (1, 2, 3):
        w = {name: p.detach().requires_grad_() for name, p in w.items()}
        x, y = data.batch(dataset, 8, seed=0, step=k - 1)
        draws = meanflow.draw(x.shape, generator=generator(0, "draws", k - 1))
        rows, raw = meanflow.loss(partial(model.dit, w), x, y, draws, null=10, **guided)
        norms, errors = [], [*errors, raw]
        for name, gradient in zip(w, torch.autograd.grad(rows.mean(), w.values())):
            norms.append(gradient.norm().item())
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            step = m[name] / (1 - 0.9**k) / ((v[name] / (1 - 0.95**k)).sqrt() + 1e-8)
            w[name] = w[name].detach() - recipe.lr * step
            average[name] += 9 / (10 + k) * (w[name] - average[name])
    for name in w:
        assert (m[name] - state[f"exp_avg.{name}"]).norm() <= 1e-3 * m[name].norm() + 1e-9
        assert (w[name] - state[f"weights.{name}"]).norm() <= 1e-4 * w[name].norm() + 1e-6
        assert (average[name] - ema[name]).norm() <= 1e-3 * average[name].norm() + 1e-6
    [line] = losses(tmp_path / "run")
    assert line["step"] == 3
    assert line["grad_norm"] == pytest.approx(math.hypot(*norms), rel=1e-3)
    raw, differ = torch.cat(errors), torch.arange(24) % 8 >= 6
    assert line["raw_equal"] == pytest.approx(raw[~differ].mean().item(), rel=1e-3)
    assert line["raw_differ"] == pytest.approx(raw[differ].mean().item(), rel=1e-3)


def test_several_averages_every_few_steps():
    """As Plan says, beside Adam's own momenta."""
    g = torch.Generator().manual_seed(0)
    method = train.Method(
        "", lambda generator: {"w": torch.randn(3, generator=generator)}, *3 * [0]
    )
    plan = train.Plan(0.1, 1, 9, ema=(0.9, 0.5, 0.1), betas=(0.7, 0.8), ema_every=2)
    state = train.begin(method, plan, torch.device("cpu"))
    p, gradients = state.params["w"], torch.randn(5, 3, generator=g)
    w, m, v = p.detach().clone(), 0, 0
    averages = {decay: w.clone() for decay in plan.ema}
    for k, gradient in enumerate(gradients, 1):
        p.grad = gradient.clone()
        train.update(state, plan, k)
        m, v = 0.7 * m + 0.3 * gradient, 0.8 * v + 0.2 * gradient**2
        w = w - 0.1 * m / (1 - 0.7**k) / ((v / (1 - 0.8**k)).sqrt() + 1e-8)
        for decay in plan.ema if k % 2 == 0 else ():
            kept = min(decay, (1 + k) / (10 + k)) ** 2
            averages[decay] = kept * averages[decay] + (1 - kept) * w
        assert torch.allclose(p, w, atol=1e-6)
        for decay, average in averages.items():
            assert torch.allclose(state.ema[decay]["w"], average, atol=1e-6)
    saved = train.saved_tensors(state)
    assert list(saved) == ["state", "ema0.5", "ema0.1", "ema"]  # the last says that all are there
    assert saved["ema"] is state.ema[0.9] and saved["ema0.1"] is state.ema[0.1]


def logged(history, *errors):
    """Return the line that log_means writes of these rows, without its time, and what it shows."""
    state = dict.fromkeys(("dataset", "plan", "state", "sampler"))
    method = train.Method("", *4 * [None], errors=errors)
    run = train.Run(Path("x"), **state, method=method, metadata={}, lock=True, world=World())
    with mock.patch.object(runtime, "append_line") as write:
        shown = train.log_means(run, history, 0.125, 77.77)
    [path, line] = write.call_args.args
    assert path == Path("x", "log.jsonl") and json.loads(json.dumps(line)) == line
    assert line.pop("time") > 1.7e9
    return line, shown


def test_the_log_holds_the_means_over_rows():
    """Average over two steps with different numbers of rows, those with r = t apart."""
    t = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    r = torch.tensor([0.5, 0.6, 0.1, 0.2, 0.9])
    loss, raw = torch.arange(5.0), 10 * torch.arange(5.0)
    rows = torch.stack((t, r, loss, raw), 1)
    line, shown = logged([(7, rows[:3]), (8, rows[3:])])
    seen = {"raw_equal": 50 / 3, "raw_differ": 25.0, "grad_norm": 0.125, "images_per_second": 77.8}
    parts = {"raw_equal_by_t": [None, None, 5.0, 40.0], "raw_differ_by_t": [None, None, 20.0, 30.0]}
    assert line == {"step": 8, "loss": 2.0, **seen, **parts}
    assert shown == {name: f"{value:.4g}" for name, value in seen.items()}


@pytest.mark.parametrize("errors", [(), ("v",), ("v", "w")])
def test_the_log_holds_the_means_by_quarter_of_t(errors):
    """Each quarter holds its lower bound, the last also t = 1."""
    g = torch.Generator().manual_seed(0)
    t = torch.cat((torch.rand(37, generator=g), torch.tensor([0, 0.25, 0.5, 0.75, 1])))
    r = torch.where(torch.rand(len(t), generator=g) < 0.5, t, t * torch.rand(len(t), generator=g))
    values = torch.rand(len(t), 2 + len(errors), generator=g)
    line, shown = logged([(1, torch.cat((torch.stack((t, r), 1), values), 1))], *errors)
    sums = {}
    for late, early, (_, raw, *others) in zip(t.tolist(), r.tolist(), values.tolist()):
        quarter = [late >= bound for bound in (0.25, 0.5, 0.75)].count(True)
        named = {"raw_equal" if late == early else "raw_differ": raw}
        for name, value in (named | {f"raw_{e}": o for e, o in zip(errors, others)}).items():
            sums.setdefault(name, [[], [], [], []])[quarter].append(value)
    for name, parts in sums.items():
        means = [sum(part) / len(part) if part else None for part in parts]
        assert line[f"{name}_by_t"] == pytest.approx(means)
        assert line[name] == pytest.approx(sum(sum(parts, [])) / len(sum(parts, [])))
        assert f"{name}_by_t" not in shown
    assert {name for name in line if name.endswith("_by_t")} == {f"{name}_by_t" for name in sums}


def test_the_recipe_reaches_the_loss(monkeypatch, tmp_path):
    seen, fast_loss = [], meanflow.fast_loss

    def spy(*inputs, **options):
        seen.append({name: options[name] for name in ("null", "omega", "kappa", "interval")})
        return fast_loss(*inputs, **options)

    monkeypatch.setattr(meanflow, "fast_loss", spy)
    monkeypatch.setattr(evaluate, "report", nothing)
    recipe = train.Recipe((0.3, 0.8, (0.1, 0.7)), 1e-3, 4, 1, 5, 0.5)
    monkeypatch.setitem(train.RECIPES, "T/2", recipe)
    words = ["--no-compile", "--steps", "1", "--out"]
    for flags, numbers in (
        ([], (0.3, 0.8, (0.1, 0.7))),
        (["--guidance", "0.2", "0.9", "0.25", "0.75"], (0.2, 0.9, (0.25, 0.75))),
        (["--guidance", "1", "0"], (1, 0, (0, 1))),
    ):
        train.main([*words, str(tmp_path / str(len(flags))), *flags], World())
        assert seen.pop() == dict(zip(("null", "omega", "kappa", "interval"), (10, *numbers)))


@pytest.mark.parametrize("batch, world, parts", [(16, 1, 1), (16, 2, 1), (12, 4, 1), (24, 2, 3)])
def test_the_processes_share_out_the_draws(batch, world, parts):
    """Each process and each part has its own rows of one batch, counted rows with r = t first."""

    method = train.dit_method("T/2", channels=1, classes=10)
    plan = train.Plan(1.0, batch, 9, seed=3)

    def first(rank, world, parts):
        return next(train.stream(method, data.digits(), plan, 5, World(rank, world), parts))

    [(x, y, draws, equal)] = first(0, 1, 1)
    assert equal == int(0.75 * batch)
    shares = [
        (rank + world * k, part)
        for rank in range(world)
        for k, part in enumerate(first(rank, world, parts))
    ]
    assert equal == sum(part[3] for _, part in shares)
    for first_row, (px, py, pdraws, pequal) in shares:
        assert (pdraws.t[:pequal] == pdraws.r[:pequal]).all() and (
            pdraws.t[pequal:] > pdraws.r[pequal:]
        ).all()
        for mine, whole in zip((px, py, *pdraws), (x, y, *draws)):
            assert torch.equal(mine, whole[first_row :: world * parts])


def test_old_saves_are_thinned(tmp_path):
    """The last two saves stay, and the averaged weights of every 50,000th step."""
    p = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([p])
    adam.state[p] = {moment: torch.zeros(3) for moment in ("exp_avg", "exp_avg_sq")}
    state = train.State({"w": p}, {0.9: {"w": p.detach()}}, adam)
    for step in range(25_000, 200_000, 25_000):
        weights.save_checkpoint(tmp_path, step, train.saved_tensors(state), {})
    kept = {kind: sorted(weights.checkpoints(tmp_path, kind)) for kind in ("ema", "state")}
    assert kept == {"ema": [50_000, 100_000, 150_000, 175_000], "state": [150_000, 175_000]}
    whole = train.saved_tensors(state)
    weights.save_tensors(tmp_path / "state-00180000.safetensors", whole["state"])  # half a save
    weights.save_checkpoint(tmp_path, 190_000, whole, {})
    kept = {kind: sorted(weights.checkpoints(tmp_path, kind)) for kind in ("ema", "state")}
    assert kept["ema"][-2:] == [175_000, 190_000] and kept["state"] == [175_000, 180_000, 190_000]


@slow
def test_the_scores_of_samples_are_logged_at_the_end(tmp_path, capsys):
    """One process, two processes and evaluate.py find the same and say the same of it."""
    found, flags = [], ["--fid", "digits", "--count", "50"]
    one, two = (command(tmp_path / name, *flags, steps=20) for name in ("one", "two"))
    finish(fork(*one), share(2, *two))
    for name in ("one", "two"):
        [line] = [entry for entry in losses(tmp_path / name) if "fid" in entry]
        assert line.pop("step") == 20
        found.append(line)
    evaluate.main([str(tmp_path / "one"), "--ref", "digits", "--count", "50"], World())
    alone = json.loads(capsys.readouterr().out)
    assert alone.pop("fid") == pytest.approx(found[0].pop("fid"), rel=1e-6)
    assert alone == found[0] and found[1]["fid"] > 0


def scored(folder):
    return [entry["step"] for entry in losses(folder) if "fid" in entry]


def test_scores_that_a_kill_lost_are_made_when_the_run_continues(monkeypatch, tmp_path):
    """Lasting saves and the last have scores, in whatever order they are made, and once."""
    monkeypatch.setattr(weights, "LASTING", 4)
    monkeypatch.setattr(evaluate, "report", nothing)
    words = ["--batch", "8", "--save", "2", "--out", str(tmp_path)]
    flags = ["--fid", "digits", "--count", "20"]

    def killed(*_, **__):
        raise KeyboardInterrupt

    for name in ("draw_images", "scores"):  # before its samples, and before its line
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(evaluate, name, killed)
            train.main([*words, *flags, "--steps", "10"], World())
    assert scored(tmp_path) == [] and weights.newest(tmp_path) == 4
    train.main([*words, "--steps", "10"], World())  # without scores
    train.main([*words, *flags, "--steps", "10"], World())
    assert scored(tmp_path) == [4, 8, 10]
    before = (tmp_path / "log.jsonl").read_text()
    train.main([*words, *flags, "--steps", "10"], World())
    assert (tmp_path / "log.jsonl").read_text() == before
    train.main([*words, *flags, "--steps", "11"], World())
    assert scored(tmp_path) == [4, 8, 10, 11]
    train.main([*words, *flags[:2], "--count", "30", "--steps", "11"], World())  # other scores
    assert scored(tmp_path) == [4, 8, 10, 11, 4, 8, 11]


def test_a_run_that_another_process_has_moved_on_is_not_cut_back(monkeypatch, tmp_path):
    """Another process saves step 4 between this one's look for saves and its lock."""
    words = ["--batch", "8", "--save", "2", "--out", str(tmp_path), "--steps"]
    monkeypatch.setattr(evaluate, "report", nothing)
    train.main([*words, "2"], World())
    begin = train.begin

    def late(*arguments):
        with monkeypatch.context() as m:
            m.setattr(train, "begin", begin)
            train.main([*words, "4"], World())
        return begin(*arguments)

    with (
        monkeypatch.context() as m,
        pytest.raises(ValueError, match="ema-00000004.* is later than") as error,
    ):
        m.setattr(train, "begin", late)
        train.main([*words, "6"], World())
    runtime.lock_folder(tmp_path).release()  # while `error` still holds what the run held
    assert error.value.__traceback__
    assert [entry["step"] for entry in losses(tmp_path)] == [2, 4]


def signal_at_once(handler, notice):
    """Stand in for runtime.signals: a signal comes before the first step."""
    handler()
    return nullcontext()


def test_a_run_stopped_at_its_last_step_gets_its_picture(monkeypatch, tmp_path, capsys):
    """Stopped before, it gets none until it goes on."""
    monkeypatch.setattr(runtime, "signals", signal_at_once)
    monkeypatch.setattr(evaluate, "report", nothing)
    words = ["--batch", "8", "--out", str(tmp_path), "--steps"]
    train.main([*words, "11"], World())
    assert "stopped by a signal after step 10" in capsys.readouterr().out
    assert weights.newest(tmp_path) == 10 and not list(tmp_path.glob("grid-*"))
    train.main([*words, "20"], World())
    assert "stopped by a signal after step 20" in capsys.readouterr().out
    before, picture = sorted(tmp_path.glob("grid-*"))
    assert (before.name, picture.name) == ("grid-00000010.png", "grid-00000020.png")
    train.main([*words, "20"], World())
    assert f"{picture} {tmp_path / 'curve.png'}" in capsys.readouterr().out


def test_a_save_says_how_it_was_trained_last(tmp_path):
    for steps, precision in ((1, "float32"), (2, "bfloat16")):
        words = ["--batch", "8", "--steps", str(steps), "--precision", precision]
        with mock.patch.object(evaluate, "report", nothing):
            train.main([*words, "--out", str(tmp_path)], World())
        with safe_open(tmp_path / f"ema-{steps:08}.safetensors", "pt") as file:
            run = json.loads(file.metadata()["run"])
        assert (run["steps"], run["precision"]) == (steps, precision)


def test_saves_take_two_percent_of_the_time(monkeypatch, tmp_path):
    """With a clock that a step moves by 1 and a save by 1: after n of them, 50 n must be past."""
    clock, saved, update = [0.0], [], train.update
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(evaluate, "report", nothing)

    def step(*arguments):
        clock[0] += 1
        return update(*arguments)

    def save(run, step, *_, **__):
        clock[0] += 1
        saved.append(step)

    monkeypatch.setattr(train, "update", step)
    monkeypatch.setattr(train, "save", save)
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    words = ["--batch", "4", "--steps", "115", "--out"]
    train.main([*words, str(tmp_path / "a")], World())
    assert saved == [10, 50, 100, 115]
    lines = losses(tmp_path / "a")
    assert [entry["step"] for entry in lines] == [10, 50, 100, 115]
    with open(tmp_path / "a" / "log.jsonl") as file:
        assert {json.loads(line)["images_per_second"] for line in [*file][1:]} == {4.0}
    saved.clear()
    train.main([*words, str(tmp_path / "b"), "--save", "25"], World())
    assert saved == [25, 50, 75, 100, 115]


@given(st.integers(1, 2 * 10**6), st.integers(1, 2 * 10**6), st.sampled_from([1, 64, 256, 4096]))
def test_smaller_data_sets_take_fewer_steps_of_more_epochs(a, b, batch):
    recipe = train.RECIPES["B/2"]._replace(batch=batch)
    (a, few), (b, many) = ((n, train.make_plan(recipe, n).steps) for n in sorted((a, b)))
    assert 50 <= few <= many and few % 50 == 0
    if few > 5000 and b <= 1281167:
        assert few / a >= 0.98 * many / b
        assert few / many == pytest.approx((a / b) ** 0.5, rel=0.02)


def test_a_run_says_how_long_it_will_be(tmp_path, capsys):
    with mock.patch.object(train, "open_run", side_effect=ValueError):
        for flags in ([], ["--guidance", "1", "0"]):
            with pytest.raises(ValueError):
                train.main(["--out", str(tmp_path), *flags], World())
    plan = "T/2 on 1,797 images of 10 classes: 3,000 steps of 64 are 107 epochs; "
    assert capsys.readouterr().out.splitlines() == [
        plan + "guidance scale 1.43",
        plan + "guidance scale 1",
    ]


def test_one_class_needs_no_guidance(monkeypatch, tmp_path, capsys):
    seen, fast_loss = [], meanflow.fast_loss

    def spy(*inputs, **options):
        seen.append((options["null"], options["omega"], options["kappa"]))
        return fast_loss(*inputs, **options)

    paint(tmp_path / "images", 1, 6, 8)
    data.main([str(tmp_path / "images"), str(tmp_path / "data")], World())
    monkeypatch.setattr(meanflow, "fast_loss", spy)
    words = ["--data", str(tmp_path / "data"), "--batch", "4", "--out", str(tmp_path / "run")]
    train.main([*words, "--steps", "1"], World())
    assert (
        seen == [(1, 1, 0)]
        and "steps of 4 are 1 epochs; guidance scale 1\n" in capsys.readouterr().out
    )
    for kappa in ("0.5", "0.1"):
        message = fails(monkeypatch, "train.py", *words, "--guidance", "1", kappa)
        assert "--guidance would be ignored as " in message and "data has one class" in message


def test_precision_is_that_of_the_matrix_products():
    g = torch.Generator().manual_seed(0)
    params = model.init((64, 1, 2), channels=1, classes=10, generator=g)
    params = {
        k: torch.nn.Parameter(torch.randn(p.shape, generator=g) / 8) for k, p in params.items()
    }
    x, y = torch.randn(8, 1, 8, 8, generator=g), torch.arange(8)
    draws, guidance = meanflow.draw(x.shape, generator=g), train.RECIPES["T/2"].guidance
    loss = train.dit_method("T/2", channels=1, classes=10, guidance=guidance).loss
    with torch.no_grad():
        exact, half = (
            train.Objective(loss, params, precision)(x, y, draws, 6)[1][:, 3]
            for precision in ("float32", "bfloat16")
        )
    error = ((half - exact) / exact).abs()
    assert half.dtype == torch.float32 and 1e-5 < error.max() < 0.05


def test_a_dit_is_trained_by_the_improved_loss(monkeypatch, tmp_path):
    """The log says so, the run goes on bit for bit, and no other loss continues it."""
    monkeypatch.setattr(evaluate, "report", nothing)
    words = ["--loss", "imf", "--batch", "8", "--save", "2", "--steps"]
    whole, part = (["--out", str(tmp_path / name)] for name in ("whole", "part"))
    train.main([*words, "4", *whole], World())
    train.main([*words, "2", *part], World())
    with pytest.raises(ValueError, match="holds a run with loss imf, not None: choose another"):
        train.main([*words[2:], "4", *part], World())
    train.main([*words, "4", *part], World())
    saves = [load_file(tmp_path / name / "ema-00000004.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(saves[0][name], p) for name, p in saves[1].items())
    train.main([*words[2:], "4", "--out", str(tmp_path / "other")], World())
    other = load_file(tmp_path / "other" / "ema-00000004.safetensors")
    assert not all(torch.equal(saves[0][name], p) for name, p in other.items())
    first = json.loads((tmp_path / "whole" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == "imf" and first["omega"] == 1 and first["kappa"] == 0.3


# --- anybody's method ---


def sequence_net(params):
    """Return the network of sequences, (B, 2, 12), that are told a vector, (B, 3)."""

    def net(z, t, r, y):
        condition = torch.cat((t[:, None], (t - r)[:, None], y), 1)
        h = F.conv1d(z, params["first"], padding=1) + (condition @ params["condition"])[..., None]
        return F.conv1d(F.silu(h), params["last"], padding=1)

    return net


def sequence_params(generator):
    shapes = {"first": (16, 2, 3), "condition": (5, 16), "last": (2, 16, 3)}
    return {k: 0.3 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def sequence_loss(params, x, y, draws, equal):
    options = dict(kappa=0.5, null=torch.zeros(3), jvp=dual.jvp, equal=equal)
    return meanflow.fast_loss(sequence_net(params), x, y, draws, **options)


def train_sequences(argv, world, method=None, seed=3, score=None):
    """Train so many steps into a folder; the mean of a sequence is that of its condition."""
    folder, steps, every = argv
    g = torch.Generator().manual_seed(0)
    conditions = torch.randn(50, 3, generator=g)
    items = conditions.mean(1)[:, None, None] + 0.1 * torch.randn(50, 2, 12, generator=g)
    dataset = data.Dataset("waves", "sequences", [], (2, 12), False, conditions, items)
    net, loss = sequence_net, sequence_loss
    method = method or train.Method("Somebody's", sequence_params, meanflow.draw, loss, net)
    plan = train.Plan(1e-2, 8, int(steps), ema=0.9, seed=seed)
    options = dict(every=int(every), score=score)
    return train.fit(method, dataset, plan, folder, world, **options), dataset


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequences") / "run"
    return folder, *train_sequences((folder, 200, 100), World())


def test_anybodys_method_is_trained(sequences):
    """On data that are no images, told what is no class; its samples heed what they are told."""
    folder, sampler, dataset = sequences
    assert {p.name for p in folder.iterdir()} == {"log.jsonl", ".lock", "curve.png"} | {
        f"{kind}-{step:08}.safetensors" for kind in ("ema", "state") for step in (100, 200)
    }
    first, *lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert first["method"] == "Somebody's" and first["data"] == "waves" and first["batch"] == 8
    assert [line["step"] for line in lines] == [50, 100, 150, 200]
    assert lines[-1]["raw_equal"] < 0.7 * lines[0]["raw_equal"]
    with safe_open(folder / "ema-00000200.safetensors", "pt") as file:
        about = file.metadata()
    assert about["model"] == "Somebody's, averaged weights" and json.loads(about["run"]) == first
    assert about["kind"] == "sequences" and about["classes"] == "[]" and about["step"] == "200"
    assert "resolution" not in about
    assert_same_bits([sampler.params], [load_file(folder / "ema-00000200.safetensors")])
    assert sampler.shape == (2, 12) and sampler.classes == []
    told = torch.tensor([-1.0, 1.0]).repeat(50)[:, None].expand(-1, 3)
    x = sample.generate(sampler, told, steps=4)
    assert x.shape == (100, 2, 12) and x[1::2].mean() - x[::2].mean() > 1
    assert torch.equal(sample.choose_shown(dataset), dataset.labels)


def test_anybodys_run_goes_on_bit_for_bit(monkeypatch, sequences, tmp_path, capsys):
    """After its end, and after a signal."""
    folder, whole, _ = sequences
    train_sequences((tmp_path, 70, 50), World())
    with monkeypatch.context() as m:
        m.setattr(runtime, "signals", signal_at_once)
        assert train_sequences((tmp_path, 200, 100), World())[0] is None
    assert "stopped by a signal after step 80" in capsys.readouterr().out
    found, _ = train_sequences((tmp_path, 200, 100), World())
    assert_same_bits([found.params], [whole.params])
    assert_same_bits(final(tmp_path, 200), final(folder, 200))
    other = train.Method("Another", sequence_params, meanflow.draw, sequence_loss, sequence_net)
    with pytest.raises(ValueError, match="holds a run with method Somebody's, not Another: choose"):
        train_sequences((tmp_path, 200, 100), World(), other)


SEQUENCES = """
import sys
sys.path[:0] = {paths!r}
import runtime, test_train
runtime.launch(test_train.train_sequences)
"""


@slow
def test_two_processes_train_anybodys_run(sequences, tmp_path):
    (tmp_path / "script.py").write_text(SEQUENCES.format(paths=[str(ROOT), str(ROOT / "tests")]))
    finish(start(*LAUNCH, 2, tmp_path / "script.py", tmp_path / "two", 200, 100))
    for entry, alone in zip(losses(tmp_path / "two"), losses(sequences[0]), strict=True):
        assert_close(entry, alone, rel=1e-4)
    for name, p in final(sequences[0], 200)[0].items():
        assert torch.allclose(final(tmp_path / "two", 200)[0][name], p, atol=1e-4)


def test_methods_have_their_own_draws_errors_and_metadata(tmp_path):
    """What is drawn may be any named tuple with t and r; raw errors may be several."""
    Draws, seen = namedtuple("Draws", ("e", "t", "r", "drop", "more")), []

    def draw(shape, *, generator):
        return Draws(*meanflow.draw(shape, generator=generator), torch.arange(shape[0]))

    def loss(params, x, y, draws, equal):
        seen.append((draws.more.tolist(), equal))
        rows, raw = sequence_loss(params, x, y, meanflow.Draws(*draws[:4]), equal)
        return rows, torch.stack((raw, 2 * raw), 1)

    options = dict(errors=("twice",), metadata={"guidance": "none"})
    method = train.Method("Mine", sequence_params, draw, loss, sequence_net, **options)
    train_sequences((tmp_path, 2, 2), World(), method)
    assert seen == 2 * [([*range(8)], 6)]
    [line] = losses(tmp_path)
    mean = (6 * line["raw_equal"] + 2 * line["raw_differ"]) / 8
    assert line["raw_twice"] == pytest.approx(2 * mean)
    assert len(line["raw_twice_by_t"]) == 4
    with safe_open(tmp_path / "ema-00000002.safetensors", "pt") as file:
        assert file.metadata()["guidance"] == "none"


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_put_back_and_the_folder_is_unlocked_after_training(tmp_path, fails):
    numbers = signal.SIGTERM, signal.SIGINT
    before, during = [signal.getsignal(number) for number in numbers], []

    def loss(*inputs):
        during.append([signal.getsignal(number) for number in numbers])
        if fails:
            raise ValueError("no")
        return sequence_loss(*inputs)

    method = train.Method("Mine", sequence_params, meanflow.draw, loss, sequence_net)
    with pytest.raises(ValueError, match="no") if fails else nullcontext() as error:
        train_sequences((tmp_path, 1, 1), World(), method)
    assert [signal.getsignal(number) for number in numbers] == before
    assert len(during) == 1 and all(a != b for a, b in zip(before, during[0]))
    runtime.lock_folder(tmp_path).release()  # while `error` still holds what the run held
    assert fails == (error is not None)


# --- runs from before ---

# The first line of a log that also held the recipe's epochs and images.
OLD = {
    "size": "T/2",
    "init": None,
    "convention": None,
    "seed": 0,
    "steps": 2,
    "precision": "float32",
    "data": "digits",
    "commit": "0123456789012345678901234567890123456789+",
    "torch": "2.12.0",
    "omega": 1.0,
    "kappa": 0.3,
    "interval": [0.0, 1.0],
    "lr": 0.003,
    "batch": 8,
    "epochs": 107,
    "images": 1797,
    "ema": 0.998,
    "warmup": 0,
}


@pytest.mark.parametrize("size", ["T/2", "iT/2"])
def test_a_run_from_before_goes_on(monkeypatch, tmp_path, size):
    """Its lines have no means by quarter of t; T/2 was guided at all times."""
    monkeypatch.setattr(evaluate, "report", nothing)
    words, old = ["--size", size, "--batch", "8", "--save", "2"], OLD
    if size == "iT/2":
        drawn = ("omega", "kappa", "interval")
        old = {k: v for k, v in OLD.items() if k not in drawn}
        old |= {"size": size, "lr": 0.006, "epochs": 28}
        same = []
    else:
        same = ["--guidance", "1", "0.3", "0", "1"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train.main([*words, *same, "--steps", "4", "--out", str(whole)], World())
    train.main([*words, *same, "--steps", "2", "--out", str(part)], World())
    _, line = (part / "log.jsonl").read_text().splitlines()
    line = {k: v for k, v in json.loads(line).items() if not k.endswith("_by_t")}
    (part / "log.jsonl").write_text(f"{json.dumps(old)}\n{json.dumps(line)}\n")
    if same:
        with pytest.raises(ValueError, match=r"a run with interval \[0.0, 1.0\], not \[0.0, 0.5\]"):
            train.main([*words, "--steps", "4", "--out", str(part)], World())
    train.main([*words, *same, "--steps", "4", "--out", str(part)], World())
    assert_same_bits(final(part, 4), final(whole, 4))
    first, second, third = map(json.loads, (part / "log.jsonl").read_text().splitlines())
    assert first == old and second == line and third["step"] == 4
    assert "raw_equal_by_t" in third and "raw_equal_by_t" not in second


# --- bad input ---


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--size", "Q"], "--size Q is unknown: choose one of T/2, S/2, B/4"),
        (["--steps", "0"], "--steps: 0: give 1 to 99999999"),
        (["--batch", "-3"], "--batch: -3: give 1 to 99999999"),
        (["--lr", "nan"], "--lr: nan: give a number above 0"),
        (["--lr", "inf"], "--lr: inf: give a number above 0"),
        (["--save", "0"], "--save: 0: give 1 to 99999999"),
        (["--steps", "100000000"], "--steps: 100000000: give 1 to 99999999"),
        (["--batch", "9" * 20], f"--batch: {'9' * 20}: give 1 to 99999999"),
        (["--seed", str(2**64)], f"--seed: {2**64}: give {-(2**63)} to {2**63 - 1}"),
        (["--seed", str(-(2**63) - 1)], f"--seed: {-(2**63) - 1}: give {-(2**63)} to"),
        (["--guidance", "inf", "0"], "--guidance inf 0.0: give OMEGA >= 0"),
        (["--fid", ""], "--fid is empty: give a value, or leave it out"),
        (["--data", " "], "--data is empty: give a value, or leave it out"),
        (["--vae="], "--vae= is empty: give a value, or leave it out"),
        (["--save", "often"], "argument --save: invalid int value: 'often'"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--fid", "digits", "--count", "1"], "--count: 1: give 2 to 2147483648"),
        (["--count", "9"], "--count would be ignored without --fid: leave it out"),
        (["--inception", "x"], "--inception would be ignored without --fid: leave it out"),
        (["--convention", "sit"], "--convention would be ignored without --init: leave it out"),
        (["--vae", "x"], "--vae would be ignored as digits holds pixels: leave it out"),
        (["--guidance", "1"], "--guidance 1.0: give OMEGA >= 0, KAPPA in [0, 1) and"),
        (["--guidance", "1", "1"], "--guidance 1.0 1.0: give OMEGA >= 0, KAPPA in"),
        (["--guidance", "1", "0.5", "0.8", "0.2"], "perhaps T0 <= T1 in [0, 1]"),
        (["--guidance", "1", "0.5", "0", "1", "2"], "give OMEGA >= 0"),
        (["--guidance", "1", "0.5", "0.2"], "--guidance 1.0 0.5 0.2: give OMEGA >= 0"),
        (["--guidance", "nan", "0.5"], "--guidance nan 0.5: give OMEGA >= 0"),
        (["--precision", "float16"], "argument --precision: invalid choice: 'float16' (choose fr"),
        (
            ["--fid", "digits", "--inception", "no.pth"],
            "no.pth is not a file: fetch https://github.com/mseitzer/pytorch-fid",
        ),
        (
            ["--fid", "no.npz"],
            "no.npz is not a file: give images or",
        ),
        (["--accumulate", "0"], "--accumulate: 0: give 1 to 99999999"),
        (
            ["--accumulate", "3"],
            "--batch 64 is not divisible by 3: give a multiple of processes times --accumulate",
        ),
        (
            ["--size", "XL"],
            "data/imagenet/index.json does not exist: run python data.py IMAGES data/imagenet",
        ),
        (
            ["--size", "B/4", "--data", "digits", "--init", "no.pt"],
            "no.pt is not a file: give a run's folder, or .safetensors, .pt or .pth weights",
        ),
        (["--init", "README.md"], "README.md cannot be read (it is no file of tensors without"),
        (
            ["--size", "B/4", "--data", "digits", "--init", ""],
            "--init is empty: give a value, or leave it out",
        ),
        (["--data", "README.md"], "README.md/index.json does not exist: run python data.py"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, flags, words):
    assert words in fails(monkeypatch, "train.py", "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_size_without_a_recipe_is_told_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(model.SIZES, "Q/2", (64, 1, 2))
    for size in ("Q", "Q/2"):
        words = f"--size {size} has no recipe: add one to train.RECIPES, or choose one of T/2, S/2"
        with pytest.raises(ValueError, match=words):
            train.main(["--size", size, "--out", str(tmp_path / "run")], World())
    monkeypatch.setitem(train.RECIPES, "Q/2", train.RECIPES["T/2"])
    assert train.choose_recipe("Q")[0] == "Q/2"
    assert not (tmp_path / "run").exists()


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--size", "B/4", "--data", "digits"],
            "holds a run with size T/2, not B/4: choose another --out",
        ),
        (["--seed", "7"], "holds a run with seed 0, not 7: choose another --out"),
        (["--batch", "8"], "holds a run with batch 16, not 8: choose another --out"),
    ],
)
def test_another_runs_folder_is_left_as_it_is(monkeypatch, undisturbed, flags, words):
    before = snapshot(undisturbed[0])
    assert words in fails(monkeypatch, *command(undisturbed[0], *flags))
    assert snapshot(undisturbed[0]) == before


@slow
@pytest.mark.parametrize(
    "change, flags, words",
    [
        (lambda folder: (folder / "log.jsonl").unlink(), [], "log.jsonl is missing, or not the l"),
        (
            lambda folder: (folder / "log.jsonl").write_bytes(b"\xff\n"),
            [],
            "log.jsonl is missing, or not the log of a run: choose another --out",
        ),
        (
            lambda folder: None,
            ["--steps", "50"],
            "holds a run of 60 steps: give --steps 60 or more",
        ),
        (
            lambda folder: (folder / "state-00000060.safetensors").write_bytes(b"{"),
            ["--steps", "70"],
            "state-00000060.safetensors cannot be read (",
        ),
        (
            lambda folder: (folder / "ema-00000060.safetensors").write_bytes(b"{"),
            ["--steps", "70"],
            "ema-00000060.safetensors cannot be read (",
        ),
    ],
)
def test_a_folder_out_of_order_is_left_as_it_is(
    monkeypatch, undisturbed, tmp_path, change, flags, words
):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    change(folder)
    before = snapshot(folder)
    assert words in fails(monkeypatch, *command(folder), *flags)
    assert snapshot(folder) == before


def test_a_file_for_a_folder(monkeypatch, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "run is a file: choose another folder to write" in fails(
        monkeypatch, *command(tmp_path / "run")
    )
    assert (tmp_path / "run").read_text() == "mine"


@slow
def test_other_files_in_a_folder_are_left_alone(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    shutil.copy(folder / "ema-00000060.safetensors", folder / "ema-best.safetensors")
    finish(fork(*command(folder, steps=80)))
    assert {p.name for p in folder.glob("ema-*")} == {
        f"ema-{k}.safetensors" for k in ("best", "00000070", "00000080")
    }
    assert weights.find_checkpoint(folder) == folder / "ema-00000080.safetensors"


def test_a_loss_that_is_not_finite_ends_the_run_and_costs_no_save(monkeypatch, tmp_path):
    message = fails(monkeypatch, *command(tmp_path / "run", "--lr", "1e30", "--save", "2"))
    pairs = r"(\(0\.\d{4}, 0\.\d{4}\), ){8}\.\.\."
    where = r"not finite at step 2 in 16 rows, with \(t, r\)"
    assert re.search(f"{where} = {pairs}; nothing was", message)
    assert all(math.isfinite(entry["loss"]) for entry in losses(tmp_path / "run"))


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, tmp_path):
    """The loss of step 1 is computed before the update, which is too large."""
    message = fails(monkeypatch, *command(tmp_path / "run", "--lr", "1e39", "--save", "1"))
    assert (
        "the weights are not finite after step 1; nothing was saved; choose another --out"
        in message
    )
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_two_runs_do_not_write_to_one_folder(monkeypatch, tmp_path):
    lock = runtime.lock_folder(tmp_path / "run")
    assert "another process is writing to" in fails(monkeypatch, *command(tmp_path / "run"))
    lock.release()


@slow
def test_what_fails_on_one_process_ends_all_with_one_line(monkeypatch, tmp_path):
    """A shard of --data that the second of two processes checks is damaged."""
    paint(tmp_path / "images", 2, 6)
    monkeypatch.setattr(data, "SHARD", 6)
    data.main([str(tmp_path / "images"), str(tmp_path / "data")], World())
    shard = tmp_path / "data" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    words = [*LAUNCH, "2", *command(tmp_path / "run", "--data", str(tmp_path / "data"))]
    process = start(*words)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert errors.count("train.py: ") == 1
    assert f"train.py: {shard} does not have the checksum" in errors
    assert "Traceback" not in errors.split("failed (exitcode")[0], "what follows is torchrun's own"


def test_a_folder_with_a_foreign_log_is_left_as_it_is(monkeypatch, tmp_path):
    for text in ("", "[1]\n", '{"epoch": 1}\n', "hello\n"):
        (tmp_path / "log.jsonl").write_text(text)
        message = fails(monkeypatch, *command(tmp_path))
        assert "choose another --out" in message and (tmp_path / "log.jsonl").read_text() == text


@slow
def test_without_the_last_save_the_one_before_is_continued(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    (folder / "state-00000060.safetensors").unlink()
    message, _ = fork(*command(folder)).communicate()
    assert "ema-00000060.safetensors is later than the save to continue from, step 50" in message
    (folder / "ema-00000060.safetensors").unlink()
    finish(fork(*command(folder)))
    assert_same_bits(final(folder), final(undisturbed[0]))
    assert losses(folder) == losses(undisturbed[0])


def test_only_new_saves_are_read_to_be_scored(monkeypatch, tmp_path):
    """Those before are 2.7 GB each at XL; a run that goes on looks at all of them once."""
    seen, score = [], evaluate.score

    def spy(sampler, *inputs, **options):
        path, word, digest = sampler.weights.split(" ")
        assert (word, digest) == ("sha256", runtime.sha256(path))
        seen.append(int(Path(path).stem[-2:]))
        return score(sampler, *inputs, **options)

    monkeypatch.setattr(weights, "LASTING", 2)
    monkeypatch.setattr(evaluate, "score", spy)
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    words = ["--batch", "4", "--save", "2", "--fid", "digits", "--count", "2", "--out"]
    train.main([*words, str(tmp_path / "run"), "--steps", "6"], World())
    assert seen == [2, 4, 6]
    train.main([*words, str(tmp_path / "run"), "--steps", "8"], World())
    assert seen == [2, 4, 6, 2, 4, 6, 8]
    assert [line["step"] for line in losses(tmp_path / "run") if "fid" in line] == [2, 4, 6, 8]


def test_scores_in_a_runs_log_do_not_stop_it(monkeypatch, tmp_path):
    """evaluate.py --out RUN/log.jsonl writes lines without a step."""
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    words = ["--batch", "4", "--out", str(tmp_path), "--steps"]
    train.main([*words, "1"], World())
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"fid": 3.0}\n')
    train.main([*words, "2"], World())
    assert [line.get("step") for line in losses(tmp_path)] == [1, None, 2]


def test_one_class_may_be_told_that_it_is_unguided():
    recipe = train.RECIPES["T/2"]
    assert train.choose_guidance(recipe, "x", 1, [1.0, 0.0]) == (1.0, 0.0, (0.0, 1.0))
    with pytest.raises(ValueError, match="--guidance would be ignored as x has one class"):
        train.choose_guidance(recipe, "x", 1, [1.0, 0.5])


@pytest.mark.parametrize("terminal, seconds", [(True, 0.1), (False, 60)])
def test_a_schedulers_file_gets_a_line_a_minute(monkeypatch, tmp_path, terminal, seconds):
    seen, tqdm = {}, train.tqdm
    monkeypatch.setattr(train, "tqdm", lambda *a, **k: (seen.update(k), tqdm(*a, **k))[1])
    monkeypatch.setattr(train.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    train.main(["--batch", "4", "--steps", "1", "--out", str(tmp_path)], World())
    assert seen == {"initial": 0, "total": 1, "disable": False, "mininterval": seconds}


def test_a_run_that_went_wrong_names_its_last_good_save(tmp_path):
    assert weights.last_good(tmp_path).startswith("nothing was saved; choose another --out")
    for step in (50, 100):
        weights.checkpoint(tmp_path, "ema", step).write_bytes(b"")
    path = weights.checkpoint(tmp_path, "ema", 100)
    wanted = f"the last good checkpoint is {path}: give it to --init; choose another --out"
    assert weights.last_good(tmp_path).startswith(wanted)


# --- the order of what is written ---


@pytest.fixture
def plain(monkeypatch):
    """Train without the report and the curve, which take longer than a few steps."""
    monkeypatch.setattr(evaluate, "report", nothing)
    monkeypatch.setattr(evaluate, "plot", nothing)


def broken(error):
    """Return a function that raises `error`, whatever it is called with."""

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "module, name, error",
    [
        (evaluate, "plot", ImportError("no FreeType")),
        (evaluate, "plot", KeyError("step")),
        (sample, "generate", MemoryError()),
        (sample, "save_grid", OSError(28, "No space")),
    ],
)
def test_a_picture_that_fails_costs_a_line(monkeypatch, tmp_path, capsys, module, name, error):
    monkeypatch.setattr(evaluate, "report", nothing)
    monkeypatch.setattr(module, name, broken(error))
    train.main(["--batch", "4", "--save", "1", "--steps", "2", "--out", str(tmp_path)], World())
    assert weights.newest(tmp_path) == 2 and [line["step"] for line in losses(tmp_path)] == [1, 2]
    lost = ["curve.png"] if name == "plot" else ["grid-00000001.png", "grid-00000002.png"]
    printed, errors = capsys.readouterr()
    for picture in lost:
        assert f"{tmp_path / picture} is left out: {runtime.reason(error)}\n" in errors
    kept = {"curve.png", "grid-00000001.png", "grid-00000002.png"} - {*lost}
    assert {p.name for p in tmp_path.glob("*.png")} == kept
    assert str(tmp_path / sorted(kept)[-1]) in printed and lost[-1] not in printed


def test_samples_that_are_not_finite_cost_the_grid_alone(plain, monkeypatch, tmp_path, capsys):
    nan = torch.full((100, 1, 8, 8), torch.nan)
    monkeypatch.setattr(sample, "generate", lambda *_, **__: nan)
    train.main(["--batch", "4", "--steps", "1", "--out", str(tmp_path)], World())
    assert "grid-00000001.png is left out: samples have values" in capsys.readouterr().err
    assert weights.newest(tmp_path) == 1


def test_a_kill_before_the_pictures_costs_nothing(plain, monkeypatch, tmp_path):
    """The checkpoint is there before them, and who goes on from it draws them."""
    words = ["--batch", "4", "--save", "1", "--out", str(tmp_path), "--steps"]
    for name in ("plot", "save_grid"):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(evaluate if name == "plot" else sample, name, broken(KeyboardInterrupt()))
            train.main([*words, "2"], World())
        assert weights.newest(tmp_path) == 1
        assert not list(tmp_path.glob("grid-*"))
    train.main([*words, "1"], World())
    first = (tmp_path / "grid-00000001.png").read_bytes()
    train.main([*words, "2"], World())
    train.main([*words[:-2], str(tmp_path / "whole"), "--steps", "2"], World())
    for name in ("grid-00000001.png", "grid-00000002.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "grid-00000001.png").read_bytes() == first


# --- signals ---


def stopped_by(monkeypatch, tmp_path, moment, *signals, score=None):
    """Train sequences, and send signals to this process at its third call of `moment`, the name of
    a function of train.py. Return what train.fit returns."""
    calls, function = [], getattr(train, moment)

    def signalled(*args, **options):
        calls.append(args)
        for number in signals if len(calls) == 3 else ():
            os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(train, moment, signalled)
    return train_sequences((tmp_path, 40, 15), World(), score=score)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment, step", [("update", 10), ("save", 40)])
def test_a_signal_is_acknowledged_at_once(
    plain, monkeypatch, tmp_path, capfd, number, moment, step
):
    """While training, and while saving; nothing is scored after it."""
    scores = []
    found = stopped_by(
        monkeypatch, tmp_path, moment, number, score=lambda *_: scores.append(1) or {}
    )
    printed, errors = capfd.readouterr()
    assert found is None and not scores and weights.newest(tmp_path) == step
    assert errors.count("saving, then ending; the next signal ends at once\n") == 1
    assert f"stopped by a signal after step {step}, which is saved" in printed


def test_a_second_signal_ends_training_at_once(plain, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            stopped_by(monkeypatch, tmp_path, "update", signal.SIGTERM, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert weights.newest(tmp_path) == 0
    runtime.lock_folder(tmp_path).release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_scores_at_once_and_they_are_made_up_for(
    plain, monkeypatch, tmp_path, capfd, number
):
    monkeypatch.setattr(weights, "LASTING", 20)
    before = signal.getsignal(number)

    def score(sampler, known):
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        train_sequences((tmp_path, 40, 20), World(), score=score)
    assert "ending; the next signal" in capfd.readouterr().err
    assert signal.getsignal(number) == before and weights.newest(tmp_path) == 20
    train_sequences((tmp_path, 40, 20), World(), score=lambda *_: {"fid": 1.0})
    assert scored(tmp_path) == [20, 40]


# --- what belongs together ---


def test_a_replaced_reference_is_scored_again(plain, tmp_path):
    ref = tmp_path / "ref.npz"
    words = ["--batch", "4", "--steps", "1", "--out", str(tmp_path / "run"), "--count", "9"]
    for scale, lines in ((1, 1), (1, 1), (2, 2), (2, 2), (1, 2)):
        np.savez(ref, mu=np.zeros(64), sigma=scale * np.eye(64))
        train.main([*words, "--fid", str(ref)], World())
        assert len(scored(tmp_path / "run")) == lines
    found = [entry for entry in losses(tmp_path / "run") if "fid" in entry]
    for entry in found:
        assert entry["weights"].endswith(f" sha256 {runtime.sha256(entry['weights'].split()[0])}")
    assert found[0]["fid"] != found[1]["fid"]


@pytest.mark.parametrize("kinds", [("state",), ("ema",), ("state", "ema")])
@pytest.mark.parametrize("step, seed, words", [(2, 3, "step 2, not 1"), (1, 4, "seed 4, not 3")])
def test_files_of_another_save_are_not_continued(plain, tmp_path, kinds, step, seed, words):
    """From another step, or from another run's folder."""
    other, folder = tmp_path / "other", tmp_path / "run"
    train_sequences((other, step, 1), World(), seed=seed)
    train_sequences((folder, 1, 1), World())
    for kind in kinds:
        shutil.copy(weights.checkpoint(other, kind, step), weights.checkpoint(folder, kind, 1))
    with pytest.raises(ValueError, match=f"{kinds[0]}-00000001.*{words}.*: "):
        train_sequences((folder, 3, 1), World())


def wide(kind, vae=""):
    """Return a data set of images that are twice as wide as high."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    if kind == "pixels":
        items = torch.randint(256, (24, 3, 8, 16), dtype=torch.uint8, generator=g)
    else:
        items = torch.rand(24, 2, 2, 4, 8, 16, generator=g).half()
    return data.Dataset("wide", kind, ["a", "b"], tuple(items.shape[-3:]), True, labels, items, vae)


@pytest.mark.parametrize("kind, resolution", [("pixels", "8x16"), ("latents", "64x128")])
def test_images_that_are_not_square_are_trained_and_drawn_as_they_are(
    plain, tmp_path, kind, resolution
):
    """And the checkpoint says which VAE made them."""
    vae = "" if kind == "pixels" else "5" * 64
    dataset = wide(kind, vae)
    channels = dataset.shape[0]
    method = train.dit_method((64, 1, 2), channels=channels, classes=2)
    found = train.fit(method, dataset, train.Plan(1e-3, 4, 2), tmp_path, World())
    with safe_open(tmp_path / "ema-00000002.safetensors", "pt") as file:
        about = file.metadata()
    assert about["resolution"] == resolution and about["vae"] == vae
    loaded = weights.load(tmp_path)
    assert loaded.shape == found.shape == dataset.shape
    assert loaded.vae_sha256 == found.vae_sha256 == vae
    x, y = (sample.generate(sampler, torch.arange(2)) for sampler in (found, loaded))
    assert x.shape == (2, *dataset.shape) and torch.equal(x, y)
    with Image.open(tmp_path / "grid-00000002.png") as picture:
        assert picture.width == 10 * (32 + 4) + 4 and picture.height == 2 * (16 + 4) + 4


def test_the_vae_is_told_which_one_encoded_the_latents(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(data, "load_data", lambda *_: wide("latents", "5" * 64))
    monkeypatch.setattr(weights, "load_vae", lambda *inputs: asked.append(inputs))
    monkeypatch.setattr(train, "fit", lambda *_, **__: None)
    words = ["--data", "x", "--vae", "file", "--size", "T", "--out", str(tmp_path)]
    train.main(words, World())
    assert asked == [("file", torch.device("cpu"), "5" * 64)]


def test_processes_that_see_different_things_are_told(monkeypatch, tmp_path):
    """Data, arguments or saves; otherwise they would wait for each other, or train a mixture."""
    gather, seen = runtime.all_gather, []

    def other(change):
        def all_gather(value):
            seen.append(value)
            return [value, change] if len(seen) == number else gather(value)

        return all_gather

    for number, words in ((1, "different data or arguments"), (2, "different saves in ")):
        seen.clear()
        monkeypatch.setattr(runtime, "all_gather", other("changed"))
        with pytest.raises(ValueError, match=words):
            train_sequences((tmp_path, 40, 20), World())
    [_, plan, name, every, scores], _ = seen
    assert (plan.seed, name, every, scores) == (3, "waves", 20, True)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_folder_named_digits_is_not_the_digits(plain, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "images", 2, 2, 8)
    data.main(["images", "digits"], World())
    words = ["--batch", "4", "--steps", "1", "--out"]
    with pytest.raises(ValueError, match="give ./digits"):
        train.main([*words, "a", "--data", "digits"], World())
    train.main([*words, "b", "--data", "./digits"], World())
    train.main([*words, "c"], World())
    assert weights.load("b").shape == (3, 8, 8) and weights.load("c").shape == (1, 8, 8)


# --- a log in disorder ---


def test_lines_by_hand_in_the_log_cost_nothing(monkeypatch, tmp_path):
    """At the front, in the middle, and at the end without a newline."""
    monkeypatch.setattr(evaluate, "report", nothing)
    words = ["--batch", "4", "--save", "1", "--out", str(tmp_path), "--steps"]
    train.main([*words, "2"], World())
    path = tmp_path / "log.jsonl"
    first, *rest = path.read_text().splitlines()
    odd = ["# mine", "[1]", "7", '"x"', "null", "\xff", "{", '{"step": 1', "9" * 5000, "[" * 9999]
    steps = [json.dumps({"step": step}) for step in ("1", None, [1], 1e9, -math.inf, math.nan)]
    lines = [*odd, first, *odd, "{}", *steps, *rest, '{"step": 1, "grad_norm": "x"}', *odd, "{"]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    train.main([*words, "3"], World())
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written[0] == json.loads(first) and weights.newest(tmp_path) == 3
    assert [line["step"] for line in written[1:] if "loss" in line] == [1, 2, 3]
    assert all(line.get("step", 1) in (1, 2, 3) for line in written)
    assert (tmp_path / "grid-00000003.png").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_log_that_is_no_file_is_told(tmp_path, make):
    make(tmp_path / "log.jsonl")
    with pytest.raises(FileNotFoundError, match="log.jsonl is not a file"):
        train_sequences((tmp_path, 40, 20), World())
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_try_that_failed_before_its_first_save_keeps_no_folder_occupied(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(evaluate, "report", nothing)
    words = ["--batch", "4", "--steps", "2", "--out", str(tmp_path), "--seed"]
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(train, "update", broken(RuntimeError()))
        train.main([*words, "1"], World())
    with monkeypatch.context() as m, pytest.raises(ValueError, match="writing to"):
        lock = runtime.lock_folder(tmp_path)
        train.main([*words, "2"], World())
    assert json.loads((tmp_path / "log.jsonl").read_text())["seed"] == 1
    lock.release()
    train.main([*words, "2"], World())
    first, line = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["seed"] == 2 and line["step"] == 2
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()  # its log is not that of a try
    for _ in "ab":
        with pytest.raises(ValueError, match="holds a run with seed 2, not 3"):
            train.main([*words, "3"], World())
        (tmp_path / "curve.png").unlink(missing_ok=True)
    capsys.readouterr()
    train.main([*words, "2"], World())
    assert f"{tmp_path} holds no save: starting from step 0\n" in capsys.readouterr().err


def test_half_a_save_is_told(plain, tmp_path, capsys):
    words = ["--batch", "4", "--steps", "2", "--out", str(tmp_path), "--save"]
    train.main([*words, "1"], World())
    (tmp_path / "ema-00000002.safetensors").unlink()
    assert capsys.readouterr().err.count("half a save") == 0
    train.main([*words, "1"], World())
    line = f"{tmp_path / 'state-00000002.safetensors'} is half a save: going on from step 1\n"
    assert line in capsys.readouterr().err and weights.newest(tmp_path) == 2
    for path in (*tmp_path.glob("ema-*"), *tmp_path.glob("state-00000001.*")):
        path.unlink()
    with pytest.raises(ValueError, match="holds a run with seed 0, not 7"):
        train.main([*words, "1", "--seed", "7"], World())
    assert "is half a save: going on from step 0\n" in capsys.readouterr().err
    train.main([*words, "1"], World())
    assert [line["step"] for line in losses(tmp_path)] == [1, 2]


def test_what_a_kill_left_is_removed_once_the_folder_is_known_to_be_the_runs(plain, tmp_path):
    """And nothing of anybody else's."""
    left = tmp_path / ".meanflow-abcdefgh.tmp"
    others = [tmp_path / name for name in (".tmpBackup", ".meanflow-thesis", "meanflow-tmp-x")]
    for folder in (left, *others):
        folder.mkdir()
        (folder / "state-00000020.safetensors").write_text("x")
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="is missing, or not the log of a run"):
        train_sequences((tmp_path, 2, 2), World())
    assert left.exists() and not (tmp_path / ".lock").exists()
    (tmp_path / "log.jsonl").unlink()
    train_sequences((tmp_path, 2, 2), World())
    assert not left.exists() and all(any(folder.iterdir()) for folder in others)


def test_a_network_that_cannot_be_compiled_is_told_in_one_line(monkeypatch, tmp_path):
    error = InductorError(RuntimeError("no C++ compiler"), None)
    monkeypatch.setattr(meanflow, "fast_loss", broken(error))
    message = fails(monkeypatch, *command(tmp_path / "run"))
    assert "cannot be compiled (" in message and message.endswith("give train.py --no-compile")
