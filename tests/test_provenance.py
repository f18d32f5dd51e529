"""What a report says of its own making: manifest, bill of materials, summary and changes; and building it once more."""

import hashlib
import json
import subprocess
import zlib
from urllib.parse import unquote

import pytest
import yaml
from conftest import ROOT, Course, chapter_cells, light_cells

from bigmodel_utils.report import ReportError, figures, publish, summary, verify
from bigmodel_utils.report.runner import Build

EPOCH = 1_800_000_000


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> tuple[Course, Course]:
    """The same course in two folders, both built with SOURCE_DATE_EPOCH, under different hash seeds."""
    courses = []
    for seed in ("1", "2"):
        course = Course(
            tmp_path_factory.mktemp("course"), lambda *name: (chapter_cells if name[1] == 3 else light_cells)(*name)
        )
        course.environment |= {"SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONHASHSEED": seed}
        status, printed = course.run("build")
        assert status == 0, printed
        courses.append(course)
    return tuple(courses)


def published(course: Course) -> dict[str, bytes]:
    """Every file of a build but what only the runner reads."""
    build = course.folder / "build" / "small"
    paths = (path for path in build.rglob("*") if path.is_file() and not path.relative_to(build).parts[0].startswith("."))
    return {str(path.relative_to(build)): path.read_bytes() for path in paths if path.parent.name != "runs"}


def test_two_builds_of_the_same_sources_are_the_same_bytes(twice):
    first, second = map(published, twice)
    assert (
        first.keys() == second.keys()
        and {"html/index.html", "report.pdf", "summary.json", "results/03_first.json"} <= first.keys()
    )
    different = [name for name in first if first[name] != second[name]]
    assert different == ["rendered.json"], different  # it holds hashes of the run's records, which are timed


def test_an_epoch_that_is_no_number_is_refused(twice):
    course = Course.__new__(Course)
    course.folder, course.environment = twice[0].folder, twice[0].environment | {"SOURCE_DATE_EPOCH": "today"}
    status, printed = course.run("build")
    assert status == 2 and "SOURCE_DATE_EPOCH is 'today'" in printed


def graph(course: Course) -> dict[str, dict]:
    """The manifest's entities by id."""
    crate = json.loads((course.folder / "build/small/ro-crate-metadata.json").read_text())
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"]), "an id is used twice"
    return entities


def references(value) -> list[str]:
    """The ids that an entity refers to."""
    if isinstance(value, dict):
        return [value["@id"]] if set(value) == {"@id"} else [id for item in value.values() for id in references(item)]
    return [id for item in value for id in references(item)] if isinstance(value, list) else []


def test_the_manifest_is_an_ro_crate(twice):
    """What RO-Crate 1.1 requires: descriptor, root data entity, flat entities, no dangling reference within the crate."""
    entities = graph(twice[0])
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    assert descriptor["@type"] == "CreativeWork" and descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and root["datePublished"] == "2027-01-15T08:00:00+00:00"
    assert root["name"] and root["description"] and root["license"]
    for entity in entities.values():
        assert entity["@type"]
        dangling = [id for id in references(entity) if id not in entities and not id.startswith("https://w3id.org/")]
        assert not dangling, f"{entity['@id']} refers to {dangling}"
    parts = set(references(root["hasPart"]))
    assert parts == {id for id, entity in entities.items() if entity["@type"] == "File"}


def test_the_manifest_lists_inputs_and_outputs_by_their_checksums(twice):
    course, entities = twice[0], graph(twice[0])
    for id, entity in entities.items():
        if "sha256" in entity:
            inside, outside = course.folder / "build/small" / unquote(id), course.folder / unquote(id.removeprefix("#source/"))
            path = outside if id.startswith("#source/") else inside
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entity["sha256"], id
    assert {
        "#source/notebooks/03_first.ipynb",
        "#source/constraints.txt",
        "#source/report/profiles/small.yaml",
    } <= entities.keys()
    assert {
        "report.pdf",
        "sbom.json",
        "html/index.html",
        "results/03_first.json",
        "notebooks/04_second.ipynb",
    } <= entities.keys()
    run = entities["#run-04_second"]
    assert {"#source/notebooks/04_second.ipynb", "results/03_first.json", "#run-04_second/seed"} <= set(
        references(run["object"])
    )
    assert entities["#run-04_second/seed"]["value"] == 0


