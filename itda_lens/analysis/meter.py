"""Running figures of the codes and reconstructions of a dictionary."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from itda_lens.dictionary import RunningFVU
from itda_lens.sae import coded


class CodeMeter:
    """FVU, L0 and firing rates of one dictionary or SAE, over all activations that it was shown."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._sae = sae
        self._fvu = RunningFVU()
        self._fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device="cpu")
        self._nonzeros = 0

    def update(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Count these activations, and return their reconstructions."""
        reconstructions = []
        for part in coded(self._sae, x):
            fired = part.codes.indices[part.codes.values != 0].cpu()
            self._fired += fired.bincount(minlength=len(self._fired))
            self._nonzeros += len(fired)
            reconstructions.append(part.reconstruction.to(x.device))
        reconstruction = torch.cat(reconstructions)
        self._fvu.update(x, reconstruction)
        return reconstruction

    @property
    def n(self) -> int:
        """Activations that were counted."""
        return self._fvu.n

    def figures(self) -> dict[str, Any]:
        """The figures so far, by the names that `Evaluation` and `RowsEvaluation` have for them."""
        cfg, n = self._sae.cfg, max(1, self.n)
        return {
            "d_sae": cfg.d_sae,
            "k": getattr(cfg, "k", getattr(cfg, "max_iterations", None)),
            "l0": self._nonzeros / n,
            "fvu": self._fvu.value(),
            "alive_fraction": (self._fired > 0).float().mean().item(),
            "feature_density": self._fired / n,
        }
