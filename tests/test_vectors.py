"""vectors/: the file is what the code gives, and check.py names each known mistake, and each pair.

Mistakes are those of vectors/mistakes.py, put into copies of meanflow.py and imf.py. SPLIT brings
lines of these into the form that the edits of mistakes.py know, EDITS holds what is left.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

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
        "guidance ignored": [("v + append_dims(kappa", "v + 0 * append_dims(kappa")],
        "guidance of scale omega": [("v + append_dims(kappa,", "v + append_dims(1 / (1 - kappa),")],
        "the interval ignored":
            [("(guidance.low <= t) & (t <= guidance.high)", "(t <= t)")],
        "guidance outside of the interval":
            [("(guidance.low <= t) & (t <= guidance.high)",
              "~((guidance.low <= t) & (t <= guidance.high))")],
        "guidance of dropped rows":
            [("torch.where(append_dims(drop, v), v, v_guided)", "v_guided")],
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


def copy(name, *mistakes):
    """Return {name: function} of a copy of meanflow.py, or of imf.py, with these mistakes."""
    edits = [edit for m in mistakes for edit in EDITS[name].get(m.name, m.edits)]
    text = known.edit(SOURCE[name], edits)
    assert text, f"{[m.name for m in mistakes]} are two versions of one line"
    names, original = {"__name__": "meanflow"}, sys.modules["meanflow"]
    for part in text.split(MARK):
        exec(compile(part, "copy", "exec"), names)
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
    right, w, (x, e, y, t, r, drop) = VECTORS["loss"][setting], VECTORS["weights"], [
        GIVEN[k] for k in ("x", "e", "y", "t", "r", "drop")
    ]
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
        u = field(VECTORS["weights"], "u", z, np.full(8, t), np.full(8, r), GIVEN["y"])
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
FAST = {"t - r forgotten": "t - r forgotten, where r < t", "t for t - r": None}


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
    elif name := FAST.get(mistake.name, mistake.name):
        assert not right and named(lines) == [{name}], lines
    else:
        assert not right and "no known mistake and no pair of them" in lines[1]


@pytest.mark.parametrize("name", known.KNOWN)
def test_names_are_plain_and_each_stands_once(name):
    names = [m.name for m in known.KNOWN[name]]
    assert len({*names}) == len(names)
    assert not [n for n in names if "; " in n or len(n) > 80]
    assert EDITS[name].keys() <= {*names}
