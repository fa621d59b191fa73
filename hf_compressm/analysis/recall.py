"""Associative recall measures how much of what it has just read a causal language model can still predict.

A cut may leave the perplexity as it was and still take memory away, since most tokens of a text can be guessed from
the few before them. Here no value can be guessed: a sequence is made of random pairs of a key and a value,
k₁ v₁ k₂ v₂ …, followed by the same keys in another order, each again with its value, which the model has to predict. A
model that remembers the values, but not which key each belongs to, has accuracy 1 / pairs and loss ln(pairs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..architectures.installed_scan import scan_installed
from ..engines import from_first_process, raise_in_all_processes, unwrap
from ..theory.plan import Plan
from .calibration import undisturbed
from .collate import Batch
from .objective import model_outputs, output_of, run

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class RecallResult:
    """A recall result says how well values were recalled: mean `loss`, nats per value, and `accuracy`, in [0, 1]."""

    loss: float
    accuracy: float


def chance(pairs: int) -> RecallResult:
    """Return the result of guessing among the values of the sequence."""
    return RecallResult(math.log(pairs), 1 / pairs)


def recall_probe(model: nn.Module, pairs: int = 8, sequences: int = 32, seed: int = 0) -> RecallResult:
    """Measure what a causal language model recalls; its mode, gradients and random states are as before.

    Args:
        model: a model of Transformers, with or without a state. Of several processes each calls this.
        pairs: how many pairs of a key and a value each sequence has.
        sequences: how many sequences; they are the same for the same seed and vocabulary.
        seed: the seed of the draw.

    Raises:
        ValueError: the model is no language model, or its vocabulary is too small.
    """
    model = unwrap(model)
    with undisturbed(model), scan_installed():
        return RecallProbe(model, pairs, lambda plan: {}, sequences, seed).measure({})


class RecallProbe:
    """A recall probe measures what an unwrapped model in eval mode recalls, with some parameters overridden.

    Args:
        overrides: plan → parameter name → the value with which the model computes what it will after the cut.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: int,
        overrides: Callable[[Plan], dict[str, Tensor | int]],
        sequences: int = 32,
        seed: int = 0,
    ):
        self.model, self.overrides, self.batch = model, overrides, recall_batch(model, pairs, sequences, seed)

    def measure(self, plan: Plan) -> RecallResult:
        """Return what the model recalls as the plan would leave it; every process measures the same sequences."""
        overrides, labels = self.overrides(plan), self.batch["labels"][:, 1:]
        with raise_in_all_processes():
            outputs = run(self.model, lambda: model_outputs(self.model, self.batch), overrides)
            asked = labels != -100
            right = output_of(outputs, "logits")[:, :-1].argmax(-1)[asked] == labels[asked]
            result = RecallResult(output_of(outputs, "loss").item(), right.double().mean().item())
        return from_first_process(result)


def recall_batch(model: nn.Module, pairs: int, sequences: int = 32, seed: int = 0) -> Batch:
    """Return sequences of pairs, (sequences, 4 · pairs), with labels at the values to be recalled only.

    Keys and values of a sequence are distinct tokens, none of them one of the model's special ones.

    Raises:
        ValueError: the model is no language model, or has a vocabulary of fewer than 2 · pairs tokens.
    """
    check_recall(model, pairs)
    tokens, generator = _ordinary_tokens(model), torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(tokens), generator=generator)[: 2 * pairs] for _ in range(sequences)])
    given = tokens[chosen].view(sequences, pairs, 2)  # (key, value)
    order = torch.stack([torch.randperm(pairs, generator=generator) for _ in range(sequences)])
    asked = given.gather(1, order.unsqueeze(-1).expand_as(given))
    labels = asked.clone()
    labels[:, :, 0] = -100
    labels = torch.cat([torch.full_like(given, -100), labels], 1).flatten(1)
    device = next(model.parameters()).device
    return {"input_ids": torch.cat([given, asked], 1).flatten(1).to(device), "labels": labels.to(device)}


def check_recall(model: nn.Module, pairs: int) -> None:
    """Refuse a model that could not be asked for so many pairs.

    Raises:
        ValueError: the model is no language model, or has a vocabulary of fewer than 2 · pairs tokens.
    """
    count = len(_ordinary_tokens(model))
    if count < 2 * pairs:
        raise ValueError(
            f"{pairs} pairs to recall need {2 * pairs} tokens, {type(model).__name__} has {count}: give fewer pairs, "
            "or a causal language model."
        )


def _ordinary_tokens(model: nn.Module) -> Tensor:
    """Return the tokens of the vocabulary that are not special; there are none where a model predicts no tokens."""
    config = model.config.get_text_config()
    ids = torch.arange(0 if model.get_output_embeddings() is None else config.vocab_size)
    special = [getattr(config, name, None) for name in SPECIAL_TOKENS]
    flat = [i for entry in special for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
    return ids[~torch.isin(ids, torch.tensor(flat, dtype=torch.long))]
