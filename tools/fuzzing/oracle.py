"""What the numbers must be, by plain float64 numpy from the definitions; nothing of the package.

ΔW is the tests' own oracle's (tests/helpers/plain_delta.py); here is what merges, sums and copies of it are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from corpus import Raw, pack, raw, unpack
from plain_delta import apart, changes, numbers

Array = np.ndarray[Any, Any]
Parts = Sequence[tuple[str, float]]
TOLERANCE = 1e-5
# Half a unit of rounding beside 1, the smallest step, and the largest number of a stored dtype.
UNITS = {
    "F64": (2.0**-53, 0.0, np.finfo("f8").max), "F32": (2.0**-24, 2.0**-150, np.finfo("f4").max),
    "F16": (2.0**-11, 2.0**-25, 65504.0), "BF16": (2.0**-8, 2.0**-134, 3.3895e38),
}  # fmt: skip


class Wrong(AssertionError):
    """A result that is not what its definition says."""


@contextmanager
def judged() -> Any:
    """An oracle that stumbles over what was accepted has found a fault, too."""
    try:
        with np.errstate(all="ignore"):
            yield
    except Wrong:
        raise
    except AssertionError as error:
        raise Wrong(str(error).split("\n")[0]) from error


# -- Headers


def by_library(path: str) -> dict[str, Raw] | None:
    """The tensors of a file as the safetensors library reads it; None where it refuses."""
    import safetensors

    try:
        with open(path, "rb") as file:
            read = safetensors.deserialize(file.read())
    except Exception:
        return None
    return {key: Raw(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for key, t in read}


def same_tensors(read: Any, theirs: Mapping[str, Raw]) -> None:
    if read.tensors.keys() != theirs.keys():
        raise Wrong("other keys than the safetensors library reads")
    for key, tensor in read.tensors.items():
        data = b"".join(part.read() for part in tensor.parts)
        if (tensor.shape, data) != (theirs[key].shape, theirs[key].data):
            raise Wrong("another shape, or other bytes, than the safetensors library reads")


# -- Models as files


def files_of(model: str) -> list[Path]:
    """The safetensors files of a model: the one, an index's, or a folder's."""
    path = Path(model)
    if path.is_dir():
        return sorted(path.rglob("*.safetensors"))
    return [path]


@lru_cache(maxsize=4)
def _read(path: str, stamp: tuple[int, int]) -> dict[str, Raw]:
    return unpack(Path(path).read_bytes())[0]


def tensors_of(model: str) -> dict[str, Raw]:
    out: dict[str, Raw] = {}
    for path in files_of(model):
        stat = path.stat()
        out |= _read(str(path), (stat.st_ino, stat.st_mtime_ns))
    return out


def array(tensor: Raw) -> Array:
    """A float tensor's numbers in float64, whatever they are."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(tensor.shape).astype("f8")
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
    return np.frombuffer(tensor.data, kinds[tensor.dtype]).reshape(tensor.shape).astype("f8")


def finite_model(model: str, base: str) -> None:
    """No NaN and no infinity in what a merge wrote, but in tensors that have the base's bytes."""
    for key, tensor in tensors_of(model).items():
        finite = tensor.dtype not in UNITS or np.isfinite(array(tensor)).all()
        if not finite and tensor.data not in _of_key(base, key):
            raise Wrong(f"what is not finite was written, in {_role(key)}")


def _of_key(model: str, key: str) -> list[bytes]:
    """The bytes under a key in those of a model's files that can be read."""
    folder = Path(model).parent if model.endswith(".json") else model
    held = []
    for path in files_of(str(folder)):
        with suppress(ValueError):
            held += [t.data for k, t in unpack(path.read_bytes())[0].items() if k == key]
    return held


def _role(key: str) -> str:
    return key.rpartition(".")[2] if key.isprintable() else "a tensor"


def finite_adapter(source: str) -> None:
    """Every number of an accepted adapter is one."""
    with judged():
        for path in files_of(source):
            for key, tensor in unpack(path.read_bytes())[0].items():
                numbers(tensor, key)