def test_a_figure_carries_its_cell_and_commit(twice):
    (figure,) = (entity for id, entity in graph(twice[0]).items() if id.startswith("figures/03_first"))
    assert figure["identifier"] == "03_first.ipynb#cell-6" and figure["description"] == "a rising line"
    build = twice[0].folder / "build/small"
    marked = [
        path
        for path in [build / figure["@id"], *(build / "html/_images").iterdir()]
        if b"#cell-6 at commit" in path.read_bytes()
    ]
    assert len(marked) == 2, "the figure's file, and the page's image"


def test_the_mark_in_a_png_leaves_its_pixels():
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.radial_gradient("L").save(buffer, "PNG")
    marked = Image.open(BytesIO(figures.with_text(buffer.getvalue(), "notebooks/x.ipynb#cell-1")))
    assert marked.text == {"Provenance": "notebooks/x.ipynb#cell-1"}
    assert zlib.crc32(marked.tobytes()) == zlib.crc32(Image.radial_gradient("L").tobytes())
    with pytest.raises(ValueError, match="not a PNG"):
        figures.with_text(b"GIF89a", "x")


def test_the_bill_of_materials_is_valid_and_complete(twice):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    bill = (twice[0].folder / "build/small/sbom.json").read_text()
    error = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill)
    assert error is None, error
    versions = {component["name"]: component["version"] for component in json.loads(bill)["components"]}
    import torch

    assert versions["torch"] == str(torch.__version__) and len(versions) > 100 and "bigmodel-utils" not in versions


def test_the_citation_file_says_what_the_format_requires():
    """Citation File Format 1.2.0: the four required keys, at least one author with a name, a version and date of the right form."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["authors"] and all(author.get("name") or author.get("family-names") for author in citation["authors"])
    import bigmodel_utils

    assert citation["version"] == bigmodel_utils.__version__
    assert str(citation["date-released"]).count("-") == 2 and citation["type"] in ("software", "dataset")


def claim(
    value: float | None = 1.0, status: str = "pass", verdict: str = "", tolerance: float = 0.1, relation: str = "=="
) -> dict:
    figures = {"status": status, "verdict": verdict, "value": value, "reference": None if value is None else 1.0}
    return figures | {"tolerance": tolerance, "relation": relation, "unit": "", "statement": ""}


def test_changes_name_every_claim_that_differs():
    before = {"same": claim(), "moved": claim(), "fell": claim(), "gone": claim(), "judged": claim(None, verdict="supported")}
    after = {"same": claim(), "moved": claim(1.05), "fell": claim(1.5, "fail"), "fresh": claim()}
    after |= {"judged": claim(None, verdict="not supported")}
    notebooks = {"a": {"seconds": 10.0}, "b": {"seconds": 10.0}, "c": {"seconds": 0.1}, "d": {"seconds": None}}
    later = {"a": {"seconds": 11.0}, "b": {"seconds": 20.0}, "c": {"seconds": 0.9}, "d": {"seconds": 3.0}}
    changed = summary.changes(
        {"date": "then", "claims": before, "notebooks": notebooks}, {"date": "now", "claims": after, "notebooks": later}
    )
    assert summary.lines(changed) == [
        "claim moved: value 1 → 1.05, 0.5 of its tolerance",
        "claim fell: pass → fail",
        "claim fresh: new",
        "claim judged: supported → not supported",
        "claim gone: gone",
        "slower: b, 20 s after 10 s",
    ]
    assert summary.lines(changed, n_shown=2)[-1] == "... and 4 more in summary.json"


def test_verification_holds_values_to_their_own_tolerance():
    recorded = {"moved": claim(1.0), "within": claim(1.0), "bound": claim(5.0, relation=">="), "fell": claim()}
    rebuilt = {"moved": claim(1.2), "within": claim(1.09), "bound": claim(9.0, relation=">="), "fell": claim(3.0, "fail")}
    assert verify.claim_differences(recorded, rebuilt) == [
        "claim moved: 1, rebuilt 1.2: 0.2 apart, tolerance 0.1",
        "claim fell: status 'pass', rebuilt 'fail'",
    ]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Course:
    """A light course in a git repository, built with one parameter changed."""
    course = Course(tmp_path_factory.mktemp("tracked"), light_cells)
    (course.folder / ".gitignore").write_text("build/\n__pycache__/\n")
    git(course, "init", "--quiet")
    git(course, "add", ".")
    git(course, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "--message", "all")
    status, printed = course.run("build", "--set", "03_first.seed=5")
    assert status == 0, printed
    return course


def git(course: Course, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=course.folder, check=True, capture_output=True, text=True).stdout


def test_a_report_is_verified_from_its_commit_and_parameters(tracked: Course):
    """One recorded claim is falsified, and only that one differs, although another seed than the notebook's own was used."""
    notebook, path = tracked.folder / "notebooks/03_first.ipynb", tracked.folder / "build/small/summary.json"
    content, recorded = notebook.read_bytes(), path.read_text()
    notebook.write_bytes(content.replace(b"2 + seed / 10", b"2 + seed / 5"))  # not committed, so of no account
    path.write_text(recorded.replace('"value": 2.0', '"value": 2.9'))
    status, printed = tracked.run("verify")
    notebook.write_bytes(content)
    path.write_text(recorded)
    assert '"value": 2.5' in recorded
    assert status == 3 and printed.splitlines() == [
        "DIFFERENT: claim 04-sum: 2.9, rebuilt 2: 0.9 apart, tolerance 0.2",
        "1 claims differ",
    ]
    assert git(tracked, "worktree", "list").count("\n") == 1, "the worktree is left behind"


