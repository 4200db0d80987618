"""Forward mode for any network: values with their graph, tangents without, for two forwards.

    value, tangent = dual.jvp(f, primals, tangents)

computes what torch.func.jvp computes: f(primals), and its derivative along the tangents. The value
keeps its graph and is trained; the tangent is a constant, as in a loss of MeanFlow, whose du/dt has
no gradient. (A method that differentiates through the tangent needs torch.func.jvp.)

Why it is cheaper. For y = x w, torch.func.jvp multiplies x w, dx w and x dw, with a dw of zeros:
three products for a linear map or convolution, of which the graph keeps two. Here a weight has no
tangent, dy = dx w, and nothing of it is kept for the backward pass. The tangent of attention is
written out, so that the value may use any kernel, where torch.func.jvp runs with one alone.
Networks of linear maps, convolutions and attention cost 2.0 to 2.3 forwards for 3.0 and more.

How. What is differentiated is a Dual, a tensor that carries its tangent. Every function of torch
that is given one is looked up in RULES; what has no rule, and is written in Python, calls others
that have; else the value is by the function itself and the tangent by torch's forward mode of that
function alone. What would lose a tangent raises an error: a Dual written into a tensor that has
none, an autograd.Function without jvp, a kernel that reads memory. Add a rule for such a function:

    @dual.rule(function)  # a function, or a class of autograd.Function
    def _(function, q, k, **options):  # is given duals and tensors, which dual.split takes apart
        (q, dq), (k, dk) = dual.split(q), dual.split(k)
        return function(q, k, **options), ...  # the value, and its tangent

Under torch.compile a Dual cannot be made. `compile` compiles a function once for tensors and once
for duals; a `jvp` inside of what is compiled works as well.
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

RUNNING = threading.local()


def jvp(f, primals, tangents):
    """Return f(*primals) with its graph, and its derivative along `tangents` without.

    primals: tuple of floating tensors, or of nested tuples, lists and dicts of them; tangents: the
    same, with the same shapes. f returns a tensor or such a nesting, and so does this. What f makes
    by detach(), item() or float() is a constant, as everywhere in torch. Raises ValueError where
    primals and tangents differ, NotImplementedError where a tangent would be lost.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise TypeError("primals and tangents are tuples: give (x,) for one x")
    shell = Traced if torch.compiler.is_compiling() else Dual

    def begin(x, dx):
        if shell is Dual and (torch.is_inference_mode_enabled() or x.is_inference()):
            raise NotImplementedError("no derivatives in inference_mode: take torch.no_grad()")
        if not is_real(x) or dx.shape != x.shape:
            kind = f"{x.dtype} of shape {(*x.shape,)}"
            raise ValueError(f"a primal {kind} and a tangent of shape {(*dx.shape,)}")
        return shell(x, like(x, dx.detach().clone()))  # clone: f may write to it

    def end(y):
        if is_dual(y):
            return y.tangent.detach()
        if not isinstance(y, torch.Tensor | None):
            raise TypeError(f"dual.jvp of a function that returns a {type(y).__name__}, no tensor")
        return None if y is None else torch.zeros_like(y)

    duals = tree_map(begin, primals, tangents)
    with running() if shell is Dual else contextlib.nullcontext():
        out = f(*duals)
    return tree_map(value_of, out), tree_map(end, out)


@contextlib.contextmanager
def running():
    """Refuse a jvp inside of another, whose duals it could not tell from its own."""
    watch_functions()
    if getattr(RUNNING, "jvp", False):
        raise NotImplementedError("dual.jvp inside of dual.jvp: nest torch.func.jvp instead")
    RUNNING.jvp = True
    try:
        yield
    except RuntimeError as error:
        if "TorchScript interpreter" in str(error):  # which says no more of an error of ours
            raise lost("a script", "", "call the function that it was made of") from error
        raise
    finally:
        RUNNING.jvp = False


# --- duals ---


class Dual(torch.Tensor):
    """A value and its tangent, alike in shape, dtype and strides."""

    @staticmethod
    def __new__(cls, value, tangent):
        made = torch.Tensor._make_wrapper_subclass
        self = made(cls, value.shape, dtype=value.dtype, device=value.device)
        self.value, self.tangent = value, tangent
        return self

    def __repr__(self):
        return f"Dual({self.value}, {self.tangent})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(Dual, function, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise lost(function, "inside of torch.tensor, vmap or a script ")


