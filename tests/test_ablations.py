"""benchmarks/ablations.py and curves.py: every row runs, goes on when killed, and is told right."""

import json
import math
from functools import partial

import ablations
import curves
import pytest
import torch
from ablations import METRICS, TABLES, Setting

import data
import model

pytestmark = pytest.mark.slow
ROWS = [(title, *row) for title, rows in TABLES.items() for row in rows]
DIGITS = data.digits()._replace(labels=data.digits().labels[:256], items=data.digits().items[:256])


def features(x):
    return x.flatten(1)[:, ::4]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(ablations, "SAMPLES", 40)
    monkeypatch.setattr(ablations.prepare, "dataset", DIGITS, raising=False)
    reference = ablations.make_reference(DIGITS, features)
    monkeypatch.setattr(ablations.prepare, "reference", reference, raising=False)


@pytest.mark.parametrize(
    "title, label, how, published", ROWS, ids=[f"{r[0][0]} {r[1]}" for r in ROWS]
)
def test_every_row_trains_and_is_judged(title, label, how, published):
    line = ablations.run({"data": "digits", "steps": 3, "seed": 0, "change": how})
    assert json.loads(json.dumps(line))["pixels"] > 0 and 0 <= line["class"] <= 1
    assert [line[name] for name in METRICS] == [line[name] for name in METRICS if line[name] >= 0]


def weights(setting, seed=0):
    g = torch.Generator().manual_seed(seed)
    params, condition = ablations.parameters(setting, (64, 1, 2), 1, 10, g)
    params = {
        name: (p + 0.1 * torch.randn(p.shape, generator=g)).double() for name, p in params.items()
    }
    return params, partial(model.dit, params, condition=condition)


