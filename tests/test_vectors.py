"""vectors/: the file is what the code gives, and check.py names each known mistake, and each pair.

Mistakes are those of vectors/mistakes.py, put into copies of meanflow.py and imf.py. SPLIT brings
lines of these into the form that the edits of mistakes.py know, EDITS holds what is left.
"""

import json
import re
import subprocess
import sys
import types
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "vectors"))

import check  # noqa: E402
import make  # noqa: E402
import mistakes as known  # noqa: E402

# fmt: off
SPLIT = {  # what is computed stays the same
    "loss": [
        ("    u = net(z, t, r, y)\n", "    times = t, r\n    u = net(z, *times, y)\n"),
        ("v_g = omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null)", ""),
        ("def guide(net, z, t, v,", "def guide(net, z, t, r, v,"),
        ("v = guide(net, z, t, v,", "plain = v\n    v = guide(net, z, t, r, v,"),
        ("t, t, y) if kappa else None", "t, t, y)"),
        ("def velocities(net, z, t, y,", "def velocities(net, z, t, r, y,"),
        ("velocities(net, z, t, y, null, n if kappa else len(x))",
         "velocities(net, z, t, r, rows[3], null, n)"),
        ("count_equal(t, r) if equal is None else equal\n",
         "count_equal(t, r) if equal is None else equal\n    plain = v\n"),
        ("    return v - append_dims(t - r, v)", "    h = t - r\n    return v - append_dims(h, v)"),
    ],
    "both": [
        ("    primals, tangents = (z.clone(), t.clone()), (v, torch.ones_like(t))",
         "    one, zero = torch.ones_like(t), torch.zeros_like(t)\n"
         "    primals, tangents = (z.clone(), t.clone(), r.clone()), (v, one, zero)"),
        ("jvp(lambda z, t:", "jvp(lambda z, t, r:"),
        ("tree_map(torch.Tensor.detach, dudt)", "dudt"),
        ("    return s / (s.detach() + c) ** p, s.detach()",
         "    held = s.detach()\n    weight = (held + c) ** p\n    loss = s / weight\n"
         "    return loss, held"),
    ],
    "imf_loss": [
        ("e, t, r, drop, *_ = draws\n    z, v = interpolate(x, e, t)\n    with",
         "e, t, r, drop, kappa, low, high = draws\n    z, v = interpolate(x, e, t)\n"
         "    inner, row, plain = net, kappa, v\n\n"
         "    def net(z, t, r, y, guidance):\n        times = t, r\n"
         "        return inner(z, *times, y, guidance)\n\n"
         "    label, nothing = torch.where(drop, null, y), torch.full_like(y, null)\n    with"),
        ("        v_class = net(z, t, t, y, at_all_times(kappa))[1]\n"
         "        v_null = net(z, t, t, torch.full_like(y, null), at_all_times(0 * kappa))[1]\n",
         "        guided, unguided = at_all_times(kappa), at_all_times(0 * kappa)\n"
         "        v_class = net(z, t, t, y, guided)[1]\n"
         "        v_null = net(z, t, t, nothing, unguided)[1]\n"),
        ("    y = torch.where(drop, null, y)\n    given = partial(net, guidance=draws)\n",
         "    given = partial(net, guidance=Guidance(row, low, high))\n    tangent = v_class\n"),
        ("given, z, t, r, v_class, y)\n    return velocity_loss(u, v_head, dudt, v_guided,",
         "given, z, t, r, tangent, label)\n    goal_v = v_guided\n    goal_u = v_guided\n"
         "    return velocity_loss(u, v_head, dudt, goal_v, goal_u,"),
        ("def velocity_loss(u, v_head, dudt, v_guided,",
         "def velocity_loss(u, v_head, dudt, v_guided, goal_u,"),
        ("    rows_u, s_u = adaptive_loss(u + append_dims(t - r, u) * dudt, v_guided, p, c)",
         "    h = t - r\n    rows_u, s_u = adaptive_loss("
         "u + append_dims(h, u) * dudt.detach(), goal_u, p, c)"),
        ("    return rows_u + rows_v,", "    rows = rows_u + rows_v\n    return rows,"),
    ],
    "sample": [
        ("    u = net(z, t, r, y)\n", "    times = t, r\n    u = net(z, *times, y)\n"),
        ("len(times) < 2 or not decreasing", "not decreasing"),
        ("    for t, r in pairwise(z.new_tensor(times).expand(len(e), -1).unbind(1)):\n"
         "        z = z - append_dims(t - r, z) * evaluate(net, z.to(e.dtype), t, r, y)\n",
         "    label = y\n    count = len(times) - 1\n"
         "    every = z.new_tensor(times).expand(len(e), -1)\n"
         "    for t, r in [*pairwise(every.unbind(1))][:count]:\n        h = t - r\n"
         "        start, seen = z, z\n"
         "        z = start - append_dims(h, z) * evaluate(net, seen, t, r, label)\n"),
    ],
    "draw": [
        ("    r, t = torch.sigmoid(logits).sort(0).values",
         "    times = torch.sigmoid(logits)\n    r, t = times.sort(0).values"),
        ("    r = torch.where(row < int(share * batch), t, r)",
         "    equal = row < int(share * batch)\n    r = torch.where(equal, t, r)"),
    ],
}
RAND = "torch.rand(batch, generator=generator, device=device)"
COMMON = {
    "a mean where the paper sums (the squared error)": [(", -1).sum(1)", ", -1).mean(1)")],
    "a squared squared error: of each element": [(".square().resh", ".square().square().resh")],
    "half of the loss": [("loss = s / weight\n", "loss = s / weight\n    loss = loss / 2\n")],
    "the network is called with (z, r, t)": [("times = t, r", "times = r, t")],
    "the network is given t - r where r belongs": [("times = t, r", "times = t, t - r")],
    "t times 1000": [("*times", "*(1000 * a for a in times)")],
    "the tangent of r is 1": [(", one, zero)", ", one, one)")],
    "the tangent of t is 0": [(", one, zero)", ", zero, zero)")],
    "the tangents in the wrong order: (v, r, t)": [(", one, zero)", ", zero, one)")],
    "the adaptive weight is not detached": [("held = s.detach()", "held = s")],
    "an adaptive weight of the whole batch":
        [("held = s.detach()", "held = s.detach().mean(-1, keepdim=True)")],
}
EDITS = {  # of meanflow.py and imf.py, where the text is not that of mistakes.py
    "loss": COMMON | {
        "labels are not dropped": [("    y = replace(y, null, drop)\n", ""),
                                   ("(z, t, r, replace(y, null, drop)), []", "(z, t, r, y), []")],
        "labels are dropped in all rows or none":
            [("y = replace(y, null, drop)", "y = replace(y, null, drop | drop.any())"),
             ("r, replace(y, null, drop))", "r, replace(y, null, drop | drop.any()))")],
        "an adaptive weight of each element":
            [(", -1).sum(1)", ", -1)"), ("s / weight", "(s / weight).sum(1)")],
        "the tangent of z is 0": [("r.clone()), (v,", "r.clone()), (0 * v,")],
        "the tangent of z is e - x under guidance":
            [("r, v, y)  # Eq. 8", "r, plain, y)  # Eq. 8"), ("(*rows, v))", "(*rows, plain))")],
        "the target starts from e - x under guidance":
            [("(u, identity(v,", "(u, identity(plain,"),
             ("us), identity(v,", "us), identity(plain,")],
        "a plus in the identity: v + (t - r) du/dt":
            [("return v - append_dims(h", "return v + append_dims(h")],
        "no du/dt: flow matching's target": [(", v) * dudt", ", v) * 0 * dudt")],
        "the target is not detached": [("u_tgt.detach()", "u_tgt")],
        "guidance keeps its graph":
            [("@torch.no_grad()\ndef guide", "def guide"), ("v_class)).detach()", "v_class))"),
             ("@torch.no_grad()\ndef velocities", "def velocities")],
        "kappa times the class velocity forgotten":
            [("        v_g = v_g + kappa * v_class", "        pass")],
        "guidance ignored": [("torch.where(append_dims(guided, v), v_g, v)", "v")],
        "guidance evaluated at (r, r)":
            [("z, t, t, replace(", "z, r, r, replace("),
             ("v_class = evaluate(net, z, t, t,", "v_class = evaluate(net, z, r, r,"),
             ("(z, t, t, nothing), (z, t, t, y))", "(z, r, r, nothing), (z, r, r, y))")],
        "guidance evaluated at (t, r)":
            [("z, t, t, replace(", "z, t, r, replace("),
             ("v_class = evaluate(net, z, t, t,", "v_class = evaluate(net, z, t, r,"),
             ("(z, t, t, nothing), (z, t, t, y))", "(z, t, r, nothing), (z, t, r, y))")],
    },
    "imf_loss": COMMON | {
        "half of the loss": [("rows = rows_u + rows_v", "rows = (rows_u + rows_v) / 2")],
        "labels are not dropped": [("torch.where(drop, null, y)", "y")],
        "labels are dropped in all rows or none":
            [("torch.where(drop, null", "torch.where(drop | drop.any(), null")],
        "the tangent of z is 0": [("tangent = v_class", "tangent = 0 * v_class")],
        "the tangent of z is e - x": [("tangent = v_class", "tangent = plain")],
        "the tangent of z is the guided velocity": [("tangent = v_class", "tangent = v_guided")],
        "a minus in V = u - (t - r) du/dt": [("u + append_dims(h", "u - append_dims(h")],
        "no du/dt: flow matching's loss": [("dudt.detach()", "0")],
        "du/dt is not detached": [("dudt.detach()", "dudt")],
        "the v head learns e - x": [("goal_v = v_guided", "goal_v = plain")],
        "V is regressed on e - x": [("goal_u = v_guided", "goal_u = plain")],
        "no loss of the v head": [("rows_u + rows_v", "rows_u")],
        "the null velocity is told the guidance": [("at_all_times(0 * k", "at_all_times(k")],
        "the class velocity is told the row's interval":
            [("= at_all_times(kappa)", "= Guidance(kappa, low, high)")],
        "the class velocity is told kappa outside of the interval":
            [("= at_all_times(kappa)", "= at_all_times(row)")],
        "guidance is not detached":
            [("with torch.no_grad():", "if True:"), ("u_tgt.detach()", "u_tgt")],
        "guidance ignored": [("append_dims(kappa, v), (0", "0 * append_dims(kappa, v), (0")],
        "guidance of scale omega":
            [("append_dims(kappa, v), (0", "append_dims(1 / (1 - kappa), v), (0")],
        "the interval ignored":
            [("(guidance.low <= t) & (t <= guidance.high)", "(t <= t)")],
        "guidance outside of the interval":
            [("(guidance.low <= t) & (t <= guidance.high)",
              "~((guidance.low <= t) & (t <= guidance.high))")],
        "guidance of dropped rows":
            [("v_null, t, drop, 1", "v_null, t, drop & False, 1")],
        "the network is told omega": [("Guidance(row,", "Guidance(1 / (1 - row),")],
        "the network is told kappa of the interval": [("Guidance(row,", "Guidance(kappa,")],
        "the network is told the interval [0, 1]": [("low, high))", "0 * low, 0 * high + 1))")],
    },
    "sample": {
        "t = 1 for data in the network's times":
            [("        start,", "        t, r = 1 - t, 1 - r\n        start,")],
        "time runs from 0 to 1": [("    z = e.to(", "    times = times[::-1]\n    z = e.to(")],
        "t times 1000": [("*times", "*(1000 * a for a in times)")],
        "a plus: z + (t - r) u": [("start - append", "start + append")],
        "one time too few: linspace(1, 0, steps)":
            [("i / max(steps, 1) for i in range(steps, -1, -1)",
              "1 - i / max(steps - 1, 1) for i in range(steps)")],
        "equal steps where times are given":
            [("        times = [float(t) for t in times]\n",
              "        times = [float(t) for t in times]\n        times = "
              "[1 - i / max(len(times) - 1, 1) for i in range(len(times))]\n")],
        "the null label for the class": [("label = y", "label = torch.full_like(y, 3)")],
    },
    "draw": {
        "uniform times": [("torch.sigmoid(logits)", "torch.rand(2, batch, generator=generator)")],
        "a mean of +0.4, or t = 1 for data": [("mean=-0.4", "mean=0.4")],
        "a mean of 0": [("mean=-0.4", "mean=0.0")],
        "CIFAR-10's times: logit-normal(-2, 2)": [("mean=-0.4, std=1.0", "mean=-2.0, std=2.0")],
        "no sigmoid": [("torch.sigmoid(logits)", "logits.clamp(0, 1)")],
        "exp for sigmoid: log-normal times":
            [("torch.sigmoid(logits)", "logits.exp().clamp(0, 1)")],
        "r above t: not sorted": [("times.sort(0).values", "times")],
        "r above t: sorted the wrong way round": [("r, t = times.sort", "t, r = times.sort")],
        "r uniform below t":
            [("    row =", "    r = t * torch.rand(batch, generator=generator)\n    row =")],
        "a share of 75 % with r < t": [("share=0.75", "share=0.25")],
        "r < t in all rows": [("share=0.75", "share=0.0")],
        "half of the rows with r = t: iMF's share": [("share=0.75", "share=0.5")],
        "t is lowered to r": [("r = torch.where(equal, t, r)", "t = torch.where(equal, r, t)")],
        "one time for the whole batch":
            [("torch.randn(2, batch, generator=generator, device=device)",
              "torch.randn(2, 1, generator=generator).expand(2, batch)")],
        "the same numbers in every batch":
            [("    batch, device =", "    generator.manual_seed(0)\n    batch, device =")],
        "randn() < p": [(RAND, RAND.replace("rand(", "randn("))],
        "no label is dropped": [("drop=0.1", "drop=0.0")],
        "nine labels in ten are dropped": [("drop=0.1", "drop=0.9")],
        "one coin for the labels of a whole batch":
            [(RAND, "torch.rand(1, generator=generator).expand(batch)")],
    },
}
# fmt: on