class Traced:
    """What a Dual is inside of torch.compile, which cannot make subclasses of Tensor."""

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul and not isinstance(args[0], Traced):
            # it makes b @ a of a @ b here, without a word, and passes on what is b @ a alike
            raise lost(function, "by @ under torch.compile ", "write torch.matmul(a, b)")
        return call(Traced, function, args, kwargs or {})

    def __getattr__(self, name):
        if name in PROPERTIES:
            return call(Traced, PROPERTIES[name], (self,), {})
        if name in METHODS:
            function = METHODS[name]
            return lambda *args, **kwargs: call(Traced, function, (self, *args), kwargs)
        raise AttributeError(name)

    def __setitem__(self, key, x):
        write(Traced, set_item, (self, key, x), {})

    def __iter__(self):
        return iter(self.unbind())


def set_item(x, key, value):
    x[key] = value


def compile(f, **options):
    """Return f compiled by torch.compile(f, **options), for duals as for tensors.

    There, write torch.matmul for @, and give cat and stack a list, not a tuple: Dynamo knows what
    to do with duals in no other form, and says so.
    """
    compiled = torch.compile(f, **options)

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
    """Call a function of torch on duals of this shell: by its rule, piece by piece, or at large."""
    place = INPLACE_AT.get(function, len(args))
    if place < len(args):
        args, kwargs = (*args[:place], *args[place + 1 :]), kwargs | {"inplace": args[place]}
    if kwargs.get("out") is not None:
        raise lost(function, "with out= ", "use what it returns")
    rule = write if kwargs.get("inplace") else RULES.get(function)
    if rule is write:
        return write(shell, function, args, kwargs)
    if "inplace" in kwargs:
        kwargs = {k: a for k, a in kwargs.items() if k != "inplace"}
    found = rule and rule(function, *args, **kwargs)
    if found:
        return join(shell, *found)
    body = without_check(function) if shell is Dual else None
    return body(*args, **kwargs) if body else general(shell, function, args, kwargs)


def lost(function, how="", hint="detach() what it is given, or write a dual.rule for its caller"):
    name = getattr(function, "__name__", function)
    return NotImplementedError(f"{name} {how}would lose the tangent of dual.jvp: {hint}")


CHECKS = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
    lambda *_: False,
)
# Other methods in Python (hooks, copies) are not for duals: they read the memory of a tensor.
METHODS_IN_PYTHON = "__rsub__ __rdiv__ __rpow__ __rmod__ pow pow_ split unflatten norm stft istft"


@functools.cache
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
    """Value by the function itself, tangent by torch's forward mode."""
    leaves, spec = tree_flatten((args, kwargs))
    values, eager = [value_of(a) for a in leaves], shell is Dual
    state = random_state(values) if eager else []
    tensors = [a for a in values if eager and isinstance(a, torch.Tensor) and not a.is_inference()]
    versions = [a._version for a in tensors]
    outs, out_spec = tree_flatten(invoke(function, values, spec))
    if versions != [a._version for a in tensors]:
        raise lost(function, "writes to its arguments and ")
    if not any(is_real(a) for a in outs):
        return tree_unflatten(outs, out_spec)
    restore(state)
    tangents = iter(differentiate(function, leaves, spec))
    outs = [join(shell, a, next(tangents)) if is_real(a) else a for a in outs]
    return tree_unflatten(outs, out_spec)


def invoke(function, leaves, spec):
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


def random_state(leaves):
    found = {torch.default_generator, *(a for a in leaves if isinstance(a, torch.Generator))}
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    found |= {torch.cuda.default_generators[a.get_device()] for a in tensors if a.is_cuda}
    return [(g, g.get_state()) for g in found]


def restore(state):
    for generator, numbers in state:
        generator.set_state(numbers)


def differentiate(function, leaves, spec, in_place=False):
    """Return the tangents of all floating outputs by torch's forward mode, without graph.

    Or that of a copy of the first argument, which the function writes to. The tangents of views of
    the value are views of the tangent.
    """
    # MATH: the only kernel of attention that has a forward mode
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        inputs = [constant(a) for a in leaves]
        for i, a in enumerate(leaves):
            if is_dual(a):
                inputs[i] = forward_ad.make_dual(inputs[i], a.tangent)
        if in_place:
            inputs[0] = inputs[0].clone()
        try:
            out = invoke(function, inputs, spec)
        except RuntimeError as error:  # NotImplementedError is one
            raise lost(function, "has no forward mode and ") from error
        outs = inputs[:1] if in_place else [a for a in tree_leaves(out) if is_real(a)]
        pairs = [forward_ad.unpack_dual(a) for a in outs]
        custom = type(function).__module__ == "torch._ops"  # these say nothing if they have none
        if custom and all(dy is None for _, dy in pairs):
            raise lost(function, "has no forward mode and ")
        return [torch.zeros_like(y) if dy is None else dy for y, dy in pairs]


