"""Engines that run the shards of a plan elsewhere than in this process."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

TRIES = 3
"""How often a shard is begun before a run gives up: a shard may kill its workers."""


class _Worker:
    """A process that holds the model and runs one shard after another."""

    def __init__(self, folder: str, model: Any, threads: int) -> None:
        from itda_lens.training.shards import open_plan

        torch.set_num_threads(threads)  # products of a model depend on it in their last bits
        self._plan = open_plan(folder, model=model)

    def run(self, index: int) -> int:
        self._plan.run(index)
        return index


def ray_shards(
    folder: Path, indices: Sequence[int], *, workers: int, model: Any, options: Mapping[str, Any]
) -> Iterator[int]:
    """Run shards on a Ray cluster, and give the number of each that is finished.

    The cluster is the one that `ray.init` of the caller has joined, or else one of this machine. All
    workers must see the folder. A worker that dies is replaced, and its shard is begun anew.

    Args:
        folder: of the plan.
        indices: the shards to run.
        workers: processes, each with a model of its own.
        model: as in `open_plan`: the name or folder of the model, or None.
        options: for Ray, such as `{"num_gpus": 1}`: what each worker needs.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a shard fails by its own fault, or its workers die each time.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray: pip install 'itda-lens[ray]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    kind: Any = ray.remote(_Worker).options(**options)
    waiting = list(reversed(indices))
    begun = dict.fromkeys(indices, 0)
    running: dict[Any, tuple[Any, int]] = {}

    def begin(worker: Any) -> None:
        if waiting:
            index = waiting.pop()
            begun[index] += 1
            running[worker.run.remote(index)] = worker, index

    def new() -> Any:
        return kind.remote(str(folder), model, torch.get_num_threads())

    everyone = []
    try:
        for _ in range(min(workers, len(indices))):
            everyone.append(new())
            begin(everyone[-1])
        while running:
            (task, *_), _ = ray.wait(list(running))
            worker, index = running.pop(task)
            try:
                yield ray.get(task)
            except RayActorError as error:
                if begun[index] == TRIES:
                    raise ValueError(
                        f"shard {index} of {folder}: its worker died {TRIES} times, last so: {error}"
                    ) from error
                logger.warning("a worker died at shard %d, which is begun anew", index)
                waiting.append(index)
                worker = new()
                everyone.append(worker)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            begin(worker)
    finally:
        for worker in everyone:
            ray.kill(worker)
