"""SAELens's own evaluation, in the form of SAEBench's: its explained variance is the one to quote."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer

from itda_lens.saebench.job import result_file


@dataclass
class SAELensEvalConfig:
    """Settings of SAELens's evaluation: which figures to measure, and on how much text.

    Attributes:
        model_name: TransformerLens's name of the model.
        dataset: name of the data set, or a folder.
        context_size: tokens per context; None takes the dictionary's.
        batch_size_prompts: contexts per batch.
        n_eval_reconstruction_batches: batches for the model's losses; 0 leaves the losses out.
        n_eval_sparsity_variance_batches: batches for L0, explained variance and densities.
        llm_dtype: precision of the model.
    """

    model_name: str = ""
    dataset: str = "Skylion007/openwebtext"
    context_size: int | None = None
    batch_size_prompts: int = 16
    n_eval_reconstruction_batches: int = 10
    n_eval_sparsity_variance_batches: int = 10
    llm_dtype: str = "float32"


def run_eval(
    config: SAELensEvalConfig, saes: list[tuple[str, SAE[Any]]], device: str, output_path: str
) -> None:
    """Evaluate each SAE with `sae_lens.evals.run_evals`; one result file each."""
    dtype = getattr(torch, config.llm_dtype)
    model = HookedTransformer.from_pretrained_no_processing(
        config.model_name, device=device, dtype=dtype
    )
    losses = config.n_eval_reconstruction_batches > 0
    for name, sae in saes:
        sae = sae.to(dtype=dtype)
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=config.dataset,
            context_size=config.context_size,
            store_batch_size_prompts=config.batch_size_prompts,
            device=device,
        )
        store.shuffle_input_dataset(seed=42)
        metrics, features = run_evals(
            sae,
            store,
            model,
            ActivationScaler(),
            EvalConfig(
                batch_size_prompts=config.batch_size_prompts,
                n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
                n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
                compute_kl=losses,
                compute_ce_loss=losses,
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
                compute_featurewise_density_statistics=True,
            ),
        )
        density = features["feature_density"]
        metrics["sparsity"]["alive_fraction"] = sum(d > 0 for d in density) / len(density)
        result = {
            "eval_type_id": "saelens",
            "eval_config": asdict(config),
            "eval_result_metrics": metrics,
            "eval_result_unstructured": features,
        }
        path = result_file(output_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2))