def test_an_untraceable_report_is_not_verified(tracked: Course):
    recorded = summary.read(Build(tracked.folder / "build/small"))
    assert verify.traceable_commit(recorded) == git(tracked, "rev-parse", "HEAD").strip()
    with pytest.raises(ReportError, match="uncommitted changes"):
        verify.traceable_commit(recorded | {"dirty": True})
    with pytest.raises(ReportError, match=r"not run from one commit \(none\)"):
        verify.traceable_commit(recorded | {"commits": []})


def test_the_changes_are_said_and_the_earlier_report_kept(tracked: Course):
    build = tracked.folder / "build/small"
    before = (build / "report.pdf").read_bytes()
    status, printed = tracked.run("build", "--set", "03_first.seed=6")
    assert status == 0 and "claim 03-sum: value 2.5 → 2.6, 0.5 of its tolerance" in printed
    (kept,) = (build / "history").iterdir()
    assert kept.name.startswith("2026-01-02T030405-") and (kept / "html/index.html").is_file()
    assert (kept / "report.pdf").read_bytes() == before
    assert json.loads((build / "summary.json").read_text())["changes"]["since"].startswith("2026-01-02")


def test_only_the_newest_earlier_reports_are_kept(tmp_path):
    build = Build(tmp_path)
    for month in range(1, 6):
        ready = tmp_path / ".ready"
        for part in publish.PARTS:
            (ready / part).mkdir(parents=True) if "." not in part else (ready / part).write_text(str(month))
        publish._swap(ready, build, summary.read(build), n_kept=2)
        summary_now = {"date": f"2026-{month:02d}-01T00:00:00+00:00", "commits": []}
        (tmp_path / "summary.json").write_text(json.dumps(summary_now))
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == [
        "2026-03-01T000000-none",
        "2026-04-01T000000-none",
    ]
    assert (tmp_path / "history/2026-04-01T000000-none/report.pdf").read_text() == "4" and (
        tmp_path / "report.pdf"
    ).read_text() == "5"


def test_a_profile_without_a_report_cannot_be_verified(tracked: Course):
    status, printed = tracked.run("verify", "--profile", "smoke")
    assert status == 1 and "run `make report PROFILE=smoke` first" in printed
