"""ResNet and Inception against torchvision's in float64, their counts against the published ones, and what a shortcut does."""

import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bigmodel_utils import models
from bigmodel_utils.models import inception
from bigmodel_utils.models.inception import Inception, InceptionConfig
from bigmodel_utils.models.resnet import ResNet, ResNetConfig

FEW = settings(deadline=None, max_examples=15)
TINY = ResNetConfig("basic", (2, 1), (3, 5), n_classes=4, stem="cifar")


@pytest.fixture(scope="module")
def torchvision():
    """torchvision's models; where its compiled part does not fit this torch, without that part, which no model here needs."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision.models as library
        except ImportError:
            pytest.skip("torchvision is not installed")
        except RuntimeError:
            forget(before)
            name = "torchvision._meta_registrations"
            patch.setitem(sys.modules, name, types.ModuleType(name))
            operators = torch.library.Library("torchvision", "DEF")
            operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision.models as library
        yield library
    forget(before)


def forget(before: set[str]) -> None:
    """Leave no half of torchvision behind for other tests."""
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with normalisations that are not those of a new model: gains of 1 and means of 0 would hide mistakes."""
    torch.manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(std=0.3)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=0.1)
                module.bias.normal_()
    return model


def draw_images(n_images: int, height: int, width: int, n_channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(n_images, n_channels, height, width, generator=generator, dtype=torch.float64)


def max_error(ours: dict, theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names, relative to each one's largest value."""
    assert ours.keys() == theirs.keys()
    sizes = {name: value.abs().max().item() for name, value in theirs.items()}
    least = 1e-6 * max(sizes.values())  # below this a tensor is roundoff
    return max((ours[name] - theirs[name]).abs().max().item() / max(sizes[name], least) for name in ours)


def compare(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, train: bool) -> None:
    """Logits, gradients of a loss by every parameter and by the image, and statistics of the normalisations agree to 1e-10."""
    randomize(theirs).train(train)
    ours.double().train(train)
    models.load_reference(ours, theirs.state_dict())
    targets, losses, inputs = torch.arange(len(x)), [], [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(image) for model, image in zip((ours, theirs), inputs)]
    as_tuples = [(output,) if isinstance(output, torch.Tensor) else tuple(output) for output in outputs]
    # torchvision's GoogLeNet gives (logits, deep head, shallow head); ours goes from the input to the output
    as_tuples[1] = as_tuples[1][:1] + as_tuples[1][:0:-1]
    assert len(as_tuples[0]) == len(as_tuples[1])
    assert max_error(dict(enumerate(as_tuples[0])), dict(enumerate(as_tuples[1]))) < 1e-10
    for logits in as_tuples:
        losses.append(sum((k + 1) * F.cross_entropy(part, targets) for k, part in enumerate(logits)))
        losses[-1].backward()
    assert max_error({"x": inputs[0].grad}, {"x": inputs[1].grad}) < 1e-10
    # heads take no part in evaluation
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in (ours, theirs)]
    assert max_error(gradients[0], ours.translate_reference(gradients[1])) < 1e-10
    assert len(gradients[0]) == len([name for name, _ in ours.named_parameters() if train or not name.startswith("heads.")])
    assert max_error(ours.state_dict(), ours.translate_reference(theirs.state_dict())) < 1e-10


# ResNet


@pytest.mark.parametrize(
    "name, size, train",
    [
        ("resnet18", (33, 65), False),
        ("resnet18", (33, 34), True),
        ("resnet34", (34, 33), True),
        ("resnet50", (33, 47), False),
        ("resnet101", (1, 1), False),
        ("resnet152", (33, 33), True),
    ],
)
def test_resnet_equals_torchvisions(torchvision, name, size, train):
    theirs = getattr(torchvision, name)(num_classes=7)
    compare(ResNet(replace(ResNetConfig.named(name), n_classes=7)), theirs, draw_images(3, *size), train)


class Subsample(nn.Module):
    """Option A written out: zeros first, then what there is."""

    def __init__(self, n_new: int, stride: int):
        super().__init__()
        self.n_new, self.stride = n_new, stride

    def forward(self, x):
        batch, channels, height, width = x[:, :, :: self.stride, :: self.stride].shape
        out = torch.zeros(batch, channels + self.n_new, height, width, dtype=x.dtype)
        out[:, :channels] = x[:, :, :: self.stride, :: self.stride]
        return out


class Nothing(nn.Module):
    """A shortcut that adds zero."""

    def forward(self, x):
        return 0.0


def cifar_by_torchvision(torchvision, config: ResNetConfig) -> nn.Module:
    """A network for small images from torchvision's parts."""
    block = {"basic": torchvision.resnet.BasicBlock, "bottleneck": torchvision.resnet.Bottleneck}[config.block]
    model = torchvision.resnet.ResNet(block, [1, 1, 1, 1], config.n_classes)
    model.conv1 = nn.Conv2d(config.n_channels, config.widths[0], 3, padding=1, bias=False)
    model.bn1, model.maxpool, model.inplanes = nn.BatchNorm2d(config.widths[0]), nn.Identity(), config.widths[0]
    for k in range(4):
        stage = nn.Identity()
        if k < len(config.widths):
            stage = model._make_layer(block, config.widths[k], config.n_blocks[k], stride=1 if k == 0 else 2)
        setattr(model, f"layer{k + 1}", stage)
    model.fc = nn.Linear(config.widths[-1] * block.expansion, config.n_classes)
    for part in model.modules():
        if isinstance(part, block) and not config.residual:
            part.downsample = Nothing()
        elif isinstance(part, block) and part.downsample is not None and config.shortcut == "zeros":
            conv = part.downsample[0]
            part.downsample = Subsample(conv.out_channels - conv.in_channels, part.stride)
    return model


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig.cifar(20),
        ResNetConfig.cifar(20, n_classes=5, residual=False),
        ResNetConfig.cifar(8, n_channels=1),
        ResNetConfig("basic", (1, 2), (6, 9), 4, stem="cifar"),
        ResNetConfig("bottleneck", (2, 1, 1), (3, 4, 4), 6, stem="cifar", shortcut="zeros"),
        ResNetConfig("bottleneck", (1, 2), (9, 7), 6, stem="cifar", residual=False),
    ],
)
def test_small_and_plain_networks_equal_torchvisions_parts(torchvision, config, train):
    compare(ResNet(config), cifar_by_torchvision(torchvision, config), draw_images(4, 13, 16, config.n_channels), train)