def source(name):
    """Return the text of the files, up to where they are used, in the form of SPLIT."""
    text = (ROOT / "meanflow.py").read_text().split("CENTRES =")[0]
    splits = SPLIT.get(name, [])
    if name in ("loss", "imf_loss"):
        text, splits = text.split("@torch.no_grad()\ndef sample")[0], splits + SPLIT["both"]
    if name == "imf_loss":
        text = text.split("def fast_loss(")[0]
        text += MARK + (ROOT / "imf.py").read_text().split("def fast_loss(")[0]
    for right, wrong in splits:
        assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times"
        text = text.replace(right, wrong)
    return text


MARK = "\n# --- imf.py ---\n"
SOURCE = {name: source(name) for name in ("loss", "imf_loss", "sample", "draw")}


@cache
def code(text):
    return compile(text, "copy", "exec")


def copy(name, *mistakes):
    """Return {name: function} of a copy of meanflow.py, or of imf.py, with these mistakes."""
    edits = [edit for m in mistakes for edit in EDITS[name].get(m.name, m.edits)]
    text = known.edit(SOURCE[name], edits)
    assert text, f"{[m.name for m in mistakes]} are two versions of one line"
    names, original = {"__name__": "meanflow"}, sys.modules["meanflow"]
    for part in text.split(MARK):
        exec(code(part), names)
        sys.modules["meanflow"] = types.SimpleNamespace(**names)  # which imf.py imports from
    sys.modules["meanflow"] = original
    return names


