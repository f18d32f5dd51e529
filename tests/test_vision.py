"""Vision: against torch's convolution, pixels that are counted, a literal mean average precision, and what symmetry forbids."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bigmodel_utils import data, vision
from bigmodel_utils.models import ResNetConfig, count_parameters

FEW = settings(deadline=None, max_examples=25)
TINY = ResNetConfig("basic", (1, 1, 1), (4, 4, 8), 10, 1, "cifar", "zeros")


@pytest.fixture(scope="module")
def digits() -> data.Split:
    """Twenty digits of each class."""
    test = data.load_mnist()["test"]
    return data.Split(test.x[::5], test.y[::5])


@pytest.fixture(scope="module")
def scenes(digits) -> vision.Scenes:
    return vision.make_scenes(digits, 60, seed=0)


# ---- convolution, networks, distortion


@FEW
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 6), st.integers(0, 6))
def test_the_transform_convolves(n_in, n_out, height, width, more_rows, more_columns):
    generator = torch.Generator().manual_seed(height)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(2, n_in, height + more_rows, width + more_columns), draw(n_out, n_in, height, width)
    torch.testing.assert_close(vision.convolve_fft(x, weight), F.conv2d(x, weight), atol=1e-10, rtol=0)


def test_small_inception_keeps_the_published_modules():
    model = vision.SmallInception(1.0)
    module = model.layers["3b"]
    assert [branch[-1].conv.out_channels for name, branch in module.branches.items() if name != "pool"] == [128, 192, 96]
    assert module.branches["5x5"][1].conv.kernel_size == (5, 5)
    assert model(torch.rand(2, 1, 14, 14)).shape == (2, 10)
    assert count_parameters(vision.SmallInception(0.1)) < count_parameters(model) / 50


def test_forward_flops_are_two_for_each_product():
    assert vision.forward_flops(lambda: torch.nn.Conv2d(3, 5, 3), 1, 3, 8, 10) == 2 * 5 * 3 * 9 * 6 * 8
    assert vision.forward_flops(lambda: torch.nn.Linear(7, 4), 6, 7) == 2 * 6 * 7 * 4


def test_distort_moves_little_and_nothing_at_zero(digits):
    x = digits.x[:40]
    still = vision.distort(x, torch.Generator().manual_seed(0), 0.0, 0.0, 0.0)
    torch.testing.assert_close(still, x, atol=1e-5, rtol=0)
    moved = vision.distort(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved, vision.distort(x, torch.Generator().manual_seed(0)))
    assert not torch.allclose(moved, x, atol=0.1)
    assert (moved.sum(dim=(1, 2, 3)) / x.sum(dim=(1, 2, 3)) - 1).abs().max() < 0.45


def test_distort_shifts_by_at_most_its_share():
    x = torch.zeros(200, 1, 41, 41)
    x[:, :, 20, 20] = 1.0
    moved = vision.distort(x, torch.Generator().manual_seed(0), max_shift=0.1, max_degrees=0.0, max_zoom=0.0)[:, 0]
    places = torch.arange(41.0) - 20
    shift = torch.stack([(moved.sum(dim=d) * places).sum(dim=1) / moved.sum(dim=(1, 2)) for d in (1, 2)])
    assert shift.abs().max() <= 4.1 + 0.01
    assert shift.abs().max() > 3.5


def test_mapped_batches_change_in_every_pass(digits):
    generator = torch.Generator().manual_seed(0)
    batches = vision.Mapped(data.Batches(digits, 200, shuffle=False), lambda x: vision.distort(x, generator))
    (first, y), (second, _) = next(iter(batches)), next(iter(batches))
    assert torch.equal(y, digits.y)
    assert not torch.equal(first, second)


# ---- boxes

box = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 6), st.integers(1, 6)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    left, top, right, bottom = box
    return {(x, y) for x in range(left, right) for y in range(top, bottom)}


@FEW
@given(st.lists(box, min_size=1, max_size=4), st.lists(box, min_size=1, max_size=4))
def test_iou_counts_pixels(a, b):
    expected = [[len(pixels(p) & pixels(q)) / len(pixels(p) | pixels(q)) for q in b] for p in a]
    got = vision.iou(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_iou_of_empty_boxes_is_zero():
    assert vision.iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


# ---- scenes


def test_boxes_fit_their_ink(digits):
    scenes = vision.make_scenes(digits, 40, seed=1, max_digits=1, n_scraps=0)
    for image, its_boxes, its_labels in zip(scenes.images[:, 0], scenes.boxes, scenes.labels):
        rows, columns = (image > vision.INK).nonzero(as_tuple=True)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert its_boxes[0].tolist() == [float(value) for value in expected]
        assert its_labels[0] in digits.y


def test_scenes_are_inside_apart_and_repeatable(digits, scenes):
    again = vision.make_scenes(digits, 60, seed=0)
    assert torch.equal(scenes.images, again.images)
    assert torch.equal(scenes.boxes, again.boxes)
    assert scenes.boxes.min() >= 0 and scenes.boxes.max() <= 48
    for its_boxes, its_labels in zip(scenes.boxes, scenes.labels):
        its_boxes = its_boxes[its_labels >= 0]
        overlap = vision.iou(its_boxes, its_boxes).fill_diagonal_(0)
        assert overlap.numel() == 0 or overlap.max() <= 0.1
    n_digits = (scenes.labels >= 0).sum(dim=1)
    assert set(n_digits.tolist()) == {1, 2, 3, 4}


def test_encode_and_decode_are_inverse(scenes):
    """A prediction that is the target gives every box and label back, but for centres in one or touching cells."""
    maps, reach = vision.encode(scenes)
    prediction = torch.cat([torch.logit(maps.clamp(1e-4, 1 - 1e-4)), reach / vision.STRIDE], dim=1)
    found = vision.decode(prediction, min_score=0.99)
    assert vision.match(found, scenes, 0.999).all()
    assert len(found.scores) >= 0.98 * (scenes.labels >= 0).sum()
    assert vision.mean_average_precision(found, scenes, 0.999) > 0.97


def test_the_middle_of_a_cell_is_between_its_sides():
    across, down = vision.cell_middles(3)
    assert across[0].tolist() == down[:, 0].tolist() == [2.0, 6.0, 10.0]  # cells of four pixels


def test_the_loss_is_least_at_the_target(scenes):
    maps, reach = vision.encode(scenes)
    centre = maps == 1
    right = torch.cat([torch.where(centre, 9.0, -9.0), reach / vision.STRIDE], dim=1)
    assert vision.detection_loss(right, (maps, reach)) < 1e-3
    blank = torch.cat([torch.full_like(maps, -4.0), torch.zeros_like(reach)], dim=1)
    assert vision.detection_loss(right, (maps, reach)) < vision.detection_loss(blank, (maps, reach))
    wrong_box = torch.cat([right[:, :10], right[:, 10:] + 1], dim=1)
    assert vision.detection_loss(wrong_box, (maps, reach)).item() == pytest.approx(1, abs=0.01)  # one cell on every side


def test_the_loss_is_its_equation():
    maps, reach = torch.zeros(1, 10, 1, 3, dtype=torch.float64), torch.zeros(1, 4, 1, 3, dtype=torch.float64)
    maps[0, 7, 0] = torch.tensor([0.6, 1.0, 0.0])
    p = torch.rand(1, 10, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.98 + 0.01
    expected = 0.0
    for its_p, m in zip(p.flatten().tolist(), maps.flatten().tolist()):
        expected -= (1 - its_p) ** 2 * np.log(its_p) if m == 1 else (1 - m) ** 4 * its_p**2 * np.log(1 - its_p)
    prediction = torch.cat([torch.logit(p), torch.zeros_like(reach)], dim=1)
    assert vision.detection_loss(prediction, (maps, reach)).item() == pytest.approx(expected)


def test_an_empty_scene_has_a_finite_loss():
    target = (torch.zeros(1, 10, 2, 2), torch.zeros(1, 4, 2, 2))
    assert torch.isfinite(vision.detection_loss(torch.randn(1, 14, 2, 2), target))


def test_detector_learns_one_scene(scenes):
    torch.manual_seed(0)
    detector = vision.Detector(TINY)
    some = vision.Scenes(scenes.images[:4], scenes.boxes[:4], scenes.labels[:4])
    target, optimizer = vision.encode(some), torch.optim.Adam(detector.parameters(), lr=0.01)
    for _ in range(120):
        loss = vision.detection_loss(detector(some.images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = vision.decode(detector(some.images))
    assert vision.mean_average_precision(found, some) > 0.9


# ---- mean average precision, by its definition


def literal_map(found, scenes, threshold: float) -> float:
    """Class by class, image by image, recall by recall, in plain Python."""
    per_class = []
    for label in range(10):
        n_true = sum(value == label for row in scenes.labels.tolist() for value in row)
        if n_true == 0:
            continue
        answers = [
            (score, image, box)
            for image, box, score, its_label in zip(
                found.images.tolist(), found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
            )
            if its_label == label
        ]
        taken, hits = set(), []
        for _, image, box in sorted(answers, key=lambda answer: -answer[0]):
            options = [
                (len(pixels(box) & pixels(truth)) / len(pixels(box) | pixels(truth)), -index)
                for index, (truth, its_label) in enumerate(
                    zip(scenes.boxes[image].int().tolist(), scenes.labels[image].tolist())
                )
                if its_label == label and (image, index) not in taken
            ]
            best, index = max(options, default=(0.0, 0))
            hits.append(best >= threshold)
            if hits[-1]:
                taken.add((image, -index))
        precisions = [(sum(hits[: k + 1]), sum(hits[: k + 1]) / (k + 1)) for k in range(len(hits))]
        reached = [max((p for h, p in precisions if h >= n), default=0.0) for n in range(1, n_true + 1)]
        per_class.append(sum(reached) / n_true)
    return sum(per_class) / len(per_class)


answer = st.tuples(st.integers(0, 1), box, st.sampled_from([3, 7]))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(st.tuples(box, st.sampled_from([3, 7])), min_size=1, max_size=3), min_size=2, max_size=2),
    st.lists(answer, max_size=8),
    st.sampled_from([0.1, 0.3, 0.5]),
    st.randoms(use_true_random=False),
)
def test_map_equals_its_definition(truths, answers, threshold, random):
    boxes, labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    for image, row in enumerate(truths):
        for index, (its_box, its_label) in enumerate(row):
            boxes[image, index], labels[image, index] = torch.tensor(its_box), its_label
            if random.random() < 0.7:  # an answer that is right
                answers = [*answers, (image, its_box, its_label)]
    images, its_boxes, its_labels = zip(*answers) if answers else ((), (), ())
    scores = random.sample(range(1, 100), len(answers))
    found = vision.Detections(
        torch.tensor(images, dtype=torch.long),
        torch.tensor(its_boxes, dtype=torch.float32).int().reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(its_labels, dtype=torch.long),
    )
    scenes = vision.Scenes(torch.zeros(2, 1, 16, 16), boxes, labels)
    expected = literal_map(found, scenes, threshold)
    assert vision.mean_average_precision(found, scenes, threshold) == pytest.approx(expected)


def test_map_of_nothing_is_refused():
    nothing = vision.Detections(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))
    blank = vision.Scenes(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4), torch.full((1, 1), -1))
    with pytest.raises(ValueError, match="at least one digit"):
        vision.mean_average_precision(nothing, blank)
    with pytest.raises(ValueError, match="at least one true box"):
        vision.average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0)


def test_error_kinds_name_the_mistake():
    scenes = vision.Scenes(
        torch.zeros(1, 1, 40, 40), torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]]), torch.tensor([[4, 6]])
    )
    cases = {
        "hit": ([0, 0, 10, 10], 4, 0.9),
        "twice": ([1, 0, 10, 10], 4, 0.8),
        "wrong digit": ([20, 20, 30, 29], 8, 0.7),
        "badly placed": ([24, 20, 34, 30], 6, 0.6),
        "nothing there": ([0, 30, 10, 40], 6, 0.5),
    }
    boxes, labels, scores = zip(*cases.values())
    found = vision.Detections(
        torch.zeros(5, dtype=torch.long), torch.tensor(boxes).float(), torch.tensor(scores), torch.tensor(labels)
    )
    assert vision.error_kinds(found, scenes) == list(cases)


def test_components_find_separate_digits(digits):
    scenes = vision.make_scenes(digits, 20, seed=2, max_digits=1, n_scraps=0)
    crops = []

    def classify(x: torch.Tensor) -> torch.Tensor:
        crops.append(x)
        return torch.eye(10)[torch.zeros(len(x), dtype=torch.long)]

    found = vision.detect_components(scenes.images, classify)
    best = torch.stack([vision.iou(found.boxes[found.images == i], scenes.boxes[i, :1]).max() for i in range(20)])
    assert (best == 1).float().mean() > 0.8  # the others are broken into pieces
    assert crops[0].shape[1:] == (1, 28, 28)
    rows, columns = (crops[0].amax(dim=(0, 1)) > 0).nonzero(as_tuple=True)
    assert rows.min() >= 4 and rows.max() <= 23 and columns.min() >= 4 and columns.max() <= 23


# ---- video


def test_clips_move_as_they_say(digits):
    clips = vision.make_clips(digits, 30, seed=0)
    steps = list(vision.DIRECTIONS.values())
    for clip, (direction, _) in zip(clips.x[:, 0], clips.y.tolist()):
        for before, after in itertools.pairwise(clip):
            moved = before.roll((3 * steps[direction][0], 3 * steps[direction][1]), (0, 1))
            assert torch.equal(moved, after)


def test_clips_hold_the_digit_that_they_say(digits):
    clips = vision.make_clips(digits, 30, seed=0)
    small = F.avg_pool2d(digits.x, 2)
    for clip, (_, digit) in zip(clips.x[:, 0], clips.y.tolist()):
        ink = clip[0].sum()
        assert (small[digits.y == digit].sum(dim=(1, 2, 3)) - ink).abs().min() < 1e-3


def test_one_frame_is_as_likely_for_every_direction(digits):
    """The place of the ink in any frame is uniform for every direction: its mean does not tell them apart."""
    clips = vision.make_clips(digits, 3000, seed=0, side=16)
    for direction in range(4):
        heat = clips.x[clips.y[:, 0] == direction, 0, -1].mean(dim=0)  # (16, 16)
        assert (heat / heat.mean() - 1).abs().max() < 0.35
        assert (heat.mean(dim=0) / heat.mean() - 1).abs().max() < 0.15


def test_video_net_without_time_ignores_the_order(digits):
    torch.manual_seed(0)
    x = vision.make_clips(digits, 4, seed=0).x
    shuffled = x[:, :, [3, 0, 4, 1, 2]]
    blind, sighted = (vision.VideoNet(span, (4, 4, 8)).eval() for span in (1, 3))
    with torch.no_grad():
        for ours, theirs in zip(blind(x), blind(shuffled)):
            torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(sighted(x)[0], sighted(shuffled)[0])


def test_video_loss_starts_at_the_logarithms():
    blank = (torch.zeros(5, 4), torch.zeros(5, 10))
    target = torch.tensor([[0, 1], [1, 9], [2, 3], [3, 0], [0, 5]])
    assert vision.video_loss(blank, target).item() == pytest.approx(np.log(4) + np.log(10), rel=1e-5)