PUBLISHED = {  # torchvision's documentation, "Num. Params"
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
PUBLISHED_CIFAR = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7, 1202: 19.4}  # millions; He et al. 2015, table 6


@pytest.mark.parametrize("name", PUBLISHED)
def test_resnet_published_counts(name):
    config = ResNetConfig.named(name)
    with torch.device("meta"):
        model = ResNet(config)
    assert config.n_parameters == models.count_parameters(model) == PUBLISHED[name]
    assert f"resnet{config.n_layers}" == name


@pytest.mark.parametrize("depth", PUBLISHED_CIFAR)
def test_cifar_published_counts(depth):
    config = ResNetConfig.named(f"resnet{depth}")
    assert config.n_layers == depth
    digits = 2 if PUBLISHED_CIFAR[depth] < 1 else 1
    assert round(config.n_parameters / 1e6, digits) == PUBLISHED_CIFAR[depth]


@FEW
@given(
    st.sampled_from(["basic", "bottleneck"]),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["imagenet", "cifar"]),
    st.sampled_from(["projection", "zeros"]),
    st.booleans(),
)
def test_resnet_formula_counts_the_parameters(block, stages, n_classes, n_channels, stem, shortcut, residual):
    n_blocks, widths = zip(*stages)
    widths = tuple(sorted(widths)) if shortcut == "zeros" else widths  # zeros can only add channels
    config = ResNetConfig(block, n_blocks, widths, n_classes, n_channels, stem, shortcut, residual)
    with torch.device("meta"):
        model = ResNet(config).eval()
        assert model(torch.zeros(2, n_channels, 19, 7)).shape == (2, n_classes)
    assert config.n_parameters == models.count_parameters(model)
    convs = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    assert config.n_layers == len(convs) + 1


