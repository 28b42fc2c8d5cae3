"""SAEBench's absorption evaluation, on a random part of the vocabulary if all of it takes too long."""

import random
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.absorption.eval_config import (  # pyright: ignore[reportMissingImports]
    AbsorptionEvalConfig,
)
from sae_lens import SAE


@dataclass
class AbsorptionConfig(AbsorptionEvalConfig):
    """SAEBench's configuration with a limit on words: each word costs a prompt of ten examples.

    Attributes:
        words: how many words of the model's vocabulary, drawn at random; None takes them all.
    """

    words: int | None = Field(default=None, ge=1)


def run_eval(
    config: AbsorptionConfig, saes: list[tuple[str, SAE[Any]]], device: str, output_path: str
) -> None:
    """Run SAEBench's evaluation, with the same prompts for every dictionary.

    Prompts are drawn from `config.random_seed`, which SAEBench reads only in its own command
    (evals/absorption/main.py:345).
    """
    # Here, and not above: the user's process reads the configuration only.
    from sae_bench.evals.absorption import (  # pyright: ignore[reportMissingImports]
        common,
        feature_absorption,
        main,
        vocab,
    )

    def get_alpha_tokens(*args: Any, **options: Any) -> list[str]:
        """The words for prompts. SAEBench asks for them for the probes, and for each dictionary."""
        random.seed(config.random_seed)
        # Sorted: the order of a tokenizer's vocabulary may differ between processes.
        found = sorted(vocab.get_alpha_tokens(*args, **options))
        if config.words is None or config.words >= len(found):
            return found
        return random.Random(config.random_seed).sample(found, config.words)

    for module in (common, feature_absorption):
        module.get_alpha_tokens = get_alpha_tokens
    # Not with force_rerun: it would train the probes of the model again for every dictionary.
    main.run_eval(config, saes, device, output_path=output_path)
