"""Slides: made by rule from the notebooks, complete, and opened by a browser that reaches no network."""

import importlib.util
import json
import re
import shutil
import subprocess
from urllib.parse import urlparse

import pytest
from conftest import NOTEBOOKS, code, markdown, write_notebook
from test_pages import Page

from bigmodel_utils import claims
from bigmodel_utils.report import chapters, course, slides

COURSE = [chapters.read(path) for path in NOTEBOOKS]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_reveal = pytest.mark.skipif(
    importlib.util.find_spec("sphinx_revealjs") is None, reason="sphinx-revealjs is not installed"
)


def made(tmp_path, *cells) -> list[tuple[str, str]]:
    """The slides of a small notebook: each cell's type and source."""
    write_notebook(tmp_path / "03_x.ipynb", list(cells))
    chapter = chapters.read(tmp_path / "03_x.ipynb")
    found = slides.cells(chapter, claims.stored(chapter.notebook))
    return [(cell["metadata"]["slideshow"]["slide_type"], cell["source"]) for cell in found]


def test_headings_begin_slides_and_later_paragraphs_are_notes(tmp_path):
    prose = "# 3 Title\n\nFirst.\n\nSecond.\n\n## 3.1 Part\n\nOne.\nTwo.\nThree.\nFour.\n\n$$\nx\n$$\n\n**Prediction.** Up.\n\n### Below\n\nText."
    assert made(tmp_path, markdown(prose)) == [
        ("slide", "# 3 Title\n\nFirst."),
        ("notes", "Second."),
        ("slide", "## 3.1 Part\n\nOne.\nTwo.\nThree.\n\n$$\nx\n$$\n\n**Prediction.** Up."),
        ("notes", "One.\nTwo.\nThree.\nFour."),
        ("subslide", "### Below\n\nText."),
    ]


def test_answers_are_revealed_and_solutions_are_notes(tmp_path):
    quiz = "## Quiz\n\n**Question 1.** Why?\n\n- a) So.\n\n<details><summary>Answer</summary>\n\na, because.\n\n</details>"
    solution = "### Exercise 3.1: do it\n\nWrite it.\n\n<details><summary>Hint</summary>\n\nThink.\n\n</details>"
    assert made(tmp_path, markdown(quiz), markdown(solution)) == [
        ("slide", "## Quiz"),
        ("subslide", "**Question 1.** Why?\n\n- a) So."),
        ("fragment", "a, because."),
        ("subslide", "### Exercise 3.1: do it\n\nWrite it."),
        ("notes", "Think."),
    ]


def test_code_is_shown_where_it_is_short_and_says_something(tmp_path):
    output = {"output_type": "stream", "name": "stdout", "text": "7\n"}
    long = "\n".join(f"x{index} = {index}" for index in range(30))
    made_of = made(
        tmp_path,
        code("import os"),
        code("seed = 0", "parameters"),
        code("pass", "bootstrap"),
        code("# a comment\nx = 3"),
        code("print(7)") | {"outputs": [output]},
        code(long) | {"outputs": [output]},
        code("def f():\n    return 1"),
        code("def g():\n    raise NotImplementedError", "exercise"),
        markdown("```python\n# no heading\n```"),
    )
    sources = [
        "print(7)",
        "",
        "def f():\n    return 1",
        "def g():\n    raise NotImplementedError",
        "```python\n# no heading\n```",
    ]
    assert [source for _, source in made_of] == sources


