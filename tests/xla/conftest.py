"""Figures that the comparison with XLA found, shown when the tests have run."""

from __future__ import annotations

import pytest

LINES: list[str] = []


@pytest.fixture
def say():
    """A function that keeps a line for the end of the run."""
    return LINES.append


def pytest_terminal_summary(terminalreporter):
    if LINES:
        terminalreporter.section("XLA against the CPU")
        for line in LINES:
            terminalreporter.write_line(line)
