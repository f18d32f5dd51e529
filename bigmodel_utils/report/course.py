"""The course as a course: what leads to what, what each chapter teaches and where it is practised, and ways through it.

All of it is read from the notebooks: their metadata name the chapters to read before (`before`) and, for each objective of the
first cell, the exercises and quiz questions that practise it (`objectives`: ``[["12.1", "Q1"], ...]``).
"""

from __future__ import annotations

import html
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bigmodel_utils.report.chapters import Chapter, tags, text

WORDS_PER_MINUTE = 150  # technical prose, with its figures and formulas
MINUTES_PER_EXERCISE = 12
WEEKS = 14  # of a semester
EXERCISE = re.compile(r"^### Exercise (\d+\.\d+): (.+)$", re.MULTILINE)
QUESTION = re.compile(r"^\*\*Question (\d+)\.\*\* (.+)$", re.MULTILINE)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of bigmodel_utils.plot
SECTION = re.compile(r"^## (\d+\.\d+) ", re.MULTILINE)


def declared(chapter: Chapter, key: str) -> list:
    """An entry of the notebook's own metadata, such as "before", or an empty list."""
    return chapter.notebook["metadata"].get("bigmodel", {}).get(key, [])


def objectives(chapter: Chapter) -> list[str]:
    """What the reader will be able to do: the list in the first cell."""
    first = text(chapter.cells("markdown")[0])
    return [line.strip(" -;.") for line in first.splitlines() if line.startswith("- ")]


def practice(chapter: Chapter) -> dict[str, str]:
    """The exercises ("12.1") and quiz questions ("Q1") of a chapter, with their titles."""
    prose = "\n".join(text(cell) for cell in chapter.cells("markdown"))
    return dict(EXERCISE.findall(prose)) | {f"Q{number}": title for number, title in QUESTION.findall(prose)}


def errors(course: list[Chapter]) -> list[str]:
    """Prerequisites that are no earlier chapter, and objectives that nothing practises."""
    found, earlier = [], set()
    for chapter in course:
        found += [
            f"{chapter.name}: {name} is no earlier chapter" for name in declared(chapter, "before") if name not in earlier
        ]
        earlier.add(chapter.name)
        stated, tied, known = objectives(chapter), declared(chapter, "objectives"), practice(chapter)
        if len(stated) != len(tied):
            found.append(
                f"{chapter.name}: {len(stated)} objectives are stated, {len(tied)} are tied to exercises and questions"
            )
        for objective, names in zip(stated, tied):
            found += [] if names else [f"{chapter.name}: nothing practises {objective!r}"]
            found += [f"{chapter.name}: there is no {name}" for name in names if name not in known]
    return found


def direct(course: list[Chapter]) -> list[tuple[str, str]]:
    """The pairs (before, after) that do not follow from others."""
    needs = {chapter.name: declared(chapter, "before") for chapter in course}

    def reached(name: str) -> set[str]:
        return {other for step in needs.get(name, []) for other in {step, *reached(step)}}

    return [
        (one, name)
        for name, all_before in needs.items()
        for one in all_before
        if not any(one in reached(other) for other in all_before)
    ]


def graph_svg(course: list[Chapter]) -> str:
    """The prerequisites as a picture: chapters below one another, an arc from each to those that build on it."""
    row = {chapter.name: 20 + 30 * index for index, chapter in enumerate(course)}
    left = 40 + max((row[end] - row[start] for start, end in direct(course)), default=0) // 2
    arcs = []
    for start, end in direct(course):
        bulge = left - 15 - (row[end] - row[start]) // 2
        path = f"M{left} {row[start] + 3} C{bulge} {row[start] + 3} {bulge} {row[end] - 3} {left - 3} {row[end] - 3}"
        arcs.append(f'<path d="{path}" stroke="{COLORS[list(row).index(start) % len(COLORS)]}" marker-end="url(#tip)"/>')
    labels = [f'<text x="{left + 8}" y="{row[chapter.name] + 5}">{html.escape(_short(chapter))}</text>' for chapter in course]
    width, height = left + 330, 30 * len(course) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0L6 3L0 6z" fill="#444"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<g fill="none" stroke-width="1.4">{"".join(arcs)}</g>'
        '<g fill="#222" font-family="Libertinus Serif, DejaVu Sans, sans-serif" font-size="15">'
        f"{''.join(labels)}</g></svg>\n"
    )