def within(model: str, limit: float) -> None:
    """No file of several tensors is larger than a shard may be."""
    for path in files_of(model):
        tensors, _ = unpack(path.read_bytes())
        if len(tensors) > 1 and sum(len(t.data) for t in tensors.values()) > limit:
            raise Wrong("a shard is larger than --max-shard-size")


# -- Adapters


def bare(model: str | None) -> dict[str, Array] | None:
    """A base's weights by module, for an adapter that is worked out on them."""
    if model is None or not Path(model).exists():
        return None
    found = tensors_of(model)
    return {k.removesuffix(".weight"): array(t) for k, t in found.items() if t.dtype in UNITS}


def same_changes(source: str, out: str, loss: float, folded: bool, base: str | None) -> None:
    """ΔW of both adapters; where the report owns up to a loss, just that loss."""
    with judged():
        weights = bare(base)
        before = changes(Path(source), folded, weights)
        _same(before, changes(Path(out), folded, weights), loss, folded)


def _same(
    before: Mapping[str, Array], after: Mapping[str, Array], loss: float, folded: bool
) -> None:
    if before.keys() != after.keys():
        raise Wrong("other modules came out than went in")
    for name, change in before.items():
        if folded and np.linalg.norm(change) < 1e-12:
            continue  # a rotation by nothing: W' − W is float64's rounding of W
        error = apart(change, after[name])
        if not error <= TOLERANCE + 1.01 * loss:
            raise Wrong("ΔW is off by more than is told")


def summed_rightly(sources: Parts, out: str, loss: float, base: str | None) -> None:
    """Σ w·ΔW, where all that is summed adds; turns and magnitudes do not."""
    with judged():
        total: dict[str, Array] = {}
        for path, weight in sources:
            if not adds(path):
                return
            for name, change in changes(Path(path)).items() if weight else ():
                if "." in name:
                    continue  # a parameter that is replaced outright is no sum
                total[name] = _plus(total.get(name, np.zeros((0, 1))), weight * change)
        found = {name: c for name, c in changes(Path(out)).items() if "." not in name}
        for name in total.keys() | found.keys():
            a, b = (d.get(name, np.zeros((0, 1))) for d in (total, found))
            size = max(len(a), len(b))
            if len(b) < size:  # a weight's change of zeros may be left out beside its bias's
                short = np.zeros((size - len(b), 1))
                b = min(
                    np.concatenate([b, short]),
                    np.concatenate([short, b]),
                    key=lambda c: float(np.linalg.norm(a - c)),
                )
            a = _padded(a, size)
            scale = max(np.linalg.norm(w * c[name]) for c, w in _each(sources) if name in c)
            if not np.linalg.norm(a - b) <= (TOLERANCE + 1.01 * loss) * scale:
                raise Wrong("the sum is off by more than is told")


def _each(sources: Parts) -> list[tuple[dict[str, Array], float]]:
    return [(changes(Path(path)), weight) for path, weight in sources]


def adds(path: str) -> bool:
    """Whether an adapter is sums alone."""
    keys = [k for p in files_of(path) for k in unpack(p.read_bytes())[0]]
    return not any("hra_u" in k or "magnitude" in k or "dora_scale" in k for k in keys)


def _plus(a: Array, b: Array) -> Array:
    size = max(len(a), len(b))
    return _padded(a, size) + _padded(b, size)


def _padded(a: Array, size: int) -> Array:
    return np.concatenate([a, np.zeros((size - len(a), 1))])


# -- Merges


def merged(base: str, adapters: Parts, sign: float) -> dict[str, tuple[Array, float]]:
    """Every float tensor's W' in float64, and the size of what was summed for it."""
    weights = bare(base) or {}
    stored = {k: array(t) for k, t in tensors_of(base).items() if t.dtype in UNITS}
    total: dict[str, Array] = {}
    for path, weight in adapters:
        for name, change in changes(Path(path), True, weights).items():
            total[name] = _plus(total.get(name, np.zeros((0, 1))), sign * weight * change)
    return {key: _after(key, w, stored, total) for key, w in stored.items()}


