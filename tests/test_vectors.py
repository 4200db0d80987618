"""vectors/: the file is what the code gives, and check.py names each known mistake, and each pair.

Mistakes are those of vectors/mistakes.py, put into copies of meanflow.py and imf.py. SPLIT brings
lines of these into the form that the edits of mistakes.py know, EDITS holds what is left.
"""

import importlib
import json
import subprocess
import sys
import types
from collections import Counter
from functools import cache, partial
from itertools import combinations
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
         "    every = z.new_tensor(times).expand(len(e), -1)\n    for t, r in [*pairwise(every.unbind(1))][:count]:\n        h = t - r\n"
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
        "guidance keeps its graph": [("with torch.no_grad():", "if True:")],
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
