"""Vision: convolution by Fourier transform, distorted images, scenes of digits with a detector and its score, moving digits.

A scene is an image with several digits; a detector says where each is and which.
Boxes are (left, top, right, bottom) in pixels from the image's upper left corner, the right and lower sides exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bigmodel_utils import data
from bigmodel_utils.models import inception
from bigmodel_utils.models.resnet import ConvNorm, ResNet, ResNetConfig

INK = 0.25  # a pixel above this belongs to a digit
STRIDE = 4  # pixels of the image for each cell of the detector's grid
N_CLASSES = 10
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}  # rows and columns of a step


def convolve_fft(x: Tensor, weight: Tensor) -> Tensor:
    """What `torch.nn.functional.conv2d(x, weight)` computes, as a product of Fourier transforms.

    A shift is a factor in the transform, so that a sum over shifts is a product.
    The transform is periodic, but a filter that lies inside the image never meets the border.

    Args:
        x: images (B, C, H, W).
        weight: filters (O, C, h, w), not larger than the images.

    Returns:
        (B, O, H - h + 1, W - w + 1).
    """
    height, width = x.shape[2:]
    spectrum = torch.einsum("bchw,ochw->bohw", torch.fft.rfft2(x), torch.fft.rfft2(weight, (height, width)).conj())
    y = torch.fft.irfft2(spectrum, (height, width))  # (B, O, H, W)
    return y[:, :, : height - weight.shape[2] + 1, : width - weight.shape[3] + 1]


class SmallInception(nn.Module):
    """GoogLeNet behind its stem, for small images: modules 3a, 3b, 4a, 4b and 5a with all widths scaled, and 5x5 filters.

    GoogLeNet's stem turns 224 x 224 pixels into 28 x 28; images that are as small to begin with need one convolution.
    """

    STEPS = ("3a", "3b", "pool3", "4a", "4b", "pool4", "5a")

    def __init__(self, width: float, n_classes: int = N_CLASSES, n_channels: int = 1):
        super().__init__()
        config = inception.InceptionConfig("googlenet", width=width, side_5=5)
        steps = {"stem": inception.Conv(max(1, round(192 * width)), 3)} | {name: config.steps[name] for name in self.STEPS}
        self.layers = nn.ModuleDict(zip(steps, inception.build(steps.values(), n_channels)))
        self.classifier = nn.Linear(inception.count_steps(steps.values(), n_channels)[1], n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes: (B, n_channels, H, W) -> (B, n_classes)."""
        for layer in self.layers.values():
            x = layer(x)
        return self.classifier(x.mean(dim=(2, 3)))


