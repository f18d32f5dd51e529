"""Prediction: batches, intervals that cover, warnings outside the data, caching, export, int8 weights and latency."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bigmodel_utils import device as devices

if TYPE_CHECKING:
    from scipy import stats  # takes longer to import than all else here

Predictor = Callable[[Tensor], Tensor]  # features (m, d) -> predictions (m, k)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
    """Predictions for many rows, a batch at a time, in evaluation mode; the model's mode is put back.

    Args:
        model: features (B, d) -> predictions (B, k).
        x: (m, d) features, on any device.
        batch_size: rows a forward pass; memory grows with it, and the time a row falls.

    Returns:
        (m, k) predictions on the CPU.

    Raises:
        ValueError: for no rows, a batch size below 1, or features that are NaN or infinite; of the model, for a wrong width.
    """
    if batch_size < 1 or len(x) == 0:
        raise ValueError(f"needs rows and a batch_size of 1 or more, got {len(x)} rows and {batch_size}")
    refuse_nan(x)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        return torch.cat([model(batch.to(device)).cpu() for batch in x.split(batch_size)])
    finally:
        model.train(was_training)


def refuse_nan(x: Tensor) -> None:
    """Let only finite features (m, d) pass.

    Raises:
        ValueError: where some are NaN or infinite, with the first such row.
    """
    bad_rows = torch.nonzero(~torch.isfinite(x).flatten(1).all(dim=1)).flatten().tolist()
    if bad_rows:
        raise ValueError(
            f"NaN or infinite features in {len(bad_rows)} of {len(x)} rows, first in row {bad_rows[0]}: clean them before predicting"
        )


# Conformal intervals: Vovk, Gammerman and Shafer 2005; Papadopoulos et al. 2002; Lei et al. 2018, section 2.2.


def conformal_rank(n_calibration: int, alpha: float) -> int:
    """k = ceil((n + 1)(1 - alpha)): the k-th smallest of n calibration scores bounds a new score with probability k / (n + 1).

    Raises:
        ValueError: for no calibration rows, or alpha outside (0, 1).
    """
    if n_calibration < 1 or not 0 < alpha < 1:
        raise ValueError(f"needs calibration rows and 0 < alpha < 1, got {n_calibration} rows and alpha = {alpha}")
    return math.ceil((n_calibration + 1) * (1 - alpha) - 1e-9)  # 20 * (1 - 0.95) is a little above 1 in floating point


def conformal_half_width(residuals: Tensor, alpha: float) -> float:
    """q such that prediction ± q covers a new target with probability at least 1 - alpha, if it is exchangeable with these.

    Args:
        residuals: target - prediction of rows that the model was not trained on, any shape.
        alpha: the share of misses allowed.

    Returns:
        q, infinite where there are fewer than 1 / alpha - 1 residuals: so few cannot promise so much.

    Raises:
        ValueError: for no residuals, NaN among them, or alpha outside (0, 1).
    """
    scores = residuals.abs().flatten()
    if scores.isnan().any():
        raise ValueError("residuals hold NaN: a missing prediction or target has no place in a calibration")
    k = conformal_rank(len(scores), alpha)
    return math.inf if k > len(scores) else scores.sort().values[k - 1].item()


def coverage_law(n_calibration: int, n_test: int, alpha: float) -> stats.rv_discrete:
    """The exact law of how many of `n_test` new rows are covered, for any model and any data without ties.

    Beta-binomial with parameters n_test, k and n_calibration + 1 - k (Marques 2023, https://arxiv.org/abs/2303.02770).
    Its mean share is k / (n_calibration + 1).

    Raises:
        ValueError: where the half-width would be infinite.
    """
    from scipy import stats

    k = conformal_rank(n_calibration, alpha)
    if k > n_calibration:
        raise ValueError(f"{n_calibration} calibration rows cannot give a finite interval at alpha = {alpha}")
    return stats.betabinom(n_test, k, n_calibration + 1 - k)


# Applicability domain: how far from the training data a row is.


def count_similarity(x: Tensor, reference: Tensor) -> Tensor:
    """Tanimoto similarity of count vectors: sum of the minima over sum of the maxima; 1 for equal rows, 0 for disjoint ones.

    Args:
        x: (m, d) counts, none negative.
        reference: (n, d) counts.

    Returns:
        (m, n) similarities in [0, 1]; two all-zero rows have similarity 1.
    """
    shared, smaller = x.new_empty(len(x), len(reference)), torch.empty_like(reference)
    for row, counts in enumerate(x):  # a row at a time, in one buffer: an (m, n, d) tensor would not fit
        torch.sum(torch.minimum(counts, reference, out=smaller), dim=1, out=shared[row])
    either = x.sum(dim=1, keepdim=True) + reference.sum(dim=1) - shared  # min + max = sum
    return torch.where(either > 0, shared / either.clamp(min=1e-30), 1.0)


def nearest_similarity(x: Tensor, reference: Tensor) -> Tensor:
    """(m,) similarity of each row of x (m, d) to the row of `reference` (n, d) that is most like it."""
    return count_similarity(x, reference).max(dim=1).values


@dataclass(frozen=True)
class Domain:
    """The molecules that a model may be asked about: made of known elements, of known size, near to a known one."""

    elements: frozenset[str]
    max_atoms: int  # heavy atoms of the largest known molecule
    min_similarity: float  # to the nearest training molecule
    reference: Tensor  # (n, d) counts of the training molecules

    @classmethod
    def fit(cls, smiles: Sequence[str], reference: Tensor, calibration: Tensor, false_alarm: float = 0.05) -> Domain:
        """From what the model has seen.

        Args:
            smiles: the molecules that it was developed with.
            reference: (n, d) counts of the training molecules.
            calibration: (m, d) counts of further molecules of the same kind, for the threshold.
            false_alarm: the share of such molecules that may be warned about for their similarity.
        """
        molecules = [_molecule(text) for text in smiles]
        elements = frozenset(atom.GetSymbol() for molecule in molecules for atom in molecule.GetAtoms())
        strangeness = -nearest_similarity(calibration, reference)
        # Its conformal quantile: a new molecule of the same kind is stranger with probability <= false_alarm.
        least = -strangeness.sort().values[_finite_rank(len(calibration), false_alarm) - 1].item()
        return cls(elements, max(molecule.GetNumHeavyAtoms() for molecule in molecules), least, reference)

    def reasons(self, smiles: str, counts: Tensor) -> list[str]:
        """Why a prediction for this molecule should not be trusted; empty where nothing speaks against it.

        Args:
            smiles: the molecule.
            counts: its (d,) fingerprint.

        Raises:
            ValueError: for an invalid SMILES.
        """
        from rdkit import Chem

        molecule, found = _molecule(smiles), []
        foreign = sorted({atom.GetSymbol() for atom in molecule.GetAtoms()} - self.elements)
        if foreign:
            found.append(f"new element {', '.join(foreign)}")
        if len(Chem.GetMolFrags(molecule)) > 1:
            found.append("salt or mixture")
        elif Chem.GetFormalCharge(molecule):
            found.append("ion")
        if molecule.GetNumHeavyAtoms() > self.max_atoms:
            found.append("too large")
        if nearest_similarity(counts.unsqueeze(0), self.reference).item() < self.min_similarity:
            found.append("far from known")
        return found


def _finite_rank(n_calibration: int, alpha: float) -> int:
    k = conformal_rank(n_calibration, alpha)
    if k > n_calibration:
        raise ValueError(
            f"a false-alarm rate of {alpha} needs at least {math.ceil(1 / alpha) - 1} calibration rows, got {n_calibration}"
        )
    return k


def _molecule(smiles: str):
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():  # the error below says it better
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"{smiles!r} is not a valid SMILES string")
    return molecule


# Caching.


def canonical_smiles(smiles: str) -> str:
    """RDKit's one spelling of a molecule: "OCC" and "C(O)C" are both "CCO".

    Raises:
        ValueError: for an invalid SMILES.
    """
    from rdkit import Chem

    return Chem.MolToSmiles(_molecule(smiles))


class Cache:
    """Remembers predictions by molecule, whatever its spelling, and forgets the one longest unused when it is full.

    Args:
        predict_smiles: n canonical SMILES -> (n,) predictions.
        max_size: molecules remembered.
    """

    def __init__(self, predict_smiles: Callable[[list[str]], Tensor], max_size: int = 10_000):
        if max_size < 1:
            raise ValueError(f"max_size must be 1 or more, got {max_size}")
        self.predict_smiles, self.max_size = predict_smiles, max_size
        self.canonical = functools.lru_cache(max_size)(canonical_smiles)
        self.answers: OrderedDict[str, float] = OrderedDict()  # the longest unused first
        self.n_predicted = 0

    def __call__(self, smiles: Sequence[str]) -> Tensor:
        """(n,) predictions; the model sees each molecule that is not remembered once, all of them in one batch."""
        keys = [self.canonical(text) for text in smiles]
        new = [key for key in dict.fromkeys(keys) if key not in self.answers]
        answers = {key: self.answers[key] for key in keys if key in self.answers}
        if new:
            answers |= zip(new, self.predict_smiles(new).tolist())
            self.n_predicted += len(new)
        for key in keys:
            self.answers[key] = answers[key]
            self.answers.move_to_end(key)
        while len(self.answers) > self.max_size:
            self.answers.popitem(last=False)
        return torch.tensor([answers[key] for key in keys])


# Export.


def export_onnx(model: nn.Module, path: str | Path, n_features: int) -> None:
    """Write the model as one ONNX file: input "features" (batch, n_features), output "prediction", any batch size."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with _quiet_exporter():
            torch.onnx.export(
                model,
                (torch.zeros(2, n_features, device=device),),
                str(path),
                input_names=["features"],
                output_names=["prediction"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    finally:
        model.train(was_training)


def load_onnx(path: str | Path, n_threads: int = 1) -> Predictor:
    """An ONNX file as a function of features (m, d) float32, run by ONNX Runtime without torch's model code.

    The function refuses NaN and infinite features, which integer arithmetic may turn into ordinary numbers.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        refuse_nan(x)
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return run


def quantize_onnx(source: str | Path, target: str | Path) -> None:
    """Write a copy of an ONNX file that multiplies in int8: weights are rounded now, activations as they come.

    Weights get 7 of the 8 bits (`reduce_range`), because processors without VNNI instructions add pairs of 8-bit
    products in 16 bits, which overflow (ONNX Runtime's documentation of quantisation, "U8S8"): so the answers do not depend on the processor.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet_exporter():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporters' notes on optional packages and on their own deprecated calls; errors are still raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# Weights in 8 bits.


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to 255 evenly spaced levels, symmetric about 0: weight ≈ scale * codes.

    Args:
        weight: (d_out, d_in).

    Returns:
        codes (d_out, d_in) int8 in [-127, 127], and scale (d_out, 1) float32; no weight moves by more than scale / 2.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer that stores its weight as int8 codes and a scale a row, and multiplies in floating point."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        codes, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in) -> (B, d_out)."""
        return nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale.T + self.bias


def quantize(model: nn.Module) -> nn.Module:
    """A copy of the model with every linear layer's weight in int8; biases stay as they are."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model


@torch.no_grad()
def quantization_bound(layers: nn.Sequential, x: Tensor) -> Tensor:
    """How far int8 weights can move each output of a ReLU network, whatever the rounding did: an upper bound, in float64.

    A layer's error is at most |quantised weight| times the error of its input plus scale / 2 times the sum of its
    input's sizes; ReLU and dropout (off) add nothing.

    Args:
        layers: linear layers, ReLU and dropout, as `MLP.layers`.
        x: (m, d) features.

    Returns:
        (m, k) bounds.
    """
    h, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            codes, scale = quantize_rows(layer.weight)
            scale = scale.double()
            error = error @ (codes.double() * scale).abs().T + h.abs().sum(dim=1, keepdim=True) * scale.T / 2
            h = nn.functional.linear(h, layer.weight.double(), layer.bias.double())
        elif isinstance(layer, nn.ReLU):
            h = h.relu()
        elif not isinstance(layer, nn.Dropout):
            raise ValueError(f"the bound holds for linear layers, ReLU and dropout, not for {type(layer).__name__}")
    return error


# Latency.


def measure_latency(call: Callable[[], object], n_calls: int = 200, n_warmup: int = 10) -> np.ndarray:
    """(n_calls,) seconds of single calls, after some that do not count (caches fill, memory is allocated)."""
    for _ in range(n_warmup):
        call()
    seconds = np.empty(n_calls)
    for i in range(n_calls):
        begin = time.perf_counter()
        call()
        seconds[i] = time.perf_counter() - begin
    return seconds


def percentile(seconds: Sequence[float] | np.ndarray, q: float) -> float:
    """The nearest-rank percentile: the smallest measured value that at least q per cent of the calls do not exceed.

    Raises:
        ValueError: for no measurements, or q outside (0, 100].
    """
    if len(seconds) == 0 or not 0 < q <= 100:
        raise ValueError(f"needs measurements and 0 < q <= 100, got {len(seconds)} and q = {q}")
    return float(np.sort(seconds)[math.ceil(q / 100 * len(seconds) - 1e-9) - 1])


# Text from a causal model: one that is called as model(tokens, cache), with `config` and `new_cache`, such as models.GPT.


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution that the next token is drawn from: softmax(logits / temperature), cut off and normalised again.

    Args:
        logits: (B, V).
        temperature: below 1 sharper, above 1 flatter; 0 leaves only the most probable token.
        top_k: keep this many of the most probable tokens (Fan, Lewis and Dauphin 2018); None keeps all.
        top_p: of these keep the fewest whose probabilities sum to top_p (Holtzman et al. 2020, section 3.1); None keeps all.

    Returns:
        (B, V) probabilities.

    Raises:
        ValueError: for a negative or infinite temperature, top_k below 1, or top_p outside (0, 1].
    """
    _refuse_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)  # what rounds to 0 would divide 0 by 0
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: none becomes +inf
    if top_k is None and top_p is None:
        return logits.softmax(dim=-1)
    V = logits.shape[-1]
    values, order = logits.topk(V if top_k is None else min(top_k, V), dim=-1)  # the most probable first
    probabilities = values.softmax(dim=-1)
    if top_p is not None:
        before = nn.functional.pad(probabilities.cumsum(dim=-1)[:, :-1], (1, 0))  # the mass of the more probable ones
        probabilities = torch.where(before < top_p, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order, probabilities)


def _refuse_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k counts tokens to keep, 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is a probability in (0, 1], got {top_p}")


def _next_logits(model: nn.Module, tokens: Tensor, cache) -> Tensor:
    """(B, V) logits of the token after (B, T) tokens; reads only those that the cache has not seen.

    A text longer than the context is read as its last `context_length` tokens. Their positions, and what they have
    seen, are then others than the cache holds, so that the whole window is read again each time.
    """
    if tokens.ndim != 2:
        raise ValueError(f"expected tokens of shape (B, T), got {tuple(tokens.shape)}: put [None] behind a single text")
    context, device = model.config.context_length, next(model.parameters()).device
    if device.type == "xla":
        logits = logits_of_padded(model, tokens[:, -context:])
    elif cache is None or tokens.shape[1] > context:
        logits = model(tokens[:, -context:])[:, -1]
    else:
        new = tokens[:, cache.length :]
        # A single token is too little work to share: waiting for another thread takes longer than it saves.
        with devices.threads(1 if new.numel() == 1 else torch.get_num_threads()):
            logits = model(new, cache)[:, -1]
    if not (logits < math.inf).all():  # NaN is not below it, either; XLA's max would pass over NaN
        raise ValueError("the model's logits are NaN or infinite: did its training diverge?")
    return logits


def logits_of_padded(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, V) logits of the token after (B, T) tokens, by reading them as the beginning of a whole context.

    What stands behind the tokens is not seen by them. XLA compiles a program for each shape, and this has one for all T;
    so the place of the last token is data, too, and not part of the program.
    """
    T, device = tokens.shape[1], next(model.parameters()).device
    window = nn.functional.pad(tokens, (0, model.config.context_length - T)).to(device)
    return model(window).index_select(1, torch.tensor([T - 1]).to(device))[:, 0]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    n_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    top_p: float | None = None,
) -> Tensor:
    """Go on with texts, a token at a time, in evaluation mode; the model's mode is put back.

    Args:
        model: a GPT, or another causal model with its interface.
        tokens: (B, T) the beginnings, all of one length, at least 1.
        n_tokens: tokens to add to each.
        temperature: as for `token_probabilities`; 0 takes the most probable token each time.
        top_k: likewise.
        generator: of the random draws, which are made on its device; None uses torch's global one.
        use_cache: keep keys and values, so that a step costs one position; False reads the whole text each time. The
            logits are the same up to rounding. Under XLA there is none: each step reads a whole context, in one program.
        top_p: as for `token_probabilities`.

    Returns:
        (B, T + n_tokens) beginnings and continuations, on the device of `tokens`. Beyond the model's context each
        token depends on the `context_length` tokens before it.

    Raises:
        ValueError: for a negative n_tokens or as `token_probabilities`; for logits that are NaN; of the model, for
            tokens that it cannot read.
    """
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be 0 or more, got {n_tokens}")
    _refuse_sampling(temperature, top_k, top_p)
    device, was_training = next(model.parameters()).device, model.training
    is_xla = device.type == "xla"  # the text, whose length changes, then stays on the host
    text = nn.functional.pad(tokens.to("cpu" if is_xla else device), (0, n_tokens))  # (B, T + n_tokens), filled from the left
    model.eval()
    try:
        cache = model.new_cache(text.shape[-1]) if use_cache and not is_xla else None
        with _numpy_threads(torch.get_num_threads()):
            for length in range(tokens.shape[-1], text.shape[-1]):
                logits = _next_logits(model, text[..., :length], cache)
                if temperature == 0:
                    text[:, length] = logits.argmax(dim=-1).to(text.device)
                    continue
                probabilities = token_probabilities(logits, temperature, top_k, top_p)
                drawn_on = device if generator is None else generator.device
                text[:, length] = torch.multinomial(probabilities.to(drawn_on), 1, generator=generator)[:, 0].to(text.device)
    finally:
        model.train(was_training)
    return text.to(tokens.device)


def _numpy_threads(n_threads: int) -> contextlib.AbstractContextManager:
    """Inside it NumPy's matrix products, which a single token's are (`models.gpt.linear`), use that many threads."""
    return _numpy_libraries().limit(limits=n_threads, user_api="blas")


@functools.cache
def _numpy_libraries():
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@torch.no_grad()
def beam_search(
    model: nn.Module, tokens: Tensor, n_tokens: int, n_beams: int, end_token: int | None = None, use_cache: bool = True
) -> tuple[Tensor, Tensor]:
    """The most probable continuations, by keeping the `n_beams` best at each step; exact where none is ever dropped.

    Args:
        model: as for `generate`.
        tokens: (B, T) the beginnings, all of one length, at least 1.
        n_tokens: tokens to add to each.
        n_beams: continuations kept of each beginning; 1 is greedy.
        end_token: ends a continuation: it is filled up with more of this token, at no cost. None: all are n_tokens long.
        use_cache: as for `generate`.

    Returns:
        texts (B, n, T + n_tokens), the most probable first, with n = n_beams or, where fewer exist, all of them;
        and the natural logarithms of the continuations' probabilities (B, n).

    Raises:
        ValueError: for a negative n_tokens, n_beams below 1, an end_token that is no token, or logits that are NaN; of
            the model, for tokens that it cannot read.
    """
    V = model.config.vocab_size
    if n_tokens < 0 or n_beams < 1 or (end_token is not None and not 0 <= end_token < V):
        raise ValueError(
            f"needs n_tokens >= 0, n_beams >= 1 and an end_token below {V}, got {n_tokens}, {n_beams} and {end_token}"
        )
    text, was_training = tokens.to(next(model.parameters()).device), model.training
    B, n = len(text), 1  # a beginning's n continuations are neighbouring rows
    score = torch.zeros(B, 1, device=text.device)  # (B, n) log probabilities
    ended = torch.zeros(B, dtype=torch.bool, device=text.device)  # (B n,)
    model.eval()
    try:
        cache = model.new_cache(text.shape[-1] + n_tokens) if use_cache else None
        for _ in range(n_tokens):
            step = _next_logits(model, text, cache).log_softmax(dim=-1)  # (B n, V)
            if end_token is not None:
                is_end = torch.arange(V, device=step.device) == end_token
                step = torch.where(ended[:, None], torch.where(is_end, 0.0, -math.inf), step)
            total = score[:, :, None] + step.view(B, n, V)
            score, best = total.flatten(1).topk(min(n_beams, n * V), dim=1)  # (B, n) of the next n
            parents = (best // V + n * torch.arange(B, device=best.device)[:, None]).flatten()
            text = torch.cat([text[parents], (best % V).view(-1, 1).to(text)], dim=1)  # (B n, T)
            n = best.shape[1]
            if end_token is not None:
                ended = text[:, -1] == end_token
            if cache is not None:
                cache.select(parents)
    finally:
        model.train(was_training)
    exist = (score > -math.inf).any(dim=0)  # else filler, where fewer than n_beams are possible
    return text.view(B, n, -1)[:, exist].to(tokens.device), score[:, exist].to(tokens.device)
