"""A forward under torch.fx.symbolic_trace whose tensors are known and whose input is not.

Parameters are real tensors there, so every shape and dtype that the algebra asks for is known; what
is computed from them is computed, and recorded too, so that the graph holds the parameters by name
and none of their numbers. What meets the input is recorded alone.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.fx import Node, Proxy
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves


class Recording(TorchFunctionMode):
    """Records in the trace of ``proxy`` what is done to tensors that come from parameters."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self.tracer = proxy.tracer
        self.known: dict[int, tuple[Tensor, Node]] = {}  # the tensor, so that no other takes its id

    def __enter__(self) -> Self:
        self._plain = self.tracer.create_arg
        self.tracer.create_arg = self._argument  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self.tracer.create_arg = self._plain  # type: ignore[method-assign]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def _argument(self, value: Any) -> Any:
        """A node's argument: a tensor that comes from parameters is the node that it came from."""
        entry = self.known.get(id(value))
        return self._plain(value) if entry is None else entry[1]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        if any(isinstance(value, Proxy) for value in given):
            return self._record(func, args, kwargs or {})
        out = func(*args, **kwargs or {})
        tensors = [value for value in given if isinstance(value, Tensor)]
        # What is made of no tensor is recorded too: random numbers are drawn anew on every call.
        if _holds_tensors(out) and (not tensors or any(map(self._follows, tensors))):
            made = self._record(func, args, kwargs or {})
            several = isinstance(out, (tuple, list))
            for n, tensor in enumerate(out if several else [out]):
                self.known[id(tensor)] = (tensor, _part(made, n).node if several else made.node)
        return out

    def _follows(self, tensor: Tensor) -> bool:
        return isinstance(tensor, torch.nn.Parameter) or id(tensor) in self.known

    def _record(self, func: Any, args: Any, kwargs: Any) -> Proxy:
        name = func.__name__
        if name == "__get__":  # a property: Tensor.T and its like
            args = (args[0], func.__self__.__name__)
            return self.tracer.create_proxy("call_function", getattr, args, {})
        method = is_tensor_method_or_property(func)
        kind, target = ("call_method", name) if method else ("call_function", func)
        return self.tracer.create_proxy(kind, target, args, kwargs)


def _part(made: Any, n: int) -> Proxy:
    part: Proxy = made[n]
    return part


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], Tensor)
    )


def unreadable(x: object) -> bool:
    """Whether the sizes of ``x`` must not be read: a trace, an export or a compiler is under way."""
    if isinstance(x, Proxy) or torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return isinstance(x, Tensor) and any(isinstance(size, torch.SymInt) for size in x.shape)
