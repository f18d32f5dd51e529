"""The report as its readers meet it: every page in a real browser, in both themes, on a phone, by keyboard, by ear."""

import base64
import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlparse

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import NOTEBOOKS, code, markdown, stored_report, write_notebook
from PIL import Image
from test_pages import Page, dead_links, unanswered

from bigmodel_utils.report import chapters, html

CHAPTERS = [path.stem for path in NOTEBOOKS]
PAGES = [*CHAPTERS, "index", "ledger", "references", "glossary", "licence", "search"]
MAX_PAGE_BYTES = 1_500_000
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


class Visit:
    """A page opened in a window of its own, and what the browser said meanwhile."""

    def __init__(self, browser, path: Path, before: str = "", **settings):
        self.path, self.said, self.requested = path, [], []
        self.context = browser.new_context(viewport=DESKTOP, **settings)
        self.context.add_init_script(before)
        self.page = page = self.context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(f"exception: {error}"))
        page.on("requestfailed", lambda request: self.said.append(f"failed: {request.url}"))
        page.on("request", lambda request: self.requested.append(request.url))
        page.goto(path.as_uri())
        page.evaluate("() => window.MathJax?.startup?.promise?.then(() => true)")

    def theme(self, name: str) -> None:
        """Show the page as the theme's own switch does, every fold open."""
        self.page.evaluate(
            "name => { document.documentElement.dataset.theme = document.documentElement.dataset.mode = name;"
            "document.querySelectorAll('details').forEach(fold => fold.open = true) }",
            name,
        )
        self.page.wait_for_timeout(300)  # colours fade

    def axe(self, **options) -> list[str]:
        """What axe-core finds of serious or critical impact."""
        axe = pytest.importorskip("axe_playwright_python")
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(Path(axe.__file__).with_name("axe.min.js").read_text())
        found = self.page.evaluate("options => axe.run(document, options)", {"resultTypes": ["violations"]} | options)
        return [
            f"{violation['id']}: {node['html'][:120]} {node['failureSummary']}"
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]


@pytest.fixture(scope="module", params=PAGES)
def visit(request, browser, stored_site):
    """Each page in turn, opened once; tests leave it in the light theme on a desktop."""
    visit = Visit(browser, stored_site / f"{request.param}.html")
    yield visit
    visit.context.close()


@pytest.fixture
def opened(browser, stored_site):
    """Opens pages that only one test needs."""
    visits = []

    def open(name: str, **settings) -> Visit:
        visits.append(Visit(browser, stored_site / name, **settings))
        return visits[-1]

    yield open
    for visit in visits:
        visit.context.close()


@pytest.fixture(scope="session")
def site(stored_site) -> dict[Path, Page]:
    return {path: Page(path) for path in stored_site.glob("*.html")}


def test_a_page_loads_quietly_and_from_this_machine_alone(visit):
    assert visit.said == []
    assert [url for url in visit.requested if urlparse(url).scheme not in ("file", "data", "blob")] == []


def test_a_page_paints_before_it_is_whole_and_then_stands_still(visit):
    """Text shows while formulas are still set, and nothing jumps: 0.1 is what web.dev calls a good layout shift."""
    painted_s, loaded_s, shift = visit.page.evaluate(
        """() => new Promise(done => { let shift = 0;
            new PerformanceObserver(list => list.getEntries().forEach(entry => shift += entry.value))
                .observe({type: 'layout-shift', buffered: true});
            const painted = performance.getEntriesByName('first-contentful-paint')[0].startTime;
            const loaded = performance.getEntriesByType('navigation')[0].loadEventEnd;
            setTimeout(() => done([painted / 1000, loaded / 1000, shift]), 100) })"""
    )
    assert painted_s < min(loaded_s + 0.1, 5) and shift < 0.1


def test_a_page_weighs_little_beside_what_all_pages_share(visit):
    own = {unquote(urlparse(url).path) for url in visit.requested if url.startswith("file:") and "/_static/" not in url}
    pictures = visit.page.evaluate("[...document.images].map(image => image.src)")
    own |= {unquote(urlparse(url).path) for url in pictures if url.startswith("file:")}
    assert sum(Path(path).stat().st_size for path in own) < MAX_PAGE_BYTES


def test_mathematics_is_drawn(visit):
    n_sources, n_drawn, n_errors = visit.page.evaluate(
        "['.math', '.math mjx-container', 'mjx-merror'].map(kind => document.querySelectorAll(kind).length)"
    )
    assert (n_drawn, n_errors) == (n_sources, 0)
    assert not re.search(r"\\\(|\\\[|\$\$", visit.page.inner_text("main")), "mathematics shows as its source"


def test_figures_are_there_sized_and_described(visit):
    visit.page.evaluate("Promise.all([...document.images].map(image => { image.loading = 'eager'; return image.decode() }))")
    for image in visit.page.evaluate(
        "[...document.querySelectorAll('article img')].map(image => ({alt: image.alt, width: image.getAttribute('width'),"
        "height: image.getAttribute('height'), ratio: image.naturalWidth / image.naturalHeight}))"
    ):
        assert len(image["alt"]) > 10
        assert float(image["width"]) / float(image["height"]) == pytest.approx(image["ratio"], rel=0.02)