def write(shell, function, args, kwargs):
    """Write in place to the value and to the tangent of the first argument."""
    leaves, spec = tree_flatten((args, kwargs))
    target, values = leaves[0], [value_of(a) for a in leaves]
    if is_real(target) and not is_dual(target):
        hint = "make that tensor by zeros_like or new_zeros of one that has, or write a detach()"
        raise lost(function, "into a tensor that has no tangent ", hint)
    if not is_dual(target):
        return invoke(function, values, spec)
    state = random_state(values) if shell is Dual else []
    [tangent] = differentiate(function, leaves, spec, in_place=True)
    restore(state)
    out = invoke(function, values, spec)
    if target.tangent.shape != tangent.shape:  # squeeze_() and its like
        invoke(function, [target.tangent, *values[1:]], spec)
    target.tangent.copy_(tangent)
    return None if out is None else target


@functools.cache
def watch_functions():
    """Let autograd.Function.apply ask for a jvp where it is given duals.

    Its own code would run the forward on them without a graph and return a value that has no
    gradient. It stays so after the jvp, as a checkpoint calls functions in the backward pass.
    """
    original = torch.autograd.Function.apply.__func__

    @functools.wraps(original)
    def apply(cls, *args, **kwargs):
        if not any(isinstance(a, Dual) for a in tree_leaves((args, kwargs))):
            return original(cls, *args, **kwargs)
        if cls in RULES:
            return join(Dual, *RULES[cls](cls.apply, *args, **kwargs))
        if cls.jvp is torch.autograd.Function.jvp:
            hint = "write its jvp, or a dual.rule; give a checkpoint use_reentrant=False"
            raise lost(cls, "(an autograd.Function without jvp) ", hint)
        return general(Dual, cls.apply, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)


# --- rules: rule(function, *args, **kwargs) -> (value, tangent), or None to leave it to others ---


def rule(function):
    """Register the decorated function as the rule of `function`; see the top of this file.

    Returns `function`, which then also takes duals where it is no function of torch.
    """

    def register(derivative):
        RULES[function] = derivative
        if isinstance(function, type):
            return function

        @functools.wraps(function)
        def either(*args, **kwargs):
            if any(is_dual(a) for a in tree_leaves((args, kwargs))):
                shell = Traced if torch.compiler.is_compiling() else Dual
                return call(shell, function, args, kwargs)
            return function(*args, **kwargs)

        return either

    return register


def first(rule):
    """Let a rule see only what has a tangent in its first argument and nowhere else."""

    def checked(function, input, *args, **kwargs):
        if is_dual(input) and not any(map(is_dual, (*args, *kwargs.values()))):
            return rule(function, input, *args, **kwargs)

    return checked


def unpack(args, kwargs):
    return [value_of(a) for a in args], {k: value_of(a) for k, a in kwargs.items()}


def plain(function, *args, **kwargs):
    """What has no derivative."""
    args, kwargs = unpack(args, kwargs)
    return function(*args, **kwargs), None


def fresh(function, *args, **kwargs):
    """A new tensor, perhaps to be written to: its tangent is zero."""
    y, _ = plain(function, *args, **kwargs)
    return y, torch.zeros_like(y) if is_real(y) else None


def leak(function, *args, **kwargs):
    raise lost(function)


def random(function, *args, **kwargs):
    """`general` draws the same numbers for value and tangent, but cannot do so in a graph."""
    if torch.compiler.is_compiling():
        raise lost(function, "draws twice under torch.compile and ", "do not compile it")


def multi_head_attention(function, *args, training=True, **kwargs):
    return random(function) if training and args[10] > 0 else None  # the probability of dropout


def keep(function, input, *args, **kwargs):
    function(input.value, *args, **kwargs)
    return input, None


def detach(function, input):
    return function(input.value), None


