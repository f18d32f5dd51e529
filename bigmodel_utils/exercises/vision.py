"""Checkers of chapter 8: convolution backwards, folding, boxes in a mirror and suppression, each against something independent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bigmodel_utils import vision


def check_convolution_gradient(answer: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Against autograd."""
    generator = torch.Generator().manual_seed(0)
    for n_out, n_in, height, width, rows, columns in ((1, 1, 1, 3, 4, 6), (2, 3, 3, 2, 5, 7), (3, 2, 4, 4, 4, 6)):
        x = torch.randn(n_in, rows, columns, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(n_out, n_in, height, width, generator=generator, dtype=torch.float64)
        y = F.conv2d(x[None], weight)[0]
        g = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (expected,) = torch.autograd.grad(y, x, g)
        got = answer(g, weight)
        shapes = f"g of shape {tuple(g.shape)} and filters of shape {tuple(weight.shape)}"
        assert got.shape == expected.shape, f"for {shapes} expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
        assert torch.allclose(got, expected), f"for {shapes} it differs from autograd by {(got - expected).abs().max():.2g}"


def check_fold(answer: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Against the two layers one after the other."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, gain, bias, mean, variance = draw(2, 3, 6, 6), draw(4, 3, 3, 3), draw(4), draw(4), draw(4), draw(4).abs() + 0.1
    for eps in (1e-5, 0.5):
        expected = F.batch_norm(F.conv2d(x, weight), mean, variance, gain, bias, training=False, eps=eps)
        folded = F.conv2d(x, *answer(weight.clone(), gain, bias, mean, variance, eps))
        assert torch.allclose(folded, expected), (
            f"with eps {eps} the single convolution differs from the two layers by {(folded - expected).abs().max():.2g}"
        )


def check_mirror(answer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Against boxes that are found again in the mirrored image, each by its own grey."""
    boxes = torch.tensor([[0.0, 1.0, 3.0, 4.0], [5.0, 0.0, 6.0, 7.0], [7.0, 2.0, 10.0, 5.0]])
    image = torch.zeros(1, 8, 12)
    for grey, (left, top, right, bottom) in enumerate(boxes.int().tolist(), start=1):
        image[0, top:bottom, left:right] = grey
    mirrored, moved = answer(image.clone(), boxes.clone())
    assert torch.equal(mirrored, torch.stack([image[..., column] for column in range(11, -1, -1)], dim=-1)), (
        "the image must be mirrored left to right: its last column comes first"
    )
    for grey, box in enumerate(moved, start=1):
        rows, columns = (mirrored[0] == grey).nonzero(as_tuple=True)
        expected = [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]
        assert box.tolist() == expected, f"the mirrored image has its box {grey} at {expected}, yours is {box.tolist()}"


def check_suppress(answer: Callable[[Tensor, Tensor, float], list[int]]) -> None:
    """Against what defines the result: kept boxes do not overlap, and what was dropped overlaps a better one that was kept."""
    generator = torch.Generator().manual_seed(0)
    for n_boxes, threshold in ((1, 0.5), (12, 0.5), (30, 0.3), (30, 0.7)):
        corners = torch.rand(n_boxes, 2, generator=generator) * 10
        boxes = torch.cat([corners, corners + 2 + 6 * torch.rand(n_boxes, 2, generator=generator)], dim=1)
        scores = torch.rand(n_boxes, generator=generator)
        kept, overlap = answer(boxes, scores, threshold), vision.iou(boxes, boxes)
        assert kept == sorted(kept, key=lambda k: -scores[k]), "give the indices by falling score, each once"
        assert len(set(kept)) == len(kept), "an index is there twice"
        for i in range(n_boxes):
            better = [k for k in kept if scores[k] > scores[i] and overlap[i, k] > threshold]
            verb = "kept" if i in kept else "dropped"
            assert (i in kept) == (not better), (
                f"box {i} was {verb}, and {len(better)} better boxes that were kept overlap it by more than {threshold}"
            )
