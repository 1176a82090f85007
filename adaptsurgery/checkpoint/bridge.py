"""Between lazy tensors and torch. Only this file and ``pickles`` know torch, and import it late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptsurgery_formats.errors import ShapeError, ValueRefused
from adaptsurgery_formats.tensors import Literal, Part, Tensor, bytes_of

if TYPE_CHECKING:
    import torch

# safetensors' dtype names and torch's.
DTYPES: Mapping[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip
_NAMES = {f"torch.{torch_name}": name for name, torch_name in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; raises ValueRefused where it has none."""
    if str(dtype) not in _NAMES:
        raise ValueRefused(f"{dtype} has no place in a safetensors file", code="unknown-dtype")
    return _NAMES[str(dtype)]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name; raises ValueRefused where this torch has none."""
    import torch

    dtype = getattr(torch, DTYPES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueRefused(f"this torch has no dtype for {name}", code="unknown-dtype")
    return dtype


def torch_device(name: str) -> torch.device:
    """The torch device of a name; raises ValueRefused "no-such-device" where there is none."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # RuntimeError, AssertionError, and what a backend thinks of
        raise ValueRefused(
            f"torch finds no device `{name}` here",
            seen=str(error).splitlines()[0][:120] if str(error) else type(error).__name__,
            next="--device cpu",
            code="no-such-device",
        ) from None


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The tensor's numbers in a torch tensor of its own memory, writable, on the CPU.

    Raises ShapeError if the parts hold fewer or more bytes than the shape needs, and what the
    parts raise when they are read.
    """
    import torch

    dtype = torch_dtype(tensor.dtype)
    if len(tensor.parts) == 1 and isinstance(tensor.parts[0], (Held, Computed)):
        t = tensor.parts[0].torch().detach()
        if t.numel() == tensor.numel and t.dtype == dtype:
            own = t.cpu().contiguous()
            shared = isinstance(tensor.parts[0], Held) and own.data_ptr() == t.data_ptr()
            return (own.clone() if shared else own).reshape(tensor.shape)
    data = bytearray()
    for part in tensor.parts:
        data += part.read()
    if len(data) != tensor.nbytes:
        raise ShapeError(
            f"{tensor.dtype} {list(tensor.shape)} needs {tensor.nbytes} bytes, not {len(data)}"
        )
    if not data:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def from_torch(t: torch.Tensor, source: str = "") -> Tensor:
    """A torch tensor by reference; its bytes are taken when they are read. ``source`` is the file
    whose numbers they are, where nothing was computed.

    Raises ValueRefused for dtypes and layouts (sparse, quantised, nested, meta) that have no bytes to write.
    """
    odd = t.is_nested or t.is_quantized
    if odd or t.layout != _strided() or t.device.type == "meta":
        raise ValueRefused(
            "only plain, dense tensors can be written",
            seen=f"{'nested' if t.is_nested else t.layout}, {t.dtype}, on {t.device}",
            code="unknown-dtype",
        )
    return Tensor(dtype_name(t.dtype), tuple(t.shape), (Held(t.detach(), source),))


def computed(dtype: str, shape: tuple[int, ...], thunk: Callable[[], torch.Tensor]) -> Tensor:
    """A tensor whose numbers are computed each time they are read, and not kept.

    ``thunk`` must give a tensor of its own: ``to_torch`` hands it on without a copy.
    """
    return Tensor(dtype, shape, (Computed(bytes_of(dtype, shape), thunk),))


def _strided() -> torch.layout:
    import torch

    return torch.strided


def _memory_of(t: torch.Tensor) -> memoryview:
    """The bytes of a tensor, borrowed where it lies contiguous on the CPU."""
    import torch

    flat = t.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """A torch tensor in memory as a Part; ``source`` is the file that it was read from, if any."""

    tensor: torch.Tensor
    source: str = ""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def torch(self) -> torch.Tensor:
        return self.tensor

    def window(self, start: int, stop: int) -> Part:
        size = self.tensor.element_size()
        if start % size or stop % size:
            return Literal(self.read()[start:stop])
        return Held(self.tensor.reshape(-1)[start // size : stop // size], self.source)

    def read(self) -> bytes:
        return bytes(self.buffer())

    def buffer(self) -> memoryview:
        return _memory_of(self.tensor)


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A torch tensor that is computed each time it is read; size and order are known beforehand."""

    nbytes: int
    thunk: Callable[[], torch.Tensor]

    def torch(self) -> torch.Tensor:
        """The computed tensor; raises ShapeError if it has not the size that was promised."""
        t = self.thunk()
        if t.numel() * t.element_size() != self.nbytes:
            raise ShapeError(
                f"{self.nbytes} bytes were promised, but {t.dtype} {list(t.shape)} was computed"
            )
        return t

    def window(self, start: int, stop: int) -> Part:
        return Literal(self.read()[start:stop])

    def read(self) -> bytes:
        return bytes(self.buffer())

    def buffer(self) -> memoryview:
        return _memory_of(self.torch())
