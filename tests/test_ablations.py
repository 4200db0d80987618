"""benchmarks/ablations.py and curves.py: every row runs, goes on when killed, and is told right."""

import json
import math
from functools import partial

import ablations
import curves
import pytest
import torch
from ablations import METRICS, REAL, TABLES, Setting

import data
import meanflow
import model

pytestmark = pytest.mark.slow
CHANGES = {json.dumps(how): how for rows in TABLES.values() for _, how, _ in rows}
DIGITS = data.digits()._replace(labels=data.digits().labels[:256], items=data.digits().items[:256])


def features(x):
    return x.flatten(1)[:, ::4]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(ablations, "SAMPLES", 40)
    monkeypatch.setattr(ablations.prepare, "dataset", DIGITS, raising=False)
    monkeypatch.setattr(ablations.prepare, "features", features, raising=False)
    reference = ablations.make_reference(*ablations.all_images(DIGITS), features)
    monkeypatch.setattr(ablations.prepare, "reference", reference, raising=False)


@pytest.mark.parametrize("how", CHANGES.values(), ids=CHANGES)
def test_every_row_trains_and_is_judged(how):
    line = ablations.run({"data": "digits", "steps": 3, "seed": 0, "change": how})
    line = json.loads(json.dumps(line))
    assert line["pixels"] > 0 and line["features"] > 0 and line["diversity"] > 0
    assert 0 <= line["class"] <= 1 and json.loads(ablations.key(line))[3] == line["change"]


def test_every_setting_trains_otherwise():
    """Weights after four steps differ from those of every other setting."""
    found = {}
    for text, how in CHANGES.items():
        if how == REAL:
            continue

        def watch(step, draws, raw, state):
            found[text] = torch.cat([p.detach().flatten() for p in state.params.values()])

        ablations.fit(DIGITS, Setting(**how), 0, 4, watch)
    assert len(found) == len(CHANGES) - 1 == 29
    assert len({(len(w), *w.double().sum(0, keepdim=True).tolist()) for w in found.values()}) == 29


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
def test_a_condition_embeds_what_it_names(what):
    params, net = weights(Setting(condition=what))
    z, t, r, y, _ = rows()
    u = net(z, t, r, y)
    embedders = sorted({name.split(".")[0] for name in params if "_embedder.mlp" in name})
    assert len(embedders) == len(what.split(", "))
    moved = {"t": (t + 0.1, r), "r": (t, r + 0.1), "t - r": (t + 0.1, r + 0.1)}
    values = {"t": t, "r": r, "t - r": t - r}
    for embedder, named in zip(("t_embedder", "h_embedder", "r_embedder"), what.split(", ")):
        # with the other embedders silenced, the network changes with what this one embeds alone
        silent = {
            k: 0 * p if "_embedder.mlp.2" in k and embedder not in k else p
            for k, p in params.items()
        }
        only = partial(net.func, silent, **net.keywords)
        base = only(z, t, r, y)
        for name, times in moved.items():
            same = torch.allclose(
                values[named], dict(t=times[0], r=times[1]).get(named, times[0] - times[1])
            )
            assert torch.allclose(only(z, *times, y), base) == same, (embedder, name)
    if what == "t, t - r":
        assert torch.equal(u, model.dit(params, z, t, r, y))


def test_a_tangent_is_a_direction():
    """Differences along (a v, b, c) agree; the default is that of the loss."""
    _, net = weights(Setting())
    z, t, r, y, v = rows()
    _, right = meanflow.derivative(net, z, t, r, v, y)
    for tangent in ((1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)):
        a, b, c = tangent
        moving, jvp = ablations.along(net, tangent)
        u, dudt = meanflow.derivative(moving, z, t, r, v, y, jvp=jvp)
        h = 1e-5
        ahead, behind = (net(z + s * a * v, t + s * b, r + s * c, y) for s in (h, -h))
        assert torch.allclose(dudt, (ahead - behind) / (2 * h), atol=1e-7)
        assert torch.allclose(u, net(z, t, r, y)) and torch.equal(moving(z, t, r, y), u)
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
    """Lines that are there are not run again; one cut short anywhere is."""
    monkeypatch.setattr(ablations, "train_classifier", lambda *_: (torch.nn.Flatten(), 0.5))
    path = tmp_path / "results.jsonl"
    args = ["--tables", "a", "--steps", "2", "--seeds", "1", "--workers", "2"]
    monkeypatch.setattr(ablations, "RESULTS", path)
    ablations.main(args)
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and {json.loads(line)["data"] for line in lines} == {"digits"}
    for cut in range(len(lines[2])):
        path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:cut])
        assert [json.dumps(line) for line in ablations.read(path)] == lines[:2]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][: lines[2].index("}") + 1])
    ablations.main(args)
    found = {ablations.key(line): line["pixels"] for line in ablations.read(path)}
    assert found == {ablations.key(json.loads(line)): json.loads(line)["pixels"] for line in lines}
    assert path.read_text().splitlines()[:2] == lines[:2]
    capsys.readouterr()
    ablations.main(["--table", "--steps", "2"])
    shown = capsys.readouterr().out
    assert "| 0 % (flow matching) | 328.91 |" in shown and "5 runs of 2 steps, 1 seeds; " in shown
    ablations.main(["--table"])
    assert "| 0 % (flow matching) | 328.91 |  |" not in capsys.readouterr().out