def alike(function, *args, **kwargs):
    """Linear in its first argument, a tensor or a list of them: act on value and tangent alike.

    Of other duals it takes only the shape or the dtype.
    """
    if not args:
        return None
    x, (args, kwargs) = args[0], unpack(args[1:], kwargs)
    if is_dual(x):
        return function(x.value, *args, **kwargs), function(x.tangent, *args, **kwargs)
    if isinstance(x, torch.Tensor):
        return function(x, *args, **kwargs), None
    dx = [a.tangent if is_dual(a) else torch.zeros_like(a) for a in x]
    return function([value_of(a) for a in x], *args, **kwargs), function(dx, *args, **kwargs)


@first
def divide(function, input, other, **kwargs):
    return None if kwargs else alike(function, input, other)


def add(function, input, other, **kwargs):
    y = function(value_of(input), value_of(other), **kwargs)
    if not is_dual(other):
        return y, input.tangent.expand(y.shape).clone()  # clone: y += 1 must not write to input
    dx = input.tangent if is_dual(input) else torch.zeros_like(y)
    return y, function(dx, other.tangent, **kwargs)


def subtract_from(function, input, other, *, alpha=1):
    """other - alpha input"""
    return None if alpha != 1 else add(operator.sub, other, input)


def product_rule(function, *args, **kwargs):
    """Return the sum over the arguments of the function with one replaced by its tangent."""
    terms, fixed = [], [constant(a) for a in args]
    for i, a in enumerate(args):
        if is_dual(a):
            terms.append(function(*fixed[:i], a.tangent, *fixed[i + 1 :], **kwargs))
    return functools.reduce(torch.add, terms) if terms else None


def product(function, *args, **kwargs):
    if any(map(is_dual, kwargs.values())):
        return None
    return function(*map(value_of, args), **kwargs), product_rule(function, *args, **kwargs)


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


@first
def affine(function, input, weight, bias=None, *args, **kwargs):
    """A linear map or convolution with constant weights: the bias drops out."""
    y = function(input.value, weight, bias, *args, **kwargs)
    return y, function(input.tangent, weight.detach(), None, *args, **kwargs)


def elementwise(derivative):
    """Return the rule of a function of one number. derivative(x, y, dx, ...) -> dy."""

    @first
    def rule(function, input, **kwargs):
        y = function(input.value, **kwargs)
        return y, derivative(constant(input), y.detach(), input.tangent, **kwargs)

    return rule


@first
def power(function, input, exponent):
    if not isinstance(exponent, (int, float)):
        return None
    dy = exponent * constant(input) ** (exponent - 1) * input.tangent
    return function(input.value, exponent), dy


@first
def pad(function, input, pad, mode="constant", value=None):
    y = function(input.value, pad, mode, value)
    return y, function(input.tangent, pad, mode, 0.0 if mode == "constant" else None)


def where(function, condition, input=None, other=None):
    if input is None:
        return None
    (x, dx), (z, dz) = split(input), split(other)
    dx, dz = (0.0 if a is None else a for a in (dx, dz))
    return function(condition, x, z), function(condition, dx, dz)


@first
def dropout(function, input, p=0.5, training=True):
    """Value and tangent go through one mask."""
    if not training:
        return alike(function, input, p, training)
    mask = function(torch.ones_like(constant(input)), p, training)
    return input.value * mask, input.tangent * mask


# The Jacobians of softmax and of norms without weights are symmetric, as diagonal ones are: forward
# and backward mode agree, and the backward pass is one kernel.


@first
def softmax(function, input, dim, *args, **kwargs):
    if dim is None:
        return None
    y = function(input.value, dim, *args, **kwargs)
    return y, softmax_jvp(y.detach(), input.tangent, dim)


def softmax_jvp(y, dx, dim):
    return torch.ops.aten._softmax_backward_data(dx.to(y.dtype), y, dim, y.dtype)


