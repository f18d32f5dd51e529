"""Figures that say where they come from: the source cell and the commit, written into the PNG or SVG itself."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable
from typing import Any

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"Provenance"


def mark(outputs: Iterable[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """A cell's outputs, each PNG and SVG among them with a text that names its source; what they show stays as it is."""
    return [output | {"data": _marked(output["data"], source)} if "data" in output else output for output in outputs]


def _marked(data: dict[str, Any], source: str) -> dict[str, Any]:
    marked = {}
    if "image/png" in data:
        marked["image/png"] = base64.b64encode(with_text(base64.b64decode(data["image/png"]), source)).decode() + "\n"
    if "image/svg+xml" in data:
        before, end, after = "".join(data["image/svg+xml"]).rpartition("</svg>")
        marked["image/svg+xml"] = f"{before}<!-- {KEYWORD.decode()}: {source} -->\n{end}{after}"
    return data | marked


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
