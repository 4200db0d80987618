"""Check a port of MeanFlow against vectors.json, and name the mistakes that it makes.

    python vectors/check.py package.module:function             a loss
    python vectors/check.py --imf package.module:function       a loss of improved MeanFlow
    python vectors/check.py --sample package.module:function    a sampler
    python vectors/check.py --draw package.module:function      a drawer of times
    python vectors/check.py answers.json                        numbers of another language

Torch, JAX and NumPy are understood, told by what the function returns. It is called as

    loss(net, x, y, draws, *, null, omega, kappa, interval, p, c)    as meanflow.loss
    loss(net, x, y, draws, *, null, p, c)                            --imf, as imf.loss
    sample(net, e, y, steps)                       steps: a number, or the decreasing times
    draw(shape, *, generator) -> t, r and drop     or rng, key, seed for generator: what you name

x, e: (7, 2, 2, 3); y: (7,) integers; draws: a named tuple of e, t, r and drop (kappa, low, high);
t = 1 is noise. net(z, t, r, y) is partial(network, weights): the small network of README.md, in
the same kind of arrays, so that gradients by its weights are checked, too. Keywords that the
function does not name are not handed over, and settings that need them are not checked; nor are
those for which it raises NotImplementedError.

A loss returns its rows (B,), their mean, or a tuple or dict with one of them: `loss` is the loss,
z, v, v_g, u, dudt, u_tgt and s are compared, too, and grad, {name of weight: array}, where NumPy
has no gradient of its own. An adapter for a port of another signature, in a file beside it:

    from myport import MeanFlowLoss  # forward(model, images, labels, noise, t, r) -> loss, mse

    def loss(net, x, y, draws, *, null, p, c):
        y = torch.where(draws.drop, null, y)
        model = lambda z, t, h, y: net(z, t, t - h, y)  # theirs takes the duration h = t - r
        return MeanFlowLoss(power=p, eps=c).forward(model, x, y, draws.e, draws.t, draws.r)
"""

import argparse
import importlib
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

import mistakes as known  # noqa: E402

VECTORS = json.loads((FOLDER / "vectors.json").read_text())
# An error is the largest difference of an array, in units of its largest number. A mistake is
# recognised to TOLERANCE, or, where that is less than sums in another order make, to 1e-9.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "float16": 3e-2, "bfloat16": 3e-2}
DEFAULTS = {"omega": 1, "kappa": 0, "interval": [0, 1], "p": 1, "c": 0.01}
WAY_OUT = "write an adapter as in the docstring of check.py"
LEAST_SLOPE = 1e-3


class Wrong(Exception):
    """What the user must mend before anything can be compared."""


class Draws(NamedTuple):
    e: Any
    t: Any
    r: Any
    drop: Any


class ImfDraws(NamedTuple):
    e: Any
    t: Any
    r: Any
    drop: Any
    kappa: Any
    low: Any
    high: Any


class Kind(NamedTuple):
    """What is checked. One more loss is one more row of KINDS, of make.py and of mistakes.py."""

    flag: str  # of the command line
    title: str
    call: str
    main: str  # the result
    steps: list  # before it, in the order of the algorithm
    net: Callable
    weights: str  # in vectors.json
    draws: type
    options: list  # keywords, beside null


KINDS = {
    "loss": Kind(
        "",
        "Algorithm 1",
        "loss(net, x, y, draws, *, null, omega, kappa, interval, p, c)",
        "loss",
        "z v v_g u dudt u_tgt s".split(),
        known.network,
        "weights",
        Draws,
        [*DEFAULTS],
    ),
    "imf_loss": Kind(
        "--imf",
        "iMF's loss",
        "loss(net, x, y, draws, *, null, p, c)",
        "loss",
        "z v v_class v_null v_g u v_head dudt V s".split(),
        known.imf_network,
        "imf_weights",
        ImfDraws,
        ["p", "c"],
    ),
    "sample": Kind(
        "--sample",
        "the sampler",
        "sample(net, e, y, steps)",
        "x",
        [],
        known.network,
        "weights",
        Draws,
        [],
    ),
}
DRAW_CALL = "draw(shape, *, generator)"


