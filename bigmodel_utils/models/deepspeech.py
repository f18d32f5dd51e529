"""Speech to text without a pronunciation dictionary: log-probabilities of letters for each frame, for `ctc` to read.

DeepSpeech (Hannun et al. 2014, https://arxiv.org/abs/1412.5567): three layers on each frame, one bidirectional recurrent layer.
DeepSpeech2 (Amodei et al. 2015, https://arxiv.org/abs/1512.02595): convolutions over time and frequency, several recurrent layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class DeepSpeechConfig:
    """Shape of the first Deep Speech.

    Raises:
        ValueError: for sizes below 1, a negative context, a clip of 0 or less, or a dropout outside [0, 1).
    """

    n_features: int = 128  # numbers a frame of sound, such as log mel energies
    d_hidden: int = 2048  # units of each hidden layer
    n_classes: int = 40  # labels, the blank among them
    context: int = 0  # frames on either side that the first layer sees too; 5, 7 or 9 in the paper, 0 in torchaudio
    dropout: float = 0.0  # behind the layers that are not recurrent; 0.05 to 0.1 in the paper (section 2.1)
    clip: float = 20.0  # activations are min(max(0, z), clip) (section 2)

    def __post_init__(self):
        if min(self.n_features, self.d_hidden, self.n_classes) < 1 or self.context < 0 or self.clip <= 0:
            raise ValueError(f"sizes are 1 or more, the context 0 or more, the clip above 0, got {self}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")

    @classmethod
    def named(cls, name: str) -> DeepSpeechConfig:
        """A published size: "deepspeech", torchaudio's with 128 features and 40 labels.

        Raises:
            ValueError: for another name.
        """
        if name != "deepspeech":
            raise ValueError(f"unknown speech model {name!r}; known: deepspeech")
        return cls()

    @property
    def d_input(self) -> int:
        """Numbers that the first layer sees: a frame and those around it."""
        return self.n_features * (2 * self.context + 1)

    @property
    def n_parameters(self) -> int:
        """Five linear maps (d_in + 1) d_out, and a recurrent layer of 2 d^2 + 2 d in either direction."""
        d = self.d_hidden
        return (self.d_input + 1) * d + 3 * (d + 1) * d + 2 * (2 * d * d + 2 * d) + (d + 1) * self.n_classes


class DeepSpeech(nn.Module):
    """Frame by frame three clipped-ReLU layers, then a bidirectional recurrent one, then one more and the labels (section 2).

    As in torchaudio the recurrent layer's ReLU is not clipped; in the paper it is.
    """

    def __init__(self, config: DeepSpeechConfig = DeepSpeechConfig()):
        super().__init__()
        self.config = config
        d = config.d_hidden
        self.frame_layers = nn.ModuleList(nn.Linear(d_in, d) for d_in in (config.d_input, d, d))
        self.recurrent = nn.RNN(d, d, nonlinearity="relu", bidirectional=True, batch_first=True)
        self.joint_layer = nn.Linear(d, d)
        self.classifier = nn.Linear(d, config.n_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities of the labels at each frame.

        Args:
            x: frames (B, T, n_features).
            lengths: (B,) frames of each recording, 1 to T; the frames behind are padding, and what comes out there has no meaning.
                None: no padding.

        Returns:
            (B, T, n_classes).

        Raises:
            ValueError: for frames of another width, or lengths that do not fit.
        """
        x = _mask(x, check_input(x, lengths, self.config.n_features))
        h = _with_context(x, self.config.context)  # (B, T, d_input)
        for layer in self.frame_layers:
            h = self.activate(layer(h))  # (B, T, d_hidden)
        h = self.activate(self.joint_layer(run_both_ways(self.recurrent, h, lengths)))
        return self.classifier(h).log_softmax(dim=-1)  # (B, T, n_classes)

    def activate(self, z: Tensor) -> Tensor:
        """Dropout of min(max(0, z), clip)."""
        return F.dropout(z.clamp(0, self.config.clip), self.config.dropout, self.training)

    def translate_reference(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchaudio's names into ours: "fc1.fc.weight" becomes "frame_layers.0.weight"."""
        new = {f"fc{k + 1}.fc": f"frame_layers.{k}" for k in range(3)}
        new |= {"bi_rnn": "recurrent", "fc4.fc": "joint_layer", "out": "classifier"}
        translated = {}
        for name, value in state_dict.items():
            module, _, parameter = name.removeprefix("module.").rpartition(".")
            translated[f"{new[module]}.{parameter}" if module in new else name] = value
        return translated


@dataclass(frozen=True)
class DeepSpeech2Config:
    """Shape of Deep Speech 2; the convolutions of the defaults are the paper's two-layer, two-dimensional ones (section 3.5).

    Raises:
        ValueError: for sizes below 1, even filters, an unknown cell or a dropout outside [0, 1).
    """

    n_features: int = 161  # frequencies a frame: a window of 20 ms at 16 kHz has 161
    n_classes: int = 29  # labels: blank, 26 letters, apostrophe, space
    n_channels: tuple[int, ...] = (32, 32)  # of each convolution
    kernel_sizes: tuple[tuple[int, int], ...] = ((11, 41), (11, 21))  # frames and frequencies of each filter, odd
    strides: tuple[tuple[int, int], ...] = ((2, 2), (1, 2))  # frames and frequencies from one filter position to the next
    n_layers: int = 5  # recurrent layers
    d_hidden: int = 800  # units of each recurrent layer, in either direction
    cell: str = "gru"  # "gru" or "rnn", a simple recurrence with ReLU
    dropout: float = 0.0  # between the recurrent layers
    clip: float = 20.0  # activations of the convolutions are min(max(0, z), clip) (section 3.1)

    def __post_init__(self):
        if not len(self.n_channels) == len(self.kernel_sizes) == len(self.strides) >= 1:
            raise ValueError(f"each convolution needs channels, a filter and a stride, got {self}")
        filters = [side for kernel_size in self.kernel_sizes for side in kernel_size]
        sizes = [*self.n_channels, *filters, *(step for stride in self.strides for step in stride)]
        if min(self.n_features, self.n_classes, self.n_layers, self.d_hidden, *sizes) < 1 or self.clip <= 0:
            raise ValueError(f"sizes are 1 or more and the clip is above 0, got {self}")
        if any(side % 2 == 0 for side in filters):
            raise ValueError(f"kernel_sizes are odd, so that a filter has a middle, got {self.kernel_sizes}")
        if self.cell not in ("gru", "rnn"):
            raise ValueError(f"cell is gru or rnn, got {self.cell!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got {self.dropout}")

    @property
    def d_recurrent_inputs(self) -> list[int]:
        """Numbers a frame into each recurrent layer: channels times remaining frequencies, then d_hidden."""
        n_frequencies = self.n_features
        for _, stride in self.strides:
            n_frequencies = _shrunk(n_frequencies, stride)
        return [self.n_channels[-1] * n_frequencies] + [self.d_hidden] * (self.n_layers - 1)

    @property
    def n_parameters(self) -> int:
        """Convolutions, recurrent layers (three gates in a GRU, two directions), the normalisations' 2 a number, and the labels."""
        n, d_in, d, n_gates = 0, 1, self.d_hidden, 3 if self.cell == "gru" else 1
        for d_out, (n_frames, n_frequencies) in zip(self.n_channels, self.kernel_sizes):
            n, d_in = n + (n_frames * n_frequencies * d_in + 2) * d_out, d_out
        n += sum(2 * d_layer + 2 * n_gates * (d_layer * d + d * d + 2 * d) for d_layer in self.d_recurrent_inputs)
        return n + 2 * d + (d + 1) * self.n_classes


class DeepSpeech2(nn.Module):
    """Convolutions over time and frequency, then bidirectional recurrent layers, then the labels (section 3).

    One simplification: the paper normalises W x within the recurrent layers (section 3.2), here each layer's input x is normalised.
    """

    def __init__(self, config: DeepSpeech2Config = DeepSpeech2Config()):
        super().__init__()
        self.config = config
        d_in = (1, *config.n_channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(*channels, size, stride, tuple(side // 2 for side in size), bias=False)
            for channels, size, stride in zip(pairwise(d_in), config.kernel_sizes, config.strides)
        )
        self.conv_norms = nn.ModuleList(nn.BatchNorm2d(n) for n in config.n_channels)
        widths = config.d_recurrent_inputs
        recurrent, options = (nn.GRU, {}) if config.cell == "gru" else (nn.RNN, {"nonlinearity": "relu"})
        options = {"bidirectional": True, "batch_first": True, **options}
        self.layers = nn.ModuleList(recurrent(width, config.d_hidden, **options) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in (*widths, config.d_hidden))
        self.classifier = nn.Linear(config.d_hidden, config.n_classes)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Frames that come out for recordings of these numbers of frames: ceil(length / stride) at each convolution."""
        for stride, _ in self.config.strides:
            lengths = _shrunk(lengths, stride)
        return lengths

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Log-probabilities of the labels at each frame that the convolutions leave.

        Args:
            x: frames (B, T, n_features).
            lengths: (B,) frames of each recording, 1 to T; the frames behind are padding. None: no padding.

        Returns:
            (B, T', n_classes) with T' = output_lengths(T); what stands behind `output_lengths(lengths)` has no meaning.

        Raises:
            ValueError: for frames of another width, or lengths that do not fit.
        """
        lengths = check_input(x, lengths, self.config.n_features)
        h = _mask(x, lengths).unsqueeze(1)  # (B, 1, T, n_features)
        for conv, norm, (stride, _) in zip(self.convs, self.conv_norms, self.config.strides):
            lengths = None if lengths is None else _shrunk(lengths, stride)
            h = norm(conv(h)).clamp(0, self.config.clip)  # (B, C, T', F')
            h = _mask(h.transpose(1, 2), lengths).transpose(1, 2)  # or the next filter would see the padding
        h = h.transpose(1, 2).flatten(2)  # (B, T', C F')
        for norm, layer in zip(self.norms, self.layers):
            h = F.dropout(_normalize(norm, h), self.config.dropout, self.training)
            h = run_both_ways(layer, h, lengths)  # (B, T', d_hidden)
        return self.classifier(_normalize(self.norms[-1], h)).log_softmax(dim=-1)  # (B, T', n_classes)


def run_both_ways(recurrent: nn.RNNBase, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The sum of what a bidirectional layer says from left to right and from right to left.

    Args:
        recurrent: bidirectional, batch first, d units.
        x: (B, T, d_in).
        lengths: (B,) frames before the padding, so that the way back begins at the recording's end.

    Returns:
        (B, T, d), zeros in the padding.
    """
    if lengths is None:
        h = recurrent(x)[0]
    else:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        h = pad_packed_sequence(recurrent(packed)[0], batch_first=True, total_length=x.shape[1])[0]  # (B, T, 2 d)
    forwards, backwards = h.chunk(2, dim=-1)
    return forwards + backwards


def check_input(x: Tensor, lengths: Tensor | None, n_features: int) -> Tensor | None:
    """The lengths, if frames and lengths have shapes that fit.

    Raises:
        ValueError: if they have not.
    """
    if x.ndim != 3 or x.shape[2] != n_features or x.shape[1] < 1:
        raise ValueError(f"expected frames of shape (B, T, {n_features}), got {tuple(x.shape)}")
    if lengths is not None and (lengths.shape != x.shape[:1] or lengths.min() < 1 or lengths.max() > x.shape[1]):
        raise ValueError(f"expected {len(x)} lengths from 1 to {x.shape[1]} frames, got {lengths.tolist()}")
    return lengths


def _shrunk(size, stride):
    return (size - 1) // stride + 1  # positions of a padded, odd filter: ceil(size / stride)


def _mask(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, ...) with zeros from each recording's end on."""
    if lengths is None:
        return x
    outside = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device).unsqueeze(1)  # (B, T)
    return x.masked_fill(outside.view(*outside.shape, *[1] * (x.ndim - 2)), 0.0)


def _normalize(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Batch normalisation over recordings and frames: (B, T, d) -> (B, T, d)."""
    return norm(x.transpose(1, 2)).transpose(1, 2)


def _with_context(x: Tensor, context: int) -> Tensor:
    """Each frame with its neighbours, zeros beyond the ends: (B, T, d) -> (B, T, (2 context + 1) d), earliest first."""
    windows = F.pad(x, (0, 0, context, context)).unfold(1, 2 * context + 1, 1)  # (B, T, d, 2 context + 1)
    return windows.transpose(2, 3).flatten(2)
