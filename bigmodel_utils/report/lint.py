"""What must not be committed in a notebook: each check returns the errors it found, in words."""

from __future__ import annotations

import os
import re

from bigmodel_utils import claims
from bigmodel_utils.report import bootstrap, chapters, environment
from bigmodel_utils.report.chapters import Chapter, tags, text

UNIT = r"(?:%|×|times\b|s\b|ms\b|µs\b|min(?:utes?)?\b|seconds?\b|hours?\b|[kMGT]i?B\b|bytes\b|[GT]?FLOPs?(?:/s)?\b|samples/s\b)"
MEASURED = re.compile(rf"(?<![\w.,/-])[-−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?[ -]?{UNIT}|(?<![\w.,/§-])\d+\.\d+(?![\w.])")
NUMBERED = re.compile(
    r"\b(?:figures?|exercises?|sections?|solutions?|chapters?|equations?|hints?|versions?|Python|PyTorch|torch)[ -]\d+\.\d+"
    r"(?:(?:,| and| to| or) \d+\.\d+)*|\(\d+\.\d+\)|\b\d{4}s\b|^#+ .*$",
    re.MULTILINE | re.IGNORECASE,
)
ANY_LINK = re.compile(r"!?\[[^\]]*\]\([^)]*\)")
CLAIM_OF = re.compile(r"\]\((\d\d_\w+\.ipynb)#")
WORDLESS = re.compile(r"(?<!!)\[((?:\s|\$[^$]+\$)*)\]\([^)]*\)")
MACHINE_PATH = re.compile(r"(?:/home/|/Users/|/root/|/tmp/|/content/(?!bigmodel|constraints)|[A-Z]:\\\\)")


def check(chapter: Chapter) -> list[str]:
    """All that is wrong with one committed notebook, each line beginning with its file name."""
    errors = [error for check in CHECKS for error in check(chapter)]
    return [f"{chapter.path.name}: {error}" for error in errors]


def normal_form(chapter: Chapter) -> list[str]:
    """Whether the file is byte for byte in its normal form."""
    normal = chapters.dump(chapters.normalize(chapter.notebook, bootstrap.repository(chapters.folder())))
    return [] if chapter.path.read_bytes() == normal else ["is not in normal form: run `make normalize`"]


def structure(chapter: Chapter) -> list[str]:
    """The parts that every chapter has."""
    code = chapter.cells("code")
    errors = []
    if not code or "bootstrap" not in tags(code[0]):
        errors.append("the first code cell must be tagged 'bootstrap'")
    chapter.parameters()
    headings = {
        line.lstrip("# ") for cell in chapter.cells("markdown") for line in text(cell).splitlines() if line.startswith("## ")
    }
    errors += [f"has no section '## {name}'" for name in ("Exercises", "Quiz", "Sources") if name not in headings]
    n_exercises = sum("exercise" in tags(cell) for cell in code)
    if not 3 <= n_exercises <= 5:
        errors.append(f"has {n_exercises} exercise cells, not three to five")
    return errors


def outputs(chapter: Chapter) -> list[str]:
    """Stored outputs: there, in order, without errors, stderr, secrets or paths of a machine."""
    errors = []
    for number, cell in enumerate(chapter.cells("code"), start=1):
        if cell["execution_count"] != number:
            errors.append(f"code cell {number} has execution count {cell['execution_count']}: run all cells in order and save")
        for output in cell["outputs"]:
            shown = "".join(output.get("text", [])) + "".join(
                "".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")
            )
            if output["output_type"] == "error":
                errors.append(f"code cell {number} ends in {output['ename']}")
            if output.get("name") == "stderr":
                errors.append(f"code cell {number} writes to stderr: {shown.strip()[:80]!r}")
            leaked = [name for name, value in environment.secrets(os.environ).items() if value in shown]
            errors += [f"code cell {number} shows the value of the environment's {name}" for name in leaked]
            if MACHINE_PATH.search(shown):
                errors.append(f"code cell {number} shows a path of one machine: {MACHINE_PATH.search(shown).group()}")
    return errors