# --- the user's function ---


def load(spec):
    """Return the function that package.module:function names. Raise Wrong."""
    name, _, path = spec.partition(":")
    name = name.removesuffix(".py").replace("/", ".")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        found = "is not on the path" if error.name == name.split(".")[0] else f"needs {error.name}"
        raise Wrong(f"module {name} {found}: run this in the folder where it lies") from None
    except Exception as error:
        raise Wrong(f"importing {name} raised {described(error)}") from None
    function = module
    for part in path.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        has = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        hint = f"{name} has {', '.join(has) or 'none'}: name one of them"
        raise Wrong(f"{spec} is no function, {hint} as package.module:function")
    return function


def described(error):
    """Return an error and where it was raised, in one line."""
    text = " ".join(str(error).split())
    frame = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    place = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
    return f"{type(error).__name__}: {text[:300]}{place}"


def accepted(function, options):
    """Return those options which the function names, or all if it takes any."""
    try:
        # a module's own signature takes anything
        parameters = inspect.signature(getattr(function, "forward", function)).parameters
    except (TypeError, ValueError):  # compiled code has none
        return options
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def check_signature(function, arguments, options, call):
    """Raise Wrong if the function cannot be called so."""
    try:
        signature = inspect.signature(function)
        signature.bind(*arguments, **options)
    except TypeError as error:
        theirs = f"{getattr(function, '__name__', 'your function')}{signature}"
        raise Wrong(f"{theirs} cannot be called as {call}: {error}; {WAY_OUT}") from None
    except ValueError:
        pass


def libraries(function):
    """Return those whose arrays to try: what the function's module names first, NumPy last."""
    module = sys.modules.get(getattr(function, "__module__", None))
    names = [getattr(value, "__name__", "") for value in vars(module or object).values()]
    near = {str(name).split(".")[0] for name in names}
    loaded = [name for name in ("jax", "torch") if name in sys.modules]
    return [*sorted(loaded, key=lambda name: name not in near), "numpy"]


def library_of(a):
    """Return the library of an array or number, or None for anything else."""
    name = type(a).__module__.split(".")[0]
    name = "jax" if name == "jaxlib" else name
    return "numpy" if isinstance(a, int | float) else name if hasattr(a, "dtype") else None


def to_library(library, dtype, a):
    """Return NumPy's array as one of this library, its floating numbers in this dtype."""
    a = a.astype(dtype) if a.dtype.kind == "f" else a
    if library == "jax":
        sys.modules["jax"].config.update("jax_enable_x64", True)
        return importlib.import_module("jax.numpy").asarray(a)
    return sys.modules["torch"].tensor(a) if library == "torch" else a


def to_numpy(a):
    """Return the array in float64, and the name of its own dtype."""
    a = a.detach().cpu() if library_of(a) == "torch" else a
    name = str(getattr(a, "dtype", "float64")).removeprefix("torch.")
    a = a.double() if name == "bfloat16" and library_of(a) == "torch" else a
    return np.asarray(a).astype(np.float64), name


def tensors(name, library, dtype):
    """Return x, y, draws and weights for this loss or sampler."""
    kind, to = KINDS[name], partial(to_library, library, dtype)
    given = {k: to(np.array(v)) for k, v in VECTORS["inputs"].items()}
    w = {k: to(np.array(v)) for k, v in VECTORS[kind.weights].items()}
    if library == "torch" and name != "sample":
        w = {k: p.requires_grad_() for k, p in w.items()}
    return given["x"], given["y"], kind.draws(*(given[k] for k in kind.draws._fields)), w


def gradient(library, rows, objective, w):
    """Return the gradient of the mean of the loss by the weights, None for NumPy. Raise Wrong."""
    if library == "torch" and library_of(rows) == "torch":
        if not rows.requires_grad:
            raise Wrong("the loss has no graph, it would train nothing: return it not detached")
        torch = sys.modules["torch"]
        grads = torch.autograd.grad(rows.mean(), [*w.values()], allow_unused=True)
        return {k: torch.zeros_like(w[k]) if g is None else g for k, g in zip(w, grads)}
    if library == "jax":
        return sys.modules["jax"].grad(lambda w: parts(objective(w))["loss"].mean())(w)


