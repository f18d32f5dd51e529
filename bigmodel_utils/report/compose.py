"""Pages: the prose of the committed notebooks joined with the outputs of one build, links resolved, figures numbered.

Also the generated pages: the cover with the provenance of the numbers, the ledger of claims, the references.
"""

from __future__ import annotations

import ast
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from bigmodel_utils import claims, results
from bigmodel_utils.report import ReportError, chapters, figures
from bigmodel_utils.report.chapters import Cell, Chapter, tags, text
from bigmodel_utils.report.runner import Build

INJECTED = "injected-parameters"  # the tag of papermill's cell
TITLE = "Large models, measured"


@dataclass(frozen=True)
class Page:
    """One chapter as it is rendered: its cells, and what this build computed."""

    chapter: Chapter
    cells: list[Cell]
    record: dict[str, Any]  # the results file

    @property
    def label(self) -> str:
        """The target of links to this chapter."""
        return chapter_label(self.chapter.number)


@dataclass(frozen=True)
class Report:
    """Everything that a rendering needs, read once."""

    profile: str
    pages: list[Page]
    folder: Path  # the checkout

    @cached_property
    def claims(self) -> list[claims.Claim]:
        """Every claim of this build, in the order of the chapters."""
        return [claims.Claim(**claim) for page in self.pages for claim in page.record["claims"]]

    @cached_property
    def date(self) -> datetime:
        """When the newest of its numbers was computed."""
        return max(datetime.fromisoformat(page.record["provenance"]["date"]) for page in self.pages)

    def failures(self) -> list[str]:
        """What makes the build fail: failing claims, and prose that does not agree with them."""
        failed = [f"claim failed: {claim!r}" for claim in self.claims if claim.status == "fail"]
        return failed + (self.prose_errors() if self.profile == "small" else [])

    def prose_errors(self) -> list[str]:
        """Where the prose cites a number that this build did not compute; the prose is written for the small profile."""
        errors = []
        known = {claim["id"]: claim for page in self.pages for claim in page.record["claims"]}
        for page in self.pages:
            for cell in page.chapter.cells("markdown"):
                errors += [f"{page.chapter.name}: {error}" for error in claims.prose_errors(text(cell), known)]
        return errors


@dataclass(frozen=True)
class Targets:
    """What the prose of any chapter may refer to: figures by number, equations by number."""

    figures: dict[str, str]  # "3.1" -> the figure's name
    equations: set[str]

    @classmethod
    def of(cls, course: list[Chapter]) -> Targets:
        """Collected from the notebooks.

        Raises:
            ReportError: for two figures of one name.
        """
        numbered = [
            (f"{chapter.number}.{index}", cell)
            for chapter in course
            for index, cell in enumerate(_figure_cells(chapter), start=1)
        ]
        figures = {number: cell["metadata"]["mystnb"]["figure"]["name"] for number, cell in numbered}
        if len(set(figures.values())) < len(figures):
            raise ReportError("two figures have one name (mystnb.figure.name): names are unique over all chapters")
        prose = (text(cell) for chapter in course for cell in chapter.cells("markdown"))
        return cls(figures, {number for source in prose for number in re.findall(r"\\tag\{([\d.]+)\}", source)})


def read(profile: str, course: list[Chapter], build: Build) -> Report:
    """Join the course with what the build computed.

    Raises:
        ReportError: for two claims of one id, or a notebook that was executed from other code than the committed one.
    """
    targets = Targets.of(course)
    records = [results.read(build.results(chapter.name)) for chapter in course]
    known = {claim["id"] for record in records for claim in record["claims"]}
    pages = [_page(chapter, record, build, targets, known) for chapter, record in zip(course, records)]
    report = Report(profile, pages, chapters.folder())
    ids = [claim.id for claim in report.claims]
    repeated = {id for id in ids if ids.count(id) > 1}
    if repeated:
        raise ReportError(f"claim ids used in two chapters: {', '.join(sorted(repeated))}")
    return report


