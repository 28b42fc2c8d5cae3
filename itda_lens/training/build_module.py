"""From any torch module and its inputs to dictionaries."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from itda_lens.dictionary import Rule
from itda_lens.pursuit import DEFAULT_RTOL, Method
from itda_lens.records import at_least, checked
from itda_lens.sae import ITDA
from itda_lens.sources import ModuleSource
from itda_lens.training.build import build_timed
from itda_lens.training.recipe import Preset, recipe_of
from itda_lens.training.run import check_enough


@checked
def build_module(
    module: nn.Module,
    paths: str | Sequence[str],
    inputs: Iterable[Any],
    label: Callable[..., Any] | None = None,
    *,
    d_sae: int | None,
    k: int,
    preset: Preset = "best",
    rule: str | Rule | None = None,
    seed: int = 0,
    method: Method | None = None,
    signed: bool = True,
    loss_threshold: float | None = None,
    l0: float | None = None,
    update: bool = False,
    least_cosine: float | None = None,
    rtol: float = DEFAULT_RTOL,
    call: Callable[..., Any] | None = None,
    item: str = "row",
    axis: int = -1,
    max_rows: int | None = None,
    name: str | None = None,
    progress: bool = True,
) -> dict[str, ITDA]:
    """Build one labelled dictionary for each of some parts of a module, from one pass over its inputs.

    For models that see images, hear sound or rank items. Language models that read texts have `build`.
    Memory does not grow with the number of inputs. The same arguments give the same dictionaries, bit
    for bit, on a CPU with the same number of threads.

    Args:
        module: any torch module; it runs in evaluation mode, and stops at the deepest path.
        paths, inputs, label, call, item, axis, max_rows, name: as in `sources.ModuleSource`.
        d_sae, k, preset, rule, seed, method, signed, loss_threshold, l0, update, least_cosine, rtol:
            as in `fit`.
        progress: show a progress bar with rows/s, atoms and running FVU.

    Returns:
        The dictionaries by path, in the order of `paths`.

    Raises:
        ValueError: bad settings, no rows, a path that leads nowhere or never runs, NaN or infinite
            activations, or fewer distinct activations than d_sae.
        TypeError: an argument is of the wrong kind; the module does not take such a batch; `label`
            returned something else.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> images = DataLoader(torch.rand(200, 3, 8, 8), batch_size=50)
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU())
        >>> made = build_module(network, "2", images, item="image", d_sae=16, k=4, progress=False)
        >>> made["2"].labels[0].kind
        'image'
    """
    recipe = recipe_of(
        d_sae=d_sae, k=k, preset=preset, rule=rule, seed=seed, method=method, signed=signed,
        loss_threshold=loss_threshold, l0=l0, update=update, least_cosine=least_cosine, rtol=rtol,
    )  # fmt: skip
    at_least(1, max_rows=max_rows)
    check_enough(recipe, max_rows)
    source = ModuleSource(
        module, paths, inputs, label, call=call, item=item, axis=axis, max_rows=max_rows, name=name
    )
    return build_timed(source, recipe, progress)