def figure(tmp_path, draw) -> dict:
    """What a notebook of the report shows for a figure: PNG of twice the resolution, and SVG."""
    fig, ax = plt.subplots(figsize=(7, 3.6))
    draw(ax)
    kept = {}
    for kind, mime, dpi in (("png", "image/png", 200), ("svg", "image/svg+xml", 100)):
        fig.savefig(tmp_path / f"figure.{kind}", dpi=dpi, metadata={"Date": None})
        content = (tmp_path / f"figure.{kind}").read_bytes()
        kept[mime] = base64.b64encode(content).decode() if kind == "png" else content.decode()
    plt.close(fig)
    return {"output_type": "display_data", "data": kept, "metadata": {"image/png": {"width": 700, "height": 360}}}


def test_a_figure_is_shown_in_its_smallest_form_and_unchanged(tmp_path):
    line = figure(tmp_path, lambda ax: ax.plot(np.random.default_rng(0).random((50, 2))))
    cloud = figure(tmp_path, lambda ax: ax.scatter(*np.random.default_rng(0).random((2, 5000)), s=1))
    shown = [code("pass") | {"execution_count": 1, "outputs": [output]} for output in (line, cloud)]
    write_notebook(tmp_path / "03_figures.ipynb", [markdown("# 3 Figures"), code("seed = 0", "parameters"), *shown])
    page = html.build(*stored_report(tmp_path, [chapters.read(tmp_path / "03_figures.ipynb")])).with_name("03_figures.html")
    small, large = Page(page).images
    assert small["src"].endswith(".svg") and large["src"].endswith(".webp")
    assert all((image["width"], image["height"]) == ("700", "360") for image in (small, large))
    pixels = np.asarray(Image.open(page.parent / large["src"]).convert("RGB"))
    assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_are_legible(visit, theme):
    """They are drawn in dark on white, or bring their own ground: where a pixel is transparent, white lies behind it."""
    visit.theme(theme)
    grounds = visit.page.evaluate(
        "[...document.querySelectorAll('article img')].map(image => getComputedStyle(image).backgroundColor"
        " + getComputedStyle(image).filter)"
    )
    assert set(grounds) <= {"rgb(255, 255, 255)none"}
    visit.theme("light")


def test_a_phone_shows_everything(visit):
    """Nothing widens the page; what is wider scrolls in a box of its own, from its very beginning, and by keyboard too."""
    visit.page.set_viewport_size(PHONE)
    visit.theme("light")  # and waits for the page to have taken its new width
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    cut = visit.page.evaluate(
        """() => [...document.querySelectorAll('article :is(table, pre, mjx-container, img)')].filter(wide => {
            for (let box = wide; box.tagName != 'ARTICLE'; box = box.parentElement) {
                const overflow = getComputedStyle(box).overflowX;
                if (box.scrollWidth > box.clientWidth + 1 && ['hidden', 'clip'].includes(overflow)) return true;
                if (box.scrollLeft != 0) return true;
            } }).map(wide => wide.outerHTML.slice(0, 100))"""
    )
    assert cut == []
    assert visit.axe(runOnly=["scrollable-region-focusable", "target-size", "meta-viewport"]) == []
    visit.page.set_viewport_size(DESKTOP)


def test_folds_open_by_click_and_by_key(visit):
    visit.page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = false)")
    folds = visit.page.locator("article details")
    for fold in folds.all()[:2]:
        for act in (lambda summary: summary.click(), lambda summary: summary.press("Enter")):
            act(fold.locator("summary").first)
            assert fold.evaluate("fold => fold.open && fold.lastElementChild.getBoundingClientRect().height > 0")
            fold.evaluate("fold => fold.open = false")
    if visit.path.stem in CHAPTERS:
        summaries = Counter(text.split()[0] for text in folds.locator("summary").all_inner_texts())
        assert summaries["Hint"] >= 3 and summaries["Solution"] >= 3 and summaries["Answer"] >= 3, summaries


def test_keyboard_reaches_what_a_mouse_reaches(visit):
    out_of_order = visit.page.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, summary, audio, select, [onclick]')]
            .filter(item => item.checkVisibility() && !item.closest('dialog:not([open])') && item.tabIndex < 0)
            .map(item => item.outerHTML.slice(0, 120))"""
    )
    assert out_of_order == []
    assert visit.page.evaluate("[...document.querySelectorAll('[tabindex]')].every(item => item.tabIndex <= 0)")


def test_colours_of_code_stand_out(visit):
    """Every pair of colours in code, against the 4.5 to 1 that WCAG 2.1 asks for (criterion 1.4.3)."""
    for theme in ("light", "dark"):
        visit.theme(theme)
        pairs = visit.page.evaluate(
            """() => [...new Set([...document.querySelectorAll('article pre *')].filter(text => text.innerText.trim()).map(text => {
                let ground = text;
                while (getComputedStyle(ground).backgroundColor == 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
                return getComputedStyle(text).color + ' on ' + getComputedStyle(ground).backgroundColor }))]"""
        )
        assert [pair for pair in pairs if contrast(*pair.split(" on ")) < 4.5] == [], theme


def contrast(*colours: str) -> float:
    """WCAG's contrast ratio of two colours written as rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        channels = [int(channel) / 255 for channel in re.findall(r"\d+", colour)[:3]]
        linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear))

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, theme):
    """Without the insides of formulas and of code, thousands of elements of few kinds: the tests above have them."""
    visit.page.evaluate(
        "document.querySelectorAll('mjx-container').forEach(formula => formula.replaceChildren('x'));"
        "document.querySelectorAll('pre').forEach(code => code.textContent = code.textContent)"
    )
    visit.theme(theme)
    options = {} if theme == "light" else {"runOnly": ["color-contrast", "link-in-text-block"]}  # what a theme can change
    assert visit.axe(**options) == []


