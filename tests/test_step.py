"""benchmarks/step.py: the costs in its table."""

import time

import pytest
import step
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", ["B/2", "L/2", "XL/2"])
def test_the_step_costs_what_is_claimed(size):
    """In units of a forward: flow matching 3, ours at most 3.3, or 4.59 guided, the authors' 7."""
    unit = step.gigaflop(step.flow_matching, size, False) / 3
    assert unit * 1e9 == pytest.approx(
        {"B/2": 46.0e9, "L/2": 161.4e9, "XL/2": 237.2e9}[size], rel=1e-2
    )
    for guided, most in ((False, 1.10 * 3), (True, 1.53 * 3)):
        assert step.gigaflop(step.ours, size, guided) <= most * unit
    assert step.gigaflop(step.jvp_with_graph, size, True) == pytest.approx(7 * unit, rel=1e-3)


@pytest.mark.parametrize("size, units, authors", [("iB/2", 7, 11.33), ("iXL/2", 5.5, 8.83)])
def test_a_step_of_imf_costs_what_is_claimed(size, units, authors):
    """In units of a forward without v head: 5 + 3 h / D, the authors' 8 + 5 h / D in PyTorch."""
    unit = step.gigaflop(step.imf_flow_matching, size, True) / 3
    assert unit <= step.gigaflop(step.imf_ours, size, True) / units <= 1.02 * unit
    found = step.gigaflop(step.imf_jvp_with_graph, size, True) / unit
    assert found == pytest.approx(authors, rel=0.01)


def test_the_formulations_of_imf_are_one_loss():
    """Unweighted, of a network whose class and null velocities are far apart."""
    params, x, y, draws = step.problem("iT/2", 6, "cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in params.values():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.15)
    options = step.options(True) | {"p": 0}
    keys = [key for key in step.IMPROVED if key != "flow"]
    found = [step.IMPROVED[key](params, x, y, draws, **options) for key in keys]
    for rows in found:
        assert torch.allclose(rows, found[-1], rtol=1e-5)
    unguided = draws._replace(kappa=0 * draws.kappa)
    rows = step.imf_ours(params, x, y, unguided, **options)
    assert not torch.allclose(rows, found[-1], rtol=1e-3)


def rows(capsys, *flags, size="T/2"):
    step.main(["--size", size, "--batch", "4", "--rounds", "2", *flags])
    lines = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]


def test_all_formulations_are_timed(capsys):
    found = rows(capsys, "--eager")
    assert [row[0] for row in found] == [*step.NAMES.values()] + [*step.NAMES.values()][1:]
    assert all(float(row[4]) >= 3 and float(row[7]) > 0 for row in found)
    assert float(found[0][8]) == 1 < float(found[1][8])
    found = rows(capsys, "--eager", size="iT/2")
    assert [row[0] for row in found] == [*step.NAMES.values()]


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