def silence(model: ResNet) -> None:
    """Let every block's function be zero: the last normalisation's gain and shift."""
    for stage in model.stages:
        for block in stage:
            nn.init.zeros_(block.layers[-1].norm.weight)
            nn.init.zeros_(block.layers[-1].norm.bias)


def test_a_silent_residual_block_passes_its_input_on_and_a_plain_one_does_not():
    config, x = ResNetConfig("basic", (3, 2), (4, 4), 2, stem="cifar", shortcut="zeros"), draw_images(2, 8, 8)
    model = randomize(ResNet(config)).eval()
    silence(model)
    stem = model.stem(x).relu()
    torch.testing.assert_close(model.features(x), stem[:, :, ::2, ::2], rtol=0, atol=0)
    plain = randomize(ResNet(replace(config, residual=False))).eval()
    silence(plain)
    assert plain.features(x).abs().max() == 0


def test_residual_and_plain_differ_in_their_shortcuts_only():
    residual, plain = (ResNet(ResNetConfig.cifar(14, residual=flag)) for flag in (True, False))
    assert residual.config.n_parameters == plain.config.n_parameters
    plain.load_state_dict(residual.state_dict())  # no shortcut of option A has parameters
    projected = replace(ResNetConfig.named("resnet18"), residual=False)
    n_projections = sum((d_in + 2) * 2 * d_in for d_in in (64, 128, 256))
    assert ResNetConfig.named("resnet18").n_parameters - projected.n_parameters == n_projections


def test_resnet_refuses_the_weights_of_another_size(torchvision):
    with pytest.raises(ValueError, match=r"stages\.0\.2\.layers\.0\.conv\.weight is missing"):
        models.load_reference(ResNet(ResNetConfig.named("resnet34")), torchvision.resnet18().state_dict())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"block": "dense"}, "block is one of basic, bottleneck"),
        ({"stem": "mnist"}, "stem is one of imagenet, cifar"),
        ({"shortcut": "none"}, "shortcut is one of projection, zeros"),
        ({"n_blocks": (2, 2)}, "a width for each stage"),
        ({"n_blocks": (), "widths": ()}, "a width for each stage"),
        ({"n_blocks": (2, 2, 0, 2)}, "1 or more"),
        ({"n_classes": 0}, "1 or more"),
        ({"shortcut": "zeros", "widths": (64, 128, 100, 512)}, "only add channels"),
    ],
)
def test_senseless_resnets_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**wrong)


@pytest.mark.parametrize("n_layers", [2, 7, 21, 51])
def test_cifar_depths_are_6n_plus_2(n_layers):
    with pytest.raises(ValueError, match="6n"):
        ResNetConfig.cifar(n_layers)


# Inception


def build_reference(torchvision, config: InceptionConfig, **options) -> nn.Module:
    """torchvision's network of this configuration, without dropout."""
    options |= {"num_classes": config.n_classes, "aux_logits": config.auxiliary, "init_weights": False, "dropout": 0.0}
    if config.version == "inception-v3":
        return torchvision.Inception3(**options)
    return torchvision.GoogLeNet(**options, dropout_aux=0.0)


def without_dropout(name: str, **changes) -> InceptionConfig:
    return replace(InceptionConfig.named(name), n_classes=7, dropout=0.0, auxiliary_dropout=0.0, **changes)


@pytest.mark.parametrize(
    "name, auxiliary, train, n_images, size",
    [
        ("googlenet", True, True, 3, (51, 61)),
        ("googlenet", True, False, 2, (33, 50)),
        ("googlenet", False, True, 3, (33, 64)),
        ("inception-v3", True, True, 2, (299, 299)),
        ("inception-v3", True, False, 2, (75, 107)),
    ],
)
def test_inception_equals_torchvisions(torchvision, name, auxiliary, train, n_images, size):
    config = without_dropout(name, auxiliary=auxiliary)
    compare(Inception(config), build_reference(torchvision, config), draw_images(n_images, *size), train)


def test_googlenet_with_the_papers_filters(torchvision):
    config = without_dropout("googlenet", auxiliary=False, side_5=5)
    theirs = build_reference(torchvision, config)
    for part in theirs.modules():
        if hasattr(part, "branch3"):
            old = part.branch3[1].conv
            part.branch3[1].conv = nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2, bias=False)
    compare(Inception(config), theirs, draw_images(3, 48, 48), train=True)


