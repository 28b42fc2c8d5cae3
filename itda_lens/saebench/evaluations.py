"""The evaluations that `bench` can run: where SAEBench keeps each, its settings and its figures."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Codes = Literal["signed", "nonnegative"]


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation's result file.

    Attributes:
        name: its name in tables.
        path: keys that lead to it in the JSON file, below the evaluation's metrics.
        higher_is_better: False for error rates; None where neither is better.
    """

    name: str
    path: str
    higher_is_better: bool | None = True


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of SAEBench, or SAELens's own.

    Attributes:
        name: its name for `--evals`.
        module: the module that runs it; its configuration is in `eval_config` beside it.
        config: name of the configuration class.
        metrics: the figures that tables show, the first one first.
        sign_matters: whether a signed dictionary is worth evaluating as its non-negative view too: the
            evaluation tests `> 0`, ranks by value or gives each latent one meaning.
        datasets_setting: the field of the configuration that names its labelled data sets.
        texts_setting: the field that names its plain text, for evaluations that can use any text.
        settings: our settings where they differ from SAEBench's defaults.
    """

    name: str
    module: str
    config: str
    metrics: tuple[Metric, ...]
    sign_matters: bool = False
    datasets_setting: str | None = None
    texts_setting: str | None = None
    settings: Mapping[str, Any] | None = None


_EVALS = "sae_bench.evals"

EVALUATIONS: dict[str, Evaluation] = {
    evaluation.name: evaluation
    for evaluation in [
        Evaluation(
            "saelens",
            "itda_lens.saebench.saelens",
            "SAELensEvalConfig",
            (
                Metric("L0", "sparsity.l0", None),
                Metric("explained variance", "reconstruction_quality.explained_variance"),
                Metric("alive", "sparsity.alive_fraction"),
            ),
            texts_setting="dataset",
        ),
        Evaluation(
            "core",
            f"{_EVALS}.core.main",
            "CoreEvalConfig",
            (
                Metric("CE-loss score", "model_performance_preservation.ce_loss_score"),
                Metric("KL score", "model_behavior_preservation.kl_div_score"),
                Metric("alive (> 0)", "misc_metrics.frac_alive"),
            ),
            sign_matters=True,
            texts_setting="dataset",
            # Off in the configuration; the commands that SAEBench documents have them on.
            settings={
                "compute_featurewise_density_statistics": True,
                "compute_featurewise_weight_based_metrics": True,
                "exclude_special_tokens_from_reconstruction": True,
            },
        ),
        Evaluation(
            "sparse_probing",
            f"{_EVALS}.sparse_probing.main",
            "SparseProbingEvalConfig",
            (
                Metric("probing top 1", "sae.sae_top_1_test_accuracy"),
                Metric("probing top 5", "sae.sae_top_5_test_accuracy"),
            ),
            sign_matters=True,
            datasets_setting="dataset_names",
        ),
        Evaluation(
            "sparse_probing_sae_probes",
            f"{_EVALS}.sparse_probing_sae_probes.main",
            "SparseProbingSaeProbesEvalConfig",
            (
                Metric("sae-probes top 1", "sae.sae_top_1_test_accuracy"),
                Metric("sae-probes top 5", "sae.sae_top_5_test_accuracy"),
            ),
            sign_matters=True,
        ),
        Evaluation(
            "absorption",
            "itda_lens.saebench.absorption",
            "AbsorptionConfig",
            (
                Metric("absorption", "mean.mean_absorption_fraction_score", False),
                Metric("full absorption", "mean.mean_full_absorption_score", False),
                Metric("splits", "mean.mean_num_split_features", False),
            ),
            sign_matters=True,
        ),
        Evaluation(
            "scr",
            f"{_EVALS}.scr_and_tpp.main",
            "ScrAndTppEvalConfig",
            (Metric("SCR top 20", "scr_metrics.scr_metric_threshold_20"),),
            sign_matters=True,
            datasets_setting="dataset_names",
            settings={"perform_scr": True},
        ),
        Evaluation(
            "tpp",
            f"{_EVALS}.scr_and_tpp.main",
            "ScrAndTppEvalConfig",
            (Metric("TPP top 20", "tpp_metrics.tpp_threshold_20_total_metric"),),
            sign_matters=True,
            datasets_setting="dataset_names",
            settings={"perform_scr": False},
        ),
        Evaluation(
            "meta_structure",
            f"{_EVALS}.meta_structure.main",
            "MetaStructureEvalConfig",
            (Metric("decoder explained", "meta_structure.decoder_fraction_variance_explained", False),),
        ),
        Evaluation(
            "autointerp",
            f"{_EVALS}.autointerp.main",
            "AutoInterpEvalConfig",
            (Metric("autointerp", "autointerp.autointerp_score"),),
            sign_matters=True,
            texts_setting="dataset_name",
        ),
        Evaluation(
            "ravel",
            f"{_EVALS}.ravel.main",
            "RAVELEvalConfig",
            (Metric("RAVEL disentanglement", "ravel.disentanglement_score"),),
            sign_matters=True,
        ),
        Evaluation(
            "unlearning",
            f"{_EVALS}.unlearning.main",
            "UnlearningEvalConfig",
            (Metric("unlearning", "unlearning.unlearning_score"),),
            sign_matters=True,
        ),
        Evaluation(
            "mdl",
            f"{_EVALS}.mdl.main",
            "MDLEvalConfig",
            (),
            sign_matters=True,
            texts_setting="dataset_name",
        ),
    ]
}


def chosen(names: list[str]) -> list[Evaluation]:
    """The evaluations of these names.

    Raises:
        ValueError: no name, an unknown or a repeated one.
    """
    unknown = [name for name in names if name not in EVALUATIONS]
    if unknown or not names:
        raise ValueError(
            f"evals must be among {', '.join(EVALUATIONS)}; got {unknown[0] if unknown else 'none'!r}"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"evals must be different ones, got {', '.join(names)}")
    return [EVALUATIONS[name] for name in names]


def configure(
    evaluation: Evaluation,
    model_name: str,
    dtype: str,
    batch_size: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The evaluation's configuration: SAEBench's defaults, ours, the run's, then the user's.

    Raises:
        ValueError: a setting that the evaluation does not have, or a value that it does not allow.
    """
    config_class = load_config_class(evaluation)
    fields = config_class.__dataclass_fields__
    values = dict(evaluation.settings or {})
    values |= {"model_name": model_name, "llm_dtype": dtype, "llm_batch_size": batch_size}
    values["batch_size_prompts"] = batch_size
    values = {name: value for name, value in values.items() if name in fields}
    unknown = [name for name in settings if name not in fields]
    if unknown:
        raise ValueError(
            f"settings of {evaluation.name} must be among {', '.join(sorted(fields))}; "
            f"got {unknown[0]!r}"
        )
    try:
        config = config_class(**values | dict(settings))
    except (TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = ", ".join(line for line in lines if not line.startswith("For further information"))
        raise ValueError(f"settings of {evaluation.name} are not valid: {reason}") from error
    return asdict(config)


def load_config_class(evaluation: Evaluation) -> Any:
    """The configuration class; SAEBench keeps it beside the module that runs the evaluation."""
    package = evaluation.module.removesuffix(".main")
    module = importlib.import_module(
        f"{package}.eval_config" if evaluation.module.endswith(".main") else package
    )
    return getattr(module, evaluation.config)


EXTRA_DATA = {
    "unlearning": ("sae_bench/evals/unlearning/data", "cais/wmdp", "cais/mmlu", "wikitext"),
}
"""Further folders that evaluations read, relative to the current one, whatever their configuration."""


def datasets_of(evaluation: Evaluation, config: Mapping[str, Any]) -> list[str]:
    """Names of the data sets that a configured evaluation loads by name."""
    if evaluation.texts_setting is not None:
        return [config[evaluation.texts_setting]]
    names = [] if evaluation.datasets_setting is None else config[evaluation.datasets_setting]
    # SAEBench's names of parts of a data set, such as "LabHC/bias_in_bios_class_set1".
    return sorted({name.split("_class_set")[0].removesuffix("_sentiment") for name in names})