def port(monkeypatch, **functions):
    """Put functions into a module `port`, as check.py finds it."""
    monkeypatch.setitem(sys.modules, "port", types.SimpleNamespace(**functions))


def check_port(monkeypatch, function, *flags):
    """Return whether check.py says that the function is right, and the lines it prints."""
    port(monkeypatch, function=function)
    name = {"--imf": "imf_loss", "--sample": "sample"}.get(*flags or [""], "loss")
    try:
        if flags == ("--draw",):
            return check.compare_draws("port:function")
        return check.compare("port:function", name)
    except check.Wrong as wrong:
        return False, [str(wrong)]


# --- the numbers ---


def test_the_file_is_what_the_code_gives():
    path = ROOT / "vectors" / "vectors.json"
    written = path.read_text()
    assert path.stat().st_size < 200_000
    assert make.text(json.loads(written)) + "\n" == written  # numbers survive the trip
    now, then = json.loads(make.text(make.plain(make.build()))), json.loads(written)

    def same(a, b):
        if isinstance(b, dict):
            assert [*a] == [*b]
            for key in b:
                same(a[key], b[key])
        else:
            np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-12, atol=1e-13)

    same(now, then)


def field(w, name, z, t, r, y, told=()):
    """Return the network of vectors/README.md, row by row."""
    rows = []
    for k in range(len(z)):
        a = z[k].ravel() @ w["z"] + t[k] * w["t"][0] + r[k] * w["r"][0] + w["y"][y[k]]
        for key, value in zip(("kappa", "low", "high"), told):
            a = a + value[k] * w[key][0]
        h = (a + np.sqrt(a**2 + 4)) / 2
        rows.append((h @ w[name] + w[f"{name}_bias"][0]).reshape(z[k].shape))
    return np.stack(rows)


def slope(f, h=2e-3):
    """Return f'(0) by differences of fourth order."""
    return (f(-2 * h) - 8 * f(-h) + 8 * f(h) - f(2 * h)) / (12 * h)


def as_arrays(tree):
    if isinstance(tree, dict):
        return {name: as_arrays(value) for name, value in tree.items()}
    return np.array(tree) if isinstance(tree, list) else tree


VECTORS = as_arrays(check.VECTORS)
GIVEN = VECTORS["inputs"]


def column(a):
    return a.reshape(-1, 1, 1, 1)


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def weighted(error, p, c):
    """Return the weighted loss of each row as a function of the error, its weight held."""
    weight = ((error**2).reshape(len(error), -1).sum(1) + c) ** p
    return lambda error: (error**2).reshape(len(error), -1).sum(1) / weight


def check_gradient(objective, w, right):
    """Compare differences of the mean by each weight with the file."""
    for name, p in w.items():
        for index in np.ndindex(p.shape):

            def moved(h):
                q = p.copy()
                q[index] += h
                return objective(w | {name: q}).mean()

            close(slope(moved), right[name][index], 1e-8)


@pytest.mark.parametrize("setting", VECTORS["loss"])
def test_differences_of_fourth_order_give_the_loss(setting):
    """No forward mode, no torch: the equations alone."""
    right, w, (x, e, y, t, r, drop) = (
        VECTORS["loss"][setting],
        VECTORS["weights"],
        [GIVEN[k] for k in ("x", "e", "y", "t", "r", "drop")],
    )
    omega, kappa, interval, p, c = (
        right["options"][k] for k in ("omega", "kappa", "interval", "p", "c")
    )
    label, null = np.where(drop, 3, y), np.full_like(y, 3)
    z, v, h = (1 - column(t)) * x + column(t) * e, e - x, column(t - r)
    classes, nulls = field(w, "u", z, t, t, label), field(w, "u", z, t, t, null)
    guided = column((interval[0] <= t) & (t <= interval[1]) & ~drop)
    v_g = np.where(guided, omega * v + kappa * classes + (1 - omega - kappa) * nulls, v)
    u = field(w, "u", z, t, r, label)
    dudt = slope(lambda h: field(w, "u", z + h * v_g, t + h, r, label))
    u_tgt = v_g - h * dudt
    s = ((u - u_tgt) ** 2).sum((1, 2, 3))
    found = dict(z=z, v=v, v_g=v_g, u=u, dudt=dudt, u_tgt=u_tgt, s=s, loss=s / (s + c) ** p)
    for name, value in found.items():
        close(value, right[name])
    rows = weighted(u - u_tgt, p, c)
    check_gradient(lambda w: rows(field(w, "u", z, t, r, label) - u_tgt), w, right["grad"])


