"""Every exercise: its solution passes the checker; the stub, and wrong versions of the solution (mutants), do not."""

import ast
import json
import re

import pytest
from conftest import NOTEBOOKS, ROOT

from bigmodel_utils import exercises
from bigmodel_utils.report import chapters

SOLUTION = re.compile(r"<summary>Solution (\d+\.\d+)</summary>\s*```python\n(.*?)```", re.DOTALL)


def collect() -> list:
    """(notebook, number, stub, solution, mutations) of every exercise."""
    found = []
    for path in NOTEBOOKS:
        chapter = chapters.read(path)
        prose = "\n".join(chapters.text(cell) for cell in chapter.cells("markdown"))
        solutions = dict(SOLUTION.findall(prose))
        mutations = json.loads((ROOT / "tests" / "mutants" / f"{path.stem}.json").read_text(encoding="utf-8"))
        stubs = [chapters.text(cell) for cell in chapter.cells("code") if "exercise" in chapters.tags(cell)]
        numbers = [f"{chapter.number}.{index}" for index in range(1, len(stubs) + 1)]
        assert sorted(solutions) == sorted(mutations) == sorted(numbers), (
            f"{path.stem}: exercises, solutions and mutants differ"
        )
        found += [
            pytest.param(chapter, stub, solutions[n], mutations[n], id=f"{path.stem}-{n}") for n, stub in zip(numbers, stubs)
        ]
    return found


def verdict(chapter: chapters.Chapter, stub: str, answer: str) -> tuple[bool, str]:
    """What the exercise cell says when its stub is replaced by an answer."""
    statements = [node for cell in chapter.cells("code") for node in ast.parse(chapters.text(cell)).body]
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom))]
    checker, name = (
        ast.unparse(argument) for argument in ast.parse(stub).body[-1].value.args
    )  # exercises.check(checker, answer)
    namespace: dict = {}
    exec(ast.unparse(ast.Module(imports, [])), namespace)
    exec(answer, namespace)
    return exercises.verdict(eval(checker, namespace), namespace[name])


@pytest.mark.parametrize(("chapter", "stub", "solution", "mutations"), collect())
def test_the_solution_passes_and_nothing_else(chapter, stub, solution, mutations):
    assert verdict(chapter, stub, solution) == (True, "right")
    without_check = ast.unparse(ast.Module(ast.parse(stub).body[:-1], []))
    assert not verdict(chapter, stub, without_check)[0], "the unanswered stub passes"
    assert len(mutations) >= 2
    for old, new in mutations:
        assert old in solution, f"{old!r} is not in the solution"
        passed, message = verdict(chapter, stub, solution.replace(old, new))
        assert not passed, f"the wrong version {old!r} -> {new!r} passes"
        assert len(message) > 15, f"the checker says too little: {message!r}"
