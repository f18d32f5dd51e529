"""The larger data sets, fetched over the network: verified, resumed after a cut, shared by all processes of a user."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bigmodel_utils.data import Card, DataError, Split

STALL_S = 30  # seconds without a byte, after which a connection counts as dead
RETRY_WAITS_S = (0, 1, 5)  # before each attempt at one address
CHUNK_BYTES = 1 << 20
USER_AGENT = "bigmodel-utils"  # some servers refuse Python's own


@dataclass(frozen=True)
class Download:
    """One file that can be fetched."""

    filename: str  # in the cache
    urls: tuple[str, ...]  # the publisher's, then mirrors
    sha256: str
    n_bytes: int | None  # None where no published source says it
    instead: str  # what to use without a network


HUGGING_FACE = ("https://huggingface.co", "https://hf-mirror.com")
OPENSLR = ("https://www.openslr.org", "https://us.openslr.org", "https://openslr.trmal.net")
TINY_STORIES_PATH = "/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
FINEWEB_EDU_PATH = (
    "/datasets/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/013_00000.parquet"
)
BIBLE, BIBLE_PAIRS = "the King James Bible (text.load_verses)", "the Bible in two translations (text.aligned_verses)"
SMALL_IMAGES, SPEECH = "data.load_mnist or data.load_fashion_mnist", "synthetic voices (speech.synthesize)"


def _multi30k(filename: str, checksum: str) -> Download:
    path = f"datasets/Multi30k/{filename}"
    urls = (
        f"https://raw.githubusercontent.com/neychev/small_DL_repo/master/{path}",
        f"https://cdn.jsdelivr.net/gh/neychev/small_DL_repo@master/{path}",
    )
    return Download(f"multi30k-{filename}", urls, checksum, None, BIBLE_PAIRS)


def _librispeech(part: str, checksum: str, n_bytes: int) -> Download:
    urls = tuple(f"{server}/resources/12/{part}.tar.gz" for server in OPENSLR)
    return Download(f"librispeech-{part}.tar.gz", urls, checksum, n_bytes, SPEECH)


DOWNLOADS = {
    "tiny-shakespeare": Download(
        "tiny-shakespeare.txt",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/data/tinyshakespeare/input.txt",
        ),
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
        BIBLE,
    ),
    "tiny-stories-train": Download(
        "tiny-stories-train.txt",
        tuple(f"{server}{TINY_STORIES_PATH}TinyStories-train.txt" for server in HUGGING_FACE),
        "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f",
        1_924_281_556,
        BIBLE,
    ),
    "tiny-stories-validation": Download(
        "tiny-stories-validation.txt",
        tuple(f"{server}{TINY_STORIES_PATH}TinyStories-valid.txt" for server in HUGGING_FACE),
        "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        19_447_282,
        BIBLE,
    ),
    "fineweb-edu": Download(
        "fineweb-edu-10bt-013.parquet",
        tuple(f"{server}{FINEWEB_EDU_PATH}" for server in HUGGING_FACE),
        "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de",
        540_632_672,
        BIBLE,
    ),
    "multi30k-train": _multi30k("training.tar.gz", "20140d013d05dd9a72dfde46478663ba05737ce983f478f960c1123c6671be5e"),
    "multi30k-validation": _multi30k("validation.tar.gz", "a7aa20e9ebd5ba5adce7909498b94410996040857154dab029851af3a866da8c"),
    "multi30k-test": _multi30k("mmt16_task1_test.tar.gz", "6d1ca1dba99e2c5dd54cae1226ff11c2551e6ce63527ebb072a1f70f72a5cd36"),
    "wmt-news-tests": Download(
        "wmt19-dev.tgz",
        ("https://data.statmt.org/wmt19/translation-task/dev.tgz",),
        "7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7",
        38_654_961,
        BIBLE_PAIRS,
    ),
    "imdb": Download(
        "aclImdb_v1.tar.gz",
        ("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
        "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
        84_125_825,
        "5,000 food reviews (data.load_reviews)",
    ),
    "cifar-10": Download(
        "cifar-10-binary.tar.gz",
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        170_052_171,
        SMALL_IMAGES,
    ),
    "imagenette-160": Download(
        "imagenette2-160.tgz",
        ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",),
        "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
        99_003_388,
        SMALL_IMAGES,
    ),
    "speech-commands": Download(
        "speech_commands_v0.02.tar.gz",
        (
            "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
            "https://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        ),
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        2_428_923_189,
        SPEECH,
    ),
    "librispeech-dev-clean": _librispeech(
        "dev-clean", "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3", 337_926_286
    ),
    "librispeech-test-clean": _librispeech(
        "test-clean", "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23", 346_663_984
    ),
    "librispeech-train-clean-100": _librispeech(
        "train-clean-100", "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2", 6_387_309_499
    ),
    "aqsoldb": Download(
        "aqsoldb.tab",
        ("https://dataverse.harvard.edu/api/access/datafile/:persistentId?persistentId=doi:10.7910/DVN/OVHAW8/RLVXZU",),
        "5370aa67615adb2f11806ed1aaed37c2bf91e634d36ebaf40509c16d5cede8a0",
        None,
        "the embedded solubility data (data.load_solubility)",
    ),
}
TFDS = "tensorflow-datasets 4.9.10 (its checksum files)"


def _card(prefix: str, **fields) -> Card:
    """The card of the downloads whose names begin with `prefix`."""
    files = [download for name, download in DOWNLOADS.items() if name.startswith(prefix)]
    sizes = [file.n_bytes for file in files]
    return Card(sha256={file.filename: file.sha256 for file in files}, n_bytes=None if None in sizes else sum(sizes), **fields)


CARDS = {
    "tiny-shakespeare": _card(
        "tiny-shakespeare",
        title="Scenes of Shakespeare's plays, 1.1 million characters",
        source="Karpathy 2015 (https://github.com/karpathy/char-rnn)",
        licence="public domain",
        n_rows={"characters": 1_115_394},
        splits="by position: the first 90 % train, the next 5 % validate, the last 5 % test",
        checksum_source=TFDS,
        flaws=(
            "no published splits: losses of others are on other characters",
            "small: a model of some million parameters learns it by heart",
            "parts of several plays, one after the other: the end is from other plays than the beginning",
        ),
    ),
    "tiny-stories": _card(
        "tiny-stories",
        title="Short stories in the words of a small child, written by GPT-3.5 and GPT-4",
        source="Eldan and Li 2023 (https://arxiv.org/abs/2305.07759), https://huggingface.co/datasets/roneneldan/TinyStories",
        licence="CDLA-Sharing-1.0",
        n_rows={"train": 2_119_719, "validation": 21_990},
        checksum_source="the content address that Hugging Face's storage gives the file; the same in several public repositories",
        flaws=(
            "written by models, from prompts that share their pattern: many stories resemble each other, across the splits too",
            "quotation marks and dashes are wrongly encoded in places",
            "some stories are empty or break off",
        ),
    ),
    "fineweb-edu": _card(
        "fineweb-edu",
        title="Educational pages of the web: the last and smallest of the 14 files of the sample of 10 billion tokens",
        source="Penedo et al. 2024 (https://arxiv.org/abs/2406.17557), https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
        licence="ODC-By 1.0 for the compilation and Common Crawl's terms; the pages belong to their authors",
        n_rows={},
        splits="none published",
        checksum_source="Hugging Face's large-file pointer; the same in several public repositories",
        flaws=(
            "what is educational was decided by a classifier that learnt from a language model's marks",
            "pages may hold personal data, falsehoods and questions of the tests that models are measured by",
            "reading it needs pyarrow (pandas.read_parquet)",
        ),
    ),
    "multi30k": _card(
        "multi30k",
        title="Captions of photographs in English and German",
        source="Elliott et al. 2016 (https://arxiv.org/abs/1605.00459), from a mirror: the publisher's server did not answer",
        licence="none stated with the files; captions of Flickr30k, whose photographs are not included",
        n_rows={"train": 29_000, "validation": 1014, "test": 1000},
        checksum_source="torchtext 0.18 (datasets/multi30k.py)",
        flaws=(
            "captions only: short sentences in the present tense, people above all",
            "some sentences cannot be translated without the photograph",
            "one translation of each",
        ),
    ),
    "wmt-news-tests": _card(
        "wmt-news-tests",
        title="The news test sets of the WMT translation tasks to 2018, several language pairs",
        source="https://www.statmt.org/wmt19/translation-task.html",
        licence="for research",
        n_rows={"newstest2014 de-en": 3003},
        splits="test sets only: the training data (hundreds of MB to many GB a pair) are not offered here",
        checksum_source=TFDS,
        flaws=(
            "before 2019 half of each set was translated the other way round: sources that are translations are easier "
            "(Graham, Haddow and Koehn 2020, https://aclanthology.org/2020.emnlp-main.6)",
            "old and public: large language models have read them",
        ),
    ),
    "imdb": _card(
        "imdb",
        title="Film reviews, positive or negative",
        source="Maas et al. 2011 (https://aclanthology.org/P11-1015), https://ai.stanford.edu/~amaas/data/sentiment/",
        licence="none stated; the reviews belong to their authors",
        n_rows={"train": 25_000, "test": 25_000},
        checksum_source=TFDS,
        flaws=(
            "reviews of 5 and 6 stars of 10 are left out, so that the rest is easier than life",
            "about 2.9 % of the test labels are wrong (Northcutt et al. 2021, https://arxiv.org/abs/2103.14749)",
            "up to 30 reviews of one film; marks of the web page (<br />) in the text; half positive, which life is not",
        ),
    ),
    "cifar-10": _card(
        "cifar-10",
        title="Small colour photographs, 32 x 32, in ten classes",
        source="Krizhevsky 2009 (https://www.cs.toronto.edu/~kriz/cifar.html)",
        licence="none stated",
        n_rows={"train": 50_000, "test": 10_000},
        splits="the test images as published; of the training images the last 5,000 validate",
        checksum_source=TFDS,
        flaws=(
            "3.3 % of the test images have a near duplicate in train (Barz and Denzler 2020, https://arxiv.org/abs/1902.00423)",
            "about 0.5 % of the test labels are wrong (Northcutt et al. 2021, https://arxiv.org/abs/2103.14749)",
            "drawn from the Tiny Images of the web, a set that its authors withdrew in 2020 for what was in it",
        ),
    ),
    "imagenette-160": _card(
        "imagenette-160",
        title="Ten easy classes of ImageNet, the shorter side 160 pixels",
        source="fast.ai (https://github.com/fastai/imagenette)",
        licence="Apache-2.0 (the compilation); ImageNet's terms for the photographs: research, not commerce",
        n_rows={"train": 9469, "validation": 3925},
        checksum_source=TFDS,
        flaws=(
            "the classes were chosen to be easy to tell apart",
            "most of its validation images stand in ImageNet's training set: a model pretrained there has seen them",
        ),
    ),
    "speech-commands": _card(
        "speech-commands",
        title="One-second recordings of 35 words by many speakers, version 0.02",
        source="Warden 2018 (https://arxiv.org/abs/1804.03209)",
        licence="CC BY 4.0",
        n_rows={"all": 105_829},
        splits="by speaker: validation_list.txt and testing_list.txt in the archive; all others train",
        checksum_source=f"torchaudio 2.11 (datasets/speechcommands.py) and {TFDS}",
        flaws=(
            "recorded on visitors' own devices and checked by ear quickly: some are cut off, silent or another word",
            "some are shorter than one second",
            "words are unequally frequent: 1,500 to 4,100 recordings of each",
        ),
    ),
    "librispeech": _card(
        "librispeech",
        title="Read English from audiobooks: 100 hours to train, 5 to validate, 5 to test",
        source="Panayotov et al. 2015 (https://doi.org/10.1109/ICASSP.2015.7178964), https://www.openslr.org/12",
        licence="CC BY 4.0; recordings and texts: public domain (LibriVox, Project Gutenberg)",
        n_rows={"train-clean-100": 28_539, "dev-clean": 2703, "test-clean": 2620},
        splits="by speaker",
        checksum_source=f"torchaudio 2.11 (datasets/librispeech.py) and {TFDS}",
        flaws=(
            "read, not spoken freely; old books; mostly accents close to that of the United States",
            "'clean' are the speakers whom an older recogniser understood best",
            "transcripts in capitals, without punctuation, aligned by machine",
        ),
    ),
    "aqsoldb": _card(
        "aqsoldb",
        title="Measured aqueous solubility of 9,982 compounds, log10 of mol/L, from nine sources",
        source="Sorkun, Khetan and Er 2019 (https://doi.org/10.1038/s41597-019-0151-1), https://doi.org/10.7910/DVN/OVHAW8",
        licence="CC0 1.0",
        n_rows={"all": 9982},
        splits="none published",
        checksum_source="beignet (Genentech; datasets/_aqsoldb_solubility_dataset.py)",
        flaws=(
            "salts, mixtures and inorganic compounds among them: the models of this course describe one molecule",
            "its sources share molecules with the embedded set: drop those of its test split before training here",
            "values of one compound differ between sources, by a standard deviation of more than 0.5 in groups G2 and G4",
        ),
    ),
}


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable BIGMODEL_CACHE, else the platform's folder for caches."""
    if folder := os.environ.get("BIGMODEL_CACHE"):
        return Path(folder).expanduser()
    home = Path.home()
    folders = {"win32": home / "AppData" / "Local", "darwin": home / "Library" / "Caches"}
    return folders.get(sys.platform, Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")) / "bigmodel-utils"


def fetch(download: str | Download, cache: str | Path | None = None) -> Path:
    """The path of a file that is in the cache or, verified, was fetched into it now.

    A transfer that was cut, even with its process, goes on where it stopped. Processes that want the same file wait for the
    first. Without a network, or with the environment variable BIGMODEL_OFFLINE=1, only the cache is looked into.

    Args:
        download: a name of `DOWNLOADS`, or a description of your own.
        cache: the folder; by default `cache_folder()`.

    Raises:
        ValueError: for an unknown name, or an address that is neither https nor on this machine.
        DataError: where no address gives the file that was described, the disk is full, or there is no network; the message
            says what to use instead.
    """
    if isinstance(download, str):
        if download not in DOWNLOADS:
            raise ValueError(f"download is one of {', '.join(DOWNLOADS)}, got {download!r}")
        download = DOWNLOADS[download]
    if refused := [url for url in download.urls if not _is_trusted(url)]:
        raise ValueError(f"only https is fetched, got {', '.join(refused)}")
    path = Path(cache or cache_folder()) / download.filename
    if path.is_file():  # it was verified before it got this name
        return path
    if os.environ.get("BIGMODEL_OFFLINE", "0") not in ("", "0"):
        raise DataError(f"{path} is not there and BIGMODEL_OFFLINE is set: unset it, or use {download.instead} instead")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.is_file():  # another process may have fetched it meanwhile
            _fetch_from_any(download, path)
    return path


def _fetch_from_any(download: Download, path: Path) -> None:
    failures = []
    for url in download.urls:
        failure = _fetch_from(url, download, path)
        if failure is None:
            return
        failures.append(f"  {url}: {failure}")
    raise DataError("\n".join([f"{download.filename} could not be fetched:", *failures, f"Use {download.instead} instead."]))


def _fetch_from(url: str, download: Download, path: Path) -> str | None:
    """Fetch from one address, with retries; returns why it failed, or None."""
    part = path.with_name(f"{path.name}.part")
    failure = None
    for wait_s in RETRY_WAITS_S:
        time.sleep(wait_s)
        n_kept = part.stat().st_size if part.is_file() else 0
        try:
            _transfer(url, download, part, n_kept)
        except urllib.error.HTTPError as error:
            failure = f"HTTP {error.code} {error.reason}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # longer than the file: begin anew
            elif error.code < 500 and error.code not in (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS):
                return failure  # it will not come
        except (OSError, http.client.HTTPException) as error:
            failure = str(error) or type(error).__name__
            if isinstance(getattr(error, "reason", None), socket.gaierror):
                return failure  # no such host, or no network
        except _WrongFile as error:
            part.unlink(missing_ok=True)
            return str(error)
        else:
            failure = _accept(part, path, download.sha256)
            if failure is None or n_kept == 0:  # else the kept beginning may be at fault
                return failure
    return f"{failure} ({len(RETRY_WAITS_S)} attempts)"


def _accept(part: Path, path: Path, expected: str) -> str | None:
    """Give the right file its name and delete another; returns what is wrong with it, or None."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == expected:
        os.replace(part, path)
        return None
    part.unlink()
    return f"the file has sha256 {found}, but {expected} is expected"


class _WrongFile(Exception):
    """The server has another file than the one described."""


def _transfer(url: str, download: Download, part: Path, n_kept: int) -> None:
    """Bring `part`, of which the first `n_kept` bytes are there, to its full length."""
    if n_kept == download.n_bytes:
        return
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={n_kept}-"} if n_kept else {})
    with _OPENER.open(urllib.request.Request(url, headers=headers), timeout=STALL_S) as response:
        start, n_bytes = _extent(response, n_kept)
        if download.n_bytes is not None and n_bytes not in (None, download.n_bytes):
            raise _WrongFile(f"the server offers {n_bytes:,} bytes, but {download.n_bytes:,} are expected")
        n_bytes = n_bytes or download.n_bytes
        _check_disk(part, (n_bytes or 0) - start)
        n_written = _append(response, part, start, n_bytes, download.filename)
    if n_bytes is not None and n_written != n_bytes:
        raise ConnectionError(f"cut after {n_written:,} of {n_bytes:,} bytes")


def _extent(response: http.client.HTTPResponse, n_kept: int) -> tuple[int, int | None]:
    """Position of the first byte that the server sends, and the size of the whole file where it says so."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        extent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if extent is None or int(extent[1]) != n_kept:
            raise _WrongFile(f"asked for bytes from {n_kept} on, the server sends {response.headers.get('Content-Range')!r}")
        return n_kept, None if extent[2] == "*" else int(extent[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdigit() else None


def _append(response: http.client.HTTPResponse, part: Path, start: int, n_bytes: int | None, name: str) -> int:
    """Write the response from position `start` on; returns the length of the file."""
    bar = tqdm(total=n_bytes, initial=start, unit="B", unit_scale=True, desc=name, disable=None)  # only on a terminal
    with bar, part.open("r+b" if start else "wb") as file:
        file.seek(start)
        while chunk := response.read1(CHUNK_BYTES):  # what has come: waiting for a full chunk would lose it in a cut
            _write(file, chunk)
            bar.update(len(chunk))
            if n_bytes is not None and file.tell() > n_bytes:
                raise _WrongFile(f"the server sends more than the {n_bytes:,} bytes that are expected")
        return file.tell()


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
        file.flush()  # a process that is killed keeps what came
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"no room left for {file.name}: set BIGMODEL_CACHE to a folder on a larger disk") from error
        raise


def _check_disk(part: Path, n_missing: int) -> None:
    n_free = shutil.disk_usage(part.parent).free
    if n_free < n_missing:
        raise DataError(
            f"{part.parent} has {n_free / 1e6:,.1f} MB free, {n_missing / 1e6:,.1f} MB are needed: make room, or set "
            "BIGMODEL_CACHE to a folder on a larger disk"
        )


def _is_trusted(url: str) -> bool:
    address = urllib.parse.urlsplit(url)
    return address.scheme == "https" or (address.scheme, address.hostname) == ("http", "127.0.0.1")


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to an address that `fetch` would refuse."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not _is_trusted(url):
            raise urllib.error.URLError(f"redirects to {url}, but only https is fetched")
        return super().redirect_request(request, file, code, message, headers, url)


_OPENER = urllib.request.build_opener(_CheckedRedirects)


def unpack(archive: Path) -> Path:
    """Unpack a tar archive of the cache once, into a folder beside it.

    Nothing is written outside of that folder (tarfile's "data" filter), and a folder that was begun is not taken for a whole
    one.

    Returns:
        the folder.
    """
    folder = archive.with_name(archive.name.partition(".tar")[0].removesuffix(".tgz"))
    with filelock.FileLock(f"{archive}.lock"):
        if not folder.is_dir():
            begun = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                with tarfile.open(archive) as tar:
                    tar.extractall(begun, filter="data")
                begun.rename(folder)
            finally:
                shutil.rmtree(begun, ignore_errors=True)
    return folder


def load_tiny_shakespeare(cache: str | Path | None = None) -> dict[str, str]:
    """Shakespeare's plays as text: "train" (the first 90 %), "validation" (the next 5 %) and "test"."""
    text = fetch("tiny-shakespeare", cache).read_text(encoding="utf-8")
    a, b = int(0.9 * len(text)), int(0.95 * len(text))
    return {"train": text[:a], "validation": text[a:b], "test": text[b:]}


def read_tiny_stories(split: str = "validation", cache: str | Path | None = None) -> Iterator[str]:
    """The stories one by one, so that the 1.9 GB of "train" need not fit in memory; empty ones are left out.

    Args:
        split: "train" or "validation".
    """
    lines: list[str] = []
    with fetch(f"tiny-stories-{split}", cache).open(encoding="utf-8") as file:
        for line in file:
            if line.strip() == "<|endoftext|>":
                yield from filter(None, ["".join(lines).strip()])
                lines = []
            else:
                lines.append(line)
    yield from filter(None, ["".join(lines).strip()])


def load_cifar10(cache: str | Path | None = None) -> dict[str, Split]:
    """Photographs: "train" (45,000), "validation" (5,000, the last of the published training images) and "test" (10,000).

    Returns:
        splits of x (m, 3, 32, 32) float32 in [0, 1] and y (m,) int64: airplane, automobile, bird, cat, deer, dog, frog, horse,
        ship, truck.
    """
    with tarfile.open(fetch("cifar-10", cache)) as tar:
        contents = {Path(member.name).name: tar.extractfile(member).read() for member in tar if member.name.endswith(".bin")}
    *train, test = (_cifar_batch(contents[f"{name}.bin"]) for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    n_train = len(y) * 9 // 10
    return {"train": Split(x[:n_train], y[:n_train]), "validation": Split(x[n_train:], y[n_train:]), "test": Split(*test)}


def _cifar_batch(content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    rows = np.frombuffer(bytearray(content), np.uint8).reshape(-1, 1 + 3 * 32 * 32)  # the class, then the planes
    return torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32) / np.float32(255)), torch.from_numpy(rows[:, 0]).long()


def load_imdb(cache: str | Path | None = None) -> pd.DataFrame:
    """Film reviews as published: columns `text`, `is_positive`, `split` ("train" or "test")."""
    rows = []
    with tarfile.open(fetch("imdb", cache)) as tar:
        for member in tar:
            if found := re.fullmatch(r"(?:\./)?aclImdb/(train|test)/(pos|neg)/\d+_\d+\.txt", member.name):
                rows.append((tar.extractfile(member).read().decode("utf-8"), found[2] == "pos", found[1]))
    return pd.DataFrame(rows, columns=["text", "is_positive", "split"])


def load_multi30k(cache: str | Path | None = None) -> dict[str, list[tuple[str, str]]]:
    """Captions as pairs (English, German): "train" (29,000), "validation" (1,014) and "test" (1,000)."""
    return {split: _caption_pairs(fetch(f"multi30k-{split}", cache)) for split in ("train", "validation", "test")}


def _caption_pairs(archive: Path) -> list[tuple[str, str]]:
    with tarfile.open(archive) as tar:
        files = {Path(member.name).suffix: member for member in tar if not Path(member.name).name.startswith(".")}
        english, german = (tar.extractfile(files[suffix]).read().decode("utf-8").splitlines() for suffix in (".en", ".de"))
    return list(zip(english, german, strict=True))


def list_librispeech(part: str = "dev-clean", cache: str | Path | None = None) -> pd.DataFrame:
    """Recordings of a part, unpacked, one row an utterance: columns `path` (FLAC), `speaker`, `chapter`, `text`.

    Args:
        part: "dev-clean", "test-clean" or "train-clean-100".
    """
    folder = unpack(fetch(f"librispeech-{part}", cache)) / "LibriSpeech" / part
    rows = []
    for transcript in sorted(folder.glob("*/*/*.trans.txt")):
        for line in transcript.read_text(encoding="utf-8").splitlines():
            utterance, _, text = line.partition(" ")
            speaker, chapter, _ = utterance.split("-")
            rows.append((transcript.with_name(f"{utterance}.flac"), int(speaker), int(chapter), text))
    return pd.DataFrame(rows, columns=["path", "speaker", "chapter", "text"])
