"""What is inside saved files, read without the package."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

from PIL import Image

EXIF_IFD, USER_COMMENT, IMAGE_DESCRIPTION = 0x8769, 0x9286, 0x010E


def infotext(path: Path) -> str:
    """The text for other tools, read as they read it."""
    with Image.open(path) as image:
        if image.format == "PNG":
            return str(image.info["parameters"])
        comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment[:8] == b"UNICODE\0"
    return str(comment[8:].decode("utf-16-be"))


def parsed(text: str) -> dict[str, str]:
    """What A1111's webui makes of it: ``parse_generation_parameters`` of its infotext_utils.py, in short."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3, "webui would take the line for a part of the prompt"
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            negative = [line.removeprefix("Negative prompt:").strip()]
        else:
            (prompt if negative is None else negative).append(line)
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative or []), **values}


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 8
    while position < len(data):
        size, kind = struct.unpack(">I4s", data[position : position + 8])
        chunks.append((kind, data[position + 8 : position + 8 + size]))
        position += 12 + size
    return chunks


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [
        struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
