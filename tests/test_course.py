"""The course as a course: prerequisites without a circle, objectives that are practised, ways whose times hold, full tables."""

import copy
import json
import re
import xml.etree.ElementTree as ET

import pytest
from conftest import NOTEBOOKS, ROOT, Course, markdown, write_notebook

from bigmodel_utils import claims
from bigmodel_utils.report import chapters, course

COURSE = [chapters.read(path) for path in NOTEBOOKS]
BY_NAME = {chapter.name: chapter for chapter in COURSE}


def changed(name: str, change) -> list[str]:
    """The errors of the course after a change of one notebook's metadata."""
    notebook = copy.deepcopy(BY_NAME[name].notebook)
    change(notebook["metadata"]["bigmodel"])
    chapter = chapters.Chapter(BY_NAME[name].path, notebook)
    return course.errors([chapter if other.name == name else other for other in COURSE])


def test_every_objective_is_practised_and_every_prerequisite_is_an_earlier_chapter():
    assert course.errors(COURSE) == []


MUTANTS = {
    "a circle": (lambda m: m["before"].append("12_costs"), "05_train_mlp: 12_costs is no earlier chapter"),
    "itself": (lambda m: m["before"].append("05_train_mlp"), "05_train_mlp is no earlier chapter"),
    "an objective too few": (lambda m: m["objectives"].pop(), "6 objectives are stated, 5 are tied"),
    "an objective without practice": (lambda m: m["objectives"].__setitem__(0, []), "nothing practises 'clean, transform"),
    "an unknown exercise": (lambda m: m["objectives"].__setitem__(0, ["5.9"]), "there is no 5.9"),
    "an unknown question": (lambda m: m["objectives"].__setitem__(0, ["Q9"]), "there is no Q9"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_finds(name):
    change, message = MUTANTS[name]
    assert message in "\n".join(changed("05_train_mlp", change))


def test_arcs_are_those_that_others_do_not_imply(tmp_path):
    needs = {"00_a": [], "01_b": ["00_a"], "02_c": ["00_a", "01_b"], "03_d": ["01_b"]}
    small = []
    for name, before in needs.items():
        write_notebook(tmp_path / f"{name}.ipynb", [markdown("# x")])
        chapter = chapters.read(tmp_path / f"{name}.ipynb")
        chapter.notebook["metadata"]["bigmodel"]["before"] = before
        small.append(chapter)
    assert course.direct(small) == [("00_a", "01_b"), ("01_b", "02_c"), ("01_b", "03_d")]


def test_the_picture_shows_every_chapter_and_every_arc():
    svg = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(course.graph_svg(COURSE))
    labels = [(element.text, float(element.get("y"))) for element in root.iter(f"{svg}text")]
    assert [int(label.split()[0]) for label, _ in labels] == [chapter.number for chapter in COURSE]
    height = {int(label.split()[0]): y - 5 for label, y in labels}
    arcs = [path.get("d").split() for path in root.iter(f"{svg}path") if path.get("marker-end")]
    drawn = {(float(arc[1]) - 3, float(arc[-1]) + 3) for arc in arcs}
    assert drawn == {(height[int(start[:2])], height[int(end[:2])]) for start, end in course.direct(COURSE)}


def test_an_hour_takes_an_hour_and_a_day_a_day():
    limits = {"hour": 60, "day": 8 * 60, "semester": 14 * 10 * 60}
    paths = course.paths(ROOT, COURSE)
    assert paths.keys() == limits.keys()
    for name, path in paths.items():
        minutes = sum(course.step_minutes(step, BY_NAME) for step in path["steps"])
        assert limits[name] / 10 < minutes <= limits[name], f"{name}: {minutes:.0f} minutes"
    assert [step["chapter"] for step in paths["semester"]["steps"]] == list(BY_NAME)


@pytest.mark.parametrize("n_chapters", [1, 13, 14, 16, 20])
def test_a_semester_has_fourteen_weeks(n_chapters):
    found = course.weeks(n_chapters)
    assert found == sorted(found) and set(found) == set(range(1, min(n_chapters, 14) + 1))
    assert max(found.count(week) for week in found) <= 2


def test_a_path_goes_forward_and_its_sections_are_there():
    for path in course.paths(ROOT, COURSE).values():
        names = [step["chapter"] for step in path["steps"]]
        assert names == sorted(names)
        for step in path["steps"]:
            assert set(step) <= {"chapter", "sections", "why"} and step["why"]
            assert course.reading_minutes(BY_NAME[step["chapter"]], step.get("sections")) > 0.5


def test_every_chapter_is_in_the_articles_outline_and_every_statement_of_the_article_has_its_place():
    import yaml

    parts = yaml.safe_load((ROOT / "report" / "article.yaml").read_text(encoding="utf-8"))["parts"]
    planned = {"11_scaling_laws", "13_parallelism", "14_challenges"}
    named = {name for part in parts for name in part["chapters"]}
    assert BY_NAME.keys() <= named and named <= BY_NAME.keys() | planned
    stored = {id: claim for chapter in COURSE for id, claim in claims.stored(chapter.notebook).items()}
    placed = {id for part in parts for id in part.get("claims", [])}
    assert placed <= stored.keys()
    said = {id for id, claim in stored.items() if claim["findings"] and claim["source"].startswith("the article")}
    assert said - placed == set()


def test_the_chapter_of_answers_cites_claims_that_hold_and_reads_all_others():
    last = COURSE[-1]
    assert last.name == "15_outlook_faq" and set(last.needs) == BY_NAME.keys() - {last.name}
    stored = {id: claims.Claim(**one) for chapter in COURSE for id, one in claims.stored(chapter.notebook).items()}
    cited = {id for cell in last.cells("markdown") for _, id in claims.LINK.findall(chapters.text(cell))}
    elsewhere = {id for id in cited if not id.startswith("15-")}
    assert len(elsewhere) > 40 and {id[:2] for id in elsewhere} >= {f"{number:02d}" for number in range(10)}
    assert [id for id in cited if stored[id].status != "pass"] == []


def test_links_to_claims_name_the_notebook_that_checks_them():
    for chapter in COURSE:
        for cell in chapter.cells("markdown"):
            for number, id in re.findall(r"\]\((\d\d)_\w+\.ipynb#(\d\d)-", chapters.text(cell)):
                assert number == id, f"{chapter.name}: a link to notebook {number} names a claim of chapter {id}"


def test_the_glossary_is_in_order_with_a_chinese_term_in_every_row():
    lines = (ROOT / "report" / "glossary.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    terms = [row[0].lower() for row in rows]
    assert terms == sorted(terms) and len(set(terms)) == len(terms)
    for term, chinese, meaning in rows:
        assert meaning.endswith(".") and chinese, term


def test_the_terms_that_the_chapters_set_in_bold_are_in_the_glossary():
    terms = re.findall(r"^\| ([^|]+) \|", (ROOT / "report" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    emphasised = {"augmented", "half", "id"}  # words, not terms
    for chapter in COURSE:
        prose = "\n".join(text for cell in chapter.cells("markdown") if (text := chapters.text(cell)))
        bold = set(re.findall(r"\*\*([A-Z]{2,}|[a-z]+(?: [a-z]+)?)\*\*", prose)) - emphasised
        missing = [word for word in bold if not any(re.search(rf"\b{word}\b", term, re.IGNORECASE) for term in terms)]
        assert missing == [], chapter.name


@pytest.fixture(scope="module")
def site(built: Course) -> dict[str, str]:
    folder = built.folder / "build/small/html"
    return {name: (folder / f"{name}.html").read_text() for name in ("course", "article", "instructors", "index")}


def test_the_pages_are_in_the_report(site, built: Course):
    assert "What builds on what" in site["course"] and "Notes for instructors" in site["instructors"]
    assert 'href="course.html"' in site["index"]
    assert "正则化" in site["article"]
    assert (built.folder / "build/small/figures/prerequisites.svg").is_file()


def test_wrong_answers_are_listed_for_the_instructor():
    page = course._caught(ROOT, COURSE)
    for path in NOTEBOOKS:
        for number, changes in json.loads((ROOT / "tests" / "mutants" / f"{path.stem}.json").read_text()).items():
            assert f"| {number}: " in page and len(changes) >= 2