@pytest.mark.parametrize("setting", VECTORS["imf_loss"])
def test_differences_of_fourth_order_give_imfs_loss(setting):
    right, w, (x, e, y, t, r, drop, kappa, low, high) = (
        VECTORS["imf_loss"][setting],
        VECTORS["imf_weights"],
        [GIVEN[k] for k in ("x", "e", "y", "t", "r", "drop", "kappa", "low", "high")],
    )
    p, c, label, null = *right["options"].values(), np.where(drop, 3, y), np.full_like(y, 3)
    z, v, h = (1 - column(t)) * x + column(t) * e, e - x, column(t - r)
    gated, told = np.where((low <= t) & (t <= high), kappa, 0), (kappa, low, high)
    v_class = field(w, "v", z, t, t, y, (gated, 0 * t, 0 * t + 1))
    v_null = field(w, "v", z, t, t, null, (0 * t, 0 * t, 0 * t + 1))
    v_g = np.where(column(drop), v, v + column(gated) * (v_class - v_null))
    u, v_head = (field(w, name, z, t, r, label, told) for name in "uv")
    dudt = slope(lambda h: field(w, "u", z + h * v_class, t + h, r, label, told))
    V = u + h * dudt
    s = np.stack([((a - v_g) ** 2).sum((1, 2, 3)) for a in (V, v_head)], 1)
    found = dict(z=z, v=v, v_class=v_class, v_null=v_null, v_g=v_g, u=u, v_head=v_head)
    found |= dict(dudt=dudt, V=V, s=s, loss=(s / (s + c) ** p).sum(1))
    for name, value in found.items():
        close(value, right[name])
    rows_u, rows_v = weighted(V - v_g, p, c), weighted(v_head - v_g, p, c)

    def objective(w):
        u, v_head = (field(w, name, z, t, r, label, told) for name in "uv")
        return rows_u(u + h * dudt - v_g) + rows_v(v_head - v_g)

    check_gradient(objective, w, right["grad"])


@pytest.mark.parametrize("setting", VECTORS["sample"])
def test_samples_are_steps_of_the_average_velocity(setting):
    steps, z = VECTORS["sample"][setting]["steps"], GIVEN["e"]
    times = np.linspace(1, 0, steps + 1) if isinstance(steps, int) else steps
    for t, r in zip(times, times[1:]):
        u = field(VECTORS["weights"], "u", z, np.full(len(z), t), np.full(len(z), r), GIVEN["y"])
        z = z - (t - r) * u
    close(z, VECTORS["sample"][setting]["x"], 1e-13)


def test_the_loss_of_every_row_matters():
    """Rows with r = t, dropped ones of both kinds, and times inside and outside of intervals."""
    equal, drop, t = GIVEN["t"] == GIVEN["r"], GIVEN["drop"], GIVEN["t"]
    assert 0 < (equal & drop).sum() and 0 < (~equal & drop).sum() and (GIVEN["r"] <= t).all()
    for right in VECTORS["loss"].values():
        low, high = right["options"]["interval"]
        assert not np.isin(t, (low, high)).any()  # closed and open intervals are alike


# --- the mistakes ---

SINGLE = [(name, mistake) for name in known.KNOWN for mistake in known.KNOWN[name]]
FLAGS = {"loss": (), "imf_loss": ("--imf",), "sample": ("--sample",), "draw": ("--draw",)}
FUNCTIONS = {"loss": "loss", "imf_loss": "loss", "sample": "sample", "draw": "draw"}
UNSEEN = "guidance keeps its graph"  # costs memory and time alone: the target is detached
# The fast loss knows that where r = t the target is v: there, no factor of du/dt matters.
FAST = {name: f"{name}, where r < t" for name in ("t - r forgotten", "t for t - r")}


def named(lines):
    """Return the sets of mistakes that lines of check.py name."""
    found = [line.split(": ", 1)[1] for line in lines if line.startswith(("known mis", "a pair"))]
    return [frozenset(line.split("; ")) for line in found]


def ids(row):
    return f"{row[0]}: {row[1].name}"


@pytest.mark.parametrize("name, mistake", SINGLE, ids=map(ids, SINGLE))
def test_a_mistake_is_named(monkeypatch, name, mistake):
    right, lines = check_port(monkeypatch, copy(name, mistake)[FUNCTIONS[name]], *FLAGS[name])
    if mistake.name == UNSEEN:
        assert right
        return
    assert not right and named(lines) == [{mistake.name}], lines
    assert f"    mend: {mistake.mend}" in lines


@pytest.mark.parametrize("mistake", known.KNOWN["loss"], ids=lambda m: m.name)
def test_a_mistake_of_the_fast_loss_is_named(monkeypatch, mistake):
    right, lines = check_port(monkeypatch, copy("loss", mistake)["fast_loss"])
    if mistake.name == UNSEEN:
        assert right
    else:
        assert not right and named(lines) == [{FAST.get(mistake.name, mistake.name)}], lines


@pytest.mark.parametrize("name", known.KNOWN)
def test_names_are_plain_and_each_stands_once(name):
    names = [m.name for m in known.KNOWN[name]]
    assert len({*names}) == len(names)
    assert not [n for n in names if "; " in n or len(n) > 80]
    assert EDITS[name].keys() <= {*names}


