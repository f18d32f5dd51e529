"""The manifest: inputs, runs and outputs of a report with their checksums, as an RO-Crate 1.1.

https://www.researchobject.org/ro-crate/specification/1.1/
"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bigmodel_utils.report import bootstrap, chapters, pdf
from bigmodel_utils.report.compose import TITLE, Page, Report
from bigmodel_utils.report.runner import Build, file_hash

Entity = dict[str, Any]

SPECIFICATION = "https://w3id.org/ro/crate/1.1"
CONTEXT = [f"{SPECIFICATION}/context", {"sha256": "https://schema.org/sha256"}]  # a term that 1.1 does not have
LICENCES = {
    "https://creativecommons.org/licenses/by/4.0/": "Creative Commons Attribution 4.0 International (text and figures)",
    "https://opensource.org/license/mit": "MIT License (programs)",
}


def crate(report: Report, build: Build, rendered: Build) -> Entity:
    """The content of ro-crate-metadata.json.

    Args:
        build: where results and executed notebooks lie; the crate's root.
        rendered: where the rendered parts lie until they are published to that root.
    """
    sources = [_source(report.folder, path) for path in _source_paths(report)]
    outputs = [_file(build.folder, path) for page in report.pages for path in _outputs(page, build)]
    figures = [figure for page in report.pages for figure in _figures(page, rendered)]
    pages = [
        path
        for path in sorted((rendered.folder / "html").rglob("*"))
        if path.suffix == ".html" or path.parent.name == "_images"
    ]
    shown = [_file(rendered.folder, path) for path in [rendered.folder / "report.pdf", rendered.folder / "sbom.json", *pages]]
    files = [*outputs, *figures, *shown]
    runs = [entity for page in report.pages for entity in _run(page, build)]
    return {"@context": CONTEXT, "@graph": [_descriptor(), _root(report, files), *_context(report), *sources, *runs, *files]}


def _descriptor() -> Entity:
    return {
        "@id": "ro-crate-metadata.json",
        "@type": "CreativeWork",
        "about": {"@id": "./"},
        "conformsTo": {"@id": SPECIFICATION},
    }


def _root(report: Report, files: list[Entity]) -> Entity:
    return {
        "@id": "./",
        "@type": "Dataset",
        "name": TITLE,
        "description": f"The report of profile {report.profile!r}: executed notebooks, results, figures, HTML pages and PDF.",
        "datePublished": report.date.isoformat(timespec="seconds"),
        "license": [{"@id": address} for address in LICENCES],
        "author": {"@id": "#authors"},
        "hasPart": [{"@id": file["@id"]} for file in files],
        "mentions": [{"@id": f"#run-{page.chapter.name}"} for page in report.pages],
    }


def _context(report: Report) -> list[Entity]:
    provenances = [page.record["provenance"] for page in report.pages]
    newest = max(provenances, key=lambda provenance: provenance["date"])
    course = {
        "@id": "#course",
        "@type": "SoftwareSourceCode",
        "name": "The course's notebooks and package",
        "version": ", ".join(sorted({str(found["commit"]) for found in provenances})),
        "programmingLanguage": f"Python {newest['python']}",
    }
    address = bootstrap.repository(report.folder)
    course |= {"codeRepository": address} if address else {}
    software = [
        {"@id": f"#{name}", "@type": "SoftwareApplication", "name": name, "softwareVersion": version}
        for name, version in newest["versions"].items()
    ]
    licences = [{"@id": address, "@type": "CreativeWork", "name": name} for address, name in LICENCES.items()]
    return [course, {"@id": "#authors", "@type": "Organization", "name": "the course's authors"}, *licences, *software]


def _source_paths(report: Report) -> list[Path]:
    paths = [page.chapter.path for page in report.pages] + [report.folder / "constraints.txt"]
    return [*paths, report.folder / "report" / "profiles" / f"{report.profile}.yaml"]


def _source_id(folder: Path, path: Path) -> str:
    return f"#source/{quote(path.relative_to(folder).as_posix())}"


def _source(folder: Path, path: Path) -> Entity:
    """An input: a file of the checkout, which is no part of the crate, by its checksum."""
    name = path.relative_to(folder).as_posix()
    entity = {"@id": _source_id(folder, path), "@type": "CreativeWork", "name": name, "isPartOf": {"@id": "#course"}}
    return entity | {"sha256": file_hash(path)}


def _outputs(page: Page, build: Build) -> list[Path]:
    artifacts = sorted(path for path in build.artifacts(page.chapter.name).rglob("*") if path.is_file())
    return [build.notebook(page.chapter.name), build.results(page.chapter.name), *artifacts]


def _file(root: Path, path: Path) -> Entity:
    name = path.relative_to(root).as_posix()
    kind = "application/x-ipynb+json" if path.suffix == ".ipynb" else mimetypes.guess_type(name)[0]
    entity = {"@id": quote(name), "@type": "File", "name": name, "contentSize": str(path.stat().st_size)}
    return entity | {"encodingFormat": kind or "application/octet-stream", "sha256": file_hash(path)}


def _figures(page: Page, rendered: Build) -> list[Entity]:
    """Each figure with its caption, its alternative text, and the cell and commit that drew it."""
    found = []
    for position, cell in enumerate(page.cells):
        path = pdf.figure_path(page, position, rendered.folder / "figures")
        if cell["cell_type"] == "code" and path.is_file():
            settings = cell["metadata"].get("mystnb", {})
            described = {
                "name": settings.get("figure", {}).get("caption", ""),
                "description": settings.get("image", {}).get("alt", ""),
                "isBasedOn": {"@id": _source_id(chapters.folder(), page.chapter.path)},
                "identifier": f"{page.chapter.path.name}#{cell['id']}",
                "version": str(page.record["provenance"]["commit"]),
            }
            found.append(_file(rendered.folder, path) | described)
    return found


def _run(page: Page, build: Build) -> list[Entity]:
    """One notebook's execution: what went in, its parameters among that, and what came out."""
    name, provenance = page.chapter.name, page.record["provenance"]
    parameters = [
        {
            "@id": f"#run-{name}/{quote(key)}",
            "@type": "PropertyValue",
            "name": key,
            "value": value if value is not None else "none",
        }
        for key, value in provenance["parameters"].items()
    ]
    upstream = [quote(build.results(need).relative_to(build.folder).as_posix()) for need in page.chapter.needs]
    inputs = [_source_id(chapters.folder(), page.chapter.path), *upstream, *(entity["@id"] for entity in parameters)]
    action = {
        "@id": f"#run-{name}",
        "@type": "CreateAction",
        "name": f"papermill executes {name}",
        "endTime": provenance["date"],
        "instrument": [{"@id": "#course"}, *({"@id": f"#{package}"} for package in provenance["versions"])],
        "object": [{"@id": id} for id in inputs],
        "result": [{"@id": quote(path.relative_to(build.folder).as_posix())} for path in _outputs(page, build)],
    }
    return [action, *parameters]