@pytest.mark.parametrize(
    "name, auxiliary, published",
    [
        ("googlenet", True, 13_004_888),
        ("googlenet", False, 6_624_904),
        ("inception-v3", True, 27_161_264),
        ("inception-v3", False, 23_834_568),
    ],
)
def test_inception_published_counts(name, auxiliary, published):
    config = replace(InceptionConfig.named(name), auxiliary=auxiliary)
    with torch.device("meta"):
        model = Inception(config)
    assert config.n_parameters == models.count_parameters(model) == published


@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from(["googlenet", "inception-v3"]),
    st.integers(1, 9),
    st.integers(1, 4),
    st.booleans(),
    st.floats(0.001, 1.5),
    st.sampled_from([1, 3, 5]),
)
def test_inception_formula_counts_the_parameters(version, n_classes, n_channels, auxiliary, width, side_5):
    config = InceptionConfig(version, n_classes, n_channels, auxiliary, width=width, side_5=side_5)
    with torch.device("meta"):
        model = Inception(config)
        logits, *heads = (
            model(torch.zeros(2, n_channels, 299, 299)) if auxiliary else (model(torch.zeros(2, n_channels, 80, 90)),)
        )
    assert config.n_parameters == models.count_parameters(model)
    assert [part.shape for part in (logits, *heads)] == [(2, n_classes)] * (1 + len(config.head_positions))


def test_loss_weighs_the_heads():
    logits, targets = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    parts = [F.cross_entropy(part, targets) for part in logits]
    torch.testing.assert_close(inception.loss(logits[0], targets), parts[0])
    torch.testing.assert_close(inception.loss(tuple(logits), targets), parts[0] + 0.3 * (parts[1] + parts[2]))


def test_dropout_acts_in_training_only():
    config = InceptionConfig(auxiliary=False, n_classes=5, width=0.1, dropout=0.5)
    model, x = Inception(config), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_auxiliary_head_names_the_image_that_it_needs():
    model = Inception(InceptionConfig("inception-v3", width=0.02))
    with pytest.raises(ValueError, match=r"299 x 299 or more, or with auxiliary=False"):
        model(torch.zeros(2, 3, 298, 400))
    assert model.eval()(torch.zeros(2, 3, 75, 75)).shape == (2, 1000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"version": "inception-v4"}, "googlenet or inception-v3"),
        ({"n_classes": 0}, "1 or more"),
        ({"width": 0.0}, "above 0"),
        ({"side_5": 4}, "odd"),
        ({"dropout": 1.0}, "probabilities"),
        ({"auxiliary_dropout": -0.1}, "probabilities"),
    ],
)
def test_senseless_inceptions_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        InceptionConfig(**wrong)


# Both


@pytest.mark.parametrize("model", [ResNet(TINY), Inception(InceptionConfig(n_classes=4, width=0.05))])
def test_images_do_not_depend_on_each_other_in_evaluation(model):
    model, x = randomize(model).eval(), draw_images(3, 32, 35)
    torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", [ResNet(TINY), Inception(InceptionConfig(n_classes=4, width=0.05))])
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_wrong_shapes_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 3, H, W\), got \("):
        model(torch.zeros(shape))


@pytest.mark.parametrize(
    "config, known", [(ResNetConfig, "resnet18, .*resnet152, resnet20, "), (InceptionConfig, "googlenet, inc")]
)
def test_unknown_names_list_the_known_ones(config, known):
    with pytest.raises(ValueError, match=f"known: {known}"):
        config.named("resnet51")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_prefix_and_unknown_entries(torchvision, prefix):
    config = InceptionConfig.named("googlenet")
    cases = [
        (ResNet(ResNetConfig.named("resnet18")), torchvision.resnet18()),
        (Inception(config), build_reference(torchvision, config)),
    ]
    for ours, theirs in cases:
        models.load_reference(ours, {prefix + name: value for name, value in theirs.state_dict().items()})
        with pytest.raises(ValueError, match=r"extra\.weight is unexpected"):
            models.load_reference(ours, theirs.state_dict() | {"extra.weight": torch.zeros(1)})