def single(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def layer_norm_jvp(x, dx, shape, eps):
    x, dx, shape = single(x), single(dx), list(shape)
    _, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    only_dx = [True, False, False]
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(dx, x, shape, mean, rstd, None, None, only_dx)[0]


@first
def layer_norm(function, input, normalized_shape, weight=None, bias=None, eps=1e-5, *args):
    y = function(input.value, normalized_shape, weight, bias, eps, *args)
    dy = layer_norm_jvp(constant(input), input.tangent, normalized_shape, eps)
    return y, dy if weight is None else dy * weight.detach()


@first
def group_norm(function, input, num_groups, weight=None, bias=None, eps=1e-5, *args):
    y = function(input.value, num_groups, weight, bias, eps, *args)
    x, dx = (a.reshape(len(a), num_groups, -1) for a in (constant(input), input.tangent))
    dy = layer_norm_jvp(x, dx, x.shape[2:], eps).view(y.shape)
    return y, dy if weight is None else dy * weight.detach().view(-1, *[1] * (y.ndim - 2))


@first
def rms_norm(function, input, normalized_shape, weight=None, eps=None):
    y = function(input.value, normalized_shape, weight, eps)
    x, dims = single(constant(input)), tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    n = x * scale
    dy = (input.tangent - n * (n * input.tangent).mean(dims, keepdim=True)) * scale
    return y, dy if weight is None else dy * weight.detach()


def batch_norm(function, input, running_mean=None, running_var=None, *args, **kwargs):
    """The running mean and variance are written once, by the value."""
    if running_mean is None or is_dual(running_mean) or is_dual(running_var):
        return None
    y, _ = plain(function, input, running_mean, running_var, *args, **kwargs)
    copies = running_mean.clone(), running_var.clone()
    leaves, spec = tree_flatten(((input, *copies, *args), kwargs))
    return y, differentiate(function, leaves, spec)[0]


def attention(
    function,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """softmax(scale q k + mask) v, whose value may use any kernel."""
    if is_dual(attn_mask):
        return None
    if dropout_p > 0:
        return split(
            plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        )
    options = dict(is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    y = function(*map(value_of, (query, key, value)), attn_mask, **options)
    if enable_gqa:
        key, value = (repeat_heads(a, query) for a in (key, value))
    (q, dq), (k, dk), (v, dv) = ((constant(a), split(a)[1]) for a in (query, key, value))
    p = attention_weights(q, k, constant(attn_mask), is_causal, scale)
    ds = product_rule(lambda q, k: q @ k.mT, query, key)
    terms = [] if dv is None else [p.to(v.dtype) @ dv]
    if ds is not None:
        ds = single(ds) * (q.shape[-1] ** -0.5 if scale is None else scale)
        terms.append(softmax_jvp(p, ds, -1).to(v.dtype) @ v)
    return y, functools.reduce(torch.add, terms)


def repeat_heads(x, query):
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def attention_weights(q, k, mask, is_causal, scale):
    """Return the weights of attention, in float32 at least, as the math kernel has them."""
    scores = single(torch.matmul(q, k.mT)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return torch.softmax(scores, -1)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    return torch.ops.aten._safe_softmax(scores + mask, -1)  # 0 where all is masked


def plain_attention(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa):
    """Attention by functions that have rules: with dropout, value and tangent need one mask."""
    if enable_gqa:
        key, value = (repeat_heads(a, query) for a in (key, value))
    p = attention_weights(query, key, mask, is_causal, scale)
    return torch.matmul(F.dropout(p, dropout_p).to(value.dtype), value)


# --- the table ---

SPACES = (torch, torch.Tensor, torch._C.TensorBase, F, torch._C._nn, torch._C._VariableFunctions)
SPACES += (torch.fft, torch.special, torch.linalg, operator)


def named(names):
    """Return what torch, and Python's operators, have under these names.

    Without functions that wrap another, such as Tensor.pow: under torch.compile these are not found
    in a dictionary; and they call others, which are.
    """
    found = {getattr(space, name, None) for space in SPACES for name in names.split()}
    return {f for f in found if callable(f) and not hasattr(f, "__wrapped__")}


def properties(names):
    return {name: getattr(torch.Tensor, name).__get__ for name in names.split()}


FACTS = properties(
    "shape dtype device ndim layout itemsize requires_grad grad_fn is_leaf is_cuda is_cpu is_mps "
    "is_meta is_nested is_sparse is_quantized"
)
VIEWS = properties("T mT H mH real imag")
PROPERTIES = FACTS | VIEWS | properties("data")
RULES = dict.fromkeys(FACTS.values(), plain) | dict.fromkeys(VIEWS.values(), alike)
RULES |= {PROPERTIES["data"]: detach, torch.Tensor.data.__set__: leak}
for names, its_rule in {
    "size dim ndimension numel nelement stride is_contiguous is_floating_point is_complex __len__ "
    "get_device eq ne lt le gt ge isnan isinf isfinite argmax argmin": plain,
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty "
    "new_full": fresh,
    "sum mean cumsum neg clone contiguous to float double half bfloat16 cpu cuda view reshape "
    "flatten unflatten squeeze unsqueeze transpose permute movedim swapaxes t chunk split unbind "
    "tensor_split narrow select expand broadcast_to unfold diagonal tril triu flip roll repeat "
    "tile repeat_interleave index_select gather take_along_dim __getitem__ getitem cat concat "
    "concatenate stack hstack vstack expand_as view_as reshape_as type_as view_as_real "
    "view_as_complex fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift "
    "ifftshift avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d interpolate pixel_shuffle pixel_unshuffle": alike,
    "div divide truediv true_divide": divide,
    "add sub": add,
    "rsub": subtract_from,
    "mul multiply matmul mm bmm mv dot outer inner": product,
    "einsum": einsum,
    "addmm addbmm baddbmm addmv": add_product,
    "pow": power,
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": affine,
    "pad": pad,
    "dropout dropout1d dropout2d dropout3d": dropout,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "rms_norm": rms_norm,
    "scaled_dot_product_attention": attention,
    "multi_head_attention_forward": multi_head_attention,
    "alpha_dropout feature_alpha_dropout rrelu gumbel_softmax": random,
    "detach": detach,
    "numpy __array__ __dlpack__ data_ptr untyped_storage storage resize_ set_ apply_ map_ "
    "__deepcopy__ __reduce_ex__ _make_dual _unpack_dual": leak,  # reach memory, or copy objects
}.items():
    RULES |= dict.fromkeys(named(names), its_rule)
RULES |= {torch.where: where, F.batch_norm: batch_norm, F.instance_norm: batch_norm}
for name, derivative in {
    "silu": lambda x, y, dx: torch.ops.aten.silu_backward(dx, x),
    "gelu": lambda x, y, dx, **kind: torch.ops.aten.gelu_backward(dx, x, **kind),
    "relu": lambda x, y, dx: dx * (y > 0),
    "tanh": lambda x, y, dx: dx * (1 - y * y),
    "sigmoid": lambda x, y, dx: dx * y * (1 - y),
    "exp": lambda x, y, dx: dx * y,
    "sin": lambda x, y, dx: dx * x.cos(),
    "cos": lambda x, y, dx: -dx * x.sin(),
    "square": lambda x, y, dx: 2 * dx * x,
    "sqrt": lambda x, y, dx: dx / (2 * y),
    "rsqrt": lambda x, y, dx: -0.5 * dx * y**3,
    "reciprocal": lambda x, y, dx: -dx * y * y,
}.items():
    RULES |= dict.fromkeys(named(name), elementwise(derivative))

in_place = [name for space in SPACES[:6] for name in dir(space) if re.fullmatch("[a-z].*_", name)]
in_place = named(" ".join(in_place) + " __setitem__ iadd isub imul itruediv ipow")
RULES = dict.fromkeys(in_place, write) | RULES | dict.fromkeys(named("requires_grad_"), keep)
INPLACE_AT = {  # which argument `inplace` is, as Dynamo hands it on by position
    f: [*inspect.signature(f).parameters].index("inplace")
    for f in vars(F).values()
    if isinstance(f, types.FunctionType) and "inplace" in inspect.signature(f).parameters
}


# --- what a Traced has of a tensor ---


def method(name):
    """Return a method that torch writes in Python, which Dynamo follows only when it is called."""
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


METHODS = {}
for name in dir(torch.Tensor):
    function = getattr(torch.Tensor, name)
    if not name.startswith("__") and callable(function):
        python = isinstance(function, types.FunctionType)
        METHODS[name] = method(name) if python else function
        if python and function in RULES:
            RULES[METHODS[name]] = RULES[function]


def define(name, function, swapped=False):
    def run(self, *args):
        return call(Traced, function, (*args, self) if swapped else (self, *args), {})

    setattr(Traced, name, run)


for name in "add sub mul truediv pow matmul".split():
    define(f"__{name}__", getattr(operator, name))
    define(f"__r{name}__", getattr(operator, name), swapped=True)
for name in "neg getitem eq ne lt le gt ge iadd isub imul itruediv ipow".split():
    define(f"__{name}__", getattr(operator, name))
define("__len__", torch.Tensor.__len__)