def test_links_say_what_they_lead_to(tmp_path):
    claim = claims.Claim("03-sum", "One and one", 2.0, 2.0, 0.0, "==", "arithmetic", "pass")
    output = {"output_type": "display_data", "data": {"text/plain": "x"}, "metadata": {"claim": vars(claim)}}
    prose = "It is [2](#03-sum), see [there](05_train_mlp.ipynb) and [that](05_train_mlp.ipynb#05-none), `[2](#03-sum)`."
    made_of = made(tmp_path, markdown(prose), code("1") | {"outputs": [output]}, code("2") | {"outputs": [output]})
    said = '<abbr title="One and one (2, held to = 2)">2</abbr>'
    there = '[there](05_train_mlp.html) and <abbr title="05-none">that</abbr>'
    assert made_of[0] == ("-", f"It is {said}, see {there}, `[2](#03-sum)`.")
    assert [kind for kind, _ in made_of[1:]] == ["subslide", "-"]  # consecutive claims share a slide


@pytest.mark.parametrize("chapter", COURSE, ids=lambda chapter: chapter.name)
def test_a_chapters_slides_have_all_figures_claims_exercises_and_questions(chapter):
    found = slides.cells(chapter, {})
    sources = "\n".join(cell["source"] for cell in found)
    n_figures = sum(bool(cell["metadata"].get("mystnb", {}).get("figure")) for cell in chapter.cells("code"))
    assert re.findall(r"\*\*Figure (\d+\.\d+)\.\*\*", sources) == [f"{chapter.number}.{n}" for n in range(1, n_figures + 1)]
    pictures = [output for cell in found for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(pictures) == n_figures and all(picture["metadata"]["image/png"]["alt"] for picture in pictures)
    assert all(f"**{id}**" in sources for id in claims.stored(chapter.notebook))
    for name, title in course.practice(chapter).items():
        assert title in sources, name
    kinds = [cell["metadata"]["slideshow"]["slide_type"] for cell in found]
    assert kinds.count("fragment") == sum(name.startswith("Q") for name in course.practice(chapter))
    assert sum(kind in ("slide", "subslide") for kind in kinds) > 20 and kinds[0] == "slide"
    assert "importlib" not in sources and "<details>" not in sources


@pytest.fixture(scope="module")
def show(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    slides.build([chapter for chapter in COURSE if chapter.number in (3, 12)], folder)
    return folder


@needs_reveal
def test_the_slides_name_only_files_that_lie_beside_them(show):
    pages = sorted(show.glob("[01]*.html"))
    assert len(pages) == 2
    for path in pages:
        page = Page(path)
        assert page.images and all(len(image["alt"]) > 30 and "No description" not in image["alt"] for image in page.images)
        assert len(page.resources) > 5
        for address in page.resources:
            assert urlparse(address).scheme in ("", "data"), address
            assert address.startswith("data:") or (show / address).is_file(), address
        styles = "".join((show / address).read_text() for address in page.resources if address.endswith(".css"))
        assert "url(http" not in styles and "@import url(//" not in styles


def opened(address: str, folder) -> tuple[str, set[str]]:
    """The page as a browser has built it, and the addresses that it asked a network for.

    What a browser asks on its own behalf (for updates, say) has no page as its origin.
    """
    log = folder / "net.json"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--virtual-time-budget=10000", "--dump-dom"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync", f"--log-net-log={log}"]
    command = [CHROMIUM, *options, f"--user-data-dir={folder / 'profile'}", address]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    urls = {one["url"] for one in asked if one["initiator"] != "not an origin"}
    return dom, {url for url in urls if not url.startswith("file:")}


@needs_reveal
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_them_and_asks_no_network(show, tmp_path):
    (tmp_path / "loud.html").write_text('<img src="http://slides.invalid/x.png">')
    assert "http://slides.invalid/x.png" in opened(f"file://{tmp_path}/loud.html", tmp_path)[1]  # it would be seen
    dom, asked = opened(f"file://{show}/12_costs.html", tmp_path)
    assert re.search(r'class="reveal[^"]*\bready\b', dom)  # reveal.js has started
    assert dom.count("<mjx-container") > 20 and "<mjx-merror" not in dom  # and MathJax has set the formulas
    assert asked == set()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(slides.ReportError, match=r"need the package sphinx-revealjs: run `make env`"):
        slides.build(COURSE[:1], tmp_path)
