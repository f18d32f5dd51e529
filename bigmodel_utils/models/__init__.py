"""The models that the article names, one readable file each, and the functions that serve all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigmodel_utils import checkpoint
from bigmodel_utils.models.bert import BERT, BERTConfig
from bigmodel_utils.models.deepspeech import DeepSpeech, DeepSpeech2, DeepSpeech2Config, DeepSpeechConfig
from bigmodel_utils.models.gpt import GPT, GPTConfig
from bigmodel_utils.models.inception import Inception, InceptionConfig
from bigmodel_utils.models.mlp import MLP, MLPConfig
from bigmodel_utils.models.resnet import ResNet, ResNetConfig
from bigmodel_utils.models.transformer import Transformer, TransformerConfig

__all__ = [
    "BERT",
    "GPT",
    "MLP",
    "BERTConfig",
    "DeepSpeech",
    "DeepSpeech2",
    "DeepSpeech2Config",
    "DeepSpeechConfig",
    "GPTConfig",
    "Inception",
    "InceptionConfig",
    "MLPConfig",
    "ResNet",
    "ResNetConfig",
    "Transformer",
    "TransformerConfig",
    "count_parameters",
    "load_reference",
]


def count_parameters(model_or_config: nn.Module | Any) -> int:
    """Number of trainable parameters, tied weights once; of a configuration, by its formula, without building it.

    Raises:
        TypeError: for anything that is neither a module nor a configuration with `n_parameters`.
    """
    if isinstance(model_or_config, nn.Module):
        return sum(parameter.numel() for parameter in model_or_config.parameters() if parameter.requires_grad)
    if hasattr(model_or_config, "n_parameters"):
        return model_or_config.n_parameters
    raise TypeError(f"expected a torch module or a model configuration, got {type(model_or_config).__name__}")


def load_reference(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load the weights of a reference library's model of the same configuration into ours.

    Args:
        model: one of this package's models with a `translate_reference`.
        state_dict: of transformers, torchvision, torchaudio or torch.nn.Transformer.

    Raises:
        ValueError: naming the entries that are missing, unexpected or of another shape.
    """
    translated = model.translate_reference(state_dict)
    wrong = checkpoint.mismatches(model, translated)
    if wrong:
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(translated)