@pytest.mark.parametrize("name", ["index", "09_speech"])
def test_tab_walks_the_page_and_shows_where_it_is(opened, name):
    page = opened(f"{name}.html").page
    page.keyboard.press("Tab")
    assert "Skip to main content" in page.evaluate("document.activeElement.innerText")
    page.keyboard.press("Enter")
    page.wait_for_url("**#main-content")
    n_stops = page.evaluate("document.querySelectorAll('main a[href], main button, main summary, main audio').length")
    walked, unseen = set(), []
    for _ in range(min(n_stops, 80)):
        page.keyboard.press("Tab")
        stop, is_inside, is_marked = page.evaluate(
            """() => { const item = document.activeElement, style = getComputedStyle(item);
            return [item.outerHTML.slice(0, 200), !!item.closest('main') || !!item.closest('.bd-sidebar-secondary'),
                    style.outlineStyle != 'none' || style.boxShadow != 'none']}"""
        )
        walked.add(stop)
        unseen += [] if is_marked else [stop]
    assert len(walked) > 0.7 * min(n_stops, 80) and unseen == []


def test_code_copies(opened):
    visit = opened("03_regularized_loss.html", permissions=["clipboard-read", "clipboard-write"])
    cell = visit.page.locator("div.cell_input").nth(1)
    cell.hover()
    cell.locator("button.copybtn").click()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == cell.locator("pre").inner_text().strip() and "import" in copied


def test_sound_plays(opened):
    visit = opened("09_speech.html")
    n_players = visit.page.locator("article audio").count()
    assert n_players > 0
    for index in range(n_players):
        played = visit.page.evaluate(
            """async index => { const player = document.querySelectorAll('article audio')[index];
            player.muted = true; await player.play();
            await new Promise(heard => player.ontimeupdate = () => player.currentTime > 0 && heard());
            player.pause(); return [player.duration, player.error] }""",
            index,
        )
        assert played[0] > 0.1 and played[1] is None


def test_the_theme_follows_the_system_and_its_switch(opened):
    for scheme in ("light", "dark"):
        page = opened("index.html", color_scheme=scheme).page
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
    grounds = {}
    for name in ("light", "dark"):
        page.locator("button.theme-switch-button:visible").click()
        page.locator(f"button.theme-change-button[data-mode={name}]:visible").click()
        assert page.evaluate("document.documentElement.dataset.theme") == name
        page.wait_for_timeout(300)
        grounds[name] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert contrast(*grounds.values()) > 10


def words(name: str) -> Counter:
    """The words of a chapter's prose."""
    prose = "\n".join(chapters.text(cell) for cell in chapters.read(NOTEBOOKS[CHAPTERS.index(name)]).cells("markdown"))
    kept = []
    chapters.outside_code_and_math(re.sub(r"\]\([^)]*\)", "]", prose), lambda piece: kept.append(piece) or piece)
    return Counter(re.findall(r"\b[a-z]{7,}\b", " ".join(kept)))


def test_search_finds_a_term_of_every_chapter(opened):
    by_chapter = {name: words(name) for name in CHAPTERS}
    page = opened("search.html").page
    for name, counts in by_chapter.items():
        others = set().union(*(by_chapter[other] for other in CHAPTERS if other != name))
        term = next(word for word, _ in counts.most_common() if word not in others)
        page.goto(page.url.partition("?")[0] + f"?q={term}")
        page.locator("#search-results .search-summary, #search-results p").first.wait_for()
        page.wait_for_function("document.querySelector('#search-results ul.search a')")
        assert name in " ".join(page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")), (
            term
        )


def test_no_link_is_dead(site):
    assert dead_links(site) == []


def test_links_to_elsewhere_are_whole(site):
    """Their syntax; with CHECK_LINKS=1 in the environment (`make links`) each is asked for, too."""
    links = {link for page in site.values() for link in page.links if urlparse(link).scheme or urlparse(link).netloc}
    assert links
    for link in links:
        address = urlparse(link)
        assert address.scheme in ("https", "http", "mailto") and not re.search(r"[\s<>\"{}|\\^`]", link), link
        assert address.scheme == "mailto" or re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", address.netloc), link
    if os.environ.get("CHECK_LINKS"):
        wrong = unanswered(link for link in links if not link.startswith("mailto:"))
        assert not wrong, "\n".join(wrong)
