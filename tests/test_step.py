"""benchmarks/step.py: the costs in its table, and how exact the ways to get du/dt are."""

import functools
import time

import pytest
import step
import torch

import dual
import meanflow
import model
import runtime

pytestmark = pytest.mark.slow


gigaflop = functools.cache(step.gigaflop)


def units(key, size, guided):
    """Return the cost of a step in forwards of the network."""
    return 3 * gigaflop(key, size, guided) / gigaflop("flow", size, False)


@pytest.mark.parametrize("size, forward", [("B/2", 46.0), ("L/2", 161.4), ("XL/2", 237.2)])
def test_the_step_costs_what_is_claimed(size, forward):
    """In forwards: flow matching 3, ours at most 3.3, or 4.59 guided; the split alone, the authors'
    and the usual rewrite what torch.func.jvp, at three forwards, leaves them."""
    assert gigaflop("flow", size, False) / 3 == pytest.approx(forward, rel=1e-2)
    for guided, most, func in ((False, 1.10 * 3, 3.5), (True, 1.53 * 3, 4.75)):
        assert units("ours", size, guided) <= most
        assert units("func", size, guided) == pytest.approx(func, rel=1e-3)
    assert units("authors", size, True) == pytest.approx(7, rel=1e-3)
    assert units("plain", size, True) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize("size, ours, authors", [("iB/2", 7, 11.33), ("iXL/2", 5.5, 8.83)])
def test_a_step_of_imf_costs_what_is_claimed(size, ours, authors):
    """In forwards without v head: 5 + 3 h / D, the authors' 8 + 5 h / D in PyTorch."""
    assert ours <= units("ours", size, True) <= 1.02 * ours
    assert units("authors", size, True) == pytest.approx(authors, rel=0.01)


def test_the_unet_costs_what_is_claimed():
    """Value and tangent 2.35 forwards at most; a step what follows, a quarter being such rows."""
    _, networks, rows = step.problem("UNet", 4, "meta")
    [net], (x, y, draws) = networks(step.unchanged).values(), rows.values()
    inputs = x, draws.t, draws.r
    forward = step.count_flops(net, *inputs, y)
    both = step.count_flops(meanflow.derivative, net, *inputs, draws.e, y, jvp=dual.jvp)
    assert both <= 2.35 * forward
    for guided, most in ((False, 3 + 1.35 / 4), (True, 4.25 + 1.35 / 4)):
        assert units("ours", "UNet", guided) <= most


def test_the_unet_is_told_both_times():
    _, networks, rows = step.problem("UNet", 2, "cpu")
    [net], t = networks(step.unchanged).values(), torch.full((2,), 0.5)
    times = (t, 0 * t), (t, t), (t + 0.25, 0 * t + 0.25)
    a, *others = (net(rows["x"], *pair, rows["y"]) for pair in times)
    for b in others:
        assert (a - b).norm() > 1e-3 * a.norm()


