"""What this package's speed is measured against: the loops that people write, and a library that they use.

The library, transformers, is optional (`pip install 'bigmodel-utils[reference]'`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bigmodel_utils.models import GPTConfig


def article_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, seed: int) -> list[float]:
    """The article's loop over a DataLoader of single rows, batch 32: the losses of one epoch."""
    order = RandomSampler(
        range(len(x)), generator=torch.Generator().manual_seed(seed)
    )  # the same as data.Batches' of that seed
    criterion, losses = nn.MSELoss(), []
    for features, targets in DataLoader(TensorDataset(x, y), batch_size=32, sampler=order):
        optimizer.zero_grad()
        loss = criterion(model(features), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_steps(
    logits_of: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> list[float]:
    """A plain eager loop over token batches in float32: the losses."""
    losses = []
    for x, y in batches:
        loss = F.cross_entropy(logits_of(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def transformers():
    """The library, or None where it is not installed."""
    for name in ("torchvision", "torchaudio"):  # it would look into them, and they may not fit this torch
        sys.modules.setdefault(name, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    return transformers


def gpt2(library, config: GPTConfig) -> nn.Module:
    """transformers' GPT2LMHeadModel of that configuration, without dropout."""
    return library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def generate(library, model: nn.Module, tokens: Tensor, n_tokens: int) -> Tensor:
    """transformers' greedy continuation with its cache, which does not stop at any token: (B, T) -> (B, T + n_tokens)."""
    settings = library.GenerationConfig(max_new_tokens=n_tokens, do_sample=False, use_cache=True, pad_token_id=0)
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings, eos_token_id=None)