def _figure_cells(chapter: Chapter) -> list[Cell]:
    return [cell for cell in chapter.cells("code") if cell["metadata"].get("mystnb", {}).get("figure")]


def _page(chapter: Chapter, record: dict[str, Any], build: Build, targets: Targets, known: set[str]) -> Page:
    executed = json.loads(build.notebook(chapter.name).read_text(encoding="utf-8"))
    executed = chapters.normalize(executed)
    ran = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    injected = [cell for cell in ran if INJECTED in tags(cell)]
    outcomes = iter([cell for cell in ran if INJECTED not in tags(cell)])
    numbers = iter(f"{chapter.number}.{index}" for index in range(1, 1000))
    cells: list[Cell] = []
    for cell in chapter.notebook["cells"]:
        if cell["cell_type"] == "markdown":
            if "badge" not in tags(cell):
                cells.append(cell | {"source": link(text(cell), known, targets)})
            continue
        outcome = next(outcomes)
        if "bootstrap" in tags(cell):
            continue
        if text(outcome) != text(cell).rstrip():
            raise ReportError(
                f"{chapter.name} was executed from other code than the committed notebook's: run `make report` again"
            )
        is_figure = bool(cell["metadata"].get("mystnb", {}).get("figure"))
        metadata = _numbered(cell["metadata"], next(numbers)) if is_figure else cell["metadata"]
        source = f"notebooks/{chapter.path.name}#{cell['id']} at commit {record['provenance']['commit']}"
        cells.append(outcome | {"metadata": metadata, "outputs": figures.mark(map(safe, outcome["outputs"]), source)})
        if "parameters" in tags(cell):
            cells += [extra | {"metadata": {}} for extra in injected]
    return Page(chapter, cells, record)


def mostly_checks(source: str) -> bool:
    """Whether three lines of code in five or more belong to `claims.check` or `claims.judge`, whose outputs say it in words."""
    n_lines, n_checking = 0, 0
    for statement in ast.parse(source).body:
        own = statement.end_lineno - statement.lineno + 1
        call = getattr(statement, "value", None)
        is_check = isinstance(call, ast.Call) and ast.unparse(call.func) in ("claims.check", "claims.judge")
        n_lines, n_checking = n_lines + own, n_checking + own * is_check
    return n_checking >= 0.6 * n_lines > 0


KINDS = ("image/svg+xml", "image/png", "text/html", "text/markdown", "text/latex", "text/plain")  # nothing that runs
DRAWS = re.compile(
    r"\{http://www.w3.org/2000/svg\}(svg|g|defs|style|path|use|text|tspan|rect|circle|ellipse|line|polyline|polygon|image|clipPath"
    r"|marker|linearGradient|radialGradient|stop|pattern|mask|title|desc|metadata)|\{(?!http://www.w3.org/)[^}]+\}\w+"
    r"|\{http://www.w3.org/1999/02/22-rdf-syntax-ns#\}\w+"
)
WITHIN = re.compile(r"#.*|data:image/(png|jpeg);base64,.*", re.DOTALL)


def safe(output: dict[str, Any]) -> dict[str, Any]:
    """An output with the kinds of data that pages show, and SVG only where it is a drawing."""
    if "data" not in output:
        return output
    data = {kind: content for kind, content in output["data"].items() if kind in KINDS}
    if not is_drawing("".join(data.get("image/svg+xml", ""))):
        data.pop("image/svg+xml", None)
    return output | {"data": data}


def is_drawing(svg: str) -> bool:
    """Whether some SVG holds shapes, text and pictures of its own alone: no script, no event, nothing from elsewhere."""
    try:
        elements = list(ElementTree.fromstring(svg).iter())
    except ElementTree.ParseError:
        return False
    attributes = [(name.rpartition("}")[2].lower(), value) for element in elements for name, value in element.items()]
    styles = "".join([value for _, value in attributes] + [element.text or "" for element in elements])
    return (
        all(DRAWS.fullmatch(element.tag) for element in elements)
        and all(not name.startswith("on") and (name != "href" or WITHIN.fullmatch(value)) for name, value in attributes)
        and not re.search(r"@import|url\(\s*['\"]?(?!#)|javascript:", styles, re.IGNORECASE)
    )


