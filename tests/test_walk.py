"""benchmarks/walk.py: its ends are the house's networks, and each row changes what it says."""

import json

import ablations
import pytest
import torch
import walk
from torch import nn

import data
import imf
import meanflow
import model

pytestmark = pytest.mark.slow
DIGITS = data.digits()._replace(labels=data.digits().labels[:256], items=data.digits().items[:256])
IMF_NAMES = {
    "attn.proj": "attn.out_proj",
    "_final.": "_final_layer.",
    "t - r_tokens": "time_tokens",
    "kappa_tokens": "omega_tokens",
    "low_tokens": "t_min_tokens",
    "high_tokens": "t_max_tokens",
}
ROWS = {label: walk.Setting(**how) for label, how in walk.ROWS.items()}
FIRST, LAST = ROWS["MeanFlow on the DiT"], ROWS["batch 32, lr 6e-3: iT/2"]


def example(setting):
    """Return (parameters of both signs, inputs of a network)."""
    g = torch.Generator().manual_seed(0)
    params = walk.parameters(setting, 1, 10, 2, g)
    params = {name: torch.randn(p.shape, generator=g).double() / 4 for name, p in params.items()}
    z, (r, t) = torch.randn(5, 1, 8, 8, generator=g), torch.rand(2, 5, generator=g).sort(0).values
    return params, (z.double(), t.double(), r.double(), torch.arange(5))


def renamed(params, names):
    for old, new in names.items():
        params = {name.replace(old, new): p for name, p in params.items()}
    return params


def test_the_walk_begins_at_the_dit():
    params, inputs = example(FIRST)
    ours = renamed(params, {"u_final.": "final_layer."})
    wanted = model.init("T/2", channels=1, classes=10, generator=torch.Generator())
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in wanted.items()}
    u = model.dit(ours, *inputs)
    assert (walk.network(FIRST, params, *inputs) - u).abs().max() < 1e-12 * u.abs().max()


def test_the_walk_ends_at_imf():
    params, inputs = example(LAST)
    ours = renamed(params, IMF_NAMES)
    wanted = imf.init("iT/2", channels=1, classes=10, generator=torch.Generator())
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in wanted.items()}
    guidance = imf.Guidance(*torch.rand(3, 5, dtype=torch.float64))
    outputs = imf.imf(ours, *inputs, guidance)
    for got, want in zip(walk.network(LAST, params, *inputs, guidance), outputs):
        assert (got - want).abs().max() < 1e-12 * want.abs().max()


@pytest.mark.parametrize("setting", (FIRST, LAST))
def test_the_initial_weights_are_those_of_the_ends(setting):
    """By their deviations, which are of a thousand numbers or more, or all zero or one."""
    g = torch.Generator().manual_seed(0)
    ours, theirs = walk.parameters(setting, 1, 10, 2, g), {}
    if setting is FIRST:
        ours = renamed(ours, {"u_final.": "final_layer."})
        theirs = model.init("T/2", channels=1, classes=10, generator=g)
    else:
        ours = renamed(ours, IMF_NAMES)
        theirs = imf.init("iT/2", channels=1, classes=10, generator=g)
    for name, p in theirs.items():
        if p.numel() > 1000:
            assert ours[name].std().item() == pytest.approx(p.std().item(), rel=0.1), name
        elif p.std() == 0:
            assert torch.equal(ours[name], p), name


@pytest.mark.parametrize("label", ROWS)
def test_every_row_trains_and_is_judged(monkeypatch, label):
    """All weights get a gradient, or the loss would not depend on them."""
    monkeypatch.setattr(ablations, "SAMPLES", 40)
    monkeypatch.setattr(walk, "IMAGES", 8)
    monkeypatch.setattr(ablations.prepare, "dataset", DIGITS, raising=False)
    monkeypatch.setattr(ablations.prepare, "features", nn.Flatten(), raising=False)
    reference = ablations.make_reference(*ablations.all_images(DIGITS), nn.Flatten())
    monkeypatch.setattr(ablations.prepare, "reference", reference, raising=False)
    job = {"data": "digits", "steps": 2, "seed": 0, "change": walk.ROWS[label]}
    line = json.loads(json.dumps(walk.run(job)))
    assert all(line[name] > 0 for name in walk.METRICS)
    assert ablations.collect([line], "digits", walk.ROWS[label], "v") == [line["v"]]


def test_every_row_is_another():
    assert len(set(ROWS.values())) == len(walk.WALK) + len(walk.MENDS) == 19
    for before, after in zip(walk.WALK.values(), list(walk.WALK.values())[1:]):
        assert 1 <= len(after.items() - before.items()) <= 2


def test_the_errors_of_a_network():
    """Of the velocity at r = t, and of u to the target along it, on the same draws for all."""
    x, y = data.batch(DIGITS, 1000, seed=0, step=0)
    found = walk.errors(lambda z, t, r, y: 0 * z + t[:, None, None, None], DIGITS)
    draws = meanflow.draw(x.shape, generator=walk.runtime.generator(0, "draws", 0), share=0.5)
    v, t, r = (a[500:] for a in (draws.e - x, draws.t, draws.r))
    t, r = (a[:, None, None, None] for a in (t, r))
    errors = {"v": t - v, "u": t - (v - (t - r))}
    for name, error in errors.items():
        assert found[name] == pytest.approx(error.square().sum((1, 2, 3)).mean().item(), rel=1e-5)


def test_what_is_there_is_not_run_again_and_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(walk, "RESULTS", tmp_path / "walk.jsonl")
    jobs = walk.missing("digits", 2, 5)
    assert len(jobs) == 2 * 19 and [job["seed"] for job in jobs[:19]] == 19 * [0]
    about = {"commit": "abc", "torch": "2", "machine": "m", "seconds": 3600}
    values = dict.fromkeys(walk.METRICS, 1.5)
    lines = [json.dumps(job | about | values) for job in jobs[:20]]
    walk.RESULTS.write_text("\n".join(lines))
    assert walk.missing("digits", 2, 5) == jobs[20:]
    walk.main(["--table", "--steps", "5"])
    told = capsys.readouterr().out
    assert "- digits: 20 runs of 5 steps of 64, 20.0 hours" in told and "commit abc" in told
    assert "| MeanFlow on the DiT | 1.5 (of 2) |" in told
