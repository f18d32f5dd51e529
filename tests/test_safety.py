"""What comes from outside stays harmless: outputs run nothing in the reader's browser, secrets and parameters stay what they are."""

import json
import re

import pypdfium2
import pytest
from conftest import ROOT, Course, code, markdown, stored_report, write_notebook
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import papermill_translators
from test_browser import Visit

from bigmodel_utils.report import chapters, compose, doctree, environment, html, lint, pdf, profiles

RUN = "window.ran.push('{}')"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9" onload="{run}"><script>{run}</script><a href="javascript:{run}"><rect width="9" height="9"/></a></svg>'
HTML = {
    "script": "<script>{run}</script>",
    "module": '<script type="module">{run}</script>',
    "onerror": '<img src="nowhere.png" onerror="{run}">',
    "onload": '<style onload="{run}">p {{color: red}}</style>',
    "ontoggle": '<details open ontoggle="{run}"><summary>fold</summary>more</details>',
    "link": '<a href="javascript:{run}">link</a>',
    "link-disguised": '<a href="java&#115;cript&colon;{run}">link</a>',
    "svg": "<svg><script>{run}</script></svg>",
    "svg-onload": '<svg onload="{run}"></svg>',
    "frame": "<iframe srcdoc=\"<script>parent.ran.push('frame')</script>\"></iframe>",
    "frame-link": "<iframe src=\"javascript:parent.ran.push('frame-link')\"></iframe>",
    "form": '<form action="javascript:{run}"><button>send</button></form>',
    "button": '<button onclick="{run}">press</button>',
    "object": "<object data=\"data:text/html,<script>parent.ran.push('object')</script>\"></object>",
    "focus": '<input autofocus onfocus="{run}">',
    "mutation": '<math><mtext><table><mglyph><style><img src=nowhere onerror="{run}">',
}
AWAY = '<img src="https://example.org/a.png"><link rel="stylesheet" href="https://example.org/a.css"><meta http-equiv="refresh" content="0;url=https://example.org">'
ALL_HTML = {name: source.format(run=RUN.format(name)) for name, source in HTML.items()}
KEPT = '<table><tr><td>a table stays</td></tr></table><a href="https://example.org/page">and a link</a>'


def output(kind: str, source: str) -> dict:
    """A stored output of one kind."""
    return {"output_type": "display_data", "data": {kind: source, "text/plain": "plain"}, "metadata": {}}


