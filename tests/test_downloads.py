"""Downloads from a real server on this machine that cuts, stalls, lies and serves wrong bytes; loaders on small archives."""

import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_utils import data, downloads

CONTENT = np.random.default_rng(0).bytes(300_000)
SECONDS = 20  # that a test waits for another process before it fails


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under every path; each request uses up one scripted fault."""

    daemon_threads = True

    def __init__(self, content: bytes = CONTENT):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.faults = []  # functions of the handler, one for each request to come
        self.ranges = []  # the Range header of each request
        self.paths = []
        self.go_on = threading.Event()  # ends a stall

    def url(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        """A client that leaves is no error here."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        self.server.paths.append(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else serve
        fault(self)

    def log_message(self, *arguments):
        pass


def serve(handler, *, content=None, ranges=True, cut=None, stall=None, length=True, shift=0):
    """Answer as a good server would, but for the fault that is asked for.

    Args:
        content: other bytes than the server's.
        ranges: False ignores the Range header.
        cut, stall: position of the file at which the connection ends, or nothing comes until `go_on`.
        length: False sends no Content-Length, a number is added to the true one.
        shift: added to the begin that Content-Range names.
    """
    content = handler.server.content if content is None else content
    begin = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1]) if ranges and handler.headers["Range"] else 0
    if begin >= len(content):
        handler.send_error(416)
        return
    handler.send_response(206 if begin else 200)
    if begin:
        handler.send_header("Content-Range", f"bytes {begin + shift}-{len(content) - 1}/{len(content)}")
    if length is not False:
        handler.send_header("Content-Length", str(len(content) - begin + (length if length is not True else 0)))
    handler.end_headers()
    end = len(content) if cut is None else cut
    pause = end if stall is None else stall
    handler.wfile.write(content[begin:pause])
    if stall is not None:
        handler.server.go_on.wait(SECONDS)
        handler.wfile.write(content[max(begin, pause) : end])


def fails(code: int):
    return lambda handler: handler.send_error(code)


def redirects_to(url: str):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", url)
        handler.end_headers()

    return redirect


def started(content: bytes = CONTENT) -> Server:
    server = Server(content)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def stopped(server: Server) -> None:
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server():
    server = started()
    yield server
    stopped(server)


@pytest.fixture
def mirror():
    server = started()
    yield server
    stopped(server)


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    """No waits, and a test that would leave the machine fails."""
    connect = socket.create_connection

    def checked(address, *arguments, **options):
        assert address[0] == "127.0.0.1", f"a request to {address}"
        return connect(address, *arguments, **options)

    monkeypatch.setattr(socket, "create_connection", checked)
    monkeypatch.setattr(downloads, "RETRY_WAITS_S", (0, 0, 0))
    monkeypatch.setattr(downloads, "STALL_S", 0.5)
    monkeypatch.delenv("BIGMODEL_OFFLINE", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def described(*servers: Server, content: bytes = CONTENT, **changes) -> downloads.Download:
    """The server's file as its publisher would describe it."""
    checksum = hashlib.sha256(content).hexdigest()
    urls = tuple(server.url() for server in servers)
    return dataclasses.replace(downloads.Download("file.bin", urls, checksum, len(content), "the Bible"), **changes)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_a_file_is_fetched_once(server, tmp_path):
    folder = tmp_path / "new" / "cache"
    path = downloads.fetch(described(server), folder)
    assert path == folder / "file.bin" and path.read_bytes() == CONTENT
    assert downloads.fetch(described(server), folder) == path
    assert server.ranges == [None]
    assert files(folder) == {"file.bin"}


def test_a_cut_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.faults = [functools.partial(serve, cut=100_000), functools.partial(serve, cut=200_000)]
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, len(CONTENT)), max_size=2), st.booleans(), st.booleans())
def test_whatever_the_cuts_the_file_arrives(tmp_path_factory, cuts, ranges, length):
    server = started()
    try:
        server.faults = [functools.partial(serve, cut=cut, ranges=ranges, length=length) for cut in cuts]
        path = downloads.fetch(described(server), tmp_path_factory.mktemp("cache"))
        assert path.read_bytes() == CONTENT
    finally:
        stopped(server)


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.faults = [functools.partial(serve, cut=100_000), functools.partial(serve, ranges=False)]
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_stalled_transfer_is_given_up_and_resumed(server, tmp_path):
    server.faults = [functools.partial(serve, stall=100_000)]
    begin = time.monotonic()
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert 0.4 < time.monotonic() - begin < 10
    assert server.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("lie", [-1000, 1000, len(CONTENT)])