def parts(out):
    """Return what a loss returned as a dict with `loss`. Raise Wrong."""
    if isinstance(out, tuple | list) and out:
        more = next((part for part in out[1:] if isinstance(part, dict)), {})
        out = {**more, "loss": out[0]}
    out = out if isinstance(out, dict) else {"loss": out}
    if library_of(out.get("loss")) is None:
        found = f"a dict of {', '.join(out)}" if "loss" not in out else type(out["loss"]).__name__
        raise Wrong(f"it returned {found}: return the loss of each row (B,), or their mean")
    return out


def ask(function, name, setting, library, dtype):
    """Return what the function answers in this setting, {name: what it returned}."""
    x, y, draws, w = tensors(name, library, dtype)
    if name == "sample":
        steps = VECTORS[name][setting]["steps"]
        return {"x": function(partial(known.network, w), draws.e, y, steps)}
    options = {"null": VECTORS["null"], **VECTORS[name][setting]["options"]}
    options = accepted(function, options)

    def objective(w):
        return function(partial(KINDS[name].net, w), x, y, draws, **options)

    answer = parts(objective(w))
    if "grad" not in answer:
        answer["grad"] = gradient(library, answer["loss"], objective, w)
    return answer


def possible(function, name, setting):
    """Say whether the function takes the options in which this setting differs from the default."""
    options = VECTORS[name][setting].get("options", {})
    lacking = options.keys() - accepted(function, options).keys()
    return all(options[k] == DEFAULTS[k] for k in lacking)


def call(function, name):
    """Return ask for this function with the arrays that it takes, and its settings. Raise Wrong."""
    kind = KINDS[name]
    if name == "sample":
        check_signature(function, [None] * 4, {}, kind.call)
    else:
        options = accepted(function, dict.fromkeys(["null", *kind.options]))
        check_signature(function, [None] * 4, options, kind.call)
    settings = [s for s in VECTORS[name] if possible(function, name, s)]
    errors, others = [], []
    for library in libraries(function):
        for dtype in ("float64", "float32"):
            asked = partial(ask, function, name, library=library, dtype=dtype)
            try:
                main = first_answer(asked, settings)[kind.main]
            except Wrong:
                raise
            except Exception as error:
                errors.append(error)
                continue
            if library_of(main) == library:
                return asked, settings
            others.append(asked)
    if others:
        return others[0], settings
    raise Wrong(f"calling it as {kind.call} raised {described(errors[0])}; {WAY_OUT}")


def first_answer(ask, settings):
    """Return the answer in the first setting that is implemented."""
    for setting in settings[:-1]:
        try:
            return ask(setting=setting)
        except NotImplementedError:
            continue
    return ask(setting=settings[-1])


def read(answer, name, setting):
    """Return the answer as {name: float64 array}, and the least precise dtype. Raise Wrong."""
    right, found, dtypes = VECTORS[name][setting], {}, {"float64"}
    grads = answer.get("grad") or {}
    if grads and (lacking := right["grad"].keys() - grads.keys()):
        raise Wrong(f"grad has no {', '.join(sorted(lacking))}: give the gradient by all weights")
    values = {k: answer.get(k) for k in [*KINDS[name].steps, KINDS[name].main]}
    values |= {f"grad of {k}": g for k, g in grads.items() if k in right["grad"]}
    for key, value in values.items():
        if value is not None:
            found[key], dtype = read_array(value, key, np.shape(expected(right, key)), setting)
            dtypes.add(dtype)
    return found, max(dtypes, key=lambda d: TOLERANCE.get(d, 0))


