"""The known mistakes of MeanFlow ports, each a small variant of the algorithm, with its mend.

`loss`, `imf_loss`, `sample` and `draw` are the algorithms of meanflow.py and imf.py in NumPy. A
mistake is an edit of their text: `variant(loss, a, b)` is the loss with mistakes a and b. check.py
compares a port with all of them; tests put the same mistakes into copies of meanflow.py and imf.py.

Weights have one more axis in front: each of its entries is the weights plus an imaginary step along
another direction, so that the imaginary part of the loss is its derivative along that direction, to
the last digit, and `sg`, which stops gradients, is the real part. Times are columns (B, 1), data
are rows (B, D), drop is a column too.
"""

import inspect
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy import where

STEP = 1e-100  # of the imaginary direction: its square vanishes


def network(weights, z, t, r, y):
    """Return u, shaped like z: the network of README.md, for NumPy, torch and JAX alike."""
    a = hidden(weights, z, t, r, y)
    return head(weights, "u", (a + (a * a + 4) ** 0.5) / 2, z)


def imf_network(weights, z, t, r, y, guidance):
    """Return u and v, both shaped like z. guidance has attributes kappa, low and high."""
    a = hidden(weights, z, t, r, y, guidance)
    h = (a + (a * a + 4) ** 0.5) / 2
    return head(weights, "u", h, z), head(weights, "v", h, z)


def hidden(w, z, t, r, y, guidance=None):
    """Return the arguments of the activation, (B, K)."""
    a = z.reshape(len(z), -1) @ w["z"] + w["y"][..., y, :]
    told = () if guidance is None else ("kappa", "low", "high")
    for name, value in ("t", t), ("r", r), *((name, getattr(guidance, name)) for name in told):
        a = a + value.reshape(-1, 1) @ w[name]
    return a


def head(w, name, h, z):
    return (h @ w[name] + w[f"{name}_bias"]).reshape(*h.shape[:-2], *z.shape)


def tangent(w, a, dz, dt, dr, head="u"):
    """Return a head's derivative along (dz, dt, dr); a: the arguments of the activation."""
    da = dz @ w["z"] + dt * w["t"] + dr * w["r"]
    return (1 + a / (a * a + 4) ** 0.5) / 2 * da @ w[head]


def sg(a):
    """Stop the gradient."""
    return a.real


# --- the algorithms ---


def loss(weights, x, y, draws, *, null, omega, kappa, interval, p, c):
    """Return the loss of each row, (..., B)."""
    e, t, r, drop = draws[:4]
    w = weights | {"t": weights["t"], "r": weights["r"]}
    nothing = np.full_like(y, null)
    label = where(drop[:, 0], null, y)
    z, v = (1 - t) * x + t * e, e - x
    v_class, v_null = network(w, z, t, t, label), network(w, z, t, t, nothing)
    v_class, v_null = sg(v_class), sg(v_null)
    guided = (interval[0] <= t) & (t <= interval[1]) & ~drop & (omega != 1 or kappa != 0)
    v_g = omega * v + (1 - omega - kappa) * v_null + kappa * v_class
    v_g = where(guided, v_g, v)
    a = hidden(w, z, t, r, label)
    u, dudt = network(w, z, t, r, label), tangent(w, a, v_g, 1, 0)
    h = t - r
    u_tgt = v_g - h * dudt
    s = ((u - sg(u_tgt)) ** 2).sum(-1)
    held = sg(s)
    weight = (held + c) ** p
    return s / weight


