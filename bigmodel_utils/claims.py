"""Claims: every number or comparison that the prose states, held to an executed check.

A claim has an id, a sentence, a computed value, the reference it is held against, a tolerance and a source.
`check` tests one number, `judge` sums several findings up into a verdict on a statement of somebody else's.
Both append to the ledger of the running notebook, which `results.save` writes and the report prints.
Prose cites a claim by a link to its id, for instance ``R2 of [0.88](#05-mlp-r2)``, and that of another notebook by
``[0.88](05_train_mlp.ipynb#05-mlp-r2)``.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field

RELATIONS = {
    "==": lambda value, reference, tolerance: abs(value - reference) <= tolerance,
    "<=": lambda value, reference, tolerance: value <= reference + tolerance,
    ">=": lambda value, reference, tolerance: value >= reference - tolerance,
    "<": lambda value, reference, tolerance: value < reference + tolerance,
    ">": lambda value, reference, tolerance: value > reference - tolerance,
}
SIGNS = {"==": "=", "<=": "≤", ">=": "≥", "<": "<", ">": ">"}
OUTCOMES = ("fails", "not supported", "supported with conditions", "not tested", "supported", "holds")  # worst first
MARKS = {"pass": "✓", "fail": "✗", "not tested": "–"}

ledger: list[Claim] = []


@dataclass(frozen=True)
class Claim:
    """One checked statement, as the ledger keeps it.

    `status` is "pass", "fail" or "not tested"; `verdict` is empty for a number and
    "supported", "supported with conditions" or "not supported" for a judged statement.
    """

    id: str
    statement: str
    value: float | None
    reference: float | None
    tolerance: float
    relation: str
    source: str
    status: str
    unit: str = ""
    verdict: str = ""
    findings: dict[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the claim was tested and holds."""
        return self.status == "pass"

    @property
    def outcome(self) -> str:
        """One of OUTCOMES: the verdict on somebody's statement, or what became of a number."""
        return (self.status == "pass" and self.verdict) or {"pass": "holds", "fail": "fails"}.get(self.status, self.status)

    def figures(self) -> str:
        """The value against its reference, at the digits that the tolerance makes meaningful."""
        if self.verdict:
            return self.verdict
        if self.status == "not tested":
            return "not tested at these sizes"
        value = format_number(self.value, self.tolerance)
        reference = format_number(self.reference, self.tolerance)
        margin = f" ± {self.tolerance:.3g}" if self.tolerance else ""
        unit = f" {self.unit}" if self.unit else ""
        return f"{value}{unit}, held to {SIGNS[self.relation]} {reference}{margin}{unit}"

    def _repr_markdown_(self) -> str:
        line = f"{MARKS[self.status]} **{self.id}**: {self.statement} (*{self.figures()}*; {self.source})"
        findings = [f"- {'yes' if holds else 'no'}: {finding}" for finding, holds in self.findings.items()]
        return "\n".join([line, "", *findings] if findings else [line])

    def __repr__(self) -> str:
        return f"{MARKS[self.status]} {self.id}: {self.statement} ({self.figures()})"

    def _ipython_display_(self) -> None:
        """Nothing: `check` and `judge` have shown the claim already."""


def check(
    id: str,
    statement: str,
    value: float,
    reference: float,
    tolerance: float,
    source: str,
    *,
    relation: str = "==",
    unit: str = "",
    tested: bool = True,
) -> Claim:
    """Hold `value` against `reference`, record the claim in the ledger, and show it.

    A failing claim does not raise: it is published as failed, and the build that contains it fails.

    Args:
        id: unique id, chapter first, such as "03-gradient-sympy".
        statement: one plain sentence.
        value: the number computed here (a bool counts as 0 or 1).
        reference: the number it is held against: theory, a library's answer, a published figure.
        tolerance: absolute, in the unit of `value`; 0 for an exact or one-sided claim.
        source: where the reference comes from, Markdown allowed.
        relation: "==" (within the tolerance), "<=", ">=", "<" or ">".
        unit: shown behind the numbers; give times and rates one ("s", "GFLOP/s", "× faster").
        tested: False where the sizes of this run cannot show it (recorded as "not tested").

    Returns:
        the recorded claim.

    Raises:
        ValueError: for an id used twice, an unknown relation, a negative tolerance or a reference that is no number.
    """
    if relation not in RELATIONS:
        raise ValueError(f"claim {id!r}: unknown relation {relation!r}; use one of {', '.join(RELATIONS)}")
    value, reference, tolerance = float(value), float(reference), float(tolerance)
    if not math.isfinite(reference) or not tolerance >= 0:
        raise ValueError(f"claim {id!r}: needs a finite reference and a tolerance >= 0, got {reference} and {tolerance}")
    holds = RELATIONS[relation](value, reference, tolerance)  # NaN holds nowhere
    status = ("pass" if holds else "fail") if tested else "not tested"
    return _record(Claim(id, statement, value, reference, tolerance, relation, source, status, unit))