def test_another_length_than_the_cards_is_not_even_read(server, mirror, tmp_path, lie):
    server.faults = [functools.partial(serve, length=lie)]
    assert downloads.fetch(described(server, mirror), tmp_path).read_bytes() == CONTENT
    assert (len(server.ranges), len(mirror.ranges)) == (1, 1)


def test_a_length_that_no_card_contradicts_is_held_against_what_comes(server, tmp_path):
    server.faults = [functools.partial(serve, length=50)] * 3
    with pytest.raises(data.DataError, match=r"cut after 300,000 of 300,050 bytes \(3 attempts\)"):
        downloads.fetch(described(server, n_bytes=None), tmp_path)
    assert downloads.fetch(described(server, n_bytes=None), tmp_path).read_bytes() == CONTENT


def test_more_bytes_than_expected_are_refused(server, tmp_path):
    server.faults = [functools.partial(serve, content=CONTENT * 20, length=False)]
    with pytest.raises(data.DataError, match="sends more than the 300,000 bytes"):
        downloads.fetch(described(server), tmp_path)
    assert files(tmp_path) == set()


def test_wrong_bytes_are_refused_with_both_checksums(server, tmp_path):
    wrong = CONTENT[:-1] + b"!"
    server.faults = [functools.partial(serve, content=wrong)]
    download = described(server)
    with pytest.raises(data.DataError) as error:
        downloads.fetch(download, tmp_path)
    for part in (hashlib.sha256(wrong).hexdigest(), download.sha256, server.url(), "Use the Bible instead"):
        assert part in str(error.value)
    assert files(tmp_path) == set()


def test_the_next_mirror_serves_after_wrong_bytes(server, mirror, tmp_path):
    server.faults = [functools.partial(serve, content=CONTENT[::-1])]
    assert downloads.fetch(described(server, mirror), tmp_path).read_bytes() == CONTENT
    assert (server.ranges, mirror.ranges) == ([None], [None])


@pytest.mark.parametrize("n_kept", [1000, len(CONTENT)])
def test_a_damaged_beginning_is_thrown_away(server, tmp_path, n_kept):
    (tmp_path / "file.bin.part").write_bytes(bytes(n_kept))
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] is None


