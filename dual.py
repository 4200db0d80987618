"""Forward mode for any network, at the cost of two forwards: values have a graph, tangents none.

    value, tangent = dual.jvp(f, primals, tangents)

computes what torch.func.jvp computes: f(primals), and its derivative along the tangents. The value
keeps its graph and is trained; the tangent is a constant, as in a loss of MeanFlow, whose du/dt has
no gradient. (A method that differentiates through the tangent needs torch.func.jvp.)

Why it is cheaper. For y = x w, torch.func.jvp multiplies x w, dx w and x dw, with a dw of zeros:
three products for a linear map or convolution, of which the graph keeps two. Here a weight has no
tangent, dy = dx w, and nothing of it is kept for the backward pass. The tangent of attention is
written out, so that the value may use any kernel, where torch.func.jvp runs with one alone.
Networks of linear maps, convolutions and attention cost 2.0 to 2.3 forwards instead of 3.0 or more.

How. What is differentiated is a Dual, a tensor that carries its tangent. Every function of torch
that is given one is looked up in RULES; what has no rule, and is written in Python, calls others
that have; else the value is by the function itself and the tangent by torch's forward mode of that
function alone. What would lose a tangent raises an error: a Dual written into a tensor that has
none, an autograd.Function without jvp, a kernel that reads memory. Add a rule for such a function:

    @dual.rule(function)  # a function, or a class of autograd.Function
    def _(function, q, k, **options):  # is given duals and tensors, which dual.split takes apart
        (q, dq), (k, dk) = dual.split(q), dual.split(k)
        return function(q, k, **options), ...  # the value, and its tangent: a tensor of its own

torch.compile cannot make Duals. `compile` compiles a function that then takes tensors and Duals; a
`jvp` inside compiled code works, too.
"""

import contextlib
import functools
import inspect
import math
import operator
import re
import threading
import types

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


def jvp(f, primals, tangents):
    """Return f(*primals) with its graph, and its derivative along `tangents` without.

    primals: tuple of floating tensors, or of nested tuples, lists and dicts of them; tangents: the
    same, with the same shapes. f gets copies, and returns a tensor or such a nesting, as this does.
    What f makes by detach(), item() or float() is a constant, as everywhere in torch. Raises
    TypeError or ValueError if primals, tangents or results are not such tensors, and
    NotImplementedError where a tangent would be lost.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise TypeError("primals and tangents are tuples: give (x,) for one x")
    shell = current_shell()

    def begin(x, dx):
        kinds = [
            f"{a.dtype} {(*a.shape,)}" if isinstance(a, torch.Tensor) else type(a).__name__
            for a in (x, dx)
        ]
        if not (is_real(x) and is_real(dx)):
            raise TypeError(f"a primal {kinds[0]} with tangent {kinds[1]}: give floating tensors")
        if x.shape != dx.shape or dx.is_complex() > x.is_complex():
            raise ValueError(f"a primal {kinds[0]} with tangent {kinds[1]}: they differ")
        if shell is Dual and (torch.is_inference_mode_enabled() or x.is_inference()):
            raise NotImplementedError("inference_mode has no derivatives: use torch.no_grad()")
        x = x.clone()
        return shell(x, like(x, dx.detach()).clone())

    def end(y):
        if is_dual(y):
            return y.tangent.detach()
        if not isinstance(y, torch.Tensor | None):
            raise TypeError(f"dual.jvp of a function that returns a {type(y).__name__}, no tensor")
        return None if y is None else torch.zeros_like(y)

    with running() if shell is Dual else contextlib.nullcontext():
        out = f(*tree_map(begin, primals, tangents))
        return tree_map(value_of, out), tree_map(end, out)


def current_shell():
    return Traced if torch.compiler.is_compiling() else Dual


class Run:
    """The jvp that is running, if any. Threads take turns: torch's forward mode has one level."""

    lock = threading.RLock()
    thread = now = None


@contextlib.contextmanager
def running():
    """Mark a jvp as running. Duals of two jvps must not mix: their tangents have no common
    direction."""
    if Run.thread == threading.get_ident():
        raise NotImplementedError("dual.jvp inside of dual.jvp: nest torch.func.jvp instead")
    watch_functions()
    with Run.lock:
        Run.thread, Run.now = threading.get_ident(), object()
        try:
            yield
        except RuntimeError as error:
            if "TorchScript interpreter" in str(error):  # which drops the text of our error
                raise lost("a script", "", "call the function it was made from") from error
            raise
        finally:
            Run.thread = Run.now = None