def figures(chapter: Chapter) -> list[str]:
    """Every figure has a name, a caption and an alternative text, in its cell's metadata."""
    errors, names = [], []
    for number, cell in enumerate(chapter.cells("code"), start=1):
        n_images = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        settings = cell["metadata"].get("mystnb", {})
        figure = settings.get("figure", {})
        if n_images > 1:
            errors.append(f"code cell {number} draws {n_images} figures: one a cell")
        if n_images and not (figure.get("name") and figure.get("caption") and settings.get("image", {}).get("alt")):
            errors.append(f"code cell {number} draws a figure without name, caption and alternative text (metadata 'mystnb')")
        names += [figure["name"]] if figure.get("name") else []
    return errors + [f"figure name {name!r} is used twice" for name in {name for name in names if names.count(name) > 1}]


def prose(chapter: Chapter) -> list[str]:
    """Numbers in prose are claims: every link is right, and no measured number stands without one."""
    known, errors = known_claims(chapter), []
    for cell in chapter.cells("markdown"):
        errors += claims.prose_errors(text(cell), known)
        stated = chapters.outside_code_and_math(ANY_LINK.sub("", text(cell)), _mask_measured)
        errors += [f"the prose states {number!r} without a claim: ...{around}..." for number, around in _masked(stated)]
    return errors


def links(chapter: Chapter) -> list[str]:
    """Every link has words that a screen reader can read out: mathematics or a picture alone is none."""
    shown = [match[1] for cell in chapter.cells("markdown") for match in WORDLESS.finditer(text(cell))]
    return [f"the link {words!r} has no words: say where it leads" for words in shown]


def _mask_measured(piece: str) -> str:
    return MEASURED.sub(lambda match: f"\0{match.group()}\0", NUMBERED.sub("", piece))


def _masked(prose: str) -> list[tuple[str, str]]:
    """The numbers that `_mask_measured` marked, and the words around each."""
    around = lambda match: prose[max(0, match.start() - 30) : match.end() + 20]  # noqa: E731
    return [
        (match[1], re.sub(r"\s+", " ", around(match).replace("\0", "")).strip()) for match in re.finditer("\0([^\0]+)\0", prose)
    ]


def equations(chapter: Chapter) -> list[str]:
    """Equation numbers run from N.1 in order, and every number referred to is there."""
    source = "\n".join(text(cell) for cell in chapter.cells("markdown"))
    numbers = re.findall(r"\\tag\{([^}]*)\}", source)
    expected = [f"{chapter.number}.{index}" for index in range(1, len(numbers) + 1)]
    errors = [] if numbers == expected else [f"equations are numbered {', '.join(numbers)}, not {', '.join(expected)}"]
    referred = re.findall(rf"\(({chapter.number}\.\d+)\)", source)
    errors += [f"refers to equation ({number}), which is not there" for number in sorted(set(referred) - set(numbers))]
    n_figures = sum(bool(cell["metadata"].get("mystnb", {}).get("figure")) for cell in chapter.cells("code"))
    for number in sorted(set(re.findall(rf"\bFigure {chapter.number}\.(\d+)", source))):
        if not 1 <= int(number) <= n_figures:
            errors.append(f"refers to Figure {chapter.number}.{number}, but has {n_figures} figures")
    return errors


def known_claims(chapter: Chapter) -> dict[str, dict]:
    """The claims that the prose may cite: the notebook's own, and those of the notebooks that it names in such links."""
    prose = "\n".join(text(cell) for cell in chapter.cells("markdown"))
    paths = [chapter.path.with_name(name) for name in sorted(set(CLAIM_OF.findall(prose)))]
    cited = [claims.stored(chapters.read(path).notebook) for path in paths if path.is_file()]
    return {id: claim for stored in (*cited, claims.stored(chapter.notebook)) for id, claim in stored.items()}


CHECKS = (normal_form, structure, outputs, figures, prose, links, equations)
