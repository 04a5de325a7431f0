"""What a custom loss may call: a list of torch's functions, each with how many arguments and which keywords it takes.

None of them changes a tensor in place, draws random numbers, leaves torch, or has a result whose shape depends on
values: shapes can be found, and refused, before anything is computed. None takes longer than its operands and its
result are large, up to a logarithm. Names of a graph are only ever looked up here.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

MOST_INT = 2**53
DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}
_PREFIXES = ("torch.nn.functional.", "torch._C._nn.", "torch._C._special.", "torch.special.", "torch.")
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT"})
_RESULTS = frozenset({"values", "indices"})


@dataclass(frozen=True, slots=True)
class Op:
    """One function.

    Attributes:
        call: what is called.
        least, most: positional and keyword arguments together; positional ones alone.
        keywords: names of keyword arguments.
    """

    call: Callable[..., Any]
    least: int
    most: int
    keywords: frozenset[str] = frozenset()


FUNCTIONS: dict[str, Op] = {}
METHODS: dict[str, Op] = {}
OPERATORS: dict[str, Op] = {}
SCALARS: dict[str, Op] = {}


def function(target: str) -> Op | None:
    """The function that a call_function node names; ``None`` if it is not offered."""
    if target.startswith("operator."):
        return OPERATORS.get(target.removeprefix("operator."))
    if target.startswith("math."):
        return SCALARS.get(target.removeprefix("math."))
    if target in ("getattr", "builtins.getattr"):
        return Op(_attribute, 2, 2)
    for prefix in _PREFIXES:
        if target.startswith(prefix):
            return FUNCTIONS.get(target.removeprefix(prefix))
    return None


def method(target: str) -> Op | None:
    """The method of a tensor that a call_method node names; ``None`` if it is not offered."""
    return METHODS.get(target)


def _number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _of_tensors(call: Callable[..., Any]) -> Callable[..., Any]:
    """Only with a tensor in first place, or among a list there: everything else has no business here."""

    def checked(first: Any = None, *args: Any, **kwargs: Any) -> Any:
        first = kwargs.pop("input", first) if first is None else first
        several = isinstance(first, list | tuple) and bool(first)
        if not isinstance(first, torch.Tensor) and not (several and all(isinstance(t, torch.Tensor) for t in first)):
            raise TypeError(f"the first argument is a {type(first).__name__}, not a tensor")
        return call(first, *args, **kwargs)

    return checked


def _arithmetic(call: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors and numbers; among numbers alone nothing may grow without bound."""

    def checked(*args: Any) -> Any:
        if any(isinstance(a, torch.Tensor) for a in args):
            if not all(isinstance(a, torch.Tensor) or _number(a) for a in args):
                raise TypeError("an operand is neither a tensor nor a number")
            return call(*args)
        return bounded(call, *args)

    return checked


def bounded(call: Callable[..., Any], *args: Any) -> Any:
    """A function of numbers alone, with a result of ordinary size."""
    if not args or not all(_number(a) for a in args):
        raise TypeError("an operand is neither a tensor nor a number")
    if call is operator.pow:  # of whole numbers it could take for ever
        args = tuple(float(a) for a in args)
    result = call(*args)
    if not _number(result) or (isinstance(result, int) and abs(result) > MOST_INT):
        raise ValueError("a number is too large")
    return result


def _item(container: Any, index: Any) -> Any:
    """Basic indexing, and by tensors of whole numbers."""
    if not isinstance(container, torch.Tensor):
        if isinstance(container, tuple | list) and isinstance(index, int):
            return container[index]
        raise TypeError(f"a {type(container).__name__} cannot be indexed so")
    for part in index if isinstance(index, tuple | list) else (index,):
        if isinstance(part, bool) or (isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)):
            raise TypeError(
                "a mask as index gives a shape that depends on values; write torch.where(mask, x, 0), or multiply"
            )
        if not (part is None or part is Ellipsis or isinstance(part, int | slice | torch.Tensor)):
            raise TypeError(f"a {type(part).__name__} is no index")
    return container[tuple(index) if isinstance(index, list) else index]


