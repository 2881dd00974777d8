"""PNG, JPEG and WebP with a run record and an A1111 text inside.

In EXIF the record is ASCII with JSON's escapes, for the field has no other encoding; where it would overflow a JPEG it
is compressed (``pipevault+zlib:`` and Base64). UserComment is UTF-16, big-endian, after ``UNICODE``, as A1111's webui
writes it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pipevault.errors import NoRecordError, RecordTooLargeError, SettingsError
from pipevault.runtime.record import RECORD_LIMIT_BYTES, RECORD_MARK, RunRecord

if TYPE_CHECKING:
    from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEYWORD = "pipevault"
_IMAGE_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_COMPRESSED_PREFIX = "pipevault+zlib:"
_JPEG_EXIF_LIMIT_BYTES = 65533  # a segment's length has 16 bits and counts its own two bytes
_FORMATS = ("PNG", "JPEG", "WEBP")
"""The only ones that are opened: others start programs (Ghostscript for EPS), or parse far more than they need to."""
_CHUNK_HEAD_BYTES = 1024  # of an iTXt chunk before its text: keyword, language, translated keyword
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B"})
_WEBP_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
"""Pillow converts any other one without a word, and what that loses is lost."""


def encode(image: Image.Image, suffix: str, record: RunRecord, text: str) -> bytes:
    """Return ``image`` as a file of the format of ``suffix``. :class:`SettingsError`, :class:`RecordTooLargeError`."""
    from PIL.PngImagePlugin import PngInfo

    modes = {".png": _PNG_MODES, ".webp": _WEBP_MODES}.get(suffix.lower())
    if modes is not None and image.mode not in modes:
        raise SettingsError(
            f"An image of mode {image.mode} cannot be written as {suffix}, which would change its values. "
            f"{_instead(image.mode, suffix)}"
        )
    match suffix.lower():
        case ".png":
            chunks = PngInfo()
            chunks.add_itxt(_PNG_KEYWORD, record.to_json())
            chunks.add_text("parameters", text)  # becomes iTXt where Latin-1 does not suffice
            return _saved(image, "PNG", pnginfo=chunks)
        case ".webp":
            # Without `exact`, colours under transparent pixels would be changed.
            return _saved(image, "WEBP", exif=_exif(_ascii_json(record), text), lossless=True, exact=True)
        case _:
            return _saved(image, "JPEG", exif=_jpeg_exif(record, text), quality=95, subsampling=0)


def record_text(path: Path) -> str | None:
    """Return the text in the place of the record in the image ``path``, if any, whose content tells the format.
    :class:`NoRecordError` if it cannot be read.
    """
    from PIL import Image

    with _reading(path):
        with path.open("rb") as file:
            if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE:
                return _png_text(file)
        with Image.open(path, formats=_FORMATS) as image:
            description = image.getexif().get(_IMAGE_DESCRIPTION)
    return _from_description(description)


def picture(path: Path) -> Image.Image:
    """Return the picture in the image ``path``. :class:`NoRecordError` if it cannot be read."""
    from PIL import Image

    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        image.load()
        return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what it can do with
            yield
    except Exception as error:  # Pillow has no root for what it raises for a damaged file
        raise NoRecordError(
            f"{path} cannot be read as an image: {error}. Give the file as it was saved, or its sidecar (.json).",
            str(path),
        ) from error


def _jpeg_exif(record: RunRecord, text: str) -> bytes:
    exif = _exif(_ascii_json(record), text)
    if len(exif) > _JPEG_EXIF_LIMIT_BYTES:
        packed = base64.b64encode(zlib.compress(_ascii_json(record).encode("ascii"), 9))
        exif = _exif(_COMPRESSED_PREFIX + packed.decode("ascii"), text)
    if len(exif) > _JPEG_EXIF_LIMIT_BYTES:
        raise RecordTooLargeError(
            f"The run record and its text take {len(exif)} bytes; a JPEG has room for {_JPEG_EXIF_LIMIT_BYTES}. "
            "Save as PNG or WebP."
        )
    return exif


def _exif(description: str, text: str) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = description
    exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + text.encode("utf-16-be")}  # Pillow 10 forgets what get_ifd gives
    return exif.tobytes()


def _saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=image_format, **options)
    except (OSError, ValueError, KeyError) as error:  # Pillow raises any of these for a mode or size that does not fit
        raise SettingsError(
            f"An image of mode {image.mode} and {image.width}x{image.height} pixels cannot be written as "
            f"{image_format}: {error}. {_instead(image.mode, f'.{image_format.lower()}')}"
        ) from error
    return buffer.getvalue()


def _instead(mode: str, suffix: str) -> str:
    if mode in _PNG_MODES and suffix.lower() != ".png":
        return "Save it as PNG, which keeps every bit, or convert it: image.convert('RGB')."
    return "Save it as NPY or NPZ, which keep every value, or convert it: image.convert('RGB')."


def _png_text(file: BinaryIO) -> str | None:
    """Return the record's chunk; Pillow would refuse a wrong CRC, and so call an edited record a broken image."""
    keyword = _PNG_KEYWORD.encode("latin-1") + b"\0"
    while len(head := file.read(8)) == 8:
        size_bytes, kind = struct.unpack(">I4s", head)
        if kind != b"iTXt":
            file.seek(size_bytes + 4, os.SEEK_CUR)
            continue
        data = file.read(min(size_bytes, RECORD_LIMIT_BYTES + _CHUNK_HEAD_BYTES))
        file.seek(size_bytes - len(data) + 4, os.SEEK_CUR)
        if data.startswith(keyword):
            return _international_text(data.removeprefix(keyword))
    return None


def _international_text(data: bytes) -> str:
    """Return the text of an iTXt chunk. After its keyword come two bytes on compression, language, keyword, text."""
    is_compressed, text = data[:1] != b"\0", data[2:].split(b"\0", 2)[-1]
    if is_compressed:
        with suppress(zlib.error):
            text = _inflated(text)
    return text.decode("utf-8", "replace")


def _inflated(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, RECORD_LIMIT_BYTES + 1)


def _ascii_json(record: RunRecord) -> str:
    return json.dumps(record.to_document(), sort_keys=True, separators=(",", ":"))


def _from_description(description: Any) -> str | None:
    """Return the unchecked record of an EXIF description; ``None`` if that is a caption of someone else."""
    if not isinstance(description, str):
        return None
    if description.startswith(_COMPRESSED_PREFIX):
        with suppress(ValueError, zlib.error):  # Base64 and ASCII errors are ValueErrors
            packed = base64.b64decode(description.removeprefix(_COMPRESSED_PREFIX), validate=True)
            return _inflated(packed).decode("ascii")
        return description
    return description if RECORD_MARK in description else None