def rows(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, v = torch.randn(2, count, 1, 4, 4, generator=g).double()
    r, t = torch.rand(2, count, generator=g).double().sort(0).values
    return z, t, r, torch.arange(count), v


@pytest.mark.parametrize("what", ["t, r", "t, t - r", "t, r, t - r", "t - r"])
def test_a_condition_knows_what_it_names_and_nothing_else(what):
    params, net = weights(Setting(condition=what))
    z, t, r, y, _ = rows()
    u = net(z, t, r, y)
    by_difference = net(z, t + 0.1, r + 0.1, y)
    assert torch.allclose(u, by_difference) == (what == "t - r")
    assert not torch.allclose(u, net(z, t + 0.1, r, y))
    assert not torch.allclose(u, net(z, t, r + 0.1, y))
    if what == "t, t - r":
        assert torch.equal(u, model.dit(params, z, t, r, y))
    # r alone changes u through no embedder of t
    names = {name.split(".")[0] for name in params if "_embedder.mlp" in name}
    assert len(names) == len(what.split(", "))


def test_a_tangent_is_a_direction():
    """Differences along (a v, b, c) agree; the default is that of dit_jvp."""
    params, net = weights(Setting())
    z, t, r, y, v = rows()
    _, right = model.dit_jvp(params, z, t, r, y, v[2:])
    for tangent in ((1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)):
        a, b, c = tangent
        u, dudt = ablations.along(net, tangent)(z, t, r, y, v[2:])
        h = 1e-5
        ahead, behind = (net(z + s * a * v, t + s * b, r + s * c, y) for s in (h, -h))
        assert torch.allclose(dudt, (ahead - behind)[2:] / (2 * h), atol=1e-7)
        assert torch.allclose(u, net(z, t, r, y)) and not dudt.requires_grad
        assert torch.allclose(dudt, right, atol=1e-10) == (tangent == (1, 1, 0))


def test_draws_have_the_share_and_the_times_that_a_setting_says():
    shape, g = (4000, 1), torch.Generator().manual_seed(0)
    draws = ablations.draw(Setting(share=0.5, times="uniform"), shape, g)
    assert (draws.t == draws.r).sum() == 2000 and (draws.r <= draws.t).all()
    equal = draws.t[:2000].sort().values  # the larger of two uniform numbers
    assert (equal - torch.linspace(0, 1, 2000).sqrt()).abs().max() < 0.05
    draws = ablations.draw(Setting(times=(-0.2, 1.2)), shape, g)
    both = torch.logit(torch.stack((draws.t, draws.r))[:, 3000:])
    assert abs(both.mean() + 0.2) < 0.1 and abs(both.std() - 1.2) < 0.1


def test_a_killed_table_goes_on(tmp_path, monkeypatch, capsys):
    """Two rows of one seed, then the others; a line cut short is run again."""
    monkeypatch.setattr(ablations, "train_classifier", lambda *_: (torch.nn.Flatten(), 0.5))
    path = tmp_path / "results.jsonl"
    args = ["--tables", "a", "--steps", "2", "--seeds", "1", "--workers", "2"]
    monkeypatch.setattr(ablations, "RESULTS", path)
    ablations.main(args)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and {json.loads(line)["data"] for line in lines} == {"digits"}
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    ablations.main(args)
    found = ablations.read(path)
    assert len(found) == 4 and len({ablations.key(line) for line in found}) == 4
    assert path.read_text().splitlines()[:2] == lines[:2]
    again = {ablations.key(json.loads(line)): json.loads(line)["pixels"] for line in lines}
    assert all(again[ablations.key(line)] == line["pixels"] for line in found)
    capsys.readouterr()
    ablations.main(["--table"])
    shown = capsys.readouterr().out
    assert (
        "| 0 % (flow matching) | 328.91 |" in shown
        and "digits: 4 runs of 1 seeds, 2 steps" in shown
    )


def test_the_table_says_the_mean_and_who_diverged(monkeypatch, capsys):
    about = {
        "data": "digits",
        "steps": 9,
        "seconds": 1,
        "machine": "m",
        "torch": "2",
        "commit": "c",
    }
    lines = []
    for seed in range(2):
        for _, how, published in TABLES["e: p of the loss"]:
            good = dict.fromkeys(METRICS, published + 2 * seed)
            lines.append(
                about | {"seed": seed, "change": how} | ({} if how == {"p": 2.0} else good)
            )
    ablations.table(lines)
    shown = capsys.readouterr().out
    assert "| 0 | 79.75 | 80.75 ± 1.41 |" in shown and "| 2 | 69.19 | diverged (2 of 2) |" in shown
    assert ablations.rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert ablations.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_the_plots_are_drawn(tmp_path, monkeypatch):
    ablations.main(["--plot", str(tmp_path / "a.png")])
    curves.main(["--plot", str(tmp_path / "b.png"), str(tmp_path / "c.png")])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png", "c.png"))


def test_heun_and_euler_follow_the_velocity():
    """Of a Gaussian of deviation 0.5, whose flow is known; errors of first and second order."""
    s = 0.5

    def net(z, t, r, y):
        t = t[:, None]
        return (
            (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * z
            if (r == t[:, 0]).all()
            else math.nan
        )

    e, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(50)
    for method, order in ((curves.euler, 1), (curves.heun, 2)):
        errors = [(method(net, e, y, n) - s * e).norm() for n in (64, 128)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_the_curves_have_all_methods_and_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "EVALUATIONS", (1, 2))
    methods = {k: (*m[:3], [n for n in m[3] if n < 3]) for k, m in curves.METHODS.items()}
    monkeypatch.setattr(curves, "METHODS", methods)
    found = [curves.run(job) for job in curves.jobs(30, 1)]
    assert [*found[0]["flow matching, Heun"]] == ["2"] and [*found[0]["MeanFlow"]] == ["1", "2"]
    assert [line["errors"] for line in found[1:]] == [*curves.ERRORS]
    for line in found[1:]:
        assert len(line["maps"]) == 3 and len(line["maps"][0]) == curves.BINS
        rows = {"0 %": ["r = t"], "100 %": ["r != t"]}.get(line["errors"], ["r = t", "r != t"])
        assert [name for name in line["quantiles"] if "mean" not in name] == rows