# --- duals ---


class Dual(torch.Tensor):
    """A value and its tangent, alike in shape, dtype and strides."""

    def __new__(cls, value, tangent):
        made = torch.Tensor._make_wrapper_subclass
        self = made(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value, self._tangent, self.run = value, tangent, Run.now
        return self

    @property
    def tangent(self):
        """The tangent; in the backward pass, a checkpoint may ask for it again."""
        if Run.now not in (None, self.run):
            raise lost("a dual that was kept from an earlier jvp", "", "detach() what is kept")
        return self._tangent

    def __repr__(self):
        return f"Dual({self.value}, {self.tangent})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(Dual, function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise lost(function, "(reached past torch's functions, as by torch.tensor or vmap) ")


class Traced:
    """Stands for a Dual inside torch.compile, which cannot make subclasses of Tensor."""

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul and not isinstance(args[0], Traced):
            # Dynamo turns a @ b into b @ a here, and passes a true b @ a in the same way
            raise lost(function, "by @ under torch.compile ", "write torch.matmul(a, b)")
        return call(Traced, function, args, kwargs or {})

    def __getattr__(self, name):
        if name in PROPERTIES:
            return call(Traced, PROPERTIES[name], (self,), {})
        if name in METHODS:
            return lambda *args, **kwargs: call(Traced, METHODS[name], (self, *args), kwargs)
        raise AttributeError(name)

    def __iter__(self):
        return iter(self.unbind())


def compile(f, **options):
    """Return a function: f compiled by torch.compile(f, fullgraph=True, **options), which takes
    duals as well as tensors.

    For duals, write torch.matmul for @, and give cat and stack a list, not a tuple: Dynamo refuses
    other forms. In a graph a dual is no instance of torch.Tensor.
    """
    compiled = torch.compile(f, **{"fullgraph": True} | options)

    def run(*args, **kwargs):
        args, kwargs = into(Traced, (args, kwargs))
        return into(Dual, compiled(*args, **kwargs))

    return run


def into(shell, tree):
    return tree_map(lambda a: shell(a.value, a.tangent) if is_dual(a) else a, tree)


def is_dual(x):
    return isinstance(x, (Dual, Traced))


def is_real(x):
    """Return whether x may have a tangent."""
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def value_of(x):
    """Return x, with its graph, without its tangent."""
    return x.value if is_dual(x) else x


def constant(x):
    """Return x without graph and tangent."""
    x = value_of(x)
    return x.detach() if isinstance(x, torch.Tensor) else x


def split(x):
    """Return the value and the tangent of x; None for the tangent of what has none."""
    return value_of(x), x.tangent if is_dual(x) else None


def like(y, dy):
    """Return a tangent with the shape, dtype and strides of its value y.

    Then what is a view of the value is a view of the tangent, too, and writing to one writes both.
    """
    if dy.shape != y.shape:
        dy = dy.expand(y.shape)
    if dy.dtype != y.dtype:
        dy = dy.to(y.dtype)
    return dy if dy.stride() == y.stride() else torch.empty_like(y).copy_(dy)


def join(shell, y, dy):
    """Return the duals of a value and a tangent, or of tuples of them."""
    if dy is None:
        return y
    if is_real(y):
        return shell(y, like(y, dy))
    if isinstance(y, (tuple, list)):
        return type(y)([join(shell, a, da) for a, da in zip(y, dy)])
    return y


# --- a function of torch meets duals ---


def call(shell, function, args, kwargs):
    """Call a function of torch on duals: by its rule, by its own Python code, or by `general`."""
    args, kwargs = list(args), dict(kwargs)
    if kwargs.get("out") is not None:
        raise lost(function, "with out= ", "use what it returns")
    place = INPLACE_AT.get(function, len(args))
    if args.pop(place) if place < len(args) else kwargs.pop("inplace", False):
        target, *args = args or [kwargs.pop("input")]
        new = call(shell, function, (target.clone(), *args), kwargs)
        target.value.copy_(new.value)
        target.tangent.copy_(new.tangent)
        return target
    rule = RULES.get(function)
    try:
        found = rule and rule(function, *args, **kwargs)
    except TypeError:  # torch takes more spellings of its arguments than our rules do
        if function in OTHERS:
            raise
        found = None
    if found:
        return join(shell, *found)
    body = without_check(function) if shell is Dual else None
    return body(*args, **kwargs) if body else general(shell, function, args, kwargs)


def lost(function, how="", hint="detach() what it is given, or write a dual.rule for its caller"):
    name = getattr(function, "__name__", function)
    return NotImplementedError(f"{name} {how}would lose the tangent of dual.jvp: {hint}")


CHECKS = [name for name in dir(torch.overrides) if name.startswith("has_torch_function")]
CHECKS = dict.fromkeys(CHECKS, lambda *_: False)
# Other methods in Python (hooks, copies) are not for duals: they read the memory of a tensor.
METHODS_IN_PYTHON = "__rsub__ __rdiv__ __rpow__ __rmod__ pow pow_ split unflatten norm stft istft"


def without_check(function):
    """Return a function of torch that is written in Python without its check for duals, or None.

    It then calls other functions of torch on duals, and these find their rules.
    """
    if not isinstance(function, types.FunctionType):
        return None
    torch_functional = function.__module__ in ("torch.functional", "torch.nn.functional")
    if not torch_functional and function.__name__ not in METHODS_IN_PYTHON.split():
        return None
    code, scope = function.__code__, function.__globals__
    if not CHECKS.keys() & set(code.co_names):
        return None
    named = function.__name__, function.__defaults__, function.__closure__
    body = types.FunctionType(code, scope | CHECKS, *named)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def general(shell, function, args, kwargs):
    """Compute the value by the function itself and the tangent by torch's forward mode."""
    leaves, spec = tree_flatten((args, kwargs))
    values, eager = [value_of(a) for a in leaves], not torch.compiler.is_compiling()
    state = random_state(values)
    tensors = [a for a in values if eager and isinstance(a, torch.Tensor) and not a.is_inference()]
    versions = [a._version for a in tensors]
    outs, out_spec = tree_flatten(invoke(function, values, spec))
    if versions != [a._version for a in tensors]:
        raise lost(function, "writes to its arguments and ")
    if not any(is_real(a) for a in outs):
        return tree_unflatten(outs, out_spec)
    for set_back in state:
        set_back()
    tangents = iter(differentiate(function, leaves, spec))
    outs = [join(shell, a, next(tangents)) if is_real(a) else a for a in outs]
    return tree_unflatten(outs, out_spec)


def invoke(function, leaves, spec):
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


def random_state(leaves):
    """Return what sets back all generators that a function may draw from."""
    if torch.compiler.is_compiling():
        return []
    found = {torch.default_generator, *(a for a in leaves if isinstance(a, torch.Generator))}
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    found |= {torch.cuda.default_generators[a.get_device()] for a in tensors if a.is_cuda}
    return [functools.partial(generator.set_state, generator.get_state()) for generator in found]


def differentiate(function, leaves, spec, in_place=False):
    """Return the tangents of all floating outputs by torch's forward mode, without graph.

    Or that of a copy of the first argument, which the function writes to. The tangents of views of
    the value are views of the tangent.
    """
    try:
        # MATH: the only kernel of attention that has a forward mode
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            inputs = [constant(a) for a in leaves]
            for i, a in enumerate(leaves):
                if is_dual(a):
                    inputs[i] = forward_ad.make_dual(inputs[i], a.tangent)
            if in_place:
                inputs[0] = inputs[0].clone()
            out = invoke(function, inputs, spec)
            outs = inputs[:1] if in_place else [a for a in tree_leaves(out) if is_real(a)]
            pairs = [forward_ad.unpack_dual(a) for a in outs]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise lost(function, "has no forward mode and ") from error
    custom = type(function).__module__ == "torch._ops"  # without a derivative, these say nothing
    if custom and all(dy is None for _, dy in pairs):
        raise lost(function, "has no forward mode and ")
    return [torch.zeros_like(y) if dy is None else dy for y, dy in pairs]


def write(function, *args, **kwargs):
    """Write in place to the value and to the tangent of the first argument."""
    if not args:
        args = (kwargs.pop("input"),)
    leaves, spec = tree_flatten((args, kwargs))
    target, values = leaves[0], [value_of(a) for a in leaves]
    if is_real(target) and not is_dual(target):
        hint = "make that tensor by zeros_like or new_zeros of one that has, or write a detach()"
        raise lost(function, "into a tensor that has no tangent ", hint)
    if not is_dual(target):
        return invoke(function, values, spec), None
    state = random_state(values)
    [tangent] = differentiate(function, leaves, spec, in_place=True)
    for set_back in state:
        set_back()
    out = invoke(function, values, spec)
    target.tangent.copy_(tangent)
    return None if out is None else target, None


@functools.cache
def watch_functions():
    """Let autograd.Function.apply ask for a jvp where it is given duals.

    Its own code would run the forward on them without a graph, and the value would have no
    gradient. This stays after the jvp, since a checkpoint calls functions in the backward pass.
    """
    original = torch.autograd.Function.apply.__func__

    @functools.wraps(original)
    def apply(cls, *args, **kwargs):
        if not any(map(is_dual, tree_leaves((args, kwargs)))):
            out = original(cls, *args, **kwargs)
            if any(map(is_dual, tree_leaves(out))):
                raise lost(cls, "on a dual that is none of its arguments ", "give it as one")
            return out
        if cls in RULES:
            return join(current_shell(), *RULES[cls](cls.apply, *args, **kwargs))
        if cls.jvp is torch.autograd.Function.jvp:
            hint = "write its jvp, or a dual.rule; give a checkpoint use_reentrant=False"
            raise lost(cls, "(an autograd.Function without jvp) ", hint)
        return general(current_shell(), cls.apply, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)


# --- rules: rule(function, *args, **kwargs) -> (value, tangent), or None to leave it to others ---


OTHERS = set()  # functions with a user's rule


def rule(function):
    """Register the decorated function as the rule of `function`; see the top of this file.

    Returns `function`, which then also takes duals where it is no function of torch.
    """

    def register(derivative):
        RULES[function] = derivative
        OTHERS.add(function)
        if isinstance(function, type):
            return function

        @functools.wraps(function)
        def either(*args, **kwargs):
            if any(is_dual(a) for a in tree_leaves((args, kwargs))):
                return call(current_shell(), function, args, kwargs)
            return function(*args, **kwargs)

        return either

    return register


def only_first(rule):
    """Let a rule see only duals in the first argument and nowhere else."""

    def checked(function, input, *args, **kwargs):
        if is_dual(input) and not any(map(is_dual, (*args, *kwargs.values()))):
            return rule(function, input, *args, **kwargs)

    return checked


def unpack(args, kwargs, each=value_of):
    return [each(a) for a in args], {k: each(a) for k, a in kwargs.items()}


def plain(function, *args, **kwargs):
    """What has no derivative."""
    args, kwargs = unpack(args, kwargs)
    return function(*args, **kwargs), None


def fresh(function, *args, **kwargs):
    """A new tensor, perhaps to be written to: its tangent is zero."""
    y, _ = plain(function, *args, **kwargs)
    return y, torch.zeros_like(y) if is_real(y) else None


def turn(function, input, *args, **kwargs):
    """In place, but nothing is written: the shape or the strides are others."""
    for x in split(input):
        function(x, *args, **kwargs)
    return input, None


def refuse(function, *args, **kwargs):
    raise lost(function)


def identity(function, *args):
    return function(*map(value_of, args)), tuple([split(a)[1] for a in args])


def random(function, *args, **kwargs):
    """`general` draws the same numbers for value and tangent, but cannot do so in a graph."""
    if torch.compiler.is_compiling():
        raise lost(function, "draws twice under torch.compile and ", "do not compile it")


def multi_head_attention(function, *args, training=True, **kwargs):
    return random(function) if training and args[10] > 0 else None  # the probability of dropout


def requires_grad(function, input, *args, **kwargs):
    function(input.value, *args, **kwargs)
    return input, None


def alike(function, input=None, *args, **kwargs):
    """Linear in its first argument, a tensor or a list of them: act on value and tangent alike.

    Of other duals it takes only the shape or the dtype.
    """
    if input is None:
        return None
    x, dx = split(input)
    if isinstance(input, (tuple, list)):
        x = [value_of(a) for a in input]
        dx = [a.tangent if is_dual(a) else torch.zeros_like(a) for a in input]
    args, kwargs = unpack(args, kwargs)
    y = function(x, *args, **kwargs)
    return y, None if dx is None else function(dx, *args, **kwargs)


def add(function, input, other, **kwargs):
    """A sum or difference, of tangents too; a new one with 0 as well: y += 1 writes to it alone."""
    (x, dx), (z, dz) = split(input), split(other)
    y = function(x, z, **kwargs)
    dx = y.new_zeros(()) if dx is None else dx
    return y, function(dx, 0 if dz is None else dz, **kwargs)


def product_rule(function, *args):
    """Return the sum over the arguments of the function with one replaced by its tangent."""
    terms, fixed = [], [constant(a) for a in args]
    for i, a in enumerate(args):
        if is_dual(a):
            terms.append(function(*fixed[:i], a.tangent, *fixed[i + 1 :]))
    return functools.reduce(torch.add, terms) if terms else None


def product(function, *args, **kwargs):
    if kwargs:
        return None
    return function(*map(value_of, args)), product_rule(function, *args)


def einsum(function, equation, *operands):
    if not isinstance(equation, str):
        return None
    if isinstance(operands[0], (tuple, list)):
        [operands] = operands
    return product(lambda *operands: function(equation, operands), *operands)


def add_product(function, input, a, b, *, beta=1, alpha=1):
    """beta input + alpha a b; at beta = 0 input is not read."""
    y = function(value_of(input), value_of(a), value_of(b), beta=beta, alpha=alpha)
    rest = functools.partial(function, constant(input), beta=0, alpha=alpha)
    dy = product_rule(rest, a, b)
    if is_dual(input):
        dy = input.tangent * beta if dy is None else dy + input.tangent * beta
    return y, dy


@only_first
def affine(function, input, weight, bias=None, *args, **kwargs):
    """A linear map or convolution with constant weights: the bias drops out."""
    y = function(input.value, weight, bias, *args, **kwargs)
    return y, function(input.tangent, weight.detach(), None, *args, **kwargs)


def of_first(derivative):
    """Return the rule of a function whose first argument has a tangent, and no other.

    derivative(x, y, dx, *others, **options) -> dy is given the function's arguments as constants.
    """

    @only_first
    def rule(function, input, *args, **kwargs):
        y = function(input.value, *args, **kwargs)
        args, kwargs = unpack(args, kwargs, constant)
        return y, derivative(constant(input), y.detach(), input.tangent, *args, **kwargs)

    return rule


@of_first
def divide(x, y, dx, other, rounding_mode=None):
    return dx / other if rounding_mode is None else torch.zeros_like(dx)


@only_first
def power(function, input, exponent):
    if not isinstance(exponent, (int, float)) or exponent == 0:
        return None
    dy = exponent * constant(input) ** (exponent - 1) * input.tangent
    return function(input.value, exponent), dy


def where(function, condition, input, other):
    (x, dx), (z, dz) = split(input), split(other)
    dx, dz = (0.0 if a is None else a for a in (dx, dz))
    return function(condition, x, z), function(condition, dx, dz)


@only_first
def dropout(function, input, p=0.5, training=True):
    """Value and tangent go through one mask."""
    if not training or p == 0:  # then torch returns the input itself
        return alike(function, input, p, training)
    mask = function(torch.ones_like(constant(input)), p, training)
    return input.value * mask, input.tangent * mask


# The Jacobians of softmax and of norms without weights are symmetric, as diagonal ones are: forward
# and backward mode agree, and the backward pass is one kernel.


@only_first
def softmax(function, input, dim, *args, **kwargs):
    if dim is None:
        return None
    y = function(input.value, dim, *args, **kwargs)
    dx = input.tangent.to(y.dtype)
    return y, torch.ops.aten._softmax_backward_data(dx, y.detach(), dim, y.dtype)


def single(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm_jvp(x, dx, shape, eps):
    x, dx, shape = single(x), single(dx), list(shape)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    only_dx = [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(dx, x, shape, mean, rstd, None, None, only_dx)[0]


@of_first
def layer_norm(x, y, dx, normalized_shape, weight=None, bias=None, eps=1e-5, *args):
    dy = layer_norm_jvp(x, dx, normalized_shape, eps)
    return dy if weight is None else dy * weight


def scale_channels(dy, weight):
    return dy if weight is None else dy * weight.detach().view(-1, *[1] * (dy.ndim - 2))


@of_first
def group_norm(x, y, dx, num_groups, weight=None, bias=None, eps=1e-5, *args):
    x, dx = (a.unflatten(1, (num_groups, -1)).flatten(2) for a in (x, dx))
    return scale_channels(layer_norm_jvp(x, dx, x.shape[2:], eps).view(y.shape), weight)


@only_first
def batch_norm(
    function, input, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """The running mean and variance are written once, by the value."""
    y = function(input.value, mean, variance, weight, bias, training, momentum, eps)
    x, dx = constant(input), input.tangent
    if training or variance is None:
        x, dx = (a.transpose(0, 1).flatten(1) for a in (x, dx))
        dy = layer_norm_jvp(x, dx, x.shape[1:], eps).view(y.transpose(0, 1).shape).transpose(0, 1)
    else:
        dy = scale_channels(dx, (variance + eps).rsqrt())
    return y, scale_channels(dy, weight)


@of_first
def rms_norm(x, y, dx, normalized_shape, weight=None, eps=None):
    """Remove from dx its part along the output n, then divide it as x is divided."""
    x, dims = single(x), tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    n = x * scale
    dy = (dx - n * (n * dx).mean(dims, keepdim=True)) * scale
    return dy if weight is None else dy * weight


def attention(
    function, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
):
    """softmax(scale q k + mask) v, whose value may use any kernel."""
    scale = options.get("scale")
    dropped = dropout_p > 0 and (attn_mask is None or not is_causal)  # both together are an error
    if not dropped:
        args = map(value_of, (query, key, value, attn_mask))
        y = function(*args, is_causal=is_causal, **options)
    if options.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = (a.repeat_interleave(groups, -3) for a in (key, value))
    if dropped:  # value and tangent need one mask
        p = F.dropout(attention_weights(query, key, attn_mask, is_causal, scale), dropout_p)
        return split(torch.matmul(p.to(value.dtype), value))
    with torch.no_grad():
        p = attention_weights(query, key, attn_mask, is_causal, scale)
        return y, product_rule(torch.matmul, p.to(value.dtype), value)


def attention_weights(query, key, mask, is_causal, scale):
    """Return the weights of attention, in float32 at least, as the math kernel has them."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = single(torch.matmul(query, key.mT)) * scale
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return torch.softmax(scores, -1)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    return torch.ops.aten._safe_softmax(scores + mask, -1)  # 0 where all is masked


# --- the table ---

SPACES = (torch, torch.Tensor, torch._C.TensorBase, F, torch._C._nn, torch._C._VariableFunctions)
SPACES += (torch.fft, torch.special, torch.linalg, operator)


def named(names):
    """Return the functions of torch, and Python's operators, that have these names.

    Functions that wrap another, such as Tensor.pow, are left out: torch.compile does not find them
    in a dictionary. They call others that it does find.
    """
    found = {getattr(space, name, None) for space in SPACES for name in names.split()}
    return {f for f in found if callable(f) and not hasattr(f, "__wrapped__")}


FACTS = (
    "shape dtype device ndim layout itemsize requires_grad grad_fn is_leaf is_cuda is_cpu is_mps "
    "is_meta is_nested is_sparse is_quantized data"
)
VIEWS = "T mT H mH real imag"
PROPERTIES = {name: getattr(torch.Tensor, name).__get__ for name in f"{FACTS} {VIEWS}".split()}
BY_NAME = {
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex __len__ "
    "get_device eq ne lt le gt ge isnan isinf isfinite argmax argmin detach": plain,
    "zeros_like ones_like empty_like full_like rand_like randn_like new new_zeros new_ones "
    "new_empty new_full": fresh,
    "sum mean cumsum neg clone contiguous to float double half bfloat16 cpu cuda view reshape "
    "flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes t chunk split unbind "
    "tensor_split narrow select expand broadcast_to unfold diagonal tril triu flip roll repeat "
    "tile repeat_interleave index_select gather take_along_dim __getitem__ getitem cat concat "
    "concatenate stack hstack vstack expand_as view_as reshape_as type_as view_as_real "
    "view_as_complex fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift "
    "ifftshift avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d interpolate pixel_shuffle pixel_unshuffle": alike,
    "div divide truediv true_divide": divide,
    "add sub rsub": add,
    "mul multiply matmul mm bmm mv dot outer inner": product,
    "einsum": einsum,
    "addmm addbmm baddbmm addmv": add_product,
    "pow": power,
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": affine,
    "pad": of_first(lambda x, y, dx, pad, mode="constant", value=None: F.pad(dx, pad, mode)),
    "dropout dropout1d dropout2d dropout3d": dropout,
    "silu": of_first(lambda x, y, dx: torch.ops.aten.silu_backward(dx, x.conj())),
    "gelu": of_first(lambda x, y, dx, **kind: torch.ops.aten.gelu_backward(dx, x, **kind)),
    "relu": of_first(lambda x, y, dx: torch.ops.aten.threshold_backward(dx, y, 0)),
    "tanh": of_first(lambda x, y, dx: dx * (1 - y * y)),
    "sigmoid": of_first(lambda x, y, dx: dx * y * (1 - y)),
    "exp": of_first(lambda x, y, dx: dx * y),
    "sin": of_first(lambda x, y, dx: dx * x.cos()),
    "cos": of_first(lambda x, y, dx: -dx * x.sin()),
    "square": of_first(lambda x, y, dx: 2 * dx * x),
    "sqrt": of_first(lambda x, y, dx: dx / (2 * y)),
    "rsqrt": of_first(lambda x, y, dx: -0.5 * dx * y**3),
    "reciprocal": of_first(lambda x, y, dx: -dx * y * y),
    "softmax": softmax,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
    "alpha_dropout feature_alpha_dropout feature_dropout native_dropout rrelu "
    "gumbel_softmax": random,
    "as_strided_ resize_as_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_": turn,
    "requires_grad_": requires_grad,
    # what reaches memory, copies objects, or has no derivative but says nothing
    "numpy __array__ __dlpack__ data_ptr untyped_storage storage resize_ set_ apply_ map_ tensor "
    "__deepcopy__ __reduce_ex__ _make_dual _unpack_dual linspace logspace": refuse,
}


IN_PLACE = [name for space in SPACES[:6] for name in dir(space) if re.fullmatch("[a-z].*_", name)]
IN_PLACE += "__setitem__ iadd isub imul itruediv ipow".split()
RULES = dict.fromkeys(named(" ".join(IN_PLACE)), write)
RULES |= {function: rule for names, rule in BY_NAME.items() for function in named(names)}
RULES |= {PROPERTIES[name]: plain for name in FACTS.split()}
RULES |= {PROPERTIES[name]: alike for name in VIEWS.split()}
RULES |= {torch.Tensor.data.__set__: refuse, torch.where: where}
RULES |= {F.batch_norm: batch_norm, torch.ops.aten._safe_softmax: softmax}
RULES |= {torch.nn.modules._functions.BackwardHookFunction: identity}  # of hooks on modules
INPLACE_AT = {  # which argument `inplace` is: Dynamo gives it by position
    f: [*inspect.signature(f).parameters].index("inplace")
    for f in vars(F).values()
    if isinstance(f, types.FunctionType) and "inplace" in inspect.signature(f).parameters
}


# --- what a Traced has of a tensor ---


def call_method(name, x, *args, **kwargs):
    return getattr(x, name)(*args, **kwargs)


METHODS = {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor) if name[:2] != "__"}
METHODS = {name: method for name, method in METHODS.items() if callable(method)}
for name, method in METHODS.items():
    if isinstance(method, types.FunctionType):  # Dynamo follows those in Python only by name
        METHODS[name] = functools.partial(call_method, name)
        RULES[METHODS[name]] = RULES.get(method)


def define(name, function, swapped=False):
    def run(self, *args):
        return call(Traced, function, (*args, self) if swapped else (self, *args), {})

    setattr(Traced, f"__{name}__", run)


for name in "add sub mul truediv floordiv mod pow matmul".split():
    define(name, getattr(operator, name))
    define(f"r{name}", getattr(operator, name), swapped=True)
for name in "neg pos abs getitem eq ne lt le gt ge iadd isub imul itruediv ipow".split():
    define(name, getattr(operator, name))
for name in ("len", "setitem"):
    define(name, getattr(torch.Tensor, f"__{name}__"))
