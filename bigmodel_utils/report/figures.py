"""Figures that say where they come from: the source cell and the commit, written into the PNG itself."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"Provenance"


def mark(outputs: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """A cell's outputs, each PNG among them with a text that names its source; the pixels stay as they are."""
    return [_marked(output, source) for output in outputs]


def _marked(output: dict[str, Any], source: str) -> dict[str, Any]:
    encoded = output.get("data", {}).get("image/png")
    if encoded is None:
        return output
    image = with_text(base64.b64decode(encoded), source)
    return output | {"data": output["data"] | {"image/png": base64.b64encode(image).decode() + "\n"}}


def with_text(png: bytes, text: str) -> bytes:
    """A PNG with one more tEXt chunk behind its header (PNG specification, third edition, 11.3.3.2).

    Raises:
        ValueError: where the bytes are no PNG.
    """
    if not png.startswith(SIGNATURE):
        raise ValueError("not a PNG file")
    content = b"tEXt" + KEYWORD + b"\0" + text.encode("latin-1", "replace")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    end_of_header = len(SIGNATURE) + 25  # length, type, 13 bytes and checksum of IHDR
    return png[:end_of_header] + chunk + png[end_of_header:]
