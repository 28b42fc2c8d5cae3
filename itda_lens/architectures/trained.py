"""SAELens's own SAEs, trained by SAELens on the same activations."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from itda_lens.records import at_least, checked
from itda_lens.sources import check_activations

Architecture = Literal["topk", "batchtopk", "matryoshka", "matching_pursuit"]

LEARNING_RATE = 3e-3
BATCH = 1024

NESTED = (8, 4, 2, 1)
"""The widths of a Matryoshka SAE's levels, as divisors of d_sae."""


@checked
def train_sae(
    activations: Float[Tensor, "n_tokens d_in"],
    *,
    d_sae: int,
    k: int,
    architecture: Architecture = "topk",
    epochs: int = 8,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = BATCH,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> TrainingSAE[Any]:
    """One of SAELens's SAEs, trained by SAELens on `activations`, in a new random order each epoch.

    Training uses Adam and the auxiliary loss for dead latents. Activations are scaled to mean norm
    sqrt(d_in), and `b_dec` begins at their mean. The learning rate warms up over the first 5 % of the
    steps and decays linearly over the last 20 %.

    Args:
        architecture: "topk" has k nonzeros a row. "batchtopk" has k nonzeros a row on average over each
            batch, and a threshold instead after training (`save_inference` writes a JumpReLU SAE).
            "matryoshka" is "batchtopk" with further losses for nested prefixes: an eighth, a quarter and
            half of the latents. "matching_pursuit" takes k steps a row, and fewer only if it picks a
            latent again.
        epochs: passes over the activations.
        learning_rate, batch_size: the defaults were chosen on a validation split, for "topk"; see
            docs/saebench.md. A batch has no more rows than there are activations.

    Returns:
        The trained SAE; `save_inference` writes it as a SAELens SAE for inference.

    Raises:
        ValueError: architecture is unknown; k, d_sae or epochs is out of range.
    """
    check_activations(activations)
    n, d_in = activations.shape
    if architecture not in get_args(Architecture):
        raise ValueError(f"architecture must be one of {get_args(Architecture)}, got {architecture!r}")
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must be between 1 and d_sae={d_sae}, got {k}")
    at_least(1, epochs=epochs, batch_size=batch_size)
    at_least(0, seed=seed)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0 and finite, got {learning_rate}")
    batch_size = min(batch_size, n)
    steps = epochs * (n // batch_size)
    device = str(activations.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common: dict[str, Any] = dict(
            d_in=d_in, d_sae=d_sae, device=device, normalize_activations="expected_average_only_in"
        )
        sae = _untrained(architecture, common, k, steps)
        for key, value in (metadata or {}).items():
            sae.cfg.metadata[key] = value
        trainer = SAETrainer(
            cfg=SAETrainerConfig(
                total_training_samples=steps * batch_size,
                train_batch_size_samples=batch_size,
                device=device,
                lr=learning_rate,
                lr_end=learning_rate / 10,
                lr_warm_up_steps=steps // 20,
                lr_decay_steps=steps // 5,
                dead_feature_window=max(1, n // batch_size),
                n_batches_for_norm_estimate=max(1, n // batch_size),
            ),
            sae=sae,
            data_provider=_epochs(activations, batch_size, seed),
        )
        scale = d_in**0.5 / activations.norm(dim=-1).mean().item()
        trainer.activation_scaler.scaling_factor = scale
        with torch.no_grad():
            sae.b_dec.copy_(activations.mean(dim=0, dtype=torch.float64) * scale)
        trained = trainer.fit()
        folds = "fold_activation_norm_scaling_factor" in vars(BatchTopKTrainingSAE)
        if isinstance(trained, BatchTopKTrainingSAE) and not folds:
            # SAELens 6.54.0 leaves the threshold in scaled units (its issue #763).
            trained.topk_threshold /= scale
        return trained


def _untrained(
    architecture: Architecture, common: dict[str, Any], k: int, steps: int
) -> TrainingSAE[Any]:
    if architecture == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**common, k=k))
    if architecture == "matching_pursuit":
        return MatchingPursuitTrainingSAE(
            MatchingPursuitTrainingSAEConfig(
                **common, max_iterations=k, residual_threshold=0.0, decoder_init_norm=1.0
            )
        )
    # A running mean that begins at 0: with few steps SAELens's rate, 0.01, does not get there.
    common |= dict(k=k, topk_threshold_lr=max(0.01, min(1.0, 10 / steps)))
    if architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    widths = sorted({max(1, common["d_sae"] // part) for part in NESTED})
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=widths)
    )


def _epochs(activations: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end, every epoch in a new order; an epoch's last, short batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield activations[order[start : start + batch_size]]