def _attribute(of: Any, name: Any) -> Any:
    if isinstance(of, torch.Tensor) and name in _ATTRIBUTES:
        return getattr(of, name)
    if isinstance(of, tuple) and name in _RESULTS and hasattr(of, name):
        return getattr(of, name)
    raise TypeError(f"attribute {name!r} is not offered; offered: {', '.join(sorted(_ATTRIBUTES | _RESULTS))}")


def _to(tensor: torch.Tensor, *args: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:  # noqa: ARG001
    """Another dtype; the device stays."""
    for arg in (*args, dtype):
        if isinstance(arg, torch.Tensor):
            tensor = tensor.to(arg.dtype)
        elif isinstance(arg, torch.dtype):
            tensor = tensor.to(arg)
        elif not (arg is None or arg == "cpu" or isinstance(arg, torch.device)):
            raise TypeError("to takes a dtype, a tensor or the device 'cpu'")
    return tensor


def _norm(tensor: torch.Tensor, p: Any = 2, dim: Any = None, keepdim: Any = False, dtype: Any = None) -> torch.Tensor:
    """Of vectors alone: those of matrices, which have names, would decompose them."""
    if p != "fro" and not _number(p):
        raise TypeError(f"a norm {p!r} is not offered")
    found: torch.Tensor = torch.linalg.vector_norm(tensor, 2 if p == "fro" else p, dim, keepdim, dtype=dtype)
    return found


def _creating(call: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a tensor of a size in numbers; the device is where the graph runs."""

    def checked(*args: Any, device: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return call(*args, **kwargs)

    return checked


def _like(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(tensor: torch.Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Any:  # noqa: ARG001
        return call(tensor, *args, **kwargs)

    return _of_tensors(checked)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _offer(
    names: Iterable[str], least: int, most: int, keywords: str = "", *, places: str = "fm", home: Any = None
) -> None:
    """Put functions in the lists: "f" of torch's functions, "m" of a tensor's methods."""
    for name in names:
        allowed = frozenset([*keywords.split(), "input"]) if "f" in places else frozenset(keywords.split())
        found = getattr(home, name, None) if home else getattr(torch, name, None) or getattr(functional, name, None)
        if "f" in places:
            assert found is not None, name
            FUNCTIONS[name] = Op(_of_tensors(found), least, most, allowed)
        if "m" in places:
            assert hasattr(torch.Tensor, name), name
            bound = getattr(torch.Tensor, name)
            METHODS[name] = Op(_of_tensors(bound), least, most, frozenset(keywords.split()))


def _words(text: str) -> list[str]:
    return text.split()


_offer(
    _words(
        "abs absolute neg negative exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sigmoid tanh sin "
        "cos erf sign floor ceil trunc isnan isinf isfinite logical_not relu detach clone"
    ),
    1,
    1,
)
_offer(["round"], 1, 1, "decimals")
_offer(_words("softplus"), 1, 3, "beta threshold", places="f")
_offer(_words("logsigmoid"), 1, 1, places="f", home=functional)
FUNCTIONS["log_sigmoid"] = FUNCTIONS["logsigmoid"]  # its own name within torch
_offer(_words("add sub subtract"), 2, 2, "other alpha")
_offer(_words("mul multiply"), 2, 2, "other")
_offer(_words("div divide true_divide"), 2, 2, "other rounding_mode")
_offer(
    _words(
        "pow maximum minimum fmod remainder floor_divide eq ne lt le gt ge greater greater_equal less less_equal "
        "logical_and logical_or logical_xor logaddexp xlogy atan2 dot outer"
    ),
    2,
    2,
    "other exponent",
)
_offer(["lerp"], 3, 3, "weight end")
_offer(["where"], 3, 3, "other", places="f")
_offer(["where"], 3, 3, "other", places="m")
_offer(_words("clamp clip"), 1, 3, "min max")
_offer(["clamp_min"], 2, 2, "min")
_offer(["clamp_max"], 2, 2, "max")
_offer(["nan_to_num"], 1, 4, "nan posinf neginf")
_offer(_words("sum mean prod"), 1, 3, "dim keepdim dtype")
_offer(_words("amax amin argmax argmin all any logsumexp"), 1, 3, "dim keepdim")
_offer(_words("max min"), 1, 3, "dim keepdim other")
_offer(_words("std var"), 1, 2, "dim keepdim unbiased correction")
_offer(_words("cumsum softmax log_softmax"), 1, 2, "dim dtype")
_offer(_words("sort argsort topk"), 1, 4, "dim descending stable k largest sorted")
_offer(_words("unsqueeze squeeze unbind flip"), 1, 2, "dim dims")
_offer(_words("flatten"), 1, 3, "start_dim end_dim")
_offer(_words("transpose swapaxes"), 3, 3, "dim0 dim1")
_offer(["t"], 1, 1)
_offer(["reshape"], 2, 8, "shape")
_offer(_words("permute"), 2, 8, "dims")
_offer(_words("view expand repeat"), 2, 8, places="m")
_offer(_words("expand_as view_as reshape_as type_as"), 2, 2, "other", places="m")
_offer(_words("chunk split narrow roll"), 2, 4, "dim chunks split_size start length shifts dims")
_offer(_words("gather index_select take_along_dim"), 2, 3, "dim index indices")
_offer(["masked_fill"], 3, 3, "mask value")
_offer(_words("tril triu"), 1, 2, "diagonal")
_offer(_words("cat concat stack"), 1, 2, "dim tensors", places="f")
_offer(_words("numel"), 1, 1)
_offer(_words("size dim ndimension"), 1, 2, "dim", places="m")
_offer(
    _words("mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits"),
    2,
    2,
    "target reduction beta delta log_target weight",
    places="f",
    home=functional,
)
_offer(_words("float double half bfloat16 long int bool"), 1, 1, places="m")
FUNCTIONS["norm"] = METHODS["norm"] = Op(
    _of_tensors(_norm), 1, 4, frozenset(["p", "dim", "keepdim", "dtype", "input"])
)
METHODS["to"] = Op(_of_tensors(_to), 1, 3, frozenset(["dtype", "device"]))
METHODS["cpu"] = METHODS["contiguous"] = Op(_of_tensors(_same), 1, 1)
for _name in ("zeros_like", "ones_like"):
    FUNCTIONS[_name] = Op(_like(getattr(torch, _name)), 1, 1, frozenset(["dtype", "device"]))
FUNCTIONS["full_like"] = Op(_like(torch.full_like), 2, 2, frozenset(["fill_value", "dtype", "device"]))
for _name in ("zeros", "ones", "arange"):
    FUNCTIONS[_name] = Op(_creating(getattr(torch, _name)), 1, 4, frozenset(["dtype", "device"]))
FUNCTIONS["full"] = Op(_creating(torch.full), 2, 2, frozenset(["fill_value", "dtype", "device"]))
for _name in _words("add sub mul truediv floordiv mod pow eq ne lt le gt ge and_ or_ xor"):
    OPERATORS[_name] = Op(_arithmetic(getattr(operator, _name)), 2, 2)
for _name in _words("neg pos abs inv invert"):
    OPERATORS[_name] = Op(_arithmetic(getattr(operator, _name)), 1, 1)
OPERATORS["getitem"] = Op(_item, 2, 2)
for _name in _words("exp expm1 log log1p log2 log10 sqrt floor ceil fabs"):
    SCALARS[_name] = Op(functools.partial(bounded, getattr(math, _name)), 1, 1)