def _after(
    key: str, w: Array, stored: Mapping[str, Array], total: Mapping[str, Array]
) -> tuple[Array, float]:
    module, _, role = key.rpartition(".")
    flat = module.replace(".", "_")
    saved = next((c for n, c in total.items() if n in (key, f"base_model.model.{key}")), None)
    if saved is not None:
        return saved.reshape(w.shape), float(np.abs(saved).max(initial=0))
    norm = total.get(f"{flat}:{'w' if role == 'weight' else 'b'}_norm")
    change = total.get(flat, np.zeros((0, 1))) if norm is None else norm
    if role == "bias" and norm is None:
        change = change[stored.get(f"{module}.weight", np.zeros(0)).size :]
    change = change[: w.size]
    if not change.size:
        return w, float(np.abs(w).max(initial=0))
    size = float(np.abs(w).max(initial=0) + np.abs(change).max(initial=0))
    return w + change.reshape(w.shape), size


def merged_rightly(out: str, base: str, adapters: Parts, sign: float) -> None:
    """Each element within one rounding of W', and a little for float32's sums."""
    with judged():
        if sign < 0 and not all(adds(path) for path, _ in adapters):
            return  # a turn is undone by its inverse, which is no difference
        found = tensors_of(out)
        for key, (want, size) in merged(base, adapters, sign).items():
            if key not in found or found[key].shape != want.shape:
                raise Wrong("a tensor of the base is missing, or of another shape")
            off_by_more(found[key], want, size, key)


def off_by_more(tensor: Raw, want: Array, size: float, key: str, held: float = 0.0) -> None:
    """Wrong where an element is off by more than its rounding; ``held`` is that of the factors."""
    unit, step, largest = UNITS[tensor.dtype]
    got = array(tensor)
    if not np.isfinite(got).all() or np.abs(want).max(initial=0) > largest * 1.01:
        raise Wrong("an overflow was written")
    room = 1.01 * unit * np.abs(want) + step + min(4e-6, 64 * max(unit, held)) * size
    if not (np.abs(got - want) <= room).all():
        raise Wrong(f"a merged {_role(key)} is off by more than its rounding")


def extracted_rightly(base: str, tuned: str, out: str, report: Any) -> None:
    """‖D − D̂‖/‖D‖ of each layer is what the report has, measured again."""
    with judged():
        before, after = bare(base) or {}, bare(tuned) or {}
        found = changes(Path(out), True, before)
        errors = {row.module.replace(".", "_"): row.error for row in report.rows}
        for path, weight in before.items():
            flat = path.replace(".", "_")
            if flat not in found or flat not in errors:
                continue
            d = (after[path] - weight).reshape(-1, 1)
            error = np.linalg.norm(d - found[flat][: d.size]) / max(np.linalg.norm(d), 1e-300)
            if abs(error - errors[flat]) > 1e-3 + 0.01 * error:
                raise Wrong("an extraction's error is not the one that is told")


# -- Pickles


def same_as_pickle(source: str, out: str, loss: float, base: str) -> None:
    """The numbers of a torch pickle as torch reads them without mapping the file."""
    import torch

    try:
        read = torch.load(source, map_location="cpu", weights_only=True, mmap=False)
    except Exception:
        raise Wrong("a pickle is accepted that torch refuses") from None
    read = read.get("state_dict", read)
    plain = {k: _of_torch(t) for k, t in read.items() if isinstance(t, torch.Tensor)}
    copy = Path(out).parent.parent / "plain.safetensors"
    copy.write_bytes(pack(plain))
    try:
        same_changes(str(copy), out, loss, False, base)
    finally:
        copy.unlink()


def _of_torch(tensor: Any) -> Raw:
    import torch

    flat = tensor.detach().contiguous()
    if flat.dtype == torch.bfloat16:
        return Raw("BF16", tuple(flat.shape), flat.view(torch.int16).numpy().tobytes())
    whole = flat.dtype in (torch.int64, torch.int32, torch.uint8)
    return raw((flat.double() if whole else flat).numpy())
