"""The rendered report: the HTML works from the file system, and the PDF holds what a reader of paper needs."""

import http.server
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pypdfium2
import pytest
from conftest import Course, markdown, write_notebook

from bigmodel_utils.report import chapters, compose


class Page(HTMLParser):
    """The ids, links and loaded resources of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.resources, self.images = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        if tag in ("script", "img", "iframe", "source", "audio") and values.get("src"):
            self.resources.append(values["src"])
        if tag == "link" and values.get("href") and values.get("rel") in ("stylesheet", "preload", "icon", "modulepreload"):
            self.resources.append(values["href"])


@pytest.fixture(scope="module")
def site(built: Course) -> dict[Path, Page]:
    return {path: Page(path) for path in (built.folder / "build/small/html").glob("*.html")}


@pytest.fixture(scope="module")
def document(built: Course):
    pdf = pypdfium2.PdfDocument(built.folder / "build/small/report.pdf")
    yield pdf
    pdf.close()


def text(document) -> str:
    return "\n".join(page.get_textpage().get_text_range() for page in document)


def test_nothing_is_loaded_from_a_network(site):
    loaded = [address for page in site.values() for address in page.resources]
    assert loaded and not [address for address in loaded if urlparse(address).scheme not in ("", "data")]


def dead_links(site: dict[Path, Page]) -> list[str]:
    """Links within the site to a page or a place in it that is not there."""
    dead = []
    for path, page in site.items():
        for link in page.links:
            address = urlparse(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.exists() or (
                address.fragment and target in site and unquote(address.fragment) not in site[target].ids
            ):
                dead.append(f"{path.name}: {link}")
    return dead


def unanswered(links: Iterable[str], timeout_s: float = 20) -> list[str]:
    """Of links to elsewhere those that lead to nothing, with the reason; a server that only refuses programs is taken to be there."""

    def ask(link: str, method: str = "HEAD") -> str | None:
        request = urllib.request.Request(link, method=method, headers={"User-Agent": "Mozilla/5.0"})
        try:
            urllib.request.urlopen(request, timeout=timeout_s).close()
        except urllib.error.HTTPError as error:
            if method == "HEAD" and error.code in (403, 405, 501):
                return ask(link, "GET")
            return None if error.code in (401, 403, 429) else f"{link}: {error.code} {error.reason}"
        except OSError as error:
            return f"{link}: {getattr(error, 'reason', error)}"

    with ThreadPoolExecutor(8) as pool:
        return [wrong for wrong in pool.map(ask, sorted(links)) if wrong]


class Answers(http.server.BaseHTTPRequestHandler):
    """A site of one page, one for people only, one that answers to GET alone, and one that never answers."""

    def do_HEAD(self):
        if self.path == "/silent":
            time.sleep(2)
        known = {"/here": 200, "/people": 403, "/old": 301, "/get": 200 if self.command == "GET" else 405}
        self.send_response(known.get(self.path, 404))
        if self.path == "/old":
            self.send_header("Location", "/here")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments):
        pass


def test_links_to_elsewhere_are_asked_for():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}/"
    wrong = unanswered([site + name for name in ("here", "people", "old", "get", "gone", "silent")], timeout_s=1)
    server.shutdown()
    server.server_close()
    assert wrong == [f"{site}gone: 404 Not Found", f"{site}silent: timed out"]
    assert len(unanswered([f"{site}here"])) == 1, "nobody listens there any more"


def test_every_link_within_the_site_leads_somewhere(site):
    assert dead_links(site) == []


def test_figures_have_captions_and_alternative_text(site):
    for name in ("03_first", "04_second"):
        path = next(path for path in site if path.stem == name)
        (image,) = (image for image in site[path].images if "_images" in image["src"])
        assert image["alt"] == "a rising line"
        assert re.search(rf"<strong>Figure {int(name[:2])}\.1\.</strong> The sum\.", path.read_text())


def test_the_code_of_checks_is_folded_and_their_outcome_is_not(built: Course):
    page = (built.folder / "build/small/html/03_first.html").read_text()
    (fold,) = re.findall(r"<details(?:(?!</details>).)*Show how it is checked.*?</details>", page, re.DOTALL)
    assert "claims" in fold and "One and one is two" in fold and "held to" not in fold
    assert "held to" in page.partition(fold)[2]


def test_on_paper_only_the_outcome_of_checks_is_printed(document):
    text = re.sub(r"\s+", " ", "".join(page.get_textpage().get_text_range() for page in document))
    assert "One and one is two (2, held to = 2" in text and "claims.check(" not in text and "mostly check claims" in text


CHECK = 'claims.check("03-a", "is", 1, 1, 0, "here")\n'


@pytest.mark.parametrize(
    ("source", "folds"),
    [
        (CHECK, True),
        ("_ = " + CHECK + CHECK, True),
        ("x = 1\ny = 2\n" + 3 * CHECK, True),
        ("x = 1\ny = 2\n" + 2 * CHECK, False),
        ("x = 1", False),
        ("", False),
        ("claims.stored(x)", False),
    ],
)
def test_a_cell_is_folded_where_it_mostly_checks(source, folds):
    assert compose.mostly_checks(source) == folds


def test_references_in_prose_became_links(site):
    path = next(path for path in site if path.stem == "03_first")
    assert {"ledger.html#claim-03-sum", "#fig-3-sum", "#eq-3-1"} <= {
        link.removeprefix("03_first.html") for link in site[path].links
    }


def test_the_cover_says_where_the_numbers_come_from(site, built: Course):
    page = (built.folder / "build/small/html/index.html").read_text()
    for row in ("Profile", "Commit", "Computed", "Hardware", "Versions", "Seeds", "Claims", "2 hold, 0 fail"):
        assert row in page
    assert "google.colab" not in (built.folder / "build/small/html/03_first.html").read_text()


def test_the_pdf_has_contents_page_numbers_figures_and_equations(document):
    pages = [page.get_textpage().get_text_range() for page in document]
    assert "Contents" in pages[1] and "3 A small chapter" in pages[1]
    for number, page in enumerate(pages[1:], start=2):
        assert page.strip().splitlines()[-1].strip() == str(number)
    whole = "\n".join(pages)
    for expected in (
        "Figure 3.1. The sum.",
        "(3.1)",
        "Hint",
        "Ledger of claims",
        "03-sum",
        "References",
        "Glossary",
        "Licence",
    ):
        assert expected in whole
    assert [entry.get_title() for entry in document.get_toc()][:2] == ["3 A small chapter", "4 A small chapter"]


def test_the_pdf_shows_no_raw_markup(document):
    for raw in ("<details", "</details>", "<summary", "<table", "<span", "$$", r"\frac", r"\tag", "](#", "**"):
        assert raw not in text(document), raw


def test_the_pdf_has_no_empty_page_and_no_text_outside_its_margins(document):
    check_layout(document)


def check_layout(document, margin_mm: float = 15) -> None:
    """Every page holds more than its header and number, and no character stands closer to the edge than the margin."""
    margin = margin_mm / 25.4 * 72
    for number, page in enumerate(document, start=1):
        characters, (width, height) = page.get_textpage(), page.get_size()
        assert characters.count_chars() > 20, f"page {number} is empty"
        for index in range(characters.count_chars()):
            if characters.get_text_range(index, 1).isspace():
                continue
            left, bottom, right, top = characters.get_charbox(index)
            inside = left >= margin and right <= width - margin and bottom >= margin / 2 and top <= height - margin / 2
            assert inside, f"page {number}: {characters.get_text_range(max(0, index - 20), 40)!r} runs out of the margin"


def test_links_are_left_alone_in_code_and_mathematics():
    targets = compose.Targets({"3.1": "fig-a"}, {"3.1"})
    source = "`Figure 3.1` $f (3.1)$ Figure 3.1 (3.1) [Figure 3.1](#other) [see (3.1)](04_x.ipynb#03-a) [no](#03-b) Figure 3.2 (3.2) f(3.1)\n\n```\n(3.1)\n```\n"
    expected = "`Figure 3.1` $f (3.1)$ [Figure 3.1](#fig-a) [(3.1)](#eq-3-1) [Figure 3.1](#other) [see (3.1)](#claim-03-a) [no](#03-b) Figure 3.2 (3.2) f(3.1)\n\n```\n(3.1)\n```\n"
    assert compose.link(source, {"03-a"}, targets) == expected


def test_two_figures_of_one_name_are_refused(built: Course, tmp_path):
    for name in ("03_first.ipynb", "04_second.ipynb"):
        shutil.copy(built.folder / "notebooks/03_first.ipynb", tmp_path / name)
    course = [chapters.read(path) for path in sorted(tmp_path.glob("*.ipynb"))]
    with pytest.raises(compose.ReportError, match="two figures have one name"):
        compose.Targets.of(course)


def test_mathematics_that_cannot_be_set_is_an_error(course: Course):
    path = course.folder / "notebooks/03_first.ipynb"
    cells = chapters.read(path).notebook["cells"]
    write_notebook(path, [cells[0], markdown(r"$\nosuchmacro{x}$"), *cells[1:]])
    status, printed = course.run("build")
    assert status == 1 and "nosuchmacro" in printed
