"""JupyterLab in a real browser: every notebook opens as it was written, and Run All ends without an error."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import NOTEBOOKS, ROOT

from bigmodel_utils.report import chapters

ERRORS = """() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells.flatMap(
    (cell, index) => (cell.outputs ?? []).filter(output => output.output_type == 'error').map(
        output => `cell ${index}: ${output.ename}: ${output.evalue}`))"""


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """A window of JupyterLab over a copy of the notebooks; whatever it writes is thrown away."""
    pytest.importorskip("jupyterlab")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    places = {f"JUPYTER_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "BIGMODEL_OUTPUT": str(folder / "output")}
    options = [f"--ServerApp.{name}" for name in (f"port={port}", f"root_dir={folder / 'notebooks'}", "allow_root=True")]
    options += ["--no-browser", f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        environment = os.environ | places | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api?token={token}", server, folder)
        page = browser.new_page()
        page.goto(f"{address}/lab?token={token}&reset")
        page.wait_for_function("window.jupyterapp")
        page.evaluate("jupyterapp.restored.then(() => true)")
        yield page
        page.close()
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(address: str, server: subprocess.Popen, folder) -> None:
    """Until the server answers; a server that ended, or is silent for a minute and a half, is an error with its own words."""
    for _ in range(180):
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        if server.poll() is not None:
            break
    pytest.fail((folder / "log.txt").read_text()[-2000:])


def open_notebook(page, name: str) -> None:
    """Open it and wait until it is there."""
    page.evaluate(
        "async name => { const widget = await jupyterapp.commands.execute('docmanager:open', {path: name});"
        "await widget.context.ready; await widget.revealed; await widget.context.sessionContext.ready }",
        name,
    )


def close_notebook(page) -> None:
    """End its kernel and close it without saving."""
    page.evaluate(
        "async () => { const widget = jupyterapp.shell.currentWidget; await widget.context.sessionContext.shutdown();"
        "await widget.context.revert().catch(() => null); widget.close() }"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_opens_as_it_was_written(lab, path):
    open_notebook(lab, path.name)
    kept = "jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells.map(cell => cell.source)"
    sources = [source if isinstance(source, str) else "".join(source) for source in lab.evaluate(kept)]
    chapter = chapters.read(path)
    assert sources == [chapters.text(cell) for cell in chapter.notebook["cells"]]
    heading = lab.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-RenderedMarkdown h1").first
    heading.wait_for()
    assert heading.inner_text().startswith(chapter.title) and lab.locator(".jp-Dialog").count() == 0
    assert lab.evaluate(ERRORS) == []
    close_notebook(lab)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_start_here.ipynb", "03_regularized_loss.ipynb"])
def test_run_all_ends_without_an_error(lab, name):
    open_notebook(lab, name)
    lab.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs').then(() => true)")
    lab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
    counts = lab.evaluate(
        "jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"
        ".filter(cell => cell.cell_type == 'code').map(cell => cell.execution_count)"
    )
    assert lab.evaluate(ERRORS) == [] and counts == list(range(1, len(counts) + 1))
    close_notebook(lab)