def read_array(value, key, shape, setting):
    """Return it as a float64 array of this shape, and its own dtype. Raise Wrong."""
    value = np.array(value) if isinstance(value, list) else value
    if library_of(value) is None:
        raise Wrong(f"{key} is a {type(value).__name__} in the setting {setting!r}: no array")
    value, dtype = to_numpy(value)
    shape = () if key == "loss" and value.size == 1 else shape
    if value.size != math.prod(shape):
        hint = ": of each row, or their mean; sum over all other axes" if key == "loss" else ""
        raise Wrong(f"{key} has shape {value.shape}, where {shape} is expected{hint}")
    value = value.reshape(shape)
    if not np.isfinite(value).all():
        at = tuple(np.argwhere(~np.isfinite(value))[0].tolist())
        what = f"{key}{[*at] or ''} is {value[at]}"
        raise Wrong(f"{what} in the setting {setting!r}, where all times are between 0 and 1")
    return value, dtype


def expected(right, key):
    """Return what vectors.json has under this key of `read`."""
    return right["grad"][key.removeprefix("grad of ")] if key.startswith("grad") else right[key]


def collect(spec, name):
    """Return {setting: what was read}, the dtype and the settings left out. Raise Wrong."""
    if spec.endswith(".json"):
        try:
            file = json.loads(Path(spec).read_text())
        except (OSError, ValueError) as error:
            raise Wrong(f"{spec} is no file of JSON: {error}") from None
        ask, settings = (lambda setting: file[setting]), [s for s in VECTORS[name] if s in file]
    else:
        ask, settings = call(load(spec), name)
    found, dtypes = {}, {"float64"}
    for setting in settings:
        try:
            found[setting], dtype = read(ask(setting=setting), name, setting)
        except NotImplementedError:
            continue
        except Wrong:
            raise
        except Exception as error:
            if name == "sample" and found and isinstance(VECTORS[name][setting]["steps"], list):
                continue  # it takes no times
            raise Wrong(f"in the setting {setting!r} it raised {described(error)}") from None
        dtypes.add(dtype)
    if not found:
        raise Wrong(f"there is no answer: the settings are {', '.join(VECTORS[name])}")
    setting = next(iter(found))
    main, way_out = KINDS[name].main, f"take all from {KINDS[name].call}; {WAY_OUT}"
    if not np.array_equal(read(ask(setting=setting), name, setting)[0][main], found[setting][main]):
        raise Wrong(f"two calls differ: it draws noise, times or labels of its own; {way_out}")
    dtype = max(dtypes, key=lambda d: TOLERANCE.get(d, 0))
    return found, dtype, [s for s in VECTORS[name] if s not in found]


# --- what is compared ---


def error(a, b, least=1e-300):
    """Return the largest difference, in units of b's largest number, which is at least `least`."""
    return float(np.abs(a - b).max() / max(np.abs(b).max(), least))


def differences(found, name):
    """Return {(setting, key): error}, by setting, each in the order of the algorithm."""
    errors = {}
    for setting, values in found.items():
        for key, value in values.items():
            right = np.array(expected(VECTORS[name][setting], key))
            errors[setting, key] = error(value, right.mean() if value.ndim < right.ndim else right)
    return errors


# --- which mistakes explain it ---


@cache
def directions(name):
    """Return two directions in the space of the weights, {name: (2, ...)}."""
    random = np.random.default_rng(0)
    w = VECTORS[KINDS[name].weights]
    return {k: random.standard_normal((2, *np.shape(p))) for k, p in w.items()}


@cache
def known_inputs(name):
    """Return weights, x, y and draws as mistakes.py takes them."""
    given = {k: np.array(v) for k, v in VECTORS["inputs"].items()}
    columns = [given[k].reshape(len(given["y"]), -1) for k in ImfDraws._fields]
    w = {k: np.array(p) for k, p in VECTORS[KINDS[name].weights].items()}
    if name != "sample":
        w = {k: p + 1j * known.STEP * directions(name)[k] for k, p in w.items()}
    return w, given["x"].reshape(len(given["y"]), -1), given["y"], columns


@cache
def predicted(variant, name, setting):
    """Return what a variant of mistakes.py makes: x; or the loss of each row and derivatives."""
    w, x, y, draws = known_inputs(name)
    if name == "sample":
        steps = VECTORS[name][setting]["steps"]
        return variant(w, draws[0], y, null=VECTORS["null"], steps=steps), None
    options = VECTORS[name][setting]["options"]
    with np.errstate(all="ignore"):
        rows = variant(w, x, y, draws, null=VECTORS["null"], **options)
    return rows[0].real, rows.mean(-1).imag / known.STEP