def _numbered(metadata: dict[str, Any], number: str) -> dict[str, Any]:
    settings = metadata["mystnb"]
    figure = settings["figure"] | {"caption": f"**Figure {number}.** {settings['figure']['caption']}"}
    return metadata | {"mystnb": settings | {"figure": figure}}


def link(markdown: str, known_claims: set[str], targets: Targets) -> str:
    """References to claims, other notebooks, "Figure 3.1" and equation "(3.1)" as links within the report."""

    def figure(match: re.Match) -> str:
        name = targets.figures.get(match[1])
        return f"[Figure {match[1]}](#{name})" if name else match[0]

    def equation(match: re.Match) -> str:
        return f"[({match[1]})](#{equation_label(match[1])})" if match[1] in targets.equations else match[0]

    def claim(match: re.Match) -> str:
        return f"[{match[1]}](#claim-{match[2]})" if match[2] in known_claims else match[0]

    def change(piece: str) -> str:
        pieces = re.split(r"(\[[^\]]*\]\([^)]*\))", piece)  # links, at the odd places, are not linked again
        pieces[::2] = [
            re.sub(r"(?<![\]\w])\((\d+\.\d+)\)", equation, re.sub(r"\bFigure (\d+\.\d+)", figure, text)) for text in pieces[::2]
        ]
        piece = re.sub(r"\]\((\d\d)_\w+\.ipynb\)", lambda match: f"](#{chapter_label(int(match[1]))})", "".join(pieces))
        return claims.LINK.sub(claim, piece)

    return chapters.outside_code_and_math(markdown, change)


def chapter_label(number: int) -> str:
    """The link target of a chapter."""
    return f"chapter-{number}"


def equation_label(number: str) -> str:
    """The link target of equation (3.1)."""
    return f"eq-{number.replace('.', '-')}"


def label_equations(markdown: str) -> str:
    """A link target before every display equation that has a number."""

    def label(match: re.Match) -> str:
        return f"{target(equation_label(match[2]))}\n\n{match[1]}"

    return re.sub(r"^(\$\$\s(?:(?!\$\$).)*?\\tag\{([\d.]+)\})", label, markdown, flags=re.MULTILINE | re.DOTALL)


def cover(report: Report) -> str:
    """What this report is and where its numbers come from, in Markdown."""
    latest = max((page.record["provenance"] for page in report.pages), key=lambda provenance: provenance["date"])
    commits = {page.record["provenance"]["commit"] for page in report.pages}
    dirty = any(page.record["provenance"]["dirty"] for page in report.pages)
    hardware = latest["hardware"]
    counts = {status: sum(claim.status == status for claim in report.claims) for status in claims.MARKS}
    seeds = sorted({str(page.record["provenance"]["parameters"].get("seed", "none")) for page in report.pages})
    rows = [
        ("Profile", f"`{report.profile}`"),
        (
            "Commit",
            ", ".join(sorted(f"`{commit[:12]}`" if commit else "none (not a git checkout)" for commit in commits))
            + (", with uncommitted changes" if dirty else ""),
        ),
        (
            "Computed",
            f"{latest['date'][:10]} (UTC), on {', '.join(sorted({page.record['provenance']['device'] for page in report.pages}))}",
        ),
        (
            "Hardware",
            f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 1e9:.0f} GB, {hardware['system']}",
        ),
        (
            "Versions",
            f"Python {latest['python']}, " + ", ".join(f"{name} {version}" for name, version in latest["versions"].items()),
        ),
        ("Seeds", ", ".join(seeds)),
        ("Claims", f"{counts['pass']} hold, {counts['fail']} fail, {counts['not tested']} not tested at these sizes"),
    ]
    lines = [
        "Every number in this report was computed by the run described here, and is held to a check in the [ledger of claims](#claims-ledger).",
        "",
    ]
    lines += _table(("Provenance", "This run"), rows) + ["", "What each notebook was predicted to cost, and did:", ""]
    lines += _table(
        ("Chapter", "Predicted", "Measured", "Memory predicted", "Memory measured"), [_cost_row(page) for page in report.pages]
    )
    return "\n".join(lines) + "\n"


