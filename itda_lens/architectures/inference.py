"""Files of an SAE as it is used for inference."""

import json
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME

from itda_lens.records import checked, replacing
from itda_lens.sae.saved import write_tensors


@checked
def save_inference(sae: SAE[Any], folder: str | Path) -> None:
    """Write a dictionary or a trained SAE, as it is used for inference, into `folder`.

    Raises:
        OSError: the folder cannot be written.
    """
    if not isinstance(sae, TrainingSAE):
        sae.save_model(folder)
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state)
    config = json.dumps(sae.cfg.get_inference_sae_cfg_dict() | {"metadata": sae.cfg.metadata.to_dict()})
    with replacing(target / SAE_WEIGHTS_FILENAME, target / SAE_CFG_FILENAME) as (weights, cfg):
        write_tensors(state, weights)
        cfg.write_text(config)
    (target / SPARSITY_FILENAME).unlink(missing_ok=True)
