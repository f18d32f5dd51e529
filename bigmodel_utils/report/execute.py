"""One notebook, executed by papermill in a process of its own, with limits on time, memory and output.

However it ends, `status.json` in its work folder says what went wrong and in which cell; nothing there means all went well.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigmodel_utils import results
from bigmodel_utils.report import chapters
from bigmodel_utils.report.chapters import Chapter
from bigmodel_utils.report.profiles import Profile

OUTPUT_LIMIT = 30_000_000  # characters that one notebook may print and draw: more than ten times the largest chapter's


def execute(chapter: Chapter, profile: Profile, work: Path, memory_limit_bytes: float) -> None:
    """Execute one notebook into `work`, where status.json tells of a failure.

    Args:
        memory_limit_bytes: at more than this, held by the kernel and all that it started, the notebook is stopped.

    Raises:
        SystemExit: with code 1, where a cell failed, hung, or went over a limit.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    current: dict[str, Any] = {}  # the cell being executed
    done = threading.Event()
    watched = (work, current, memory_limit_bytes, os.getppid(), done)
    threading.Thread(target=_watch, args=watched, daemon=True).start()
    papermill.engines.papermill_engines.register("limited", _engine(work, current))
    try:
        papermill.execute_notebook(
            str(chapter.path),
            str(work / f"{chapter.name}.ipynb"),
            parameters=profile.parameters.get(chapter.name),
            engine_name="limited",
            kernel_name="python3",
            progress_bar=False,
            cwd=str(work),
            execution_timeout=profile.cell_timeout_s,
        )
        _normalize(work / f"{chapter.name}.ipynb")
        return
    except papermill.PapermillExecutionError as error:
        failure = {"cell": error.cell_index, "source": error.source, "error": f"{error.ename}: {error.evalue}"}
    except CellTimeoutError:
        error = f"ran longer than {profile.cell_timeout_s} s (cell_timeout_s of profile {profile.name!r})"
        failure = current | {"error": error}
    except DeadKernelError:
        error = "the kernel died (out of memory?): lower the sizes in the profile, or close other programs"
        failure = current | {"error": error}
    finally:
        done.set()
    (work / "status.json").write_text(json.dumps(failure))
    raise SystemExit(1)


def _normalize(path: Path) -> None:
    """Leave out what changes from run to run, such as papermill's times."""
    results.write_atomically(path, chapters.dump(chapters.normalize(json.loads(path.read_text(encoding="utf-8")))))


def _engine(work: Path, current: dict[str, Any]) -> type:
    """papermill's engine, which notes the cell that runs and ends a notebook that prints without end."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class Client(PapermillNotebookClient):
        n_characters = 0

        def execute_cell(self, cell, cell_index, **options):
            current.update(cell=cell_index, source=cell.source)
            return super().execute_cell(cell, cell_index, **options)

        def process_message(self, message, *arguments):
            content = message["content"]
            shown = [content.get("text", ""), *content.get("data", {}).values()]
            self.n_characters += sum(len(value) for value in shown if isinstance(value, str))
            if self.n_characters > OUTPUT_LIMIT:
                _end(
                    work, current, f"the notebook printed more than {OUTPUT_LIMIT / 1e6:.0f} MB: print less, or save to a file"
                )
            return super().process_message(message, *arguments)

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, execution_timeout=None, start_timeout=60, **_):
            client = Client(nb_man, timeout=execution_timeout, startup_timeout=start_timeout, kernel_name=kernel_name)
            return client.execute()

    return Engine


def _watch(work: Path, current: dict[str, Any], memory_limit_bytes: float, parent: int, done: threading.Event) -> None:
    """End the notebook when it holds too much memory, and when the build that started it was killed."""
    import psutil

    this = psutil.Process()
    while not done.wait(0.5):  # seconds; a look around takes some milliseconds
        if os.getppid() != parent:
            _end(work, current, "the build was killed")
        held_bytes = 0
        for process in [this, *this.children(recursive=True)]:
            with suppress(psutil.Error):  # ended meanwhile
                held_bytes += process.memory_info().rss
        if held_bytes > memory_limit_bytes:
            error = f"held {held_bytes / 1e9:.2f} GB of memory, more than the limit of {memory_limit_bytes / 1e9:.2f} GB"
            _end(work, current, f"{error} (--memory-gb): lower the sizes in the profile")


def _end(work: Path, current: dict[str, Any], error: str) -> None:
    """Leave at once, the kernel first: it may be in no state to be asked."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            process.kill()
    if work.is_dir():
        (work / "status.json").write_text(json.dumps(current | {"error": error}))
    os._exit(1)
