"""The PDF of all chapters, page by page: built from their committed outputs, so that every page that is printed is looked at."""

import ctypes
import re

import pypdfium2
import pypdfium2.raw as raw
import pytest
from conftest import code, markdown, stored_report, write_notebook

from bigmodel_utils.report import chapters, compose, course, pdf
from bigmodel_utils.report.runner import Build

MARGIN = 22 / 25.4 * 72  # points; the page's own margin is 24 mm
MARKUP = re.compile(
    r"\*\*|</?(?:details|summary|table|span|td|tr)\b|\$\$|\]\(|\\(?:frac|tag|text|mathbf)\b|^#{1,6} ", re.MULTILINE
)
CAPTION = re.compile(r"^Figure (\d+\.\d+)\. ", re.MULTILINE)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[compose.Report, Build]:
    return stored_report(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def document(report):
    path = pdf.build(*report)
    with pypdfium2.PdfDocument(path) as document:
        yield document


@pytest.fixture(scope="module")
def pages(document):
    return read_pages(document)


def read_pages(document: pypdfium2.PdfDocument) -> list[tuple[pypdfium2.PdfPage, pypdfium2.PdfTextPage, str]]:
    """Every page, its characters and its text."""
    found = []
    for page in document:
        characters = page.get_textpage()
        found.append((page, characters, characters.get_text_range()))
    return found


def images(page: pypdfium2.PdfPage) -> list[tuple[float, float, float, float]]:
    """(left, bottom, right, top) of every image on a page, in points."""
    return [image.get_bounds() for image in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE])]