def imf_loss(weights, x, y, draws, *, null, p, c):
    """Return the iMF loss of each row, (..., B)."""
    e, t, r, drop, kappa, low, high = draws
    w = weights | {"t": weights["t"], "r": weights["r"]}
    nothing = np.full_like(y, null)
    label = where(drop[:, 0], null, y)
    z, v = (1 - t) * x + t * e, e - x
    inside = (low <= t) & (t <= high)
    gated = where(inside, kappa, 0)
    guided, unguided = at_all_times(gated), at_all_times(0 * t)
    v_class = imf_network(w, z, t, t, y, guided)[1]
    v_null = imf_network(w, z, t, t, nothing, unguided)[1]
    v_class, v_null = sg(v_class), sg(v_null)
    v_g = v + gated * (v_class - v_null)
    v_g = where(drop, v, v_g)
    told = Guidance(kappa, low, high)
    u, v_head = imf_network(w, z, t, r, label, told)
    a = hidden(w, z, t, r, label, told)
    dudt = tangent(w, a, v_class, 1, 0)
    h = t - r
    errors = u + h * sg(dudt) - v_g, v_head - v_g
    s = (np.stack(errors) ** 2).sum(-1)
    held = sg(s)
    weight = (held + c) ** p
    return (s / weight).sum(0)


def sample(weights, e, y, *, null, steps):
    """Return data from noise, (B, D)."""
    w = weights | {"t": weights["t"], "r": weights["r"]}
    label = y
    times = [1 - i / steps for i in range(steps + 1)] if isinstance(steps, int) else steps
    count = len(times) - 1
    z = e
    for t, r in zip(times[:count], times[1:]):
        h = t - r
        start, seen = z, z
        t, r = np.full(len(z), t), np.full(len(z), r)
        z = start - h * network(w, seen, t, r, label)
    return z


def draw(batch, random):
    """Return t, r and drop of a batch, (B,) each."""
    logits = -0.4 + 1.0 * random.standard_normal((2, batch))
    times = 1 / (1 + np.exp(-logits))
    r, t = np.sort(times, 0)
    row = np.arange(batch)
    equal = row < 0.75 * batch
    r = where(equal, t, r)
    drop = row < (random.random(batch) < 0.1).sum()
    return t, r, drop


class Guidance(NamedTuple):
    kappa: np.ndarray
    low: np.ndarray
    high: np.ndarray


def at_all_times(kappa):
    return Guidance(kappa, 0 * kappa, 0 * kappa + 1)


# --- the mistakes ---


class Mistake(NamedTuple):
    name: str
    mend: str
    edits: list  # [(right text, wrong text)] in the function above