def hostile_outputs() -> list[dict]:
    """Every kind of output, trying to run something."""
    run = RUN.format
    outputs = [output("text/html", source) for source in [*ALL_HTML.values(), AWAY, KEPT]]
    outputs += [output("text/markdown", f"words\n\n{source}\n") for source in ALL_HTML.values()]
    outputs += [output("text/markdown", f"words {source} more words") for source in ALL_HTML.values()]
    outputs += [
        output(
            "text/markdown",
            f"[link](<javascript:{run('markdown link')}>) ![](https://example.org/a.png) ![](//example.org/b.png)",
        ),
        output("text/markdown", f"```{{raw}} html\n{ALL_HTML['script']}\n```"),
        output("text/markdown", f"$\\href{{javascript:{run('formula')}}}{{x}}$ <b>$\\require{{html}}$</b>"),
        output("text/latex", f"$\\href{{javascript:{run('latex')}}}{{y}}$"),
        output("image/svg+xml", SVG.format(run=run("svg file"))),
        output("application/javascript", run("javascript")),
        output("application/vnd.jupyter.widget-view+json", json.dumps({"model_id": f"</script>{ALL_HTML['script']}"})),
        {"output_type": "stream", "name": "stdout", "text": ALL_HTML["script"] + ALL_HTML["onerror"]},
    ]
    return outputs


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """A site whose one chapter's cells, each of one output, are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    cells = [markdown("# 3 Outputs"), code("seed = 0", "parameters")]
    cells += [code("pass") | {"execution_count": 1, "outputs": [shown]} for shown in hostile_outputs()]
    cells = [cell | {"id": f"cell-{index}"} for index, cell in enumerate(cells)]
    path = folder / "03_hostile.ipynb"
    path.write_bytes(chapters.dump(chapters.normalize({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})))
    report, build = stored_report(folder / "build", [chapters.read(path)])
    return html.build(report, build).with_name("03_hostile.html")


class Watched(Visit):
    """A page that records what ran in it."""

    def __init__(self, browser, path):
        super().__init__(browser, path, before="window.ran = []")

    def try_everything(self) -> list[str]:
        """Click, press and move over whatever there is; returns what ran."""
        self.page.wait_for_timeout(500)
        self.page.evaluate(
            """() => { for (const item of document.querySelectorAll('article :is(a, button, img, summary, svg, rect, [href])')) {
                if (/^http/.test(item.href)) item.onclick = () => false;
                for (const kind of ['mouseover', 'focus', 'click'])
                    item.dispatchEvent(new MouseEvent(kind, {bubbles: true, cancelable: true})); } }"""
        )
        self.page.wait_for_timeout(300)
        return sorted(set(self.page.evaluate("window.ran")))


def test_outputs_run_nothing_and_fetch_nothing(browser, hostile_page):
    watched = Watched(browser, hostile_page)
    assert watched.try_everything() == []
    assert [url for url in watched.requested if url.startswith("http")] == []
    assert watched.page.locator("td", has_text="a table stays").count() == 1
    assert watched.page.locator("a[href='https://example.org/page']").count() == 1
    assert not re.search(r"javascript:", watched.page.inner_html("article .cell_output:last-of-type"))
    pictures = {path.name for path in hostile_page.parent.rglob("_images/*.svg")}
    assert pictures == {"prerequisites.svg"}, "beside the course's own a picture that could run something when opened by itself"


def test_the_hostile_page_would_run_uncleaned(browser, tmp_path):
    """The control: each of these attacks works in this browser where nothing is done against it."""
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><article>{' '.join(ALL_HTML.values())}</article>")
    by_itself = {"object", "mutation"}  # this browser stops these two
    assert set(Watched(browser, path).try_everything()) == set(ALL_HTML) - by_itself


SUM = "#(12345 * 3)"  # what Typst prints as 37035 where it runs
TYPST = {
    "raw block": f"words\n\n```{{=typst}}\n{SUM}\n```\n",
    "raw words": f"words `{SUM}`{{=typst}} more",
    "end of a fence": f"~~~~\n\n```{{=typst}}\n{SUM}\n```\n\n~~~~~~~~\n\n`{SUM}`{{=typst}}",
    "a table, and then": f"<table><tr><td>{SUM}</td></tr></table>\n\n`{SUM}`{{=typst}}\n\n```{{=typst}}\n{SUM}\n```",
    "code of our own kind": f"````` output-markdown\n`{SUM}`{{=typst}}\n`````",
    "a comment without end": f"<!-- {SUM}",
    "mathematics": f'$a {SUM} \\text{{"] {SUM}}}$',
    "files": '![](/etc/hostname) ![](secret.txt) <img src="/etc/hostname" alt="an image"><iframe src="{secret}"></iframe>',
    "a label of another": '# Heading {#ledger}\n\n<h1 id="claims-ledger">H</h1><span id="claims-ledger">s</span>',
    "links": "[l](<javascript:1>) <a href='javascript:1'>l</a> [f](file:///etc/hostname) [g](https://example.org/page)",
}


def printed_chapter(folder, cells) -> tuple[str, str]:
    """The text of a PDF with one chapter of these cells, and its Typst."""
    write_notebook(folder / "03_hostile.ipynb", [markdown("# 3 Outputs"), code("seed = 0", "parameters"), *cells])
    path = pdf.build(*stored_report(folder / "build", [chapters.read(folder / "03_hostile.ipynb")]))
    with pypdfium2.PdfDocument(path) as document:
        return "\n".join(page.get_textpage().get_text_range() for page in document), path.with_suffix(".typ").read_text()


def test_outputs_run_nothing_in_the_pdf_either(tmp_path):
    (tmp_path / "secret.txt").write_text("planted-5ec2e7")
    attacks = [source.replace("{secret}", str(tmp_path / "secret.txt")) for source in [*TYPST.values(), *ALL_HTML.values()]]
    shown = [output(f"text/{kind}", source) for kind in ("html", "markdown") for source in attacks]
    shown += [{"output_type": "stream", "name": "stdout", "text": source} for source in TYPST.values()]
    shown += hostile_outputs()
    cells = [code("pass") | {"execution_count": 1, "outputs": [one]} for one in shown]
    text, source = printed_chapter(tmp_path, [*cells, markdown("## 3.1 The end\n\nwords after all of them")])
    assert "37035" not in text and "planted-5ec2e7" not in text
    assert text.count(SUM) > 10 and "words after all of them" in text
    assert set(re.findall(r'image\("([^"]*)', source)) == {"figures/prerequisites.svg"}
    assert set(re.findall(r'#link\("(\w+):', source)) == {"https"} and '#link("https://example.org/page")' in source


def test_the_pdf_runs_what_the_prose_says(tmp_path):
    """The control: the prose is the course's own, and in it each of the first two attacks works."""
    text, _ = printed_chapter(tmp_path, [markdown(TYPST["raw block"]), markdown(TYPST["raw words"])])
    assert text.count("37035") == 2


def test_cleaning_keeps_what_chapters_show():
    sound = '<audio controls="controls"><source src="data:audio/wav;base64,UklGRg==" type="audio/wav"></audio>'
    assert doctree.clean_html(sound) == sound
    assert (
        doctree.clean_html('<img src="data:image/png;base64,AAAA" alt="a">') == '<img src="data:image/png;base64,AAAA" alt="a">'
    )
    for address in (
        "data:text/html,x",
        "data:image/svg+xml;base64,AAAA",
        "https://example.org/a.png",
        "//example.org/a",
        "file:///etc/passwd",
    ):
        assert "src" not in doctree.clean_html(f'<img src="{address}">')