def _short(chapter: Chapter) -> str:
    """A chapter's title up to its colon."""
    return chapter.title.partition(":")[0]


def reading_minutes(chapter: Chapter, sections: list[str] | None = None) -> float:
    """Minutes to read a chapter, or some sections of it, solutions and code left out."""
    prose = "\n".join(text(cell) for cell in chapter.cells("markdown"))
    prose = re.sub(r"<details>.*?</details>", "", prose, flags=re.DOTALL)
    if sections:
        pieces = SECTION.split(re.split(r"^## Exercises", prose, flags=re.MULTILINE)[0])
        bodies = dict(zip(pieces[1::2], pieces[2::2]))
        prose = "\n".join(bodies[section] for section in sections)
    return len(re.findall(r"\w+", prose)) / WORDS_PER_MINUTE


def working_minutes(chapter: Chapter) -> float:
    """Minutes to run a chapter's small profile and to do its exercises."""
    running = chapter.notebook["metadata"].get("bigmodel", {}).get("minutes", {}).get("small", 0)
    return running + MINUTES_PER_EXERCISE * sum("exercise" in tags(cell) for cell in chapter.cells("code"))


def step_minutes(step: dict[str, Any], course: dict[str, Chapter]) -> float:
    """Minutes of one step of a path: sections are read, whole chapters are read and worked through."""
    chapter, sections = course[step["chapter"]], step.get("sections")
    return reading_minutes(chapter, sections) + (0 if sections else working_minutes(chapter))


def paths(folder: Path, course: list[Chapter]) -> dict[str, dict]:
    """The ways through the course of report/paths.yaml, their steps those whose chapters are there.

    A path without steps takes every chapter in order, one a week; the first weeks take two, where there are too many.
    """
    known = [chapter.name for chapter in course]
    found = yaml.safe_load((folder / "report" / "paths.yaml").read_text(encoding="utf-8"))
    for path in found.values():
        steps = path.get("steps") or [{"chapter": name, "why": f"week {week}"} for name, week in zip(known, weeks(len(known)))]
        path["steps"] = [step for step in steps if step["chapter"] in known]
    return found