@pytest.mark.parametrize("size", ["T/2", "iT/2", "UNet"])
def test_the_formulations_are_one_loss(size):
    """Unweighted, of a network whose class and null velocities are far apart."""
    params, networks, rows = step.problem(size, 8, "cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in params if size != "UNet" else []:
            p.add_(torch.randn(p.shape, generator=g), alpha=0.15)
    options = networks(step.unchanged) | step.options(size, True) | {"p": 0}
    formulations = {k: f for k, f in step.formulations(size).items() if k != "flow"}
    *found, last = (f(**rows, **options)[0] for f in formulations.values())
    for each in found:
        assert torch.allclose(each, last, rtol=1e-5)
    if size == "iT/2":
        rows["draws"] = rows["draws"]._replace(kappa=0 * rows["draws"].kappa)
    else:
        options["kappa"] = 0
    assert not torch.allclose(formulations["ours"](**rows, **options)[0], last, rtol=1e-3)


def rows(capsys, *flags, size="T/2"):
    step.main(["--size", size, "--batch", "4", "--rounds", "2", *flags])
    lines = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_all_formulations_are_timed(capsys):
    found = rows(capsys, "--eager")
    assert [row[0] for row in found] == [*step.NAMES.values()] + [*step.NAMES.values()][1:]
    assert all(float(row[4]) >= 3 and float(row[7]) > 0 for row in found)
    assert float(found[0][8]) == 1 < float(found[1][8])
    found = rows(capsys, "--eager", "--only", "authors", "ours", size="iT/2")
    assert [row[0] for row in found] == [step.NAMES[key] for key in ("flow", "authors", "ours")]


def test_the_table_goes_on_after_a_formulation_that_fails(monkeypatch, capsys):
    """One lacks memory, one compiles for ever; the others have their numbers."""

    def greedy(*_, **__):
        raise torch.OutOfMemoryError("no")

    def slow(*_, **__):
        time.sleep(100)

    monkeypatch.setitem(step.FORMULATIONS, "authors", greedy)
    monkeypatch.setitem(step.FORMULATIONS, "plain", slow)
    monkeypatch.setattr(step, "gigaflop", lambda *_: 1.0)
    found = rows(capsys, "--eager", "--limit", "0.5")
    assert [row[0] for row in found] == [*step.NAMES.values()] + [*step.NAMES.values()][1:]
    for row in found:
        if "authors" in row[0]:
            assert row[5] == "out of memory"
        elif "then forward" in row[0]:
            assert row[5] == "TimeoutError: no first step in 0.5 s"
        else:
            assert float(row[7]) > 0
    found = rows(capsys, "--eager", "--only", "ours")
    assert [row[0] for row in found] == ["flow matching", "ours", "ours"]


def test_without_flow_matching_there_is_no_ratio(monkeypatch, capsys):
    def greedy(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(step.FORMULATIONS, "flow", greedy)
    monkeypatch.setattr(step, "gigaflop", lambda *_: 1.0)
    found = rows(capsys, "--eager", "--only", "ours")
    assert found[0][5] == "out of memory" and found[1][8] == "" and float(found[1][7]) > 0


def test_forward_mode_is_exact_and_finite_differences_are_not(tmp_path, capsys):
    """In bfloat16 by a factor of five and more; torch.func.jvp and dual.jvp are as exact."""
    g, path = torch.Generator().manual_seed(0), tmp_path / "random.safetensors"
    params = model.init("T/2", channels=1, classes=10, generator=g)
    params = {name: p + 0.05 * torch.randn(p.shape, generator=g) for name, p in params.items()}
    runtime.save_tensors(path, params, {"kind": "pixels", "resolution": "8"})
    step.main(["--derivative", "--weights", str(path), "--batch", "32", "--rounds", "2"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {way: [float(cell) for cell in cells] for way, *cells in lines[2:]}
    assert [*found] == [*step.WAYS]
    (ours, _, *errors), (func, _, *others), *differences = found.values()
    assert ours <= 2.1 and func == 3 and [row[0] for row in differences] == [2, 3, 3]
    for a, b, most in zip(errors, others, (1e-6, 1e-2)):
        assert a < most and a == pytest.approx(b, rel=0.3)
    for _, _, single, half in differences:
        assert single > 20 * errors[0] and half > 5 * errors[1]


def test_without_a_trained_network_a_line_says_how_to_train_one(tmp_path):
    for path, why in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no ema-STEP")):
        with pytest.raises(SystemExit, match=f"{why}.*: train one with python train.py --out"):
            step.main(["--derivative", "--weights", str(path)])
    g, path = torch.Generator().manual_seed(0), tmp_path / "colour.safetensors"
    params = model.init("T/2", channels=3, classes=10, generator=g)
    runtime.save_tensors(path, params, {"kind": "pixels", "resolution": "8"})
    with pytest.raises(SystemExit, match="not a DiT of the digits"):
        step.main(["--derivative", "--weights", str(path)])
