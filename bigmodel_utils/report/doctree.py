"""What Sphinx does to the pages beyond its configuration: outputs are cleaned, figures small, numbered equations whole.

An output is whatever a notebook's code, or the data that it read, chose to show. So nothing in it may run in the reader's
browser or be fetched from elsewhere; the prose is ours and may hold HTML.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import nh3
from docutils import nodes
from PIL import ExifTags, Image
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from bigmodel_utils.report import figures

TAGS = nh3.ALLOWED_TAGS | {"audio", "source"}
ATTRIBUTES = nh3.ALLOWED_ATTRIBUTES | {
    "*": {"class"},
    "audio": {"controls", "src"},
    "source": {"src", "type"},
    "img": {"src", "alt", "width", "height"},
}
EMBEDDED = re.compile(r"data:(audio|image)/(wav|mpeg|ogg|png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*")
LINKED = re.compile(r"(https?|mailto):.*|[^:]*", re.DOTALL)
SCHEMES = {"http", "https", "mailto"}


def is_element(node: nodes.Node, name: str) -> bool:
    """Whether a node is MyST-NB's element of that name."""
    return isinstance(node, nodes.container) and node.get("nb_element") == name


def clean_html(html: str) -> str:
    """HTML without anything that runs, or that is fetched: what is left is text, tables, links, embedded sound and images."""

    def checked(tag: str, attribute: str, value: str) -> str | None:
        allowed = {"src": EMBEDDED, "href": LINKED}.get(attribute)
        return value if allowed is None or allowed.fullmatch(value) else None

    schemes = SCHEMES | {"data"}  # which only EMBEDDED lets through
    return nh3.clean(html, tags=TAGS, attributes=ATTRIBUTES, attribute_filter=checked, url_schemes=schemes)


class CleanOutputs(SphinxTransform):
    """Clean what the outputs hold, as the parsers left it: raw HTML in any form, links, and images from elsewhere."""

    default_priority = 800  # after the parsers, before Sphinx collects the pictures (880)

    def apply(self, **kwargs: Any) -> None:
        """Change the document in place."""
        for output in self.document.findall(lambda node: is_element(node, "cell_code_output")):
            for raw in list(output.findall(nodes.raw)):
                raw.children = [nodes.Text(clean_html(raw.astext()))]
            for link in list(output.findall(nodes.reference)):
                if urlparse(link.get("refuri", "")).scheme not in SCHEMES | {""}:
                    link.replace_self(link.children)
            for image in list(output.findall(nodes.image)):
                if re.match(r"\w+:|//", image["uri"]):
                    image.replace_self(nodes.Text(image.get("alt", "")))


class SmallFigures(SphinxTransform):
    """Show each figure in the smallest of its forms: SVG, or the PNG's pixels as lossless WebP; both at the PNG's size."""

    default_priority = 810

    def apply(self, **kwargs: Any) -> None:
        """Change the document in place."""
        for bundle in list(self.document.findall(lambda node: is_element(node, "mime_bundle"))):
            forms = {form["mime_type"]: form for form in bundle.children}
            if "image/png" not in forms:
                continue
            png, path = self._picture(forms["image/png"])
            webp = path.with_suffix(".webp")
            if not webp.is_file():
                picture, source = Image.open(path), Image.Exif()
                source[ExifTags.Base.ImageDescription] = picture.text.get(figures.KEYWORD.decode(), "")
                picture.save(webp, lossless=True, quality=75, method=1, exif=source)
            png["uri"] = png["uri"].removesuffix(".png") + ".webp"
            if "image/svg+xml" not in forms:
                continue
            svg, path = self._picture(forms["image/svg+xml"])
            svg.attributes |= {key: png[key] for key in ("width", "height") if key in png}
            bundle.remove(forms["image/svg+xml" if path.stat().st_size >= webp.stat().st_size else "image/png"])

    def _picture(self, form: nodes.Element) -> tuple[nodes.image, Path]:
        picture = next(form.findall(nodes.image))
        return picture, Path(self.env.relfn2path(picture["uri"], self.env.docname)[1])


class NumberEquations(SphinxTransform):
    r"""Hand equations with a \tag to MathJax as they are: Sphinx would put those of several rows into an environment that
    takes no tag."""

    default_priority = 810

    def apply(self, **kwargs: Any) -> None:
        """Change the document in place."""
        for equation in self.document.findall(nodes.math_block):
            source = equation.astext()
            if r"\tag{" in source and not equation.get("no-wrap"):
                equation.children = [nodes.Text(rf"\[{source}\]")]
                equation["no-wrap"] = True


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transforms; pages are read again when this file changes."""
    app.add_transform(CleanOutputs)
    app.add_transform(SmallFigures)
    app.add_transform(NumberEquations)
    return {"env_version": zlib.crc32(Path(__file__).read_bytes()), "parallel_read_safe": True, "parallel_write_safe": True}