def forward_flops(make: Callable[[], nn.Module], *shape: int) -> int:
    """Floating-point operations of one forward pass, counted without computing anything.

    Args:
        make: builds the model; it is called on the meta device.
        shape: of the input.
    """
    with torch.device("meta"):
        model, x = make().eval(), torch.empty(shape)
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def distort(
    images: Tensor, generator: torch.Generator, max_shift: float = 0.1, max_degrees: float = 12.0, max_zoom: float = 0.12
) -> Tensor:
    """Each image shifted, turned and zoomed at random, black where it has no pixels.

    Args:
        images: (B, C, H, W).
        max_shift: part of the image's side.
        max_degrees: largest angle to either side.
        max_zoom: largest relative change of size.
    """
    draw = lambda largest, *shape: largest * (2 * torch.rand(len(images), *shape, generator=generator) - 1)  # noqa: E731
    angle, zoom = draw(np.radians(max_degrees)), 1 + draw(max_zoom)
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2) / zoom[:, None, None]
    affine = torch.cat([rows, draw(2 * max_shift, 2, 1)], dim=2).to(images)  # a grid's sides go from -1 to 1: 2 long
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class Mapped:
    """Batches whose inputs go through a function on their way, drawn anew in every pass."""

    batches: Iterable[tuple[Tensor, Tensor]]
    function: Callable[[Tensor], Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield self.function(x), y


@dataclass(frozen=True)
class Scenes:
    """Images with several digits, and where they are."""

    images: Tensor  # (n, 1, side, side), ink is 1
    boxes: Tensor  # (n, M, 4), of up to M digits each
    labels: Tensor  # (n, M) int64; -1 where there is no digit

    def __len__(self) -> int:
        return len(self.images)


def make_scenes(
    digits: data.Split,
    n_scenes: int,
    seed: int,
    *,
    side: int = 48,
    max_digits: int = 4,
    sizes: tuple[int, int] = (14, 28),
    n_scraps: int = 2,
    max_overlap: float = 0.1,
) -> Scenes:
    """Scenes of one to `max_digits` real digits of many sizes, which may touch, and scraps of digits that are none.

    Args:
        digits: x (m, 1, 28, 28) with ink 1, y (m,).
        side: of a scene, in pixels.
        sizes: smallest and largest side in pixels to which the 28 x 28 images are scaled.
        n_scraps: in each scene, corners of 8 x 8 pixels cut from digits of the largest size.
        max_overlap: largest intersection over union of two digits' boxes; a digit that finds no such place is left out.
    """
    random = np.random.default_rng(seed)
    scenes = Scenes(
        torch.zeros(n_scenes, 1, side, side),
        torch.zeros(n_scenes, max_digits, 4),
        torch.full((n_scenes, max_digits), -1),
    )
    for image, boxes, labels in zip(scenes.images[:, 0], scenes.boxes, scenes.labels):
        for index in range(random.integers(1, max_digits + 1)):
            row = random.integers(len(digits))
            ink = _cut(digits.x[row, 0], int(random.integers(sizes[0], sizes[1] + 1)))
            box = _find_place(ink, image, boxes[:index], max_overlap, random)
            if box is not None:
                _paint(image, ink, box)
                boxes[index], labels[index] = torch.tensor(box), digits.y[row]
        for _ in range(n_scraps):
            scrap = _cut(digits.x[random.integers(len(digits)), 0], sizes[1])[:8, :8]
            _paint(image, scrap, _find_place(scrap, image, boxes[:0], 1.0, random))
    return scenes


Box = tuple[int, int, int, int]


def _cut(digit: Tensor, side: int) -> Tensor:
    """The digit scaled to `side` pixels and cut to its ink."""
    scaled = F.interpolate(digit[None, None], (side, side), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    rows, columns = ((scaled > INK).any(dim=d).nonzero().squeeze(1) for d in (1, 0))
    return scaled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _find_place(
    ink: Tensor, image: Tensor, taken: Tensor, max_overlap: float, random: np.random.Generator, n_tries: int = 20
) -> Box | None:
    height, width = ink.shape
    for _ in range(n_tries):
        left, top = (
            int(random.integers(side - size + 1)) for side, size in ((image.shape[1], width), (image.shape[0], height))
        )
        box = (left, top, left + width, top + height)
        if len(taken) == 0 or iou(torch.tensor([box], dtype=torch.float32), taken).max() <= max_overlap:
            return box
    return None


def _paint(image: Tensor, ink: Tensor, box: Box) -> None:
    left, top, right, bottom = box
    place = image[top:bottom, left:right]
    torch.maximum(place, ink, out=place)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of a (..., n, 4) with every box of b (..., m, 4): (..., n, m); 0 for two empty boxes."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)  # (..., n, m, 2)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (a, b)]
    intersection = sides.prod(dim=-1)
    union = sum(areas) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def encode(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """What the detector is to answer: where digits are centred, and how far their boxes reach.

    A digit's centre lies in one cell of the grid. There the map of its class is 1; around it, where an answer is only
    somewhat wrong, the map falls off as a Gaussian whose width is a sixth of the box (Zhou, Wang and Krahenbuhl 2019,
    https://arxiv.org/abs/1904.07850, section 3).

    Returns:
        maps (n, 10, H, W) of the classes, and reach (n, 4, H, W), the pixels from the cell's centre to the box's
        left, upper, right and lower side (Tian et al. 2019, https://arxiv.org/abs/1904.01355, equation 1), 0 in
        cells without a digit's centre.
    """
    n, size = len(scenes), scenes.images.shape[-1] // STRIDE
    maps, reach = torch.zeros(n, N_CLASSES, size, size), torch.zeros(n, 4, size, size)
    middles = cell_middles(size)
    for image, index in (scenes.labels >= 0).nonzero().tolist():
        left, top, right, bottom = box = scenes.boxes[image, index]
        column, row = int((left + right) / 2 / STRIDE), int((top + bottom) / 2 / STRIDE)
        across, down = middles[0] - middles[0, row, column], middles[1] - middles[1, row, column]
        blob = torch.exp(-18 * ((across / (right - left)) ** 2 + (down / (bottom - top)) ** 2))  # (H, W)
        its_map = maps[image, scenes.labels[image, index]]
        torch.maximum(its_map, blob, out=its_map)
        reach[image, :, row, column] = (box - middles[:, row, column].repeat(2)) * SIGNS
    return maps, reach


SIGNS = torch.tensor([-1.0, -1.0, 1.0, 1.0])


def cell_middles(size: int) -> Tensor:
    """Pixel coordinates (across, down) of the middles of a grid's cells: (2, size, size)."""
    places = STRIDE * (torch.arange(size) + 0.5)
    return torch.stack(torch.meshgrid(places, places, indexing="xy"))


class Detector(nn.Module):
    """A residual network whose last feature map is not averaged: each cell answers for its own place."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.backbone = ResNet(config)
        self.backbone.classifier = nn.Identity()
        self.hidden = ConvNorm(config.d_features, 64, 3)
        self.head = nn.Conv2d(64, N_CLASSES + 4, 1)
        nn.init.constant_(self.head.bias[:N_CLASSES], -4.0)  # nearly all cells are empty: begin with that answer

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, 10 + 4, H / 4, W / 4): logits of the classes' maps, and the reach in units of 4 pixels."""
        return self.head(self.hidden(self.backbone.features(x)).relu())


def detection_loss(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Focal loss of the maps plus the mean error of the reach in cells, both for each digit.

    In the focal loss an answer that is nearly right counts for little, so that the few cells with a digit are not
    drowned by the many without (Law and Deng 2018, https://arxiv.org/abs/1808.01244, equation 1, alpha 2 and beta 4).

    Args:
        prediction: of `Detector`.
        target: of `encode`.
    """
    (maps, reach), logits = target, prediction[:, :N_CLASSES]
    p, is_centre = logits.sigmoid(), maps == 1
    right = F.logsigmoid(logits) * (1 - p) ** 2
    wrong = F.logsigmoid(-logits) * p**2 * (1 - maps) ** 4
    n_digits = is_centre.sum().clamp(min=1)
    heat = -torch.where(is_centre, right, wrong).sum() / n_digits
    error = (prediction[:, N_CLASSES:] - reach / STRIDE).abs()
    return heat + (error * is_centre.any(dim=1, keepdim=True)).sum() / n_digits / 4


@dataclass(frozen=True)
class Detections:
    """A detector's answers, one an entry, from all images."""

    images: Tensor  # (N,) int64, the image's row
    boxes: Tensor  # (N, 4)
    scores: Tensor  # (N,)
    labels: Tensor  # (N,) int64


def decode(prediction: Tensor, min_score: float = 0.02) -> Detections:
    """The peaks of the maps, each with its likeliest class, and the boxes that were predicted there.

    A peak is no lower than its eight neighbours, which is what keeps one digit from being reported twice.

    Args:
        prediction: of `Detector`.
        min_score: lower peaks are left out; above 0 this shortens the tail of each precision-recall curve.
    """
    prediction = prediction.cpu()
    scores, classes = prediction[:, :N_CLASSES].sigmoid().max(dim=1)  # (B, H, W)
    is_peak = (scores == F.max_pool2d(scores, 3, stride=1, padding=1)) & (scores > min_score)
    images, rows, columns = is_peak.nonzero(as_tuple=True)
    middles = cell_middles(scores.shape[-1])[:, rows, columns].repeat(2, 1)  # (4, N)
    reach = prediction[:, N_CLASSES:].transpose(0, 1)[:, images, rows, columns]  # (4, N)
    boxes = (middles + SIGNS[:, None] * STRIDE * reach).T
    return Detections(images, boxes, scores[is_peak], classes[is_peak])


def match(found: Detections, scenes: Scenes, threshold: float = 0.5) -> Tensor:
    """Which detections are hits: (N,) bool.

    In the order of their scores, each takes the box of its class that it overlaps most and that is still free, if
    the overlap reaches the threshold (as Lin et al. 2014, https://arxiv.org/abs/1405.0312, evaluate).
    """
    its_labels = scenes.labels[found.images]  # (N, M)
    overlap = iou(found.boxes[:, None], scenes.boxes[found.images])[:, 0]  # (N, M)
    overlap = torch.where(its_labels == found.labels[:, None], overlap, -1.0)
    free, hits = torch.ones_like(scenes.labels, dtype=torch.bool), torch.zeros_like(found.labels, dtype=torch.bool)
    for k in found.scores.argsort(descending=True, stable=True).tolist():
        candidates = torch.where(free[found.images[k]], overlap[k], -1.0)
        best = candidates.argmax()
        if candidates[best] >= threshold:
            hits[k], free[found.images[k], best] = True, False
    return hits


def average_precision(scores: Tensor, hits: Tensor, n_true: int) -> float:
    """Area under the curve of precision against recall, with precision as the best that is reached at that recall or more.

    Args:
        scores: (k,) of the detections of one class in all images.
        hits: (k,) bool.
        n_true: boxes of that class.

    Raises:
        ValueError: where there is none.
    """
    if n_true < 1:
        raise ValueError("average precision needs at least one true box of the class")
    hits = hits[scores.argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
    return float((best * hits).sum() / n_true)


def mean_average_precision(found: Detections, scenes: Scenes, threshold: float = 0.5) -> float:
    """Mean of the average precisions over the classes that are in the scenes ("mAP").

    Raises:
        ValueError: for scenes without a digit.
    """
    classes, n_true = scenes.labels[scenes.labels >= 0].unique(return_counts=True)
    if len(classes) == 0:
        raise ValueError("mean average precision needs scenes with at least one digit")
    hits, of_class = match(found, scenes, threshold), found.labels == classes[:, None]  # (N,), (classes, N)
    return float(np.mean([average_precision(found.scores[rows], hits[rows], int(n)) for rows, n in zip(of_class, n_true)]))


def error_kinds(found: Detections, scenes: Scenes, threshold: float = 0.5) -> list[str]:
    """For each detection "hit" or what is wrong with it (kinds after Hoiem, Chodpathumwan and Dai 2012,
    https://doi.org/10.1007/978-3-642-33712-3_25): "twice" (the digit was found already), "wrong digit", "badly placed" or
    "nothing there"."""
    overlap = iou(found.boxes[:, None], scenes.boxes[found.images])[:, 0]  # (N, M)
    overlap = torch.where(scenes.labels[found.images] >= 0, overlap, 0.0)
    of_class = torch.where(scenes.labels[found.images] == found.labels[:, None], overlap, 0.0)
    kinds = []
    for is_hit, best_of_class, best in zip(match(found, scenes, threshold), of_class.amax(dim=1), overlap.amax(dim=1)):
        if is_hit:
            kinds.append("hit")
        elif best_of_class >= threshold:
            kinds.append("twice")
        elif best >= threshold:
            kinds.append("wrong digit")
        else:
            kinds.append("badly placed" if best >= 0.1 else "nothing there")
    return kinds


def detect_components(images: Tensor, classify: Callable[[Tensor], Tensor]) -> Detections:
    """The detector without learning: connected pieces of ink are digits, and a classifier of single digits names them.

    Args:
        images: (n, 1, side, side).
        classify: probabilities (m, 10) of digits (m, 1, 28, 28), which are scaled and centred as MNIST's are.
    """
    from scipy import ndimage

    rows, boxes, crops = [], [], []
    for row, image in enumerate(images[:, 0]):
        pieces, _ = ndimage.label(image.numpy() > INK, structure=np.ones((3, 3)))
        for down, across in ndimage.find_objects(pieces):
            rows.append(row)
            boxes.append((across.start, down.start, across.stop, down.stop))
            crops.append(_frame(image[down, across]))
    scores, labels = classify(torch.stack(crops)).max(dim=1)
    return Detections(torch.tensor(rows), torch.tensor(boxes, dtype=torch.float32), scores, labels)


def _frame(ink: Tensor) -> Tensor:
    """Scaled to fit into 20 x 20 pixels, in the middle of 28 x 28, as MNIST's digits are: (1, 28, 28)."""
    height, width = (max(1, round(20 * size / max(ink.shape))) for size in ink.shape)
    scaled = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    left, top = (28 - width) // 2, (28 - height) // 2
    return F.pad(scaled, (left, 28 - width - left, top, 28 - height - top))


def draw(ax: Axes, image: Tensor) -> Axes:
    """An image (1, H, W), ink black, in a thin frame."""
    ax.imshow(image[0], cmap="gray_r", vmin=0, vmax=1, extent=(0, image.shape[2], image.shape[1], 0))
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="#bbbbbb")
    return ax


def draw_box(ax: Axes, box: Tensor, name: str, color: str) -> Axes:
    """A box (4,) and its name above it."""
    left, top, right, bottom = box.tolist()
    ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=color, linewidth=1.2)
    ax.text(left, top - 1, name, color=color, fontsize=9)
    return ax


def make_clips(digits: data.Split, n_clips: int, seed: int, *, side: int = 28, n_frames: int = 5, speed: int = 3) -> data.Split:
    """Films of one real digit, 14 pixels high, that moves in one of four directions and comes in again where it went out.

    Every place is as likely at every moment, whatever the direction, so that a single frame says nothing about it; and a
    film run backwards is as likely as it is forwards, so that the frames without their order do not tell right from left.

    Args:
        digits: x (m, 1, 28, 28), y (m,).
        speed: pixels a frame.

    Returns:
        x (n_clips, 1, n_frames, side, side) and y (n_clips, 2): the number of the direction, as in `DIRECTIONS`, and the digit.
    """
    random = np.random.default_rng(seed)
    small = F.avg_pool2d(digits.x, 2)[:, 0]  # (m, 14, 14)
    clips = torch.zeros(n_clips, 1, n_frames, side, side)
    rows, directions = random.integers(len(digits), size=n_clips), random.integers(len(DIRECTIONS), size=n_clips)
    places = random.integers(side, size=(n_clips, 2))
    steps = np.array(list(DIRECTIONS.values()))
    for clip, row, direction, place in zip(clips[:, 0], rows, directions, places):
        clip[:, :14, :14] = small[row]
        for t, frame in enumerate(clip):
            frame.copy_(frame.roll((place + t * speed * steps[direction]).tolist(), (0, 1)))
    return data.Split(clips, torch.stack([torch.from_numpy(directions), digits.y[torch.from_numpy(rows)]], dim=1))


class VideoNet(nn.Module):
    """Convolutions over rows and columns, and over time where `time_kernel` is above 1.

    The direction is read from where things are, the mean over the frames; the digit from what is there, the largest
    values over all places. With `time_kernel` 1 every frame is seen alone, and the mean forgets their order.
    """

    def __init__(self, time_kernel: int, widths: tuple[int, ...] = (16, 32, 64), side: int = 28):
        super().__init__()
        layers, d_in = [], 1
        for width in widths:
            kernel, padding = (time_kernel, 3, 3), (time_kernel // 2, 1, 1)
            layers += [nn.Conv3d(d_in, width, kernel, (1, 2, 2), padding, bias=False), nn.BatchNorm3d(width), nn.ReLU()]
            d_in, side = width, -(-side // 2)
        self.layers = nn.Sequential(*layers)
        self.direction = nn.Sequential(nn.Linear(d_in * side**2, 64), nn.ReLU(), nn.Linear(64, len(DIRECTIONS)))
        self.digit = nn.Sequential(nn.Linear(d_in, 64), nn.ReLU(), nn.Linear(64, N_CLASSES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Films (B, 1, T, H, W) -> logits of the directions (B, 4) and of the digits (B, 10)."""
        h = self.layers(x)  # (B, C, T, H / 8, W / 8)
        return self.direction(h.mean(dim=2).flatten(1)), self.digit(h.amax(dim=(3, 4)).mean(dim=2))


def video_loss(prediction: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of the direction plus that of the digit.

    Args:
        prediction: of `VideoNet`.
        target: (B, 2), as from `make_clips`.
    """
    return F.cross_entropy(prediction[0], target[:, 0]) + F.cross_entropy(prediction[1], target[:, 1])
