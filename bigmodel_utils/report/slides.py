"""Slides from the committed notebooks and their stored outputs, by rule: no slide is listed by hand.

A heading begins a slide; each figure, table or listing has its own below it. A slide shows of its text the first paragraph,
predictions, lists, equations and tables; the other paragraphs, hints and solutions are speaker notes. Consecutive claims share
a slide. Quiz answers appear on the next key press. Everything that a browser loads lies beside the slides.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

from bigmodel_utils import claims
from bigmodel_utils.report import ReportError, chapters
from bigmodel_utils.report.chapters import Cell, Chapter, tags, text

LONGEST_LISTING = 16  # lines of code that a slide can show
MOST_SENTENCES = 3  # of a paragraph that it shows; a line of the notebooks is a sentence
BLOCK = re.compile(r"```.*?^```|<details>.*?</details>|\$\$.*?\$\$|(?:^[^\n]*\S[^\n]*$\n?)+", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"[-*|] |\d+\. |\||\$\$|```|\*\*|!\[|\[")
CHAPTER_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb(?:#[^)]*)?\)")


def build(course: list[Chapter], folder: Path) -> Path:
    """Write a slide show for each of those chapters, and index.html, which lists all that are in the folder.

    Returns:
        the path of index.html.

    Raises:
        ReportError: where a package of the report is not installed.
    """
    import nbformat
    from nbconvert import SlidesExporter

    _copy_scripts(folder)
    exporter = SlidesExporter(
        template_name="slides",
        extra_template_basedirs=[str(chapters.folder() / "report")],
        reveal_url_prefix="reveal",
        mathjax_url="mathjax/tex-chtml.js",
        reveal_theme="white",
    )
    whole = chapters.read_all()
    stored = {id: claim for chapter in whole for id, claim in claims.stored(chapter.notebook).items()}
    for chapter in course:
        notebook = {"cells": cells(chapter, stored), "metadata": {"title": chapter.title}, "nbformat": 4, "nbformat_minor": 5}
        # Reading joins the lines of outputs, which are stored one by one.
        page, _ = exporter.from_notebook_node(nbformat.reads(json.dumps(notebook), as_version=4))
        (folder / f"{chapter.name}.html").write_text(page, encoding="utf-8")
    there = [chapter for chapter in whole if (folder / f"{chapter.name}.html").is_file()]
    links = "\n".join(f'<li><a href="{chapter.name}.html">{escape(chapter.title)}</a></li>' for chapter in there)
    index = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Slides</title>\n<ul>\n{links}\n</ul>\n</html>\n'
    (folder / "index.html").write_text(index, encoding="utf-8")
    return folder / "index.html"


def cells(chapter: Chapter, stored: dict[str, dict]) -> list[Cell]:
    """The cells of a chapter's slides, each with its type, in nbconvert's metadata.

    Args:
        stored: the fields of every claim of the course by id; a link to a claim becomes its number, which says the sentence.
    """
    found: list[Cell] = []
    numbers = iter(f"{chapter.number}.{index}" for index in range(1, 1000))
    for cell in chapter.notebook["cells"]:
        if cell["cell_type"] == "markdown":
            found += [] if "badge" in tags(cell) else _prose(_linked(text(cell), stored))
        elif not {"bootstrap", "parameters"} & set(tags(cell)):
            found += _code(cell, numbers, follows_claim=bool(found) and found[-1].get("claims", False))
    return [{key: value for key, value in cell.items() if key != "claims"} | {"id": f"s{n}"} for n, cell in enumerate(found)]


def _prose(source: str) -> list[Cell]:
    """The slides of a Markdown cell: at each heading one, its text on it or in the notes."""
    found = []
    for section in re.split(r"^(?=#{1,3} )", _outside_fences(source), flags=re.MULTILINE):
        section = section.replace("\0", "#")
        shown, noted, answers = _sorted_blocks(section)
        depth = len(section) - len(section.lstrip("#"))
        if shown:
            found.append(_markdown("\n\n".join(shown), "slide" if depth in (1, 2) else "subslide" if depth else "-"))
        for question, answer in answers:
            found += [_markdown(question, "subslide"), _markdown(answer, "fragment")]
        if noted:
            found.append(_markdown("\n\n".join(noted), "notes"))
    return found


def _outside_fences(source: str) -> str:
    """The source with the "#" of comments in code hidden, so that they are not taken for headings."""
    return re.sub(r"^```.*?^```", lambda code: code[0].replace("#", "\0"), source, flags=re.MULTILINE | re.DOTALL)


def _sorted_blocks(section: str) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """What of a section is shown, what is noted, and the quiz questions with their answers."""
    shown: list[str] = []
    noted: list[str] = []
    answers: list[tuple[str, str]] = []
    question: list[str] = []
    introduced = False
    for block in (match[0].strip() for match in BLOCK.finditer(section)):
        if block.startswith("**Question") and re.match(r"\*\*Question \d", block):
            question = [block]
        elif question and not block.startswith("<details>"):
            question.append(block)
        elif block.startswith("<details>"):
            body = re.sub(r"</?details>|<summary>.*?</summary>", "", block).strip()
            if question:
                answers.append(("\n\n".join(question), body))
                question = []
            else:
                noted.append(body)
        elif block.startswith("#") or SHOWN.match(block) or not introduced:
            introduced = introduced or not block.startswith("#")
            brief, rest = _brief(block)
            shown.append(brief)
            noted += [rest] if rest else []
        else:
            noted.append(block)
    return shown, noted, answers


def _brief(block: str) -> tuple[str, str]:
    """What of a block a slide shows, and the whole for the notes, if that is more.

    Of a list the first sentence of each item, of a paragraph the first sentences.
    """
    lines = block.splitlines()
    if re.match(r"[-*] |\d+\. ", block):
        lines = [re.sub(r"(?<=[a-z)*][.:]) .*", "", line) if len(line) > 160 else line for line in lines]
    elif not re.match(r"#|\||\$\$|```", block):
        lines = lines[:MOST_SENTENCES]
    brief = "\n".join(lines)
    return brief, "" if brief == block else block


def _code(cell: Cell, numbers: Any, follows_claim: bool) -> list[Cell]:
    """The slides of a code cell: a figure with its caption, claims, or a short listing with what it shows."""
    outputs = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    checked = [output for output in outputs if output.get("metadata", {}).get("claim")]
    shown = {"cell_type": "code", "execution_count": None, "source": ""}
    hidden = {"transient": {"remove_source": True}}
    if pictures:
        figure = cell["metadata"].get("mystnb", {})
        alt = figure.get("image", {}).get("alt", "")
        pictures = [picture | {"metadata": {"image/png": {"alt": alt}}} for picture in pictures]
        caption = f"**Figure {next(numbers)}.** {figure['figure']['caption']}" if figure.get("figure") else ""
        return [shown | {"outputs": pictures, "metadata": hidden | _type("subslide")}, _markdown(caption, "-")]
    if checked:
        sentences = [f"- {claims.Claim(**output['metadata']['claim'])._repr_markdown_()}" for output in checked]
        kind = "-" if follows_claim else "subslide"
        return [_markdown("\n\n".join(sentence.replace("\n", "\n  ") for sentence in sentences), kind) | {"claims": True}]
    source = text(cell)
    is_short = len(source.splitlines()) <= LONGEST_LISTING and not re.match(r"(import|from) ", source)
    if "exercise" in tags(cell) or (is_short and re.search(r"^(def|class|@)", source, re.MULTILINE)):
        return [shown | {"source": source, "outputs": outputs, "metadata": _type("subslide")}]
    if not outputs:
        return []
    metadata = _type("subslide") | ({} if is_short else hidden)
    return [shown | {"source": source if is_short else "", "outputs": outputs, "metadata": metadata}]


def _markdown(source: str, kind: str) -> Cell:
    return {"cell_type": "markdown", "source": source, "metadata": _type(kind)}


def _type(kind: str) -> dict[str, Any]:
    return {"slideshow": {"slide_type": kind}}


def _linked(source: str, stored: dict[str, dict]) -> str:
    """Links to claims as numbers that say their sentence, links to chapters as links to their slides."""

    def number(match: re.Match) -> str:
        claim = stored.get(match[2])
        said = f"{claim['statement']} ({claims.Claim(**claim).figures()})" if claim else match[2]
        return f'<abbr title="{escape(said).replace("$", "")}">{match[1]}</abbr>'

    def change(piece: str) -> str:
        return CHAPTER_LINK.sub(r"](\1.html)", claims.LINK.sub(number, piece))

    return chapters.outside_code_and_math(source, change)


def _copy_scripts(folder: Path) -> None:
    """Lay reveal.js and MathJax beside the slides, from the packages that bundle them."""
    reveal = _package("sphinx_revealjs") / "_static" / "revealjs"
    mathjax = _package("sphinx-mathjax-offline") / "static" / "mathjax"
    for source, target in (
        (reveal / "dist", "reveal/dist"),
        (reveal / "plugin" / "notes", "reveal/plugin/notes"),
        (mathjax / "output" / "chtml", "mathjax/output/chtml"),
        (mathjax / "input" / "tex", "mathjax/input/tex"),
    ):
        shutil.copytree(source, folder / target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.map"))
    shutil.copy(mathjax / "tex-chtml.js", folder / "mathjax")
    shutil.copy(reveal / "LICENSE", folder / "reveal")


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ReportError(f"the slides need the package {name.replace('_', '-')}: run `make env`, or pip install -e .[report]")
    return Path(spec.submodule_search_locations[0])