def place(characters: pypdfium2.PdfTextPage, text: str, index: int) -> int:
    """The number on the page of a character of its text, which pdfium counts in UTF-16."""
    return raw.FPDFText_GetCharIndexFromTextIndex(characters, len(text[:index].encode("utf-16-le")) // 2)


def is_code(characters: pypdfium2.PdfTextPage, text: str, index: int) -> bool:
    """Whether a character is set in the font of code."""
    name = ctypes.create_string_buffer(200)
    raw.FPDFText_GetFontInfo(characters, place(characters, text, index), name, 200, None)
    return b"Mono" in name.value


def layout_errors(pages) -> list[str]:
    """Pages that hold nothing, and what stands in the margins."""
    wrong = []
    for number, (page, characters, text) in enumerate(pages, start=1):
        width, height = page.get_size()
        if len(text.strip()) < 60 and not images(page):
            wrong.append(f"page {number} holds no more than {text.strip()!r}")
        boxes = [characters.get_rect(index) for index in range(characters.count_rects())] + images(page)
        for left, bottom, right, top in boxes:
            if left < MARGIN or right > width - MARGIN or bottom < MARGIN / 2 or top > height - MARGIN / 2:
                outside = characters.get_text_bounded(left, bottom, right, top)
                wrong.append(
                    f"page {number}: {outside!r} stands in the margin ({left:.0f} to {right:.0f} of {width:.0f} points)"
                )
    return wrong


def markup_errors(pages) -> list[str]:
    """Markdown, HTML and LaTeX that is printed as it was written, outside code."""
    wrong = []
    for number, (_, characters, text) in enumerate(pages, start=1):
        for match in MARKUP.finditer(text):
            if not is_code(characters, text, match.start()):
                wrong.append(f"page {number}: {text[max(0, match.start() - 30) : match.end() + 30]!r}")
    return wrong


def captions(pages) -> tuple[list[str], list[str]]:
    """The numbers of the figures that have a caption, in order, and what is wrong with where the captions stand."""
    found, wrong = [], []
    for number, (page, characters, text) in enumerate(pages, start=1):
        for match in CAPTION.finditer(text):
            if is_code(characters, text, match.start()):
                continue
            found.append(match[1])
            top = characters.get_charbox(place(characters, text, match.start()))[3]
            if not any(0 <= bottom - top < 30 for _, bottom, _, _ in images(page)):
                wrong.append(f"page {number}: nothing stands above the caption of Figure {match[1]}")
    return found, wrong


def test_every_page_is_in_order(report, pages):
    wrong = layout_errors(pages) + markup_errors(pages) + captions(pages)[1]
    assert not wrong, "\n".join(wrong)
    assert captions(pages)[0] == list(compose.Targets.of([page.chapter for page in report[0].pages]).figures)


BROKEN = {
    "a margin": ('#move(dx: -10mm)[Some words that are too far to the left]', "stands in the margin"),
    "an overflow": ("#box(width: 300mm)[" + "a long line of words " * 9 + "]", "stands in the margin"),
    "an empty page": ("words\n#pagebreak()\n \n#pagebreak()\nwords", "page 2 holds no more than ''"),
    "bold": (r"It is \*\*important\*\* to say", "It is **important"),
    "a tag": (r"\<details> of a hint", "<details> of a hint"),
    "a link": (r"see [chapter 3]\(03.ipynb)", "[chapter 3](03"),
    "mathematics": (r"so that \$\$ x", "so that $$ x"),
    "LaTeX": (r"the ratio \\frac{1}{2}", r"\\frac"),
    "a caption alone": ("#v(90mm)\nFigure 3.1. What was to be seen.", "nothing stands above the caption of Figure 3.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_checks_find(name):
    import typst

    body, message = BROKEN[name]
    setup = (
        '#set page(margin: 24mm)\n#set text(font: "Libertinus Serif")\n'
        + "Enough words for a page that is not empty, and some more. " * 2
    )
    with pypdfium2.PdfDocument(typst.compile((setup + "\n\n" + body).encode(), format="pdf")) as document:
        pages = read_pages(document)
        assert message in "\n".join(layout_errors(pages) + markup_errors(pages) + captions(pages)[1])


def test_sound_pages_pass_and_code_may_hold_stars():
    import typst

    body = "#set page(margin: 24mm)\n" + "Words that fill the first page a little. " * 9 + "\n```python\nf(**options)\n```"
    with pypdfium2.PdfDocument(typst.compile(body.encode(), format="pdf")) as document:
        pages = read_pages(document)
        assert layout_errors(pages) + markup_errors(pages) + captions(pages)[1] == []


def test_an_output_may_hold_any_character(tmp_path):
    """As an untrained model writes them: control characters, and scripts for which no font is here."""
    strange = "a\x02b \u07df \U00010380 ×"
    shown = {"output_type": "stream", "name": "stdout", "text": strange}
    cell = code("pass") | {"execution_count": 1, "outputs": [shown]}
    write_notebook(tmp_path / "03_strange.ipynb", [markdown("# 3 Strange"), code("seed = 0", "parameters"), cell])
    path = pdf.build(*stored_report(tmp_path, [chapters.read(tmp_path / "03_strange.ipynb")]))
    with pypdfium2.PdfDocument(path) as document:
        assert "a\ufffdb \ufffd \ufffd ×" in "\n".join(text for *_, text in read_pages(document))


def test_a_table_in_the_prose_is_a_table_on_paper(tmp_path):
    table = "<table><tr><th>kind</th></tr><tr><td>a cell of it</td></tr></table>"
    write_notebook(tmp_path / "03_table.ipynb", [markdown(f"# 3 Table\n\n{table}\n\nwords"), code("seed = 0", "parameters")])
    path = pdf.build(*stored_report(tmp_path, [chapters.read(tmp_path / "03_table.ipynb")]))
    assert "[a cell of it]" in path.with_suffix(".typ").read_text()


def test_the_outline_names_every_chapter(report, document):
    top = [entry.get_title() for entry in document.get_toc() if entry.level == 0]
    chapters_and_more = [page.chapter.title for page in report[0].pages]
    headings = [text.partition("\n")[0].lstrip("# ") for name, text in course.pages(report[0]).items() if name.endswith(".md")]
    assert top == [*chapters_and_more, *headings, "Ledger of claims", "References", "Glossary", "Licence"]
    assert len([entry for entry in document.get_toc() if entry.level == 1]) > 5 * len(report[0].pages)


def test_a_screen_reader_finds_language_tags_and_alternative_texts(report, document, pages):
    """PDF/UA-1, which Typst refuses to write where an image or an equation has no alternative text."""
    assert raw.FPDFCatalog_IsTagged(document)
    language = (ctypes.c_ushort * 20)()
    raw.FPDFCatalog_GetLanguage(document, language, 40)
    assert bytes(language).decode("utf-16-le").startswith("en")
    content = (report[1].folder / "report.pdf").read_bytes()
    assert b"pdfuaid" in content
    metadata = document.get_metadata_dict()
    assert (
        metadata["Title"] == compose.TITLE
        and metadata["Author"]
        and metadata["CreationDate"].startswith(f"D:{report[0].date:%Y%m%d%H%M%S}")
    )
    spoken = {text for page, _, _ in pages if images(page) for text in alternative_texts(page)}
    cells = [cell for page in report[0].pages for cell in page.cells if cell["cell_type"] == "code"]
    written = {cell["metadata"].get("mystnb", {}).get("image", {}).get("alt") for cell in cells} - {None}
    missing = {alt for alt in written if re.sub(r"\s+", " ", alt) not in spoken}
    assert written and not missing


def alternative_texts(page: pypdfium2.PdfPage) -> list[str]:
    """Those of all elements of a page's structure."""
    tree = raw.FPDF_StructTree_GetForPage(page)
    waiting = [raw.FPDF_StructTree_GetChildAtIndex(tree, index) for index in range(raw.FPDF_StructTree_CountChildren(tree))]
    found = []
    while waiting:
        element = waiting.pop()
        if not element:
            continue
        n_bytes = raw.FPDF_StructElement_GetAltText(element, None, 0)
        if n_bytes > 2:
            buffer = ctypes.create_string_buffer(n_bytes)
            raw.FPDF_StructElement_GetAltText(element, buffer, n_bytes)
            found.append(buffer.raw.decode("utf-16-le").rstrip("\0"))
        waiting += [
            raw.FPDF_StructElement_GetChildAtIndex(element, i) for i in range(raw.FPDF_StructElement_CountChildren(element))
        ]
    raw.FPDF_StructTree_Close(tree)
    return found


def test_chinese_is_shown_where_a_font_is_and_its_absence_is_said_otherwise(pages):
    import typst

    has_font = any(family in typst.Fonts().families() for family in pdf.CJK_FONTS)
    text = "".join(text for _, _, text in pages[-20:])
    assert ("消融实验" in text) == has_font
    assert ("no Chinese font was found" in re.sub(r"\s+", " ", text)) != has_font