# What cannot be told apart: (why, a mistake, those which it hides when both are made)
NO_WEIGHT = (
    "without a weight, nothing of the weight matters",
    "no adaptive weight",
    ["the adaptive weight is not detached", "an adaptive weight of the whole batch", "c forgotten",
     "c outside of the power: s^p + c", "c = 0.001 whatever is asked", "p forgotten: p = 1",
     "the square root in the weight: p / 2"],
)  # fmt: skip
ONE = ("s^1 + c = (s + c)^1", "p forgotten: p = 1", ["c outside of the power: s^p + c"])
OF_DUDT = [
    "the tangent of r is 1", "the tangent of t is 0", "the tangent of z is 0", "t - r forgotten",
    "the tangents in the wrong order: (v, r, t)", "t - r forgotten, where r < t", "t for t - r",
    "t for t - r, where r < t", "t - r squared",
]  # fmt: skip
HIDDEN = {
    "loss": [
        NO_WEIGHT,
        ONE,
        ("what multiplies du/dt = 0", "no du/dt: flow matching's target",
         [*OF_DUDT, "the tangent of z is e - x under guidance", "the target is not detached",
          "a plus in the identity: v + (t - r) du/dt"]),
        ("nothing of the guidance matters", "guidance ignored",
         [m.name for m in known.KNOWN["loss"][-13:] if m.name != "guidance ignored"] +
         ["the tangent of z is e - x under guidance",
            "the target starts from e - x under guidance"]),
        ("the class is null", "labels are dropped in all rows or none",
         ["the null velocity where the class velocity belongs, or kappa = 0",
          "the class velocity where the null velocity belongs"]),
    ],
    "imf_loss": [
        NO_WEIGHT,
        ONE,
        ("what multiplies du/dt = 0", "no du/dt: flow matching's loss",
         [*OF_DUDT, "the tangent of z is e - x", "the tangent of z is the guided velocity",
          "a minus in V = u - (t - r) du/dt", "the class velocity of dropped labels",
          "the class velocity is told kappa outside of the interval"]),
        ("v_class of rows without guidance is a tangent only", "the tangent of z is 0",
         ["the class velocity of dropped labels",
          "the class velocity is told kappa outside of the interval"]),
        ("v_class of rows without guidance is a tangent only", "the tangent of z is e - x",
         ["the class velocity of dropped labels",
          "the class velocity is told kappa outside of the interval"]),
        ("v_class of rows without guidance is a tangent only",
         "the tangent of z is the guided velocity",
         ["the class velocity of dropped labels",
          "the class velocity is told kappa outside of the interval"]),
        ("nothing of the guidance matters", "guidance ignored",
         ["the null velocity is the u head's", "the null velocity is told the guidance",
          "the null velocity of the class", "guidance of dropped rows", "guidance is not detached",
          "the v head learns e - x", "V is regressed on e - x"]),
        ("no label is dropped", "labels are not dropped", ["the class velocity of dropped labels"]),
        ("there is no v head", "no loss of the v head", ["the v head learns e - x"]),
        ("there is no outside", "the interval ignored",
         ["the network is told kappa of the interval",
          "the class velocity is told kappa outside of the interval"]),
    ],
    "sample": [
        ("r = 0 stays 0, t = 1 becomes 1", "the network is given t = 1 and r = 0 in every step",
         ["t = 1 for data in the network's times"]),
        ("the last step is the result: t - r = t and r = 0", "every step starts from the noise",
         ["t for t - r", "the network is given r = 0 in every step"]),
        ("the only step has t = 1 and r = 0", "a single step whatever is asked",
         ["t for t - r", "t - r forgotten", "the network is given r = 0 in every step",
          "the network is given t = 1 and r = 0 in every step", "every step starts from the noise",
          "the noise stays the network's input", "equal steps where times are given"]),
    ],
}  # fmt: skip
ALIKE = {  # (why, one set of mistakes, another)
    "loss": [
        ("s is that of an element: squared once more, alike",
         {"a squared squared error: of each row", "an adaptive weight of each element"},
         {"a squared squared error: of each element", "an adaptive weight of each element"}),
        ("v and t do not move: du/dt = 0", {"the tangent of z is 0", "the tangent of t is 0"},
         {"no du/dt: flow matching's target"}),
        ("guidance acts through target and tangent alone",
         {"the tangent of z is e - x under guidance",
          "the target starts from e - x under guidance"},
         {"guidance ignored"}),
        ("no tangent sees the guidance",
         {"the tangent of z is 0", "the target starts from e - x under guidance"},
         {"the tangent of z is 0", "guidance ignored"}),
        ("no tangent sees the guidance",
         {"no du/dt: flow matching's target", "the target starts from e - x under guidance"},
         {"no du/dt: flow matching's target", "guidance ignored"}),
        ("omega v + (1 - omega) v_null, both",
         {"kappa times the class velocity forgotten", "kappa's complement forgotten: 1 - omega"},
         {"the null velocity where the class velocity belongs, or kappa = 0"}),
    ],
    "imf_loss": [
        ("v_z and t do not move: du/dt = 0", {"the tangent of z is 0", "the tangent of t is 0"},
         {"no du/dt: flow matching's loss"}),
        ("v_class = v_null", {"guidance ignored"},
         {"the null velocity is told the guidance", "the null velocity of the class"}),
        ("no loss sees the guidance", {"guidance ignored"},
         {"V is regressed on e - x", "the v head learns e - x"}),
        ("v_g = e - x", {"guidance ignored", "the tangent of z is the guided velocity"},
         {"guidance ignored", "the tangent of z is e - x"}),
        ("the only loss does not see the guidance", {"guidance ignored", "no loss of the v head"},
         {"V is regressed on e - x", "no loss of the v head"}),
        ("the interval acts on the tangent alone", {"guidance ignored", "the interval ignored"},
         {"guidance ignored", "the class velocity is told kappa outside of the interval"}),
    ],
    "sample": [
        ("one step has t = 1, r = 0: t - r = t",
         {"a single step whatever is asked", "t - r = 0: Euler's method"},
         {"a single step whatever is asked", "the network is given t - r where r belongs"}),
        ("the last step has t - r = t",
         {"every step starts from the noise", "t - r = 0: Euler's method"},
         {"every step starts from the noise", "the network is given t - r where r belongs"}),
        ("(0, 1), both",
         {"a single step whatever is asked", "t = 1 for data in the network's times"},
         {"a single step whatever is asked", "the network is called with (z, r, t)"}),
        ("the only input is the noise", {"a single step whatever is asked"},
         {"the network is given t = 1 and r = 0 in every step",
          "the noise stays the network's input"}),
    ],
}  # fmt: skip


def listed(name):
    """Return the sets of mistakes of HIDDEN and ALIKE that have the same numbers."""
    sets, pairs = sets_of(name), []
    for _, shown, others in HIDDEN[name]:
        pairs += [({shown}, {shown, other}) for other in others]
    pairs += [pair for _, *pair in ALIKE[name]]
    if name == "loss":  # a target that is detached stops the graph of the guidance, too
        pairs += [(s, s | {UNSEEN}) for s in sets if len(s) < 2 and s | {UNSEEN} in sets]
        pairs.remove(({"the target is not detached"}, {"the target is not detached", UNSEEN}))
    alike = {s: frozenset({s}) for s in sets}
    for a, b in pairs:
        a, b = frozenset(a), frozenset(b)
        if a in sets and b in sets and a != b:
            union = alike[a] | alike[b]
            alike |= dict.fromkeys(union, union)
    return {group for group in alike.values() if len(group) > 1}


def sets_of(name):
    """Return {frozenset of names: variant} of all single mistakes, and of all pairs, and none."""
    sets = known.hypotheses(getattr(known, name), 1) + known.hypotheses(getattr(known, name), 2)
    return {frozenset(): getattr(known, name)} | {
        frozenset(m.name for m in mistakes): variant for mistakes, variant in sets
    }


