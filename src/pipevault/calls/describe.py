"""Values as plain JSON; in a run record, what is large or no JSON stands as its SHA-256 or its class.

torch is never imported here: an object can be a tensor only where torch already is.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

from pipevault.digest import digest_bytes

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_MODES_OF_BYTES = frozenset({"L", "LA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_PALETTE_MODES = frozenset({"P", "PA"})
_MODES_OF_16_BITS = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})

Inside: TypeAlias = "tuple[int, ...]"
"""The ids of the objects around a value."""


def plain_json(
    value: Any,
    other: Callable[[Any, Inside], Any],
    *,
    text: Callable[[str], Any] = str,
    is_object: Callable[[Any], bool] = lambda value: False,
    inside: Inside = (),
) -> Any:
    """Return ``value`` as plain JSON, for records and for keys; each says what its other objects become.

    NumPy's numbers stand as Python's, sequences as lists, sets as sorted lists, mappings with their keys as text; a
    container inside itself is ``itself``. ``text`` makes what stands for a string, ``other`` for all else: enums,
    floats that are not finite, and containers of which ``is_object`` says so. ``inside`` has the objects around the
    value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return other(value, inside)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else other(value, inside)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
        return plain_json(value.item(), other, text=text, is_object=is_object, inside=inside)
    if is_object(value) or not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return other(value, inside)
    if id(value) in inside:
        return "itself"

    def inner(item: Any) -> Any:
        return plain_json(item, other, text=text, is_object=is_object, inside=(*inside, id(value)))

    if isinstance(value, Mapping):
        return {str(name): inner(item) for name, item in value.items()}
    items = [inner(item) for item in value]
    return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items


def describe(value: Any) -> Any:
    """Return ``value`` as plain JSON for a record, see :func:`plain_json`; what is not plain is a mapping with its
    ``kind``.

    Describe a generator before the call draws from it: ``fresh`` tells whether nothing had been drawn, so that the seed
    alone gives the same numbers again; else ``state`` has what does.
    """
    return plain_json(value, lambda item, _: _describe_object(item))


def pixels_sha256(image: Image.Image | np.ndarray[Any, Any]) -> str:
    """Return the SHA-256 of the raw uint8 bytes, row by row, channels last; an image and its array have the same one.

    For an image whose channels are not one byte each, mode and size are hashed before its values (little-endian); where
    the bytes are indices of a palette, also the colours that they stand for. ``TypeError`` for an array of another
    dtype.
    """
    picture: Any = image
    if is_instance(image, "PIL.Image", "Image"):
        if picture.mode in _MODES_OF_BYTES:
            return hashlib.sha256(picture.tobytes()).hexdigest()
        return _sha256_with_mode(picture)
    if str(getattr(image, "dtype", None)) != "uint8" or not is_instance(image, "numpy", "ndarray"):
        raise TypeError(
            f"Pixels are an image or a uint8 array, not {type(image).__name__} of "
            f"{getattr(image, 'dtype', 'no dtype')}. Use digest_array for other arrays."
        )
    return digest_array(image)


def digest_array(array: Any) -> str:
    """Return the SHA-256 of an array's or tensor's bytes in C order, little-endian, without shape and type.

    ``TypeError`` for an array of Python objects and for a tensor that has no bytes (meta, sparse).
    """
    check_bytes(array)
    if not is_instance(array, "torch", "Tensor"):
        return hashlib.sha256(_bytes_of_array(array)).hexdigest()
    from pipevault.fingerprint.tensors import tensor_digest

    return tensor_digest(array)


def _describe_object(value: Any) -> Any:
    if isinstance(value, Enum):
        return {"kind": "object", "class": f"{_qualified_name(type(value))}.{value.name}"}
    if isinstance(value, float):
        return {"kind": "float", "value": str(float(value))}
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        return {"kind": "bytes", "sha256": digest_bytes(data).hex, "size_bytes": len(data)}
    if isinstance(value, PurePath):
        return str(value)
    if is_instance(value, "PIL.Image", "Image"):
        return {"kind": "image", "sha256": pixels_sha256(value), "size": list(value.size), "mode": value.mode}
    is_tensor = is_instance(value, "torch", "Tensor")
    if (is_tensor or is_instance(value, "numpy", "ndarray")) and has_bytes(value):
        dtype = str(value.dtype).removeprefix("torch.") if is_tensor else value.dtype.newbyteorder("=").name
        kind = "tensor" if is_tensor else "array"
        return {"kind": kind, "sha256": digest_array(value), "shape": list(value.shape), "dtype": dtype}
    if is_instance(value, "torch", "Generator"):
        return _describe_generator(value)
    if is_instance(value, "torch", "dtype") or is_instance(value, "torch", "device"):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return {"kind": "callable", "name": _qualified_name(value)}
    return {"kind": "object", "class": _qualified_name(type(value))}


def _describe_generator(generator: Any) -> dict[str, Any]:
    seed = generator.initial_seed()
    untouched = type(generator)(device=generator.device).manual_seed(seed)
    state = generator.get_state()
    fresh = bytes(state.numpy()) == bytes(untouched.get_state().numpy())
    described = {"kind": "generator", "seed": seed, "device": str(generator.device), "fresh": fresh}
    if not fresh:
        from pipevault.determinism.layers import pack

        described["state"] = pack(state)
    return described


def _sha256_with_mode(picture: Any) -> str:
    mode = "I;16" if picture.mode in _MODES_OF_16_BITS else picture.mode
    hasher = hashlib.sha256(f"{mode} {picture.width}x{picture.height}\n".encode("ascii"))
    if mode in _PALETTE_MODES:
        hasher.update(picture.convert("RGBA").tobytes())  # not the palette: a file need not keep what is unused of it
        hasher.update(picture.tobytes())
    else:
        import numpy as np

        hasher.update(_bytes_of_array(np.asarray(picture)))
    return hasher.hexdigest()


def _bytes_of_array(array: np.ndarray[Any, Any]) -> Any:
    import numpy as np

    little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8)


def check_bytes(array: Any) -> None:
    """Raise ``TypeError`` for a NumPy array or tensor that :func:`digest_array` refuses."""
    if has_bytes(array):
        return
    if is_instance(array, "torch", "Tensor"):
        kind = f"A quantized tensor ({array.dtype})" if array.is_quantized else f"A tensor of layout {array.layout}"
        raise TypeError(f"{kind} on {array.device} has no bytes to take a digest of.")
    raise TypeError("An array of Python objects has no bytes to take a digest of.")


def has_bytes(array: Any) -> bool:
    """Return whether a NumPy array or tensor has bytes: no Python objects, not meta, not sparse, not quantized."""
    if is_instance(array, "torch", "Tensor"):
        return not array.is_meta and not array.is_quantized and str(array.layout) == "torch.strided"
    return not array.dtype.hasobject


def is_instance(value: Any, module: str, name: str) -> bool:
    """Return whether ``value`` is an instance of a class of a module that may not have been imported."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)


def _qualified_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
