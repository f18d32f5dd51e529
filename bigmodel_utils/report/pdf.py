"""The PDF: the composed pages as Markdown, through pandoc and a filter to Typst, which sets them."""

from __future__ import annotations

import base64
import functools
import html
import re
from pathlib import Path

from bigmodel_utils.report import ReportError, chapters, compose, course, doctree
from bigmodel_utils.report.chapters import Cell
from bigmodel_utils.report.compose import Page, Report
from bigmodel_utils.report.runner import Build

CJK_FONTS = (
    "Noto Serif CJK SC",
    "Noto Sans CJK SC",
    "Source Han Serif SC",
    "Songti SC",
    "PingFang SC",
    "SimSun",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
)
NO_FONT = (
    "The Chinese terms are left out: no Chinese font was found where this PDF was made (on Debian, fonts-noto-cjk has one)."
)
SHORTENED = "*The code of cells that mostly check claims is left out on paper; their outcomes are here, and the code is in the HTML report.*"
CJK_TEXT = re.compile(r"[　-鿿＀-￯]+")


def build(report: Report, build: Build) -> Path:
    """Write report.pdf; the intermediate report.typ stays beside it, for whoever wants to change the typesetting.

    Returns:
        the path of report.pdf.

    Raises:
        ReportError: with pandoc's or Typst's own words.
    """
    import pypandoc
    import typst

    figures = build.folder / "figures"
    figures.mkdir(exist_ok=True)
    font = next((family for family in CJK_FONTS if family in typst.Fonts().families()), None)
    markdown = "\n\n".join(_parts(report, figures))
    if font is None:
        print("no Chinese font found: the PDF's glossary leaves the Chinese terms out (Debian: apt-get install fonts-noto-cjk)")
        markdown = CJK_TEXT.sub("–", markdown).replace("# Glossary\n", f"# Glossary\n\n*{NO_FONT}*\n")
    setup = report.folder / "report"
    arguments = [
        "--standalone",
        f"--template={setup / 'template.typ'}",
        f"--lua-filter={setup / 'pdf.lua'}",
        "--wrap=none",
        "--columns=500",
        "--fail-if-warnings",
        f"--variable=title:{compose.TITLE}",
        f"--variable=cjk:{font or 'Libertinus Serif'}",
    ]
    source, target = build.folder / "report.typ", build.folder / "report.pdf"
    reader = "commonmark_x-implicit_header_references-subscript-superscript-smart-emoji"
    try:
        content = pypandoc.convert_text(markdown, "typst", format=reader, extra_args=arguments)
    except RuntimeError as error:
        raise ReportError(f"pandoc does not accept the pages: {error}") from None
    source.write_text(content, encoding="utf-8")
    try:
        target.with_suffix(".part").write_bytes(
            typst.compile(str(source), format="pdf", pdf_standards=["ua-1"], timestamp=int(report.date.timestamp()))
        )
    except typst.TypstError as error:
        raise ReportError(f"Typst does not accept {source}: {error}") from None
    target.with_suffix(".part").replace(target)
    return target


def _parts(report: Report, figures: Path) -> list[str]:
    setup = report.folder / "report"
    parts = [compose.cover(report), SHORTENED, "```{=typst}\n#contents()\n```"]
    parts += [_chapter(page, figures) for page in report.pages]
    parts += _course(course.pages(report), figures)
    parts += [
        f"# Ledger of claims {{#claims-ledger}}\n\n{compose.ledger(report)}",
        f"# References\n\n{compose.references(report)}",
    ]
    return parts + [(setup / f"{name}.md").read_text(encoding="utf-8") for name in ("glossary", "licence")]


def _course(pages: dict[str, str], figures: Path) -> list[str]:
    """The pages about the course; their pictures go to the figures."""
    parts = [content for name, content in pages.items() if name.endswith(".md")]
    for name, content in pages.items():
        if not name.endswith(".md"):
            (figures / name).write_text(content, encoding="utf-8")
            parts = [part.replace(f"]({name})", f"]({figures.name}/{name})") for part in parts]
    return parts


def _chapter(page: Page, figures: Path) -> str:
    pieces = [_cell(cell, figure_path(page, position, figures)) for position, cell in enumerate(page.cells)]
    heading, _, rest = pieces[0].partition("\n")
    return "\n\n".join([f"{heading} {{#{page.label}}}", rest, *pieces[1:]])


def figure_path(page: Page, position: int, figures: Path) -> Path:
    """The file of the figure that a page's cell draws."""
    return figures / f"{page.chapter.name}-{position}.png"


def _cell(cell: Cell, image: Path) -> str:
    if cell["cell_type"] == "markdown":
        return chapters.text(cell)
    pieces = [] if compose.mostly_checks(chapters.text(cell)) else [_fenced(chapters.text(cell), "python")]
    for output in cell["outputs"]:
        pieces.append(_printable(_output(output, cell["metadata"].get("mystnb", {}), image)))
    return "\n\n".join(piece for piece in pieces if piece)


def _printable(shown: str) -> str:
    """Outputs may hold any character, such as those that an untrained model writes; what the font lacks becomes U+FFFD."""
    known = _characters()
    return "".join(c if c in known or CJK_TEXT.fullmatch(c) else "\ufffd" for c in shown)


@functools.cache
def _characters() -> frozenset[str]:
    """Those that DejaVu Sans Mono has, the font of code and outputs, which Typst and Matplotlib both hold."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"))
    return frozenset("\n\t") | frozenset(map(chr, font.get_charmap()))


def _output(output: dict, settings: dict, image: Path) -> str:
    if output["output_type"] == "stream":
        return _fenced("".join(output["text"]), "output")
    data = {kind: "".join(value) for kind, value in output["data"].items() if isinstance(value, (str, list))}
    if "image/png" in data:
        image.write_bytes(base64.b64decode(data["image/png"]))
        return _figure(image, settings)
    if "text/markdown" in data:  # pdf.lua reads it, and the HTML, and lets nothing in them do anything
        return _fenced(data["text/markdown"], "output-markdown")
    if "text/html" in data:
        return _fenced(doctree.clean_html(data["text/html"]), "output-html")  # or pandoc would fetch what a frame shows
    return _fenced(data.get("text/plain", ""), "output")


def _figure(image: Path, settings: dict) -> str:
    figure, alt = settings.get("figure", {}), settings.get("image", {}).get("alt", "")
    label = f"#{figure['name']} " if figure.get("name") else ""
    caption = figure.get("caption", "")
    return f'![{caption}]({image.parent.name}/{image.name}){{{label}alt="{html.escape(alt)}"}}'


def _fenced(source: str, language: str) -> str:
    fence = "~" * (1 + max(3, *map(len, re.findall("~+", source)), 0))
    return f"{fence} {language}\n{source.rstrip()}\n{fence}"