def groups(name):
    """Return the sets of mistakes that have the same numbers in all settings, as check.py sees."""
    sets, made = sets_of(name), []
    for variant in sets.values():
        parts = [p for s in VECTORS[name] for p in check.predicted(variant, name, s)]
        made.append([np.ravel(p) for p in parts if p is not None])
    names, alike = [*sets], {}
    blocks = [np.stack(block) for block in zip(*made)]
    for k in range(len(names)):
        same = np.ones(len(names), bool)
        for block in blocks:
            scale = max(np.abs(block[k]).max(), check.LEAST_SLOPE)
            same &= np.abs(block - block[k]).max(1) <= 1e-9 * scale
        if same.sum() > 1:
            alike[names[k]] = frozenset(names[j] for j in np.flatnonzero(same))
    return {*alike.values()}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_cannot_be_told_apart_is_listed(name):
    """Of all single mistakes and all pairs, over all settings."""
    found, known_alike = groups(name), listed(name)
    assert found == known_alike, sorted(map(sorted, found ^ known_alike))[:3]


COPIES = [  # file, function, the setting in which most mistakes show, arguments
    ("loss", "loss", "all together", {}),
    ("loss", "fast_loss", "an interval", {"equal": 0}),
    ("imf_loss", "loss", "p and c of CIFAR-10", {}),
    *(("sample", "sample", setting, {}) for setting in VECTORS["sample"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, function, setting, options", COPIES)
def test_pairs_in_copies_have_the_numbers_that_check_knows(name, function, setting, options):
    """Of all pairs: torch's gradients of the copy are those of NumPy by imaginary steps."""
    for mistakes, variant in known.hypotheses(getattr(known, name), 2):
        ask = partial(copy(name, *mistakes)[function], **options)
        answer = check.ask(ask, name, setting, "torch", "float64")
        found, _ = check.read(answer, name, setting)
        made = check.predicted(variant, name, setting)
        assert check.agree(check.observed(found, name), made, 1e-9), mistakes


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDDEN)
def test_pairs_are_named(monkeypatch, name):
    """Some of them, from the function to the lines printed."""
    alike = {s: group for group in listed(name) for s in group}
    for mistakes, _ in known.hypotheses(getattr(known, name), 2)[::23]:
        pair = frozenset(m.name for m in mistakes)
        right, lines = check_port(monkeypatch, copy(name, *mistakes)[FUNCTIONS[name]], *FLAGS[name])
        assert not right and {*named(lines)} <= alike.get(pair, {pair}) and named(lines), lines


# Of drawers: what 51,200 rows do not tell apart. (why, a mistake, those which it hides)
DRAWS_HIDDEN = [
    ("no normal number is drawn", "uniform times",
     ["a mean of +0.4, or t = 1 for data", "a mean of 0", "CIFAR-10's times: logit-normal(-2, 2)",
      "one time for the whole batch"]),
    ("below the larger of two uniform numbers the smaller is uniform", "uniform times",
     ["r uniform below t"]),
    ("of two equal numbers, it does not matter which", "one number for both times",
     ["a share of 75 % with r < t", "r < t in all rows", "t is lowered to r",
      "half of the rows with r = t: iMF's share"]),
    ("no row has r = t", "r < t in all rows", ["t is lowered to r"]),
    ("neither of the two is the larger", "r above t: not sorted", ["t is lowered to r"]),
    ("200 different times are few", "one time for the whole batch",
     ["a mean of 0", "r uniform below t"]),
    ("64 different times with r < t are few", "the same numbers in every batch",
     ["a mean of 0", "r uniform below t"]),
]  # fmt: skip
FEW = "the same numbers in every batch", "one time for the whole batch"


@pytest.mark.slow
def test_pairs_of_a_drawer_are_named(monkeypatch):
    """Exactly, but where HIDDEN says so, or where few different numbers are drawn."""
    hidden = {frozenset((a, b)): a for _, a, others in DRAWS_HIDDEN for b in others}
    for mistakes, _ in known.hypotheses(known.draw, 2):
        pair = frozenset(m.name for m in mistakes)
        right, lines = check_port(monkeypatch, copy("draw", *mistakes)["draw"], "--draw")
        found = named(lines)
        if pair in hidden:
            assert not right and frozenset({hidden[pair]}) in found, (pair, found)
        elif pair & {*FEW}:
            assert not right and pair in found, (pair, found)
        else:
            assert not right and found == [pair], (pair, found)


# --- what a port may return ---

RIGHT = copy("loss")["loss"]


def test_the_house_is_right(monkeypatch):
    for flags, name in (((), "loss"), (("--imf",), "imf_loss"), (("--sample",), "sample")):
        right, lines = check_port(monkeypatch, copy(name)[FUNCTIONS[name]], *flags)
        assert right and len(lines) == 1 and lines[0].startswith("equal to "), lines
        assert float(lines[0].split(" to ")[-1].split(":")[0]) < 1e-14
    right, lines = check_port(monkeypatch, copy("draw")["draw"], "--draw")
    assert right and lines[0].startswith("draws like the paper's"), lines


def rows(net, x, y, draws, **options):
    return RIGHT(net, x, y, draws, **options)[0]


def steps(net, x, y, draws, *, null, omega, kappa, interval, p, c):
    """Return all intermediates, as a port may hand them out."""
    m, guidance = copy("loss"), dict(omega=omega, kappa=kappa, interval=interval)
    e, t, r, drop = draws
    y = torch.where(drop, null, y)
    z, v = m["interpolate"](x, e, t)
    v_g = m["guide"](net, z, t, r, v, y, drop, null=null, **guidance)
    u, dudt = m["derivative"](net, z, t, r, v_g, y)
    u_tgt = m["identity"](v_g, t, r, dudt)
    loss, s = m["adaptive_loss"](u, u_tgt, p, c)
    return dict(z=z, v=v, v_g=v_g, u=u, dudt=dudt, u_tgt=u_tgt, s=s, loss=loss)


RETURNS = {
    "rows": rows,
    "rows as a column": lambda *a, **k: rows(*a, **k)[:, None],
    "a mean": lambda *a, **k: rows(*a, **k).mean(),
    "a mean and what it is of": lambda *a, **k: (rows(*a, **k).mean(), {"s": RIGHT(*a, **k)[1]}),
    "a dict": lambda *a, **k: {"loss": rows(*a, **k), "mse": 7.0},
    "a dict of all": steps,
    "a list": lambda *a, **k: [rows(*a, **k), "more"],
}


@pytest.mark.parametrize("kind", RETURNS)
def test_what_is_returned_is_understood(monkeypatch, kind):
    right, lines = check_port(monkeypatch, RETURNS[kind])
    assert right and len(lines) == 1 and "gradients" in lines[0], lines
    if kind == "a dict of all":
        assert "loss, z, v, v_g, u, dudt, u_tgt, s" in lines[0] or "z, v, v_g, u" in lines[0]


def test_a_sum_over_the_batch_is_understood(monkeypatch):
    right, lines = check_port(monkeypatch, lambda *a, **k: rows(*a, **k).sum())
    assert right and lines[1:] == ["it is summed over the batch, here averaged"]
    mean = next(m for m in known.KNOWN["loss"] if m.name.startswith("a mean"))
    wrong = copy("loss", mean)["loss"]
    right, lines = check_port(monkeypatch, lambda *a, **k: wrong(*a, **k)[0].sum())
    assert not right and named(lines) == [{mean.name}]


def test_arrays_of_numpy_have_no_gradient(monkeypatch):
    right, lines = check_port(monkeypatch, lambda *a, **k: rows(*a, **k).detach().numpy())
    assert right and "gradients" not in lines[0]
    assert lines[1] == "not checked: gradients, which alone show what is not detached"


def test_numbers_in_single_precision_have_their_own_tolerance(monkeypatch):
    def single(net, x, y, draws, **options):
        assert x.dtype == torch.float32, "kernels for float32 alone"
        return rows(net, x, y, draws, **options)

    right, lines = check_port(monkeypatch, single)
    assert right and lines[0].endswith("float32"), lines
    for mistake in known.KNOWN["loss"][::5]:
        wrong = copy("loss", mistake)["loss"]
        right, lines = check_port(
            monkeypatch, lambda net, x, *a, **k: wrong(net, x, *a, **k)[0] + 0 * x.float().sum()
        )
        assert not right and {mistake.name} in named(lines), lines

    def partly(net, x, y, draws, **options):
        return rows(net, x.float().double() + 1e-8 * x, y, draws, **options)

    right, lines = check_port(monkeypatch, partly)
    assert right and "is a part of it float32?" in lines[-1], lines


def test_options_that_a_port_lacks_are_left_out(monkeypatch):
    def plain(net, x, y, draws, null):
        return rows(net, x, y, draws, null=null)

    right, (line, note) = check_port(monkeypatch, plain)
    assert right and "1 settings" in line
    assert note.startswith("not checked: no guidance, p and c of CIFAR-10, omega, ")

    def unguided(net, x, y, draws, *, null, omega, kappa, interval, p, c):
        if omega != 1 or kappa != 0:
            raise NotImplementedError
        return rows(net, x, y, draws, null=null, p=p, c=c)

    right, (line, note) = check_port(monkeypatch, unguided)
    assert right and "2 settings" in line and "all together" in note

    class Module(torch.nn.Module):
        def forward(self, net, x, y, draws, null):
            return rows(net, x, y, draws, null=null)

    right, (line, note) = check_port(monkeypatch, Module())
    assert right and "1 settings" in line

    def whole_steps(net, e, y, number):
        return copy("sample")["sample"](net, e, y, [1 - i / number for i in range(number + 1)])

    right, (line, note) = check_port(monkeypatch, whole_steps, "--sample")
    assert right and note == "not checked: uneven times"


def test_the_first_step_that_differs_is_named(monkeypatch):
    for name, wrong in (("z", 1.1), ("v_g", 0.9), ("dudt", 2), ("s", 0.7)):

        def port(*a, **k):
            out = steps(*a, **k)
            later = [*out][[*out].index(name) :]
            return out | {key: out[key] * wrong for key in later}

        right, lines = check_port(monkeypatch, port)
        assert not right and f": {name} is the first" in lines[0], lines
        assert "no known mistake and no pair of them makes these numbers" in lines[1]


# --- what a user may get wrong ---


def noisy(net, x, y, draws, **options):
    return rows(net, x, y, draws._replace(e=torch.randn_like(x)), **options)


def broken(net, x, y, draws, **options):
    raise RuntimeError("shapes\ndo not match")


def late(net, x, y, draws, *, kappa, **options):
    assert not kappa, "kappa is not there yet"
    return rows(net, x, y, draws, kappa=kappa, **options)


ERRORS = [
    (lambda net, images: 0, (), r"\(net, images\) cannot be called as loss\(net, x, y, draws, \*"),
    (lambda net, x, y, draws, *, time, **k: 0, (), "missing a required .*'time'.*an adapter"),
    (lambda *a, **k: rows(*a, **k)[:3], (), r"loss has shape \(3,\), where \(7,\) is expected"),
    (lambda *a, **k: a[1] + 0 * rows(*a, **k).mean(), (), "sum over all other axes"),
    (lambda *a, **k: rows(*a, **k) / 0 * 0, (), r"loss\[0\] is nan in the setting 'no guidance"),
    (lambda *a, **k: None, (), "it returned NoneType: return the loss of each row"),
    (lambda *a, **k: {"mse": rows(*a, **k)}, (), "it returned a dict of mse"),
    (lambda *a, **k: {"loss": rows(*a, **k), "u": a[2]}, (), "u has shape .*7, 2, 2, 3"),
    (lambda *a, **k: rows(*a, **k).detach(), (), "the loss has no graph, it would train nothing"),
    (noisy, (), "two calls differ: it draws noise, times or labels"),
    (broken, (), r"raised RuntimeError: shapes do not match \(test_vectors.py, line \d+\)"),
    (late, (), "in the setting 'omega and kappa' it raised AssertionError: kappa is not there"),
    (lambda net, e, y: e, ("--sample",), "cannot be called as sample"),
    (lambda net, e, y, steps: e[:2], ("--sample",), "x has shape .*7, 2, 2, 3"),
    (lambda shape: 1, ("--draw",), "it returned int: return t, r and drop"),
    (lambda n: (np.ones(n), np.ones(3)), ("--draw",), r"r has shape \(3,\), where \(256,\)"),
    (lambda n: (np.ones(n) * 1000, np.ones(n)), ("--draw",), r"t holds 1000.0: times lie in"),
    (lambda n, device: 0, ("--draw",), "cannot be called as draw"),
]


@pytest.mark.parametrize("function, flags, line", ERRORS)
def test_a_users_error_gets_one_line(monkeypatch, function, flags, line):
    right, lines = check_port(monkeypatch, function, *flags)
    assert not right and len(lines) == 1 and "\n" not in lines[0]
    assert re.search(line, lines[0]), lines[0]


@pytest.mark.parametrize(
    "spec, line",
    [
        ("nowhere:loss", "module nowhere is not on the path"),
        ("a/nowhere.py:loss", "module a.nowhere is not on the path"),
        ("meanflow:los", "meanflow:los is no function, meanflow has .*fast_loss.*: name one"),
        ("meanflow", "meanflow is no function"),
        ("nowhere.json", "nowhere.json is no file of JSON"),
        ("broken_port:loss", r"importing broken_port raised ZeroDivisionError: .*line 1"),
        ("lacking_port:loss", "module lacking_port needs nobody"),
    ],
)
def test_what_is_not_found_is_named(monkeypatch, tmp_path, capsys, spec, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_port.py").write_text("1 / 0\n")
    (tmp_path / "lacking_port.py").write_text("import nobody\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert check.main([spec]) == 1
    printed = capsys.readouterr().out
    assert re.match(line, printed) and printed.count("\n") == 1, printed


# --- ports of others ---

NUMPY = """
import numpy as np


def loss(net, x, y, draws, *, null, omega, kappa, interval, p, c):
    w, B = net.args[0], len(x)
    y = np.where(draws.drop, null, y)
    t, r, x, e = (a.reshape(B, -1) for a in (draws.t, draws.r, x, draws.e))
    z, v = (1 - t) * x + t * e, e - x

    def act(a):
        return (a + np.sqrt(a**2 + 4)) / 2

    def args(t, r, y):
        return z @ w["z"] + t @ w["t"] + r @ w["r"] + w["y"][y]

    def u(t, r, y):
        return act(args(t, r, y)) @ w["u"] + w["u_bias"]

    v_g = omega * v + kappa * u(t, t, y) + (1 - omega - kappa) * u(t, t, 0 * y + null)
    inside = (interval[0] <= t) & (t <= interval[1]) & ~draws.drop[:, None]
    v_g = np.where(inside, v_g, v)
    a = args(t, r, y)
    slope = (1 + a / np.sqrt(a**2 + 4)) / 2
    dudt = (slope * (v_g @ w["z"] + 1 * w["t"])) @ w["u"]
    error = u(t, r, y) - (v_g - (t - r) * dudt)
    s = (error**2).sum(1)
    weight = (s + c) ** p
    g = 2 * error / weight[:, None] / B
    back = g @ w["u"].T * slope
    grad = {"z": z.T @ back, "t": t.T @ back, "r": r.T @ back, "y": np.eye(4)[y].T @ back}
    return {"loss": s / weight, "grad": grad | {"u": act(a).T @ g, "u_bias": g.sum(0)[None]}}
"""
JAX = """
import jax
import jax.numpy as jnp


def loss(net, x, y, draws, *, null, omega, kappa, interval, p, c):
    e, t, r, drop = draws
    y = jnp.where(drop, null, y)
    wide = lambda a: a[:, None, None, None]
    z, v = (1 - wide(t)) * x + wide(t) * e, e - x
    v_class, v_null = net(z, t, t, y), net(z, t, t, jnp.full_like(y, null))
    v_g = omega * v + kappa * v_class + (1 - omega - kappa) * v_null
    inside = (interval[0] <= t) & (t <= interval[1]) & ~drop
    v_g = jax.lax.stop_gradient(jnp.where(wide(inside), v_g, v))
    tangents = v_g, jnp.ones_like(t), jnp.zeros_like(r)
    u, dudt = jax.jvp(lambda z, t, r: net(z, t, r, y), (z, t, r), tangents)
    u_tgt = jax.lax.stop_gradient(v_g - wide(t - r) * dudt)
    s = ((u - u_tgt) ** 2).sum((1, 2, 3))
    return s / jax.lax.stop_gradient((s + c) ** p), s
"""
WRONG = {  # in both
    "a mean where the paper sums (the squared error)": 
        ("s = (error**2).sum(1)", "s, B = (error**2).mean(1), x.size", ".sum((", ".mean(("),
    "t = 1 for data: z = t x + (1 - t) e": ("(1 - t) * x + t * e", "t * x + (1 - t) * e",
        "(1 - wide(t)) * x + wide(t) * e", "wide(t) * x + (1 - wide(t)) * e"),
    "the tangent of r is 1": ('1 * w["t"])', '1 * w["t"] + 1 * w["r"])', "zeros_like", "ones_like"),
    "t - r forgotten": ("(t - r) *", "1 *", "wide(t - r) *", "1 *"),
    "the null velocity where the class velocity belongs, or kappa = 0":
        ("kappa * u(t, t, y)", "kappa * u(t, t, 0 * y + null)", "* v_class", "* v_null"),
    "guidance of dropped rows": (" & ~draws.drop[:, None]", "", " & ~drop", ""),
    "c outside of the power: s^p + c": ("(s + c) ** p", "s ** p + c", "(s + c) ** p", "s ** p + c"),
    "the target is not detached": ("", "", "jax.lax.stop_gradient(v_g -", "(v_g -"),
}  # fmt: skip


def check_text(text, *edits):
    """Return the status and what is printed for a file, by the command itself."""
    for right, wrong in edits:
        assert not right or text.count(right) == 1, right
        text = text.replace(right, wrong) if right else text
    Path("their_port.py").write_text(text)
    words = [sys.executable, str(ROOT / "vectors" / "check.py"), "their_port:loss"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=100)
    return run.returncode, run.stdout + run.stderr


def test_a_port_to_numpy_is_checked_by_the_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, printed = check_text(NUMPY)
    assert status == 0 and printed.startswith("equal to Algorithm 1") and "gradients" in printed
    status, printed = check_text(NUMPY, ("e - x", "x - e"))
    assert status == 1 and "known mistake: the velocity's sign: v = x - e\n    mend: " in printed


def test_mistakes_of_a_port_to_numpy_are_named(monkeypatch):
    for name, (right, wrong, *_) in WRONG.items():
        if right:
            assert NUMPY.count(right) == 1, right
            names = {}
            exec(NUMPY.replace(right, wrong), names)
            correct, lines = check_port(monkeypatch, names["loss"])
            assert not correct and named(lines) == [{name}], lines


@pytest.mark.slow
def test_a_port_to_jax(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, printed = check_text(JAX)
    assert status == 0 and printed.startswith("equal to Algorithm 1") and "gradients" in printed
    for name, (*_, right, wrong) in WRONG.items():
        assert JAX.count(right) == 1, right
        names = {"__name__": "jax_port"}
        exec(JAX.replace(right, wrong), names)
        correct, lines = check_port(monkeypatch, names["loss"])
        assert not correct and named(lines) == [{name}], lines


if not find_spec("jax"):  # which is no requirement of the tests
    del test_a_port_to_jax


def test_answers_of_another_language(monkeypatch, tmp_path, capsys):
    """A file {setting: {name: numbers}}, here with gradients in one setting alone."""
    path = tmp_path / "answers.json"
    answers = {s: {"loss": v["loss"]} for s, v in check.VECTORS["loss"].items()}
    answers["omega"]["grad"] = check.VECTORS["loss"]["omega"]["grad"]
    path.write_text(json.dumps(answers))
    assert check.main([str(path)]) == 0
    for answer in answers.values():
        answer["loss"] = [value / 2 for value in answer["loss"]]
    del answers["omega"]["grad"]
    path.write_text(json.dumps(answers))
    capsys.readouterr()
    assert check.main([str(path)]) == 1
    assert "known mistake: half of the loss\n" in capsys.readouterr().out
    path.write_text(json.dumps({"none": {}}))
    assert check.main([str(path)]) == 1
    assert "there is no answer: the settings are no guidance" in capsys.readouterr().out
