"""Exercises that check themselves: `check` runs a chapter's checker on the reader's answer and says what is wrong.

A checker takes the answer (a function, as a rule), compares what it returns with something independent,
and raises AssertionError with a message that helps; the chapters' checkers are in the modules of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def verdict(checker: Callable[[Any], None], answer: Any) -> tuple[bool, str]:
    """Whether the answer passes, and the message for the reader; an answer that raises does not pass."""
    try:
        checker(answer)
    except NotImplementedError:
        return False, "not answered yet"
    except AssertionError as error:
        return False, f"not yet: {error}"
    except Exception as error:  # the reader's code may raise anything
        return False, f"it raised {type(error).__name__}: {error}"
    return True, "right"


def check(checker: Callable[[Any], None], answer: Any) -> None:
    """Print the verdict on the reader's answer; never raises, so that the notebook runs to its end unanswered."""
    passed, message = verdict(checker, answer)
    print(f"{'✓' if passed else '○'} {message}")