# fmt: off
COMMON = [  # of loss and imf_loss
    ("a mean where the paper sums (the squared error)",
     "sum the squared error over all axes but the batch's: it is no mean over pixels",
     [(".sum(-1)", ".mean(-1)")]),
    ("a squared squared error: of each element",
     "square u - u_tgt once: what is handed to the adaptive loss is the error itself",
     [(" ** 2)", " ** 4)")]),
    ("a squared squared error: of each row",
     "do not square the row's squared error again",
     [("    held =", "    s = s ** 2\n    held =")]),
    ("half of the loss", "leave out the factor 1/2", [("    return", "    s = s / 2\n    return")]),
    ("t = 1 for data: z = t x + (1 - t) e",
     "z = (1 - t) x + t e: t = 0 is data, t = 1 is noise, in training as in sampling",
     [("(1 - t) * x + t * e", "t * x + (1 - t) * e")]),
    ("the velocity's sign: v = x - e", "v = dz/dt = e - x", [(", e - x", ", x - e")]),
    ("the network is called with (z, r, t)", "call net(z, t, r, y): the later time first",
     [('{"t": weights["t"], "r": weights["r"]}', '{"t": weights["r"], "r": weights["t"]}')]),
    ("the network is given t - r where r belongs",
     "hand (t, r) to net; one that embeds (t, t - r) subtracts inside, where the jvp sees it",
     [('{"t": weights["t"], "r": weights["r"]}',
       '{"t": weights["t"] + weights["r"], "r": -weights["r"]}')]),
    ("t times 1000", "hand t in [0, 1] to the network as it is: du/dt grows by the same factor",
     [("    nothing =",
       '    w = w | {"t": 1000 * w["t"], "r": 1000 * w["r"]}\n    nothing =')]),
    ("the tangent of r is 1", "r is held: the tangent is (v, 1, 0) for (z, t, r)",
     [(", 1, 0)", ", 1, 1)")]),
    ("the tangent of t is 0", "time moves, too: the tangent is (v, 1, 0) for (z, t, r)",
     [(", 1, 0)", ", 0, 0)")]),
    ("the tangents in the wrong order: (v, r, t)",
     "the tangent 1 is that of t, 0 that of r: keep both tuples in the order (z, t, r)",
     [(", 1, 0)", ", 0, 1)")]),
    ("t - r forgotten", "multiply du/dt by t - r", [("h = t - r", "h = 0 * t + 1")]),
    ("t - r forgotten, where r < t", "multiply du/dt by t - r",
     [("h = t - r", "h = 1.0 * (t > r)")]),
    ("t for t - r", "multiply du/dt by t - r", [("h = t - r", "h = t")]),
    ("t for t - r, where r < t", "multiply du/dt by t - r", [("h = t - r", "h = t * (t > r)")]),
    ("t - r squared", "multiply du/dt by t - r once", [("h = t - r", "h = (t - r) ** 2")]),
    ("labels are not dropped", "hand the null label to net where drop is true",
     [("where(drop[:, 0], null, y)", "y")]),
    ("labels are dropped in all rows or none", "drop labels row by row, as drop says",
     [("drop[:, 0], null", "(drop | drop.any())[:, 0], null")]),
    ("the adaptive weight is not detached", "stop the gradient of 1 / (s + c)^p",
     [("held = sg(s)", "held = s")]),
    ("an adaptive weight of the whole batch", "weight each row by its own error",
     [("held = sg(s)", "held = sg(s).mean(-1, keepdims=True)")]),
    ("c outside of the power: s^p + c", "(s + c)^p", [("(held + c) ** p", "(held ** p + c)")]),
    ("c forgotten", "add c before the power: (s + c)^p", [("(held + c)", "held")]),
    ("c = 0.001 whatever is asked", "take c as given: 0.01 in the authors' ImageNet code, 0.001 in "
     "the paper and the CIFAR-10 code", [("(held + c)", "(held + 1e-3)")]),
    ("p forgotten: p = 1", "take p as given: (s + c)^p",
     [("    weight =", "    p = 1\n    weight =")]),
    ("the square root in the weight: p / 2", "s is the squared error already: (s + c)^p",
     [("    weight =", "    p = p / 2\n    weight =")]),
    ("no adaptive weight", "divide s by sg((s + c)^p)", [("s / weight", "s")]),
]
KNOWN = {
    "loss": COMMON + [
        ("an adaptive weight of each element", "sum over the row first, then weight",
         [(".sum(-1)", ""), ("s / weight", "(s / weight).sum(-1)")]),
        ("the tangent of z is 0", "du/dt is the total derivative: v du/dz + du/dt, not du/dt alone",
         [("(w, a, v_g", "(w, a, 0 * v_g")]),
        ("the tangent of z is e - x under guidance", "move z along the guided velocity v_g",
         [("(w, a, v_g", "(w, a, v")]),
        ("the target starts from e - x under guidance", "u_tgt = v_g - (t - r) du/dt",
         [("u_tgt = v_g", "u_tgt = v")]),
        ("a plus in the identity: v + (t - r) du/dt", "u_tgt = v - (t - r) du/dt",
         [("- h", "+ h")]),
        ("no du/dt: flow matching's target", "subtract (t - r) du/dt from v", [("* dudt", "* 0")]),
        ("the target is not detached", "stop the gradient of u_tgt, du/dt included",
         [("sg(u_tgt)", "u_tgt")]),
        ("guidance keeps its graph", "evaluate v_class and v_null without gradient",
         [("sg(v_class), sg(v_null)", "v_class, v_null")]),
        ("the null velocity where the class velocity belongs, or kappa = 0",
         "kappa multiplies u(z, t, t | y)",
         [("kappa * v_class", "kappa * v_null")]),
        ("the class velocity where the null velocity belongs",
         "1 - omega - kappa multiplies u(z, t, t | null)",
         [("- kappa) * v_null", "- kappa) * v_class")]),
        ("kappa's complement forgotten: 1 - omega", "the null velocity has 1 - omega - kappa",
         [("(1 - omega - kappa) *", "(1 - omega) *")]),
        ("omega's complement forgotten: 1 - kappa", "the null velocity has 1 - omega - kappa",
         [("(1 - omega - kappa) *", "(1 - kappa) *")]),
        ("omega for kappa, and kappa for omega",
         "omega multiplies e - x, kappa the network's class velocity",
         [("    v_g = omega", "    omega, kappa = kappa, omega\n    v_g = omega")]),
        ("kappa times the class velocity forgotten",
         "v_g = omega v + kappa v_class + (1 - omega - kappa) v_null",
         [(" + kappa * v_class", "")]),
        ("guidance ignored", "replace v by v_g where guidance acts",
         [("where(guided, v_g, v)", "v")]),
        ("the interval ignored", "guide only where interval[0] <= t <= interval[1]",
         [("(interval[0] <= t) & (t <= interval[1])", "(t <= t)")]),
        ("guidance outside of the interval", "guide only where interval[0] <= t <= interval[1]",
         [("(interval[0] <= t) & (t <= interval[1])",
           "~((interval[0] <= t) & (t <= interval[1]))")]),
        ("the interval is one of 1 - t", "interval[0] <= t <= interval[1], where t = 1 is noise",
         [("(interval[0] <= t) & (t <= interval[1])",
           "(interval[0] <= 1 - t) & (1 - t <= interval[1])")]),
        ("guidance of dropped rows", "where the label is dropped, v_g is v", [(" & ~drop", "")]),
        ("guidance evaluated at (r, r)", "evaluate both velocities at (z, t, t)",
         [("z, t, t, label", "z, r, r, label"), ("z, t, t, nothing", "z, r, r, nothing")]),
        ("guidance evaluated at (t, r)", "evaluate both velocities at (z, t, t)",
         [("z, t, t, label", "z, t, r, label"), ("z, t, t, nothing", "z, t, r, nothing")]),
    ],
    "imf_loss": COMMON + [
        ("the tangent of z is 0", "du/dt is the total derivative: v du/dz + du/dt, not du/dt alone",
         [("(w, a, v_class", "(w, a, 0 * v_class")]),
        ("the tangent of z is e - x", "move z along the network's own class velocity",
         [("(w, a, v_class", "(w, a, v")]),
        ("the tangent of z is the guided velocity",
         "move z along the network's own class velocity", [("(w, a, v_class", "(w, a, v_g")]),
        ("a minus in V = u - (t - r) du/dt", "V = u + (t - r) du/dt", [("u + h", "u - h")]),
        ("no du/dt: flow matching's loss", "V = u + (t - r) du/dt", [("sg(dudt)", "0")]),
        ("du/dt is not detached", "V = u + (t - r) sg(du/dt)", [("sg(dudt)", "dudt")]),
        ("the v head learns e - x", "the authors' code regresses it on the guided velocity",
         [("v_head - v_g", "v_head - v")]),
        ("V is regressed on e - x", "regress V on the guided velocity",
         [(" - v_g, v_head", " - v, v_head")]),
        ("no loss of the v head", "add its own weighted squared error", [(".sum(0)", "[0]")]),
        ("the class velocity is the u head's", "both velocities are the v head's",
         [(", guided)[1]", ", guided)[0]")]),
        ("the null velocity is the u head's", "both velocities are the v head's",
         [("unguided)[1]", "unguided)[0]")]),
        ("the null velocity is told the guidance", "tell it kappa = 0",
         [("at_all_times(0 * t)", "at_all_times(gated)")]),
        ("the null velocity of the class", "give the null label", [("t, nothing,", "t, y,")]),
        ("the class velocity is told the row's interval", "tell it the interval [0, 1]",
         [("at_all_times(gated)", "Guidance(gated, low, high)")]),
        ("the class velocity is told kappa outside of the interval", "tell it 0 there",
         [("at_all_times(gated)", "at_all_times(kappa)")]),
        ("the class velocity of dropped labels", "take that of the row's own class for the tangent",
         [("t, t, y,", "t, t, label,")]),
        ("guidance is not detached", "evaluate v_class and v_null without gradient",
         [("sg(v_class), sg(v_null)", "v_class, v_null")]),
        ("guidance ignored", "v_g = v + kappa (v_class - v_null)",
         [("v + gated", "v + 0 * gated")]),
        ("guidance of scale omega", "kappa = 1 - 1 / omega multiplies v_class - v_null",
         [("v + gated", "v + (1 / (1 - gated))")]),
        ("the interval ignored", "kappa acts only where low <= t <= high",
         [("(low <= t) & (t <= high)", "(t <= t)")]),
        ("guidance outside of the interval", "kappa acts only where low <= t <= high",
         [("(low <= t) & (t <= high)", "~((low <= t) & (t <= high))")]),
        ("guidance of dropped rows", "where the label is dropped, v_g is v",
         [("where(drop, v, v_g)", "v_g")]),
        ("the network is told omega", "tell it kappa = 1 - 1 / omega",
         [("told = Guidance(kappa,", "told = Guidance(1 / (1 - kappa),")]),
        ("the network is told kappa of the interval", "in the main pass, tell it the row's kappa",
         [("told = Guidance(kappa,", "told = Guidance(gated,")]),
        ("the network is told the interval [0, 1]", "in the main pass, tell it the row's interval",
         [(", low, high)\n    u", ", 0 * low, 0 * high + 1)\n    u")]),
    ],
    "sample": [
        ("t - r = 0: Euler's method", "call net(z, t, r, y), which gives the average velocity",
         [("t, r, label", "t, t, label")]),
        ("the velocity at the step's end: net(z, r, r)", "call net(z, t, r, y)",
         [("t, r, label", "r, r, label")]),
        ("the network is called with (z, r, t)", "call net(z, t, r, y): the later time first",
         [("t, r, label", "r, t, label")]),
        ("the network is given t - r where r belongs", "hand (t, r) to net",
         [("t, r, label", "t, t - r, label")]),
        ("the network is given r = 0 in every step", "hand the step's own r to net",
         [("t, r, label", "t, 0 * r, label")]),
        ("the network is given t = 1 and r = 0 in every step", "hand the step's own times to net",
         [("t, r, label", "0 * t + 1, 0 * r, label")]),
        ("t = 1 for data in the network's times", "noise is t = 1: hand t and r as they are",
         [("        start,", "        t, r = 1 - t, 1 - r\n        start,")]),
        ("time runs from 0 to 1", "from t = 1, noise, down to t = 0, data",
         [("    z = e\n", "    times = times[::-1]\n    z = e\n")]),
        ("t times 1000", "hand t in [0, 1] to the network as it is",
         [("    times =", '    w = w | {"t": 1000 * w["t"], "r": 1000 * w["r"]}\n    times =')]),
        ("a plus: z + (t - r) u", "z_r = z_t - (t - r) u", [("start - h", "start + h")]),
        ("t - r forgotten", "z_r = z_t - (t - r) u", [("h = t - r", "h = 0 * t + 1")]),
        ("t for t - r", "z_r = z_t - (t - r) u", [("h = t - r", "h = t")]),
        ("every step starts from the noise", "start from where the last step ended",
         [("start, seen = z, z", "start, seen = e, e")]),
        ("the noise stays the network's input", "hand the running z to net",
         [("start, seen = z, z", "start, seen = z, e")]),
        ("one time too few: linspace(1, 0, steps)", "steps + 1 times make so many steps",
         [("1 - i / steps for i in range(steps + 1)",
           "1 - i / max(steps - 1, 1) for i in range(steps)")]),
        ("the last step is left out", "end at t = 0", [("len(times) - 1", "len(times) - 2")]),
        ("a single step whatever is asked", "take as many steps as are asked",
         [("    count =", "    times = [times[0], times[-1]]\n    count =")]),
        ("equal steps where times are given", "take the times that are given",
         [("else steps", "else [1 - i / (len(steps) - 1) for i in range(len(steps))]")]),
        ("the null label for the class", "hand y to net",
         [("label = y", "label = np.full_like(y, null)")]),
    ],
    "draw": [
        ("uniform times", "t and r are sigmoids of normal numbers of mean -0.4 and deviation 1",
         [("1 / (1 + np.exp(-logits))", "random.random((2, batch))")]),
        ("a mean of +0.4, or t = 1 for data", "the logits have mean -0.4, and t = 1 is noise",
         [("-0.4 +", "0.4 +")]),
        ("a mean of 0", "the mean of the logits is -0.4", [("-0.4 +", "0.0 +")]),
        ("CIFAR-10's times: logit-normal(-2, 2)", "mean -0.4 and deviation 1 are ImageNet's",
         [("-0.4 + 1.0 *", "-2.0 + 2.0 *")]),
        ("no sigmoid", "times are sigmoids of the normal numbers",
         [("1 / (1 + np.exp(-logits))", "np.clip(logits, 0, 1)")]),
        ("exp for sigmoid: log-normal times", "times are sigmoids of the normal numbers",
         [("1 / (1 + np.exp(-logits))", "np.clip(np.exp(logits), 0, 1)")]),
        ("r above t: not sorted", "t is the larger of the two numbers, r the smaller",
         [("np.sort(times, 0)", "times")]),
        ("r above t: sorted the wrong way round", "t is the larger of the two numbers",
         [("r, t = np.sort", "t, r = np.sort")]),
        ("r uniform below t", "r is the smaller of two logit-normal numbers",
         [("    row =", "    r = t * random.random(batch)\n    row =")]),
        ("one number for both times", "draw two numbers: r = t in three quarters only",
         [("    row =", "    r = t\n    row =")]),
        ("a share of 75 % with r < t", "r < t in a quarter of the rows, r = t in the others",
         [("row < 0.75", "row < 0.25")]),
        ("r < t in all rows", "set r = t in three quarters of the rows",
         [("row < 0.75", "row < 0 * 0.75")]),
        ("half of the rows with r = t: iMF's share", "MeanFlow has r = t in three quarters",
         [("row < 0.75", "row < 0.5")]),
        ("t is lowered to r", "where they are equal, r is raised to t: r = t",
         [("r = where(equal, t, r)", "t = where(equal, r, t)")]),
        ("one time for the whole batch", "draw times for each row",
         [("standard_normal((2, batch))", "standard_normal((2, 1)) + np.zeros((2, batch))")]),
        ("the same numbers in every batch", "seed the generator once, not in every call",
         [("    logits", "    random = np.random.default_rng(0)\n    logits")]),
        ("randn() < p", "compare a uniform number with p",
         [("random.random(batch) < 0.1", "random.standard_normal(batch) < 0.1")]),
        ("no label is dropped", "drop a tenth of the labels", [("< 0.1", "< 0")]),
        ("nine labels in ten are dropped", "drop a tenth of the labels: drop marks what is dropped",
         [("< 0.1", "< 0.9")]),
        ("one coin for the labels of a whole batch", "drop labels row by row",
         [("random.random(batch) < 0.1", "random.random(1) * np.ones(batch) < 0.1")]),
    ],
}
# fmt: on
KNOWN = {name: [Mistake(*row) for row in rows] for name, rows in KNOWN.items()}


def variant(function, *mistakes):
    """Return the function with these mistakes, or None if they are two versions of one line."""
    text, edits = inspect.getsource(function), [m.edits for m in mistakes]
    texts = {edit(text, sum(order, [])) for order in (edits, edits[::-1])}
    return compiled(function, *texts) if len(texts) == 1 and None not in texts else None


def edit(text, edits):
    """Return the text with all edits, or None if a right text is not there exactly once."""
    for right, wrong in edits:
        if text.count(right) != 1:
            return None
        text = text.replace(right, wrong)
    return text


@cache
def compiled(function, text):
    names = {}
    exec(text, globals(), names)
    return names[function.__name__]


@cache
def hypotheses(function, count):
    """Return all sets of so many mistakes that can be made at once, with the variant of each."""
    sets = ((m, variant(function, *m)) for m in combinations(KNOWN[function.__name__], count))
    return [(mistakes, f) for mistakes, f in sets if f]