def test_a_whole_part_needs_no_request(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == []


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=300004-", None]


def test_a_range_that_was_not_asked_for_is_refused(server, mirror, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.faults = [functools.partial(serve, shift=7)]
    assert downloads.fetch(described(server, mirror), tmp_path).read_bytes() == CONTENT
    assert (server.ranges, mirror.ranges) == (["bytes=1000-"], [None])


def test_errors_of_the_server_are_waited_out(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(downloads, "RETRY_WAITS_S", (0, 1, 5))
    monkeypatch.setattr(time, "sleep", waits.append)
    server.faults = [fails(503), fails(500)]
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 3
    assert [wait for wait in waits if wait >= 1] == [1, 5]


def test_a_file_that_is_not_there_is_asked_for_once(server, mirror, tmp_path):
    server.faults = [fails(404)]
    assert downloads.fetch(described(server, mirror), tmp_path).read_bytes() == CONTENT
    assert len(server.ranges) == 1


def test_every_failure_is_told(server, mirror, tmp_path):
    server.faults, mirror.faults = [fails(404)], [fails(503)] * 3
    with pytest.raises(data.DataError) as error:
        downloads.fetch(described(server, mirror), tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "file.bin could not be fetched:"
    assert server.url() in lines[1] and "HTTP 404" in lines[1]
    assert mirror.url() in lines[2] and "HTTP 503" in lines[2] and "3 attempts" in lines[2]
    assert lines[3] == "Use the Bible instead."


def test_a_redirect_is_followed_with_its_range(server, mirror, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.faults = [redirects_to(mirror.url("/elsewhere"))]
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert (mirror.paths, mirror.ranges) == (["/elsewhere"], ["bytes=1000-"])


@pytest.mark.parametrize("url", ["http://example.org/file", "ftp://127.0.0.1/file", "file:///etc/passwd"])
def test_nothing_but_https_is_fetched(server, mirror, tmp_path, url):
    server.faults = [redirects_to(url)] * 3
    assert downloads.fetch(described(server, mirror), tmp_path).read_bytes() == CONTENT
    assert len(mirror.ranges) == 1
    with pytest.raises(ValueError, match=f"only https is fetched, got {re.escape(url)}"):
        downloads.fetch(described(urls=(url,), filename="other.bin"), tmp_path)


FETCH = """
import dataclasses, json, resource, sys
from bigmodel_utils import data, downloads
description, folder, limit = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
sys.stdin.readline()
try:
    print(downloads.fetch(downloads.Download(**description), folder))
except data.DataError as error:
    print(error)
"""


def fetching(download: downloads.Download, folder: Path, limit: int = 0) -> subprocess.Popen:
    """Another process that will fetch; `limit` bytes at most go into a file of it."""
    arguments = [json.dumps(dataclasses.asdict(download)), str(folder), str(limit)]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stdin=pipe, stdout=pipe, text=True)


def let_go(process: subprocess.Popen) -> None:
    """Let a process begin to fetch; what it imports took it some time."""
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def wait_until(condition) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < SECONDS, "waited in vain"
        time.sleep(0.01)


def test_two_processes_fetch_once(server, tmp_path):
    server.faults = [functools.partial(serve, stall=100_000)]
    first, second = (fetching(described(server), tmp_path) for _ in range(2))
    let_go(first)
    wait_until(lambda: server.ranges)
    let_go(second)
    time.sleep(0.3)  # time enough to ask, if it did not wait for the first
    server.go_on.set()
    printed = [process.communicate(timeout=SECONDS)[0] for process in (first, second)]
    assert printed == [f"{tmp_path / 'file.bin'}\n"] * 2
    assert server.ranges == [None]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_killed_process_leaves_what_came(server, tmp_path):
    server.faults = [functools.partial(serve, stall=1000)]
    process = fetching(described(server), tmp_path)
    let_go(process)
    part = tmp_path / "file.bin.part"
    wait_until(lambda: part.is_file() and part.stat().st_size == 1000)
    process.kill()
    process.communicate(timeout=SECONDS)
    assert files(tmp_path) == {"file.bin.part"}
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of a file")
def test_a_disk_that_fills_up_is_told_at_once(server, tmp_path):
    process = fetching(described(server), tmp_path, limit=50_000)
    let_go(process)
    printed, _ = process.communicate(timeout=SECONDS)
    assert "no room left for" in printed and "set BIGMODEL_CACHE" in printed
    assert server.ranges == [None]


def test_a_disk_that_is_too_small_is_told_before(server, tmp_path, monkeypatch):
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage._replace(free=240_000))
    with pytest.raises(data.DataError, match=r"0\.2 MB free, 0\.3 MB are needed: make room, or set BIGMODEL_CACHE"):
        downloads.fetch(described(server), tmp_path)
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:100_000])  # the rest fits
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT


def test_offline_only_the_cache_is_looked_into(server, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGMODEL_OFFLINE", "1")
    with pytest.raises(data.DataError, match="BIGMODEL_OFFLINE is set: unset it, or use the Bible instead"):
        downloads.fetch(described(server), tmp_path)
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert downloads.fetch(described(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == []
    monkeypatch.setenv("BIGMODEL_OFFLINE", "0")
    downloads.fetch(described(server, filename="other.bin"), tmp_path)
    assert server.ranges == [None]


def test_without_a_network_the_default_is_named(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(data.DataError, match=r"refused.*\n.*Use the Bible instead"):
            downloads.fetch(described(urls=(url,)), tmp_path)


def test_without_names_of_hosts_nothing_is_waited_for(tmp_path, monkeypatch):
    asked = []

    def unknown(address, *arguments, **options):
        asked.append(address[0])
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(data.DataError, match=r"not known.*\n.*not known.*\n.*Use the Bible instead"):
        downloads.fetch(described(urls=("https://one.invalid/file", "https://two.invalid/file")), tmp_path)
    assert asked == ["one.invalid", "two.invalid"]


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"download is one of tiny-shakespeare, .* got 'imbd'"):
        downloads.fetch("imbd", tmp_path)


def test_the_cache_folder_is_the_environments_or_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path))
    assert downloads.cache_folder() == tmp_path
    monkeypatch.delenv("BIGMODEL_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert downloads.cache_folder() == tmp_path / "xdg" / "bigmodel-utils"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert downloads.cache_folder() == Path.home() / ".cache" / "bigmodel-utils"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert downloads.cache_folder() == Path.home() / "Library" / "Caches" / "bigmodel-utils"


def archive(members: dict[str, bytes]) -> bytes:
    """A tar.gz of these files."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return memory.getvalue()


def test_unpacking_stays_in_its_folder_and_happens_once(tmp_path):
    good, evil = tmp_path / "good.tar.gz", tmp_path / "cache" / "evil.tar.gz"
    good.write_bytes(archive({"a/b.txt": b"text"}))
    folder = downloads.unpack(good)
    assert folder == tmp_path / "good" and (folder / "a" / "b.txt").read_bytes() == b"text"
    (folder / "a" / "b.txt").write_bytes(b"kept")
    assert (downloads.unpack(good) / "a" / "b.txt").read_bytes() == b"kept"
    evil.parent.mkdir()
    evil.write_bytes(archive({"first.txt": b"", "../escaped.txt": b"evil"}))
    with pytest.raises(tarfile.OutsideDestinationError):
        downloads.unpack(evil)
    assert files(evil.parent) == {"evil.tar.gz"} and not (tmp_path / "escaped.txt").exists()


@pytest.fixture
def serving(monkeypatch, tmp_path):
    """A function that puts contents in the place of the downloads of these names, on servers of their own."""
    servers = []

    def put(**contents: bytes) -> Path:
        for name, content in contents.items():
            servers.append(started(content))
            name = name.replace("_", "-")
            filename = downloads.DOWNLOADS[name].filename
            download = described(servers[-1], content=content, filename=filename)
            monkeypatch.setitem(downloads.DOWNLOADS, name, download)
        return tmp_path

    yield put
    for server in servers:
        stopped(server)


def test_tiny_shakespeare_is_cut_at_90_and_95_percent(serving):
    text = "".join(chr(65 + i % 26) for i in range(200))
    parts = downloads.load_tiny_shakespeare(serving(tiny_shakespeare=text.encode()))
    assert [len(part) for part in parts.values()] == [180, 10, 10]
    assert "".join(parts.values()) == text


def test_tiny_stories_come_one_by_one(serving):
    content = "One day.\nThe end.\n<|endoftext|>\n\n<|endoftext|>\nA “cat”.\n<|endoftext|>\nno mark at the end".encode()
    stories = downloads.read_tiny_stories("validation", serving(tiny_stories_validation=content))
    assert list(stories) == ["One day.\nThe end.", "A “cat”.", "no mark at the end"]


def test_cifar10_rows_are_classes_and_planes(serving):
    rows = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    rows[:, :, 0] %= 10
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    members = {f"cifar-10-batches-bin/{name}.bin": batch.tobytes() for name, batch in zip(names, rows)}
    splits = downloads.load_cifar10(serving(cifar_10=archive({"cifar-10-batches-bin/readme.html": b"", **members})))
    assert {name: tuple(split.x.shape) for name, split in splits.items()} == {
        "train": (18, 3, 32, 32), "validation": (2, 3, 32, 32), "test": (4, 3, 32, 32)
    }  # fmt: skip
    planes = rows[4, 3, 1:].reshape(3, 32, 32) / 255  # the last training row: red, green, blue
    np.testing.assert_allclose(splits["validation"].x[1].numpy(), planes, atol=1e-7)
    assert splits["validation"].y.tolist() == rows[4, 2:, 0].tolist()
    assert splits["test"].y.tolist() == rows[5, :, 0].tolist()


def test_imdb_labels_come_from_the_folders(serving):
    members = {
        "aclImdb/README": b"",
        "aclImdb/train/pos/0_9.txt": "schön".encode(),
        "aclImdb/train/neg/0_3.txt": b"bad",
        "aclImdb/train/unsup/0_0.txt": b"no label",
        "aclImdb/test/neg/1_1.txt": b"worse",
    }
    table = downloads.load_imdb(serving(imdb=archive(members)))
    rows = list(table.itertuples(index=False, name=None))
    assert rows == [("schön", True, "train"), ("bad", False, "train"), ("worse", False, "test")]


def test_multi30k_pairs_lines(serving):
    def pair(stem, english, german):
        return archive({f"{stem}.de": german.encode(), f"{stem}.en": english.encode(), f"._{stem}.de": b"\x00"})

    folder = serving(
        multi30k_train=pair("train", "A dog.\nA cat.\n", "Ein Hund.\nEine Katze.\n"),
        multi30k_validation=pair("val", "A man.\n", "Ein Mann.\n"),
        multi30k_test=pair("test", "A door.\n", "Eine Tür.\n"),
    )
    assert downloads.load_multi30k(folder) == {
        "train": [("A dog.", "Ein Hund."), ("A cat.", "Eine Katze.")],
        "validation": [("A man.", "Ein Mann.")],
        "test": [("A door.", "Eine Tür.")],
    }


def test_librispeech_lists_utterances_with_their_recordings(serving):
    folder = "LibriSpeech/dev-clean/84/121123"
    transcript = b"84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS THAN FIVE MINUTES\n"
    members = {f"{folder}/84-121123-{i:04d}.flac": bytes([i]) for i in range(2)}
    table = downloads.list_librispeech(
        "dev-clean", serving(librispeech_dev_clean=archive({f"{folder}/84-121123.trans.txt": transcript, **members}))
    )
    assert table.text.tolist() == ["GO DO YOU HEAR", "BUT IN LESS THAN FIVE MINUTES"]
    assert [path.read_bytes() for path in table.path] == [b"\x00", b"\x01"]
    assert (table.speaker.unique().tolist(), table.chapter.unique().tolist()) == ([84], [121123])


def test_each_file_has_a_card_and_addresses():
    filenames = [download.filename for download in downloads.DOWNLOADS.values()]
    assert len(set(filenames)) == len(filenames)
    on_cards = [name for card in downloads.CARDS.values() for name in card.sha256]
    assert sorted(on_cards) == sorted(filenames)
    for download in downloads.DOWNLOADS.values():
        assert re.fullmatch("[0-9a-f]{64}", download.sha256)
        assert all(url.startswith("https://") for url in download.urls)


def test_checksums_are_those_of_torchaudio():
    package = importlib.util.find_spec("torchaudio")
    if package is None:
        pytest.skip("torchaudio is not installed")
    for module, part in (("librispeech", "/resources/12/"), ("speechcommands", "/speech_commands_v0.02")):
        text = (Path(package.origin).parent / "datasets" / f"{module}.py").read_text()
        published = {url.rpartition("/")[2]: checksum for url, checksum in re.findall(r'"(http\S+\.gz)":\s+"(\w{64})"', text)}
        ours = {d.urls[0].rpartition("/")[2]: d.sha256 for d in downloads.DOWNLOADS.values() if part in d.urls[0]}
        assert ours and ours.items() <= published.items()