def observed(values, name):
    """Return what was read as `predicted` returns it; None for derivatives that are not there."""
    if name == "sample":
        return values["x"].reshape(len(values["x"]), -1), None
    grads = [(values.get(f"grad of {k}"), d) for k, d in directions(name).items()]
    if any(g is None for g, _ in grads):
        return values["loss"], None
    return values["loss"], sum((g * d).sum(tuple(range(1, d.ndim))) for g, d in grads)


def agree(seen, made, tolerance):
    """Say whether what was seen is what a variant makes."""
    (main, slopes), (want, wanted) = seen, made
    want = want if main.ndim else want.mean()
    close = error(main, want) <= tolerance
    # s / (s + c) with c = 0 has no slope but rounding errors, which have no digits to compare
    return close and (slopes is None or error(slopes, wanted, LEAST_SLOPE) <= tolerance)


def explain(found, name, tolerance):
    """Return the mistakes that make these numbers, [(Mistake, ...)]: single ones, or else pairs."""
    seen = {setting: observed(values, name) for setting, values in found.items()}
    # most mistakes show in the last setting, where all is together: ask it first
    settings = list(seen)[::-1]
    for count in (1, 2):
        fitting = [
            mistakes
            for mistakes, variant in known.hypotheses(getattr(known, name), count)
            if all(agree(seen[s], predicted(variant, name, s), tolerance) for s in settings)
        ]
        if fitting:
            return fitting
    return []


def told(fitting):
    """Return lines that name mistakes and their mends."""
    lines = []
    if len(fitting) > 1:
        lines.append("one of these, whose numbers are the same here:")
    for mistakes in fitting:
        label = "known mistake" if len(mistakes) == 1 else "a pair of known mistakes"
        lines.append(f"{label}: {'; '.join(m.name for m in mistakes)}")
        lines += [f"    mend: {m.mend}" for m in mistakes]
    return lines


def averaged(found):
    """Return a loss summed over the batch, and its gradients, divided by the number of rows."""
    batch = len(VECTORS["inputs"]["y"])
    return {
        setting: {k: a / batch if k == "loss" or "grad" in k else a for k, a in values.items()}
        for setting, values in found.items()
    }


def compare(spec, name):
    """Check a loss or a sampler: return whether it is right, and lines that say so."""
    found, dtype, left = collect(spec, name)
    kind, what = KINDS[name], KINDS[name].title
    where, tolerance = f"{len(found)} settings, {dtype}", TOLERANCE[dtype]
    notes = [f"not checked: {', '.join(left)}"] if left else []
    if name != "sample" and not any("grad" in key for v in found.values() for key in v):
        notes.append("not checked: gradients, which alone show what is not detached")
    readings = [(found, [])]
    if all(values[kind.main].ndim == 0 for values in found.values()):
        readings.append((averaged(found), ["it is summed over the batch, here averaged"]))
    for reading, how in readings:
        errors = differences(reading, name)
        if max(errors.values()) <= tolerance:
            return True, [f"equal to {what} to {summary(errors)}; {where}", *how, *notes]
    for reading, how in readings:
        if fitting := explain(reading, name, max(tolerance, 1e-9)):
            line = first_difference(differences(reading, name), what, tolerance)
            return False, [line, *told(fitting), *how, *notes]
    errors = differences(found, name)
    if max(errors.values()) <= TOLERANCE["float32"] / 10:
        notes.append(f"the numbers are {dtype}, but not so precise: is a part of it float32?")
        return True, [f"equal to {what} to {summary(errors)}; {where}", *notes]
    lines = [first_difference(errors, what, tolerance)]
    lines.append("no known mistake and no pair of them makes these numbers")
    if name != "sample" and not any(key in kind.steps for _, key in errors):
        lines[-1] += f": return a dict with {', '.join(kind.steps)} to see the first to differ"
    return False, [*lines, *notes]


