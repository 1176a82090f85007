"""A forward under torch.fx.symbolic_trace whose tensors are known and whose input is not.

Parameters are real tensors there, so every shape and dtype that the algebra asks for is known; what
is computed from them is computed, and recorded too, so that the graph holds the parameters by name
and none of their numbers. What meets the input is recorded alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_any, tree_map

_DRAWN = {torch.rand, torch.bernoulli, torch.rand_like}  # anew on every call, so never a constant


class Recording(TorchFunctionMode):
    """Records in the trace of ``proxy`` what is done to tensors that come from parameters."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__()
        self.tracer = proxy.tracer
        self.proxies: dict[int, tuple[Tensor, Proxy]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if tree_any(lambda value: isinstance(value, Proxy), (args, kwargs)):
            return self._record(func, args, kwargs)
        out = func(*args, **kwargs)
        if _holds_tensors(out) and (func in _DRAWN or tree_any(self._known, (args, kwargs))):
            made = self._record(func, args, kwargs)
            several = isinstance(out, (tuple, list))
            for n, tensor in enumerate(out if several else [out]):
                # The tensor is held too, so that no other takes its id.
                self.proxies[id(tensor)] = (tensor, made[n] if several else made)
        return out

    def _known(self, value: object) -> bool:
        return isinstance(value, torch.nn.Parameter) or id(value) in self.proxies

    def proxied(self, value: Any) -> Any:
        """The proxy of a tensor that comes from parameters; anything else as it is."""
        if isinstance(value, torch.nn.Parameter) and id(value) not in self.proxies:
            node = self.tracer.create_arg(value)
            assert isinstance(node, Node)
            self.proxies[id(value)] = (value, Proxy(node, self.tracer))
        return self.proxies[id(value)][1] if id(value) in self.proxies else value

    def _record(self, func: Any, args: Any, kwargs: Any) -> Proxy:
        args, kwargs = tree_map(self.proxied, (args, kwargs))
        name = func.__name__
        if name == "__get__":  # a property: Tensor.T and its like
            return self.tracer.create_proxy("call_function", getattr, (args[0], func.__self__.__name__), {})
        method = is_tensor_method_or_property(func)
        kind, target = ("call_method", name) if method else ("call_function", func)
        return self.tracer.create_proxy(kind, target, args, kwargs)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and bool(value) and isinstance(value[0], Tensor)
    )


def unreadable(x: object) -> bool:
    """Whether the sizes of ``x`` must not be read: a trace, an export or a compiler is under way."""
    if isinstance(x, Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return isinstance(x, Tensor) and any(isinstance(size, torch.SymInt) for size in x.shape)