DRAWING = "<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink'>{}</svg>"


@pytest.mark.parametrize(
    ("inside", "is_safe"),
    [
        ("<defs><path id='a' d='M0 0'/></defs><use xlink:href='#a' style='fill: #fff'/><text>a</text>", True),
        ("<image xlink:href='data:image/png;base64,AAAA'/>", True),
        ("<script>1</script>", False),
        ("<path onclick='1'/>", False),
        ("<use xlink:href='https://example.org/a.svg#a'/>", False),
        ("<use href='data:image/svg+xml;base64,AAAA'/>", False),
        ("<foreignObject/>", False),
        ("<set attributeName='href' to='javascript:1'/>", False),
        ("<style>@import 'https://example.org/a.css';</style>", False),
        ("<path style='fill: url(https://example.org/a)'/>", False),
        ("<path>", False),
    ],
)
def test_a_drawing_is_shown_only_if_it_draws_and_does_nothing_else(inside, is_safe):
    assert compose.is_drawing(DRAWING.format(inside)) == is_safe


PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-4f1c9a",
    "GITHUB_TOKEN": "planted-77ab02",
    "HF_TOKEN": "planted-c0ffee",
    "JUPYTER_TOKEN": "planted-81d3e5",
    "DATABASE_URL": "postgres://me:planted-5ca1ab@host/db",
    "HTTPS_PROXY": "http://me:planted-0ddba1@proxy.invalid:8080",
    "COMPANY_INTERNAL": "planted-b0a7ed",
}


def test_a_notebook_that_prints_its_environment_gives_no_secret_away(course: Course):
    cells = chapters.read(course.folder / "notebooks/03_first.ipynb").notebook["cells"]
    shout = (
        "import os, subprocess, sys\nprint(dict(os.environ), subprocess.run(['env'], capture_output=True, text=True).stdout)"
    )
    (course.folder / "notebooks/04_second.ipynb").unlink()
    course.add("03_first", 3, cells=[*cells[:-1], code(shout), code("path = results.save({'seen': dict(os.environ)})")])
    course.environment |= PLANTED
    status, printed = course.run("build")
    assert status == 0, printed
    written = [path for path in (course.folder / "build").rglob("*") if path.is_file()]
    assert any(b"BIGMODEL_OUTPUT" in path.read_bytes() for path in written), "the notebook did not print its environment"
    leaks = [(path.name, value) for path in written for value in PLANTED.values() if value[-14:].encode() in path.read_bytes()]
    assert leaks == [] and "planted-" not in printed


def test_a_notebook_keeps_what_a_run_needs():
    needed = {
        "PATH": "/bin",
        "HOME": "/root",
        "PYTHONPATH": "/a",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "0",
        "LC_ALL": "C",
    }
    assert environment.visible(needed | PLANTED) == needed


def test_a_stored_output_with_a_secret_is_refused(monkeypatch):
    chapter = chapters.read(sorted((ROOT / "notebooks").glob("00_*.ipynb"))[0])
    shown = next(output for cell in chapter.cells("code") for output in cell["outputs"] if output["output_type"] == "stream")
    monkeypatch.setenv("SERVICE_PASSWORD", "".join(shown["text"])[:20])
    assert [error for error in lint.outputs(chapter) if "SERVICE_PASSWORD" in error]


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner, max_size=3))
)
@settings(max_examples=200, deadline=None)
def test_a_parameter_is_a_value_and_never_code(value):
    source = papermill_translators.find_translator("python3", "python").codify({"parameter": value})
    namespace: dict = {}
    exec(source, {"__builtins__": {"float": float}}, namespace)
    assert repr(namespace) == repr({"parameter": value})


@pytest.mark.parametrize(
    "given",
    ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "__import__('os').getcwd()", "[1", "{a: 1}"],
)
def test_what_is_no_plain_value_is_refused(course: Course, given):
    with pytest.raises(profiles.ReportError):
        all_chapters = [chapters.read(path) for path in (course.folder / "notebooks").glob("*.ipynb")]
        profile = profiles.load("small", all_chapters, course.folder / "report" / "profiles")
        profiles.with_overrides(profile, [f"03_first.n={given}"], all_chapters)


def test_code_in_a_text_parameter_stays_text(course: Course):
    hostile = "\"; open('ran', 'w'); \"\\\n#{}"
    cells = chapters.read(course.folder / "notebooks/03_first.ipynb").notebook["cells"]
    cells[2]["source"] += "\nname = 'plain'"
    (course.folder / "notebooks/04_second.ipynb").unlink()
    course.add("03_first", 3, cells=[*cells[:-1], code("path = results.save({'name': name})")])
    status, printed = course.run("build", "--set", f"03_first.name={json.dumps(hostile)}")
    assert status == 0, printed
    record = json.loads((course.folder / "build/small/results/03_first.json").read_text())
    assert record["values"] == {"name": hostile} and not list(course.folder.rglob("ran"))