def first_difference(errors, what, tolerance):
    """Return a line that names the first array that differs, in the order of the algorithm."""
    (setting, key), size = next(item for item in errors.items() if item[1] > tolerance)
    right = [k for s, k in errors if s == setting and errors[s, k] <= tolerance]
    line = f"differs from {what}: {key} is the first, by {size:.1g} in the setting {setting!r}"
    return line + (f" ({', '.join(right)}: right)" if right else "")


def summary(errors):
    """Return the largest error and what was compared."""
    keys = dict.fromkeys("gradients" if "grad" in key else key for _, key in errors)
    return f"{max(1e-16, *errors.values()):.0e}: {', '.join(keys)}"


# --- draws ---


BATCHES, BATCH = 200, 256
RISK = 1e-6  # of calling a right drawer wrong, in each comparison


def drawn(function, seed):
    """Return t, r and drop, or None for it, of one call. Raise Wrong."""
    names = [*inspect.signature(function).parameters]
    size = (BATCH, 1) if names[:1] == ["shape"] else BATCH
    makers = {
        "seed": lambda: seed,
        "rng": lambda: np.random.default_rng(seed),
        "key": lambda: importlib.import_module("jax").random.key(seed),
        "generator": lambda: (
            sys.modules["torch"].Generator().manual_seed(seed)
            if "torch" in sys.modules
            else np.random.default_rng(seed)
        ),
    }
    options = {name: makers[name]() for name in names[1:] if name in makers}
    check_signature(function, [size], options, DRAW_CALL)
    try:
        out = function(size, **options)
    except Exception as error:
        raise Wrong(f"calling it as {DRAW_CALL} raised {described(error)}; {WAY_OUT}") from None
    out = out._asdict() if hasattr(out, "_asdict") else out
    if isinstance(out, tuple | list) and len(out) in (2, 3):
        out = dict(zip(("t", "r", "drop"), out))
    if not isinstance(out, dict) or not {"t", "r"} <= out.keys():
        found = f" of {', '.join(out)}" if isinstance(out, dict) else ""
        raise Wrong(
            f"it returned {type(out).__name__}{found}: return t, r and drop, as a tuple or a dict"
        )
    return [time_of(out, name) for name in ("t", "r", "drop")]


def time_of(out, name):
    """Return one of t, r and drop as an array (B,); None if it is not there. Raise Wrong."""
    if out.get(name) is None:
        return None
    value = to_numpy(out[name])[0]
    if value.size != BATCH:
        raise Wrong(f"{name} has shape {value.shape}, where {(BATCH,)} is expected")
    if not (np.isfinite(value).all() and 0 <= value.min() and value.max() <= 1):
        bad = value[~((value >= 0) & (value <= 1))][0]
        raise Wrong(f"{name} holds {bad}: times lie in [0, 1], and 1 is noise, 0 data")
    return value.reshape(BATCH)


POINTS = sorted({q for levels in VECTORS["draw"]["quantiles"].values() for q in levels})


def distribution(values):
    """Return the shares of values up to each of POINTS, and by how much they may be off.

    By chance alone they are further off once in a million (Dvoretzky, Kiefer, Wolfowitz).
    """
    if not len(values):
        return None
    tolerance = math.sqrt(math.log(2 / RISK) / 2 / len(np.unique(values)))
    return (values[:, None] <= POINTS).mean(0), tolerance


def share(marked, repeated):
    """Return the share of marked rows, and five times its deviation, as it varies by batch."""
    batches = marked.mean(1)
    if repeated:  # one batch is all there is
        return batches.mean(), 5 * math.sqrt(0.25 / BATCH)
    return batches.mean(), 5 * batches.std() / math.sqrt(len(batches)) + 1e-3