def weeks(n_chapters: int) -> list[int]:
    """The week of each chapter in a semester of WEEKS weeks."""
    n_pairs = max(0, n_chapters - WEEKS)
    return [position // 2 + 1 if position < 2 * n_pairs else position - n_pairs + 1 for position in range(n_chapters)]


def pages(report: Any) -> dict[str, str]:
    """The generated pages by file name: Markdown, and the picture that one of them shows."""
    course = [page.chapter for page in report.pages]
    notes = (report.folder / "report" / "instructors.md").read_text(encoding="utf-8")
    return {
        "course.md": _course_page(report.folder, course),
        "article.md": _article_page(report.folder, course, report.claims),
        "instructors.md": f"{notes}\n{_caught(report.folder, course)}",
        "prerequisites.svg": graph_svg(course),
    }


def _link(course: dict[str, Chapter], name: str) -> str:
    return f"[{course[name].title}](#chapter-{course[name].number})"


def _course_page(folder: Path, course: list[Chapter]) -> str:
    by_name = {chapter.name: chapter for chapter in course}
    link = partial(_link, by_name)
    lines = [
        "# The course",
        "",
        "Ways through it, what builds on what, and what each chapter lets you do.",
        "",
        "## Ways through",
        "",
    ]
    lines += [
        f"Times count {WORDS_PER_MINUTE} words a minute, {MINUTES_PER_EXERCISE} minutes an exercise, and the small profile's run; "
        "where only sections are named, nothing is run.",
        "",
    ]
    for path in paths(folder, course).values():
        total, taken = sum(step_minutes(step, by_name) for step in path["steps"]), set()
        lines += [f"### {path['title']}", "", f"{path['for']} About {_hours(total)}.", ""]
        lines += ["| Read | Minutes | Why | Takes for granted |", "| --- | --- | --- | --- |"]
        for step in path["steps"]:
            chapter = by_name[step["chapter"]]
            sections = f", sections {', '.join(step['sections'])}" if step.get("sections") else ""
            missing = ", ".join(str(int(name[:2])) for name in declared(chapter, "before") if name not in taken)
            granted = f"chapter {missing}" if missing else "nothing"
            minutes = f"{step_minutes(step, by_name):.0f}"
            lines.append(f"| {link(chapter.name)}{sections} | {minutes} | {step['why']} | {granted} |")
            taken.add(chapter.name)
        lines.append("")
    lines += ["## What builds on what", ""]
    lines += [
        "![An arc leads down from a chapter to each that builds on it; what follows from others is left out.](prerequisites.svg)",
        "",
    ]
    lines += ["## What you will be able to do, and where it is practised", ""]
    for chapter in course:
        tied = declared(chapter, "objectives")
        if tied:
            lines += [
                f"### {link(chapter.name)}",
                "",
                "| You will be able to | Practised in |",
                "| --- | --- |",
            ]
            lines += [f"| {stated} | {_names(names)} |" for stated, names in zip(objectives(chapter), tied)] + [""]
    return "\n".join(lines)


def _hours(minutes: float) -> str:
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def _names(names: list[str]) -> str:
    exercises = [name for name in names if not name.startswith("Q")]
    questions = [name[1:] for name in names if name.startswith("Q")]
    parts = [f"exercise {', '.join(exercises)}"] if exercises else []
    return "; ".join(parts + ([f"question {', '.join(questions)}"] if questions else []))


def _article_page(folder: Path, course: list[Chapter], claims: list) -> str:
    """The seed article's outline, the chapters that take it up, and the verdicts that they came to."""
    by_name = {chapter.name: chapter for chapter in course}
    outline = yaml.safe_load((folder / "report" / "article.yaml").read_text(encoding="utf-8"))
    verdicts = {claim.id: f"[{claim.statement}](#claim-{claim.id}): {claim.verdict}" for claim in claims if claim.findings}
    lines = ["# The article, and where the course takes it up", "", outline["about"], ""]
    lines += ["| The article | | Chapters | Its statements, and what was found |", "| --- | --- | --- | --- |"]
    for part in outline["parts"]:
        there = [name for name in part["chapters"] if name in by_name]
        found = "; ".join(verdicts[id] for id in part.get("claims", []) if id in verdicts)
        links = ", ".join(f"[{by_name[name].number}](#chapter-{by_name[name].number})" for name in there)
        lines.append(f"| {part['english']} | {part['chinese']} | {links} | {found} |")
    return "\n".join(lines) + "\n"


def _caught(folder: Path, course: list[Chapter]) -> str:
    """The wrong answers that the tests hold against each checker, for whoever corrects."""
    lines = ["## Wrong answers that the checkers catch", ""]
    lines += ["Each is a change of the solution that a learner might make; the tests prove that its checker refuses it.", ""]
    for chapter in course:
        path, titles = folder / "tests" / "mutants" / f"{chapter.name}.json", practice(chapter)
        if not path.is_file():
            continue
        lines += ["| Exercise | In the solution | Refused |", "| --- | --- | --- |"]
        for number, changes in json.loads(path.read_text(encoding="utf-8")).items():
            for position, (old, new) in enumerate(changes):
                first = f"{number}: {titles[number]}" if position == 0 else ""
                lines.append(f"| {first} | {_code(old)} | {_code(new)} |")
        lines.append("")
    return "\n".join(lines)


def _code(source: str) -> str:
    """A piece of code as a table cell can show it."""
    shown = " ".join(source.split()).replace("|", "\\|")
    return f"`{shown}`" if shown else "(nothing)"