ABOUT = {"data": "digits", "steps": 1000, "seconds": 1, "machine": "m", "torch": "2", "commit": "c"}


def made_up():
    """Return lines whose distances are the paper's, the last row of e diverged in one seed."""
    for seed in range(2):
        for how in CHANGES.values():
            published = [fid for rows in TABLES.values() for _, h, fid in rows if h == how][0] or 9
            line = ABOUT | {"accuracy": 0.9, "seed": seed, "change": how}
            good = dict.fromkeys(METRICS, published + 2 * seed)
            yield line | ({} if (how, seed) == ({"p": 2.0}, 1) else good)


def test_the_table_says_the_mean_and_who_diverged(capsys):
    lines = [json.loads(json.dumps(line)) for line in made_up()]
    ablations.table(lines[:-1])
    shown = capsys.readouterr().out
    assert "| 0 | 79.75 | 80.8 ± 1.41 |" in shown and "| 2 | 69.19 | diverged (1 of 2) |" in shown
    assert "| [0.25, 1] |  | 9 (of 1) |" in shown
    assert shown.count("| *rank correlation with the paper's* | | 1.00 | 1.00 |") == 6  # not e, h


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    for a in ([1, 2, 3, 4], [4.0, 1, 1, 2], [1, math.inf, math.inf, 0]):
        for b in ([1, 3, 2, 4], [2, 2, 1, 1]):
            ours = torch.corrcoef(torch.stack((ablations.ranks(a), ablations.ranks(b))))[0, 1]
            assert ours == pytest.approx(spearmanr(a, b).statistic)


def test_the_plots_are_drawn(tmp_path, monkeypatch):
    """Of the published results, and of some that diverged."""
    for results in (None, list(made_up())):
        if results:
            monkeypatch.setattr(ablations, "read", lambda path: json.loads(json.dumps(results)))
        ablations.main(["--plot", str(tmp_path / "a.png")])
        assert (tmp_path / "a.png").stat().st_size > 20_000
    monkeypatch.undo()
    curves.main(["--plot", str(tmp_path / "b.png"), str(tmp_path / "c.png")])
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("b.png", "c.png"))


def test_the_published_results_are_whole_and_in_the_table(capsys):
    lines = ablations.read(ablations.RESULTS)
    for name in ("digits", "cifar16"):
        wanted = {ablations.key(job) for job in ablations.jobs(name, "abcdefgh", 3, 1000)}
        assert wanted <= {ablations.key(line) for line in lines}
    wanted = {curves.key(job) for job in curves.jobs(3000, 3)}
    assert wanted == {curves.key(line) for line in ablations.read(curves.RESULTS)}
    ablations.main(["--table"])
    assert capsys.readouterr().out == ablations.RESULTS.with_suffix(".md").read_text()


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


def test_the_curves_have_all_methods_and_runs(monkeypatch):
    methods = {k: (*m[:2], [n for n in m[2] if n < 3]) for k, m in curves.METHODS.items()}
    monkeypatch.setattr(curves, "METHODS", methods)
    monkeypatch.setattr(curves, "target_variance", partial(curves.target_variance, rows=50))
    found = [curves.run(job) for job in curves.jobs(30, 1)]
    assert [*found[0]["flow matching, Heun"]] == ["2"] and [*found[0]["MeanFlow"]] == ["1", "2"]
    assert [line["errors"] for line in found[1:]] == [*curves.ERRORS]
    for line in found[1:]:
        assert len(line["maps"]) == 3 and len(line["maps"][0]) == curves.BINS
        rows = {"0 %": ["r = t"], "100 %": ["r != t"]}.get(line["errors"], ["r = t", "r != t"])
        assert [*line["quantiles"]] == [*line["means"]] == rows


def test_the_variance_of_the_target_is_that_of_the_velocity_where_r_is_t():
    """Of one image a class there is none; else it is what is left of the error of the best net,
    the mean velocity, for which (t - r) du/dt needs a derivative of the posterior."""
    one = DIGITS._replace(items=DIGITS.items[:1].expand(256, -1, -1, -1))

    def best(z, t, r, y):  # the posterior mean of e - x, by the images of the class
        x, a = DIGITS.items.flatten(1), (1 - t)[:, None]
        gaps = (z.flatten(1)[:, None] - a[..., None] * x).square().sum(-1) / (2 * t[:, None] ** 2)
        p = (-gaps).masked_fill(y[:, None] != DIGITS.labels, -torch.inf).softmax(1)
        mean = (p @ x).unflatten(1, (1, 8, 8))
        t = t[:, None, None, None]
        return (z - mean) / t

    assert curves.target_variance(lambda z, t, r, y: 0 * z, one, 200)["r = t"] < 1e-3
    found = curves.target_variance(best, DIGITS, 4000)
    x, labels = ablations.all_images(DIGITS)
    g = torch.Generator().manual_seed(5)
    chosen = torch.randint(len(x), (4000,), generator=g)
    draws = ablations.draw(Setting(share=1.0), (4000, 1, 8, 8), g)
    z, v = ablations.meanflow.interpolate(x[chosen], draws.e, draws.t)
    left = (best(z, draws.t, draws.t, labels[chosen]) - v).square().flatten(1).sum(1).mean()
    assert found["r = t"] == pytest.approx(left.item(), rel=0.1)
    assert found["r != t"] > 0