def statistics(batches):
    """Return {name: (shares, their tolerance)} of batches of t, r and drop."""
    t, r, drop = (
        None if batches[0][k] is None else np.array([b[k] for b in batches]) for k in range(3)
    )
    repeated = (t == t[0]).all()
    found = {
        "batches like the one before": (float((t[1:] == t[:-1]).all(1).mean()), 0.25),
        "rows with the time of the one before": (float((t[:, 1:] == t[:, :-1]).mean()), 0.25),
        "r = t": share(t == r, repeated),
        "r < t": share(r < t, repeated),
        "r > t": share(r > t, repeated),
        "t where r < t": distribution(t[r < t]),
        "r where r < t": distribution(r[r < t]),
        "t where r = t": distribution(t[r == t]),
        "t where r > t": distribution(t[r > t]),
        "r where r > t": distribution(r[r > t]),
    }
    if drop is not None:
        found["dropped"] = share(drop, repeated)
        found["some are dropped"] = float(drop.any()), 0
        found["batches with one label for all"] = float((drop == drop[:, :1]).all(1).mean()), 0.25
    return {name: value for name, value in found.items() if value}


def draw_differences(found):
    """Return {line: how wrong it is}, above 1 for what cannot be chance."""
    draw, lines = VECTORS["draw"], {}
    right = {"batches like the one before": 0, "rows with the time of the one before": 0}
    right |= {"some are dropped": 1, "batches with one label for all": 0, **draw["shares"]}
    for name, (shares, tolerance) in found.items():
        if name in right:
            off, line = abs(shares - right[name]), f"{name}: {shares:.3f}, right is {right[name]}"
        elif name in draw["quantiles"]:
            points = [POINTS.index(q) for q in draw["quantiles"][name]]
            errors = np.abs(shares[points] - draw["levels"])
            k, off = int(errors.argmax()), errors.max()
            line = f"{name}: {shares[points[k]]:.3f} of them up to {POINTS[points[k]]:.3f}"
            line += f", right is {draw['levels'][k]}"
        else:  # r > t, which the shares tell
            continue
        lines[line] = off / max(tolerance, 1e-9)
    return lines


@cache
def draw_statistics(variant):
    random = np.random.default_rng(1)
    return statistics([variant(BATCH, random) for _ in range(BATCHES)])


def draws_agree(a, b):
    """Say whether two sets of statistics may be of the same drawer."""
    if any("where" in k for k in a.keys() ^ b.keys()):  # rows that only one of them has
        return False
    return all(
        np.abs(a[k][0] - b[k][0]).max() <= math.hypot(a[k][1], b[k][1]) for k in a.keys() & b.keys()
    )


def explain_draws(found):
    """Return the mistakes that make such draws, [(Mistake, ...)]: single ones, or else pairs."""
    for count in (1, 2):
        sets = known.hypotheses(known.draw, count)
        fitting = [m for m, variant in sets if draws_agree(found, draw_statistics(variant))]
        if fitting:
            return fitting
    return []


def compare_draws(spec):
    """Check a drawer: return whether it is right, and lines that say so."""
    function = load(spec)
    found = statistics([drawn(function, seed) for seed in range(BATCHES)])
    notes = [] if "dropped" in found else ["not checked: which labels are dropped"]
    wrong = [line for line, size in draw_differences(found).items() if size > 1]
    rows = f"{BATCHES} batches of {BATCH} rows"
    if not wrong:
        return True, [f"draws like the paper's, in {rows}: {', '.join(found)}", *notes]
    fitting = explain_draws(found)
    if not fitting:
        notes.insert(0, "no known mistake and no pair of them makes such draws")
    return False, [f"other draws than the paper's, in {rows}", *wrong, *told(fitting), *notes]


def main(words=None):
    first, *_ = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("function", help="package.module:function, or a file of answers")
    what = parser.add_mutually_exclusive_group()
    for name, kind in KINDS.items():
        if kind.flag:
            help = f"called as {kind.call}"
            what.add_argument(kind.flag, dest="name", action="store_const", const=name, help=help)
    help = f"called as {DRAW_CALL}"
    what.add_argument("--draw", dest="name", action="store_const", const="draw", help=help)
    args = parser.parse_args(words)
    name = args.name or "loss"
    try:
        run = compare_draws if name == "draw" else partial(compare, name=name)
        right, lines = run(args.function)
    except Wrong as wrong:
        right, lines = False, [str(wrong)]
    print("\n".join(lines))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
