"""benchmarks/step.py: the costs in its table."""

import pytest
import step

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


def test_all_formulations_are_timed(capsys):
    step.main(["--size", "T/2", "--batch", "4", "--rounds", "2", "--eager"])
    rows = [
        row.split(" | ") for row in capsys.readouterr().out.splitlines() if row.startswith("| ")
    ][1:]
    assert len(rows) == 7 and {row[0].removeprefix("| ") for row in rows} == set(step.NAMES)
    assert all(float(row[4]) >= 3 and float(row[7]) > 0 for row in rows)