def judge(id: str, statement: str, findings: dict[str, bool], source: str, *, tested: bool = True) -> Claim:
    """Give a verdict on somebody's statement from findings of this notebook, record it, and show it.

    The verdict is "supported" if all findings hold, "not supported" if none does, and otherwise
    "supported with conditions"; the findings say which. A verdict of any kind passes: it is the finding.

    Args:
        id: unique id, such as "04-article-adam-faster".
        statement: the statement, quoted.
        findings: a sentence for each condition tested, and whether the statement held there.
        source: where the statement stands.
        tested: False where the sizes of this run cannot show it.

    Raises:
        ValueError: for an id used twice or no findings.
    """
    if not findings:
        raise ValueError(f"claim {id!r}: a verdict needs at least one finding")
    findings = {finding: bool(holds) for finding, holds in findings.items()}
    n_held = sum(findings.values())
    verdict = "supported" if n_held == len(findings) else "not supported" if n_held == 0 else "supported with conditions"
    status = "pass" if tested else "not tested"
    verdict = verdict if tested else "not tested at these sizes"
    return _record(Claim(id, statement, None, None, 0.0, "==", source, status, "", verdict, findings))


def _record(claim: Claim) -> Claim:
    if any(claim.id == other.id for other in ledger):
        raise ValueError(f"claim id {claim.id!r} is used twice; ids are unique (restart the kernel and run all to re-check)")
    ledger.append(claim)
    _show(claim)
    return claim


def _show(claim: Claim) -> None:
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if get_ipython() is None:
        return
    from IPython.display import display

    data = {"text/markdown": claim._repr_markdown_(), "text/plain": repr(claim)}
    display(data, raw=True, metadata={"claim": asdict(claim)})


def format_number(value: float | None, tolerance: float = 0.0) -> str:
    """Three significant digits, or fewer where the tolerance makes the last ones meaningless.

    >>> format_number(0.87534), format_number(0.87534, 0.02), format_number(2.2e-16, 1e-12), format_number(124439808)
    ('0.875', '0.88', '0', '124,439,808')
    """
    if value is None or not math.isfinite(value):
        return str(value)
    if tolerance > 0:
        value = round(value, max(0, math.ceil(-math.log10(tolerance) - 1e-9)))
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}"


LINK = re.compile(r"\[([^\]]*)\]\((?:\d\d_\w+\.ipynb)?#(\d\d-[a-z0-9-]+)\)")
NUMBER = re.compile(r"(?<![\w(.])[-−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def stored(notebook: dict) -> dict[str, dict]:
    """The claims in a notebook's stored outputs, by id, each with the fields of `Claim`."""
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    found = (output.get("metadata", {}).get("claim") for output in outputs)
    return {claim["id"]: claim for claim in found if claim}


def prose_errors(markdown: str, claims: dict[str, dict]) -> list[str]:
    """What is wrong with the claim links of a piece of prose: unknown ids, and numbers that the claim does not bear.

    A link's number must equal the claim's value or its reference at the digits that the prose shows; a link
    without a number (to a verdict, say) needs only a claim that was tested. Claims not tested are skipped.

    Args:
        markdown: the prose.
        claims: for each id a mapping with the fields of `Claim`.
    """
    errors = []
    for text, id in LINK.findall(markdown):
        if id not in claims:
            errors.append(f"the prose cites claim {id!r}, which no cell checks")
            continue
        claim, shown = claims[id], NUMBER.search(text)
        if claim["status"] == "not tested" or shown is None or claim["value"] is None:
            continue
        scale = 100.0 if "%" in text else 1.0
        if not any(_agrees(shown.group(), scale * claim[figure]) for figure in ("value", "reference")):
            figures = f"{claim['value']:.6g} (reference {claim['reference']:.6g})"
            errors.append(f"the prose says {text!r} for claim {id!r}, whose value is {figures}")
    return errors


def _agrees(shown: str, figure: float) -> bool:
    """Whether a number as written is `figure` rounded to the digits written."""
    digits = shown.replace(",", "").replace("−", "-")
    mantissa, _, exponent = digits.partition("e")
    n_decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(float(digits) - figure) <= 0.5 * 10.0**-n_decimals * (1 + 1e-6)