def _cost_row(page: Page) -> tuple[str, ...]:
    provenance = page.record["provenance"]
    predicted = provenance["predicted"] or {}
    seconds, memory = predicted.get("seconds"), predicted.get("memory_bytes")
    return (
        f"[{page.chapter.title}](#{page.label})",
        "none" if seconds is None else f"{seconds:.0f} s",
        "not kept" if provenance["seconds"] is None else f"{provenance['seconds']:.0f} s",
        "none" if memory is None else f"{memory / 1e9:.1f} GB",
        "not kept" if provenance["seconds"] is None else f"{provenance['peak_memory_bytes'] / 1e9:.1f} GB",
    )


def ledger(report: Report) -> str:
    """Every claim: the failing first, then the verdicts on others' statements, worst first, then all by chapter."""
    failed = [claim for claim in report.claims if claim.status == "fail"]
    judged = sorted((claim for claim in report.claims if claim.findings), key=lambda one: claims.OUTCOMES.index(one.outcome))
    untested = [claim for claim in report.claims if claim.status == "not tested" and not claim.findings]
    lines = [
        "A claim is one sentence, the value computed for it, the reference that the value is held to, and the reference's source.",
        "",
    ]
    lines += [
        f"**{len(failed)} of {len(report.claims)} claims fail.**"
        if failed
        else f"None of the {len(report.claims)} claims fails.",
        "",
    ]
    lines += [f"- [{claim.id}](#claim-{claim.id}): {claim.statement}" for claim in failed] + [""]
    if judged:
        lines += ["## What is said about large models, and what was found", ""]
        lines += _table(
            ("Statement", "Verdict"), [(f"[{claim.statement}](#claim-{claim.id})", claim.verdict) for claim in judged]
        ) + [""]
    lines += ["## How many", ""] + _counts(report) + [""]
    if untested:
        lines += ["Not tested at these sizes: " + ", ".join(f"[{claim.id}](#claim-{claim.id})" for claim in untested) + ".", ""]
    for page in report.pages:
        lines += [f"## {page.chapter.title}", "", f"Checked in [chapter {page.chapter.number}](#{page.label}).", ""]
        for claim in (claims.Claim(**claim) for claim in page.record["claims"]):
            lines += [target(f"claim-{claim.id}"), "", claim._repr_markdown_(), ""]
    return "\n".join(lines)


def _counts(report: Report) -> list[str]:
    """A row a chapter: how many of its claims came out how."""
    rows = []
    for page in report.pages:
        outcomes = [claims.Claim(**claim).outcome for claim in page.record["claims"]]
        rows.append((str(page.chapter.number), *(str(outcomes.count(outcome)) for outcome in claims.OUTCOMES)))
    total = [claim.outcome for claim in report.claims]
    rows.append(("all", *(str(total.count(outcome)) for outcome in claims.OUTCOMES)))
    return _table(("Chapter", *claims.OUTCOMES), rows)


def target(label: str) -> str:
    """A place that links can lead to, as raw HTML, which the PDF's filter understands too."""
    return f'<span id="{label}"></span>'


def references(report: Report) -> str:
    """The bibliography, formatted by pandoc."""
    import pypandoc

    bibliography = report.folder / "report" / "references.bib"
    arguments = ["--citeproc", f"--bibliography={bibliography}", "--wrap=none"]
    entries = pypandoc.convert_text("---\nnocite: '@*'\n---\n", "commonmark-raw_html", format="markdown", extra_args=arguments)
    return entries


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
