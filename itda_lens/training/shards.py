"""Builds that are split into shards: each one a file, so that work can stop, move and go on.

A plan fixes the shards from the texts alone, by its settings and never by the number of workers. Each
shard is then run by whoever comes first, into one file that appears whole or not at all. Merged in any
order, shards give the dictionary of a single run, bit for bit on a CPU.
"""

import hashlib
import inspect
import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from itda_lens.dictionary import RULES, Resumable, Rule
from itda_lens.pursuit import Coding
from itda_lens.records import (
    Cutting,
    Provenance,
    TokenFilter,
    at_least,
    checked,
    replacing,
    versions,
)
from itda_lens.records.files import alone_in, said
from itda_lens.sae import ITDA
from itda_lens.sae.saved import check_digests, digests, write_tensors
from itda_lens.sources import Chats, Ids, Listed, ModelSource, describe_texts, iterate_texts
from itda_lens.training.engines import ray_shards
from itda_lens.training.point import Point
from itda_lens.training.recipe import Recipe, recipe_of
from itda_lens.training.run import assembled, check_enough

logger = logging.getLogger(__name__)

SHARD_ROWS = 65_536
"""Rows of one shard, where the user names no number: tokens that count. A shard is the most work that a
kill can lose."""

SPARE = 1.0
"""Room that shards leave for equal activations, as a share of the sample in which they count once."""

Engine = Literal["local", "ray"]
"""Who runs shards: this process, or workers of a Ray cluster."""

_FORMAT = 1
_PLAN, _TEXTS = "plan.json", "texts.jsonl"


@dataclass(frozen=True)
class Shard:
    """A part of the stream: whole batches, so that each forward pass is that of an undivided run.

    Attributes:
        mark: the mark of its first batch (`Listing`).
        n_batches: batches that have a row that counts.
        n_rows: rows that count.
        places_sha256: digest of the places of its rows: other texts or another tokenizer give another.
    """

    mark: Mapping[str, int]
    n_batches: int
    n_rows: int
    places_sha256: str


class Plan:
    """A build of one or several dictionaries, split into shards.

    Made by `plan` or `plan_from`, or opened again by `open_plan`, in this process or another one.

    Attributes:
        folder: the folder in which the plan and the finished shards are.
        hooks: the hook points.
        recipe: how atoms are chosen and encode.
        shards: the parts of the stream, in order.
    """

    def __init__(
        self, folder: Path, content: Mapping[str, Any], recipe: Recipe, source: Listed | None
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.hooks: list[str] = list(content["settings"]["hooks"])
        self.shards = [Shard(**shard) for shard in content["shards"]]
        self._bounds: list[int] = content["bounds"]
        self._content, self._source = content, source
        self._id = _sha256(json.dumps([content["settings"], content["shards"]], sort_keys=True))

    def __len__(self) -> int:
        return len(self.shards)

    def __repr__(self) -> str:
        return f"Plan({str(self.folder)!r}, {len(self)} shards, {len(self.pending())} to run)"

    @property
    def n_rows(self) -> int:
        """Rows that count, of all shards."""
        return sum(shard.n_rows for shard in self.shards)

    def pending(self) -> list[int]:
        """The numbers of the shards that are not finished."""
        return [i for i in range(len(self)) if not self._file(i).exists()]

    @checked
    def run(self, index: int, *, again: bool = False) -> None:
        """Run one shard, into one file. A shard that is finished is left alone.

        Two processes may run one shard at the same time: both write the same file.

        Args:
            index: the number of the shard, from 0.
            again: run it anew even if it is finished.

        Raises:
            ValueError: there is no such shard, activations are NaN or infinite, or the texts are others
                than those of the plan.
            OSError: the file cannot be written; finished shards stay.
        """
        self._run(index, again)

    @checked
    def run_all(
        self,
        *,
        engine: Engine = "local",
        workers: int = 1,
        model: str | Path | None = None,
        options: dict[str, object] | None = None,
        progress: bool = True,
    ) -> None:
        """Run all shards that are not finished.

        Args:
            engine: "local", one after the other in this process, or "ray", by workers of a Ray cluster
                (`pip install 'itda-lens[ray]'`): the one that `ray.init` has joined, or else one of this
                machine. All of them must see the folder and the model. A worker that dies is replaced.
            workers: for "ray": processes, each with a model of its own.
            model: for "ray": where the workers find the model; default: the place that the plan records.
            options: for "ray": what each worker needs, such as `{"num_gpus": 1}`.
            progress: show a progress bar with rows/s.

        Raises:
            ValueError, OSError: as `run`.
            BlockingIOError: another process runs this plan by `run_all` just now.
            ImportError: Ray is not installed.
        """
        at_least(1, workers=workers)
        if engine not in get_args(Engine):
            raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
        pending = self.pending()
        with (
            alone_in(self.folder),
            tqdm(
                total=self.n_rows, unit="tok", unit_scale=True, desc="building", disable=not progress
            ) as bar,
        ):
            bar.update(self.n_rows - sum(self.shards[i].n_rows for i in pending))
            if engine == "ray":
                settings: dict[str, Any] = dict(workers=workers, model=model, options=options or {})
                done = ray_shards(self.folder.resolve(), pending, **settings)
            else:
                done = map(self._finished, pending)
            for i in done:
                bar.update(self.shards[i].n_rows)

    @checked
    def finish(
        self, *, device: str | torch.device = "cpu", metadata: dict[str, object] | None = None,
        progress: bool = True,
    ) -> dict[str, ITDA]:  # fmt: skip
        """Merge all shards and choose the atoms: the dictionaries of an undivided run.

        The model is not needed.

        Args:
            device: where atoms are chosen.
            metadata: more entries for `cfg.metadata`.
            progress: show a progress bar where choosing takes long.

        Returns:
            The dictionaries by hook name, in the order of `hooks`.

        Raises:
            ValueError: shards are not finished yet, or a file is damaged or of another plan; the message
                says how to go on. Or there are fewer distinct activations than atoms.
        """
        if missing := self.pending():
            raise ValueError(
                f"all shards must be finished first: {len(missing)} of {len(self)} are not, the first "
                f"is number {missing[0]}; run them with run_all() or run(index)"
            )
        start = time.perf_counter()
        points: dict[str, Point] = {}
        seconds = 0.0
        for i in range(len(self)):
            about, states = self._read(i)
            seconds += about["seconds"]
            for hook, state in states.items():
                d_in, dtype = about["hooks"][hook]
                point = Point(self.recipe, d_in, getattr(torch, dtype), torch.device(device))
                point.load(state)
                if hook in points:
                    points[hook].merge(point)
                else:
                    points[hook] = point
        with torch.no_grad():
            chosen = {hook: points[hook].finish(progress) for hook in self.hooks}
        seconds = round(seconds + time.perf_counter() - start, 2)
        return {
            hook: assembled(found, self.recipe, self._provenance(hook, seconds), metadata or {})
            for hook, found in chosen.items()
        }

    @property
    def source(self) -> Listed:
        """The source of the activations, opened when it is first needed.

        Raises:
            ValueError: the plan does not say where the model, or the source, can be had again.
        """
        if self._source is None:
            self._source = _reopened(self.folder, self._content["source"], None)
        return self._source

    def _finished(self, index: int) -> int:
        self._run(index, again=False)
        return index

    @torch.no_grad()
    def _run(self, index: int, again: bool) -> None:
        if not 0 <= index < len(self):
            raise ValueError(f"index must be between 0 and {len(self) - 1}, got {index}")
        if self._file(index).exists() and not again:
            return
        start = time.perf_counter()
        shard = self.shards[index]
        points: dict[str, Point] = {}
        seen = hashlib.sha256()
        device = "cpu"
        for rows in itertools.islice(self.source.rows_from(shard.mark), shard.n_batches):
            seen.update(rows.places.identity.tobytes())
            for hook, x in rows.values.items():
                if hook not in points:
                    points[hook] = Point.for_rows(self.recipe, x)
                    points[hook].limit(self._bounds)
                points[hook].update(x, rows.places)
                device = str(x.device)
        if seen.hexdigest() != shard.places_sha256:
            raise ValueError(
                f"shard {index} of {self.folder} has other tokens than were planned: the texts or the "
                "tokenizer have changed since; make a new plan"
            )
        samples = {hook: point.state() for hook, point in points.items()}
        state = {
            f"{self.hooks.index(hook)}.{name}": value.cpu()
            for hook, part in samples.items()
            for name, value in part.items()
        }
        about = {
            "plan": self._id,
            "hooks": {hook: point.stream for hook, point in points.items()},
            "device": device,
            "versions": versions(),
            "seconds": time.perf_counter() - start,
            "digests": digests(state),
        }
        with replacing(self._file(index)) as (file,):
            write_tensors(state, file, {"itda": json.dumps(about)})
        logger.info("shard %d of %d: %d rows", index, len(self), shard.n_rows)

    def _read(self, index: int) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        """The facts about a finished shard, and its state at each hook point."""
        file = self._file(index)
        try:
            with safe_open(file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["itda"])
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            check_digests(state, about["digests"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{file} is damaged: run({index}, again=True) makes it anew ({error})"
            ) from error
        if about["plan"] != self._id:
            raise ValueError(f"{file} is of another plan: run({index}, again=True) makes it anew")
        states: dict[str, dict[str, torch.Tensor]] = {hook: {} for hook in self.hooks}
        for name, value in state.items():
            number, _, rest = name.partition(".")
            states[self.hooks[int(number)]][rest] = value
        return about, states

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}.safetensors"

    def _provenance(self, hook: str, seconds: float) -> Provenance:
        return replace(Provenance(**self._content["provenance"][hook]), seconds=seconds)


@checked
def plan(
    model: Any,
    texts: str | Path | Iterable[Any],
    hook_names: str | int | Sequence[str | int],
    *,
    folder: str | Path,
    shard_rows: int = SHARD_ROWS,
    spare: float = SPARE,
    **settings: Any,
) -> Plan:
    """Split a build into shards, or open the plan that an earlier call with these settings made.

    The tokenizer reads all texts now; the model runs later, in `Plan.run`. Texts that are not in a file
    or a named data set are written into the folder, so that other processes find them.

    Args:
        model, texts, hook_names: as in `build`.
        folder: the folder of the plan and its shards; made if it is missing.
        shard_rows: tokens that count, of a shard, at least; a shard ends with a forward pass.
        spare: room that shards leave for activations that are equal, as a share of the sample in which
            they count once. `Plan.finish` says if it was too little.
        settings: all other arguments of `build`, but `progress`.

    Raises:
        ValueError, TypeError: as `build`; the folder holds a plan with other settings, or the rule
            depends on the order of the stream ("paper") and cannot be split.
    """
    takes = {f: inspect.signature(f).parameters for f in (recipe_of, Cutting, ModelSource)}
    mine = {f: {k: v for k, v in settings.items() if k in takes[f]} for f in takes}
    if unknown := set(settings) - {name for names in takes.values() for name in names}:
        raise TypeError(f"plan has no argument {min(unknown)!r}; it takes those of build")
    if mine[Cutting].get("context_size", 0) is None:  # the default, as in `build`
        del mine[Cutting]["context_size"]
    recipe = recipe_of(**mine[recipe_of])
    most = settings.get("max_tokens")
    if isinstance(most, int) and not isinstance(most, bool):  # before the model is loaded
        at_least(1, max_tokens=most)
        check_enough(recipe, None if settings.get("per_head") else most)
    return plan_texts(
        model, texts, hook_names, recipe, Cutting(**mine[Cutting]), folder=folder,
        shard_rows=shard_rows, spare=spare, **mine[ModelSource],
    )  # fmt: skip


def plan_texts(
    model: Any,
    texts: str | Path | Iterable[Any] | Chats,
    hook_names: str | int | Sequence[str | int],
    recipe: Recipe,
    cutting: Cutting,
    *,
    folder: str | Path,
    shard_rows: int = SHARD_ROWS,
    spare: float = SPARE,
    **reading: Any,
) -> Plan:
    """`plan`, with the settings put together: `reading` goes to `ModelSource`."""
    if isinstance(texts, Chats):
        raise ValueError(
            "texts must be texts to be split into shards, got Chats; for these, pass a ChatSource to "
            "itda_lens.training.plan_from"
        )
    folder = Path(folder)
    _check_resumable(recipe)
    named = isinstance(texts, str | Path)
    described = describe_texts(texts, reading.get("text_field", "text"), reading.get("split", "train"))
    if not named:
        # Of no use once texts are in a file of the plan; nonsense is told all the same.
        how = {name: reading.pop(name) for name in ("text_field", "split") if name in reading}
        texts = _stored(iterate_texts(texts, **how), folder / _TEXTS)
    source = ModelSource(model, texts, hook_names, cutting, **reading)
    record = _record(source, texts if named else None, reading) | {"hooks": list(source.hooks)}
    return _planned(source, recipe, folder, shard_rows, spare, record, described)


@checked
def plan_from(
    source: Listed, recipe: Recipe, *, folder: str | Path, shard_rows: int = SHARD_ROWS,
    spare: float = SPARE,
) -> Plan:  # fmt: skip
    """Split the reading of a source of your own into shards, as `plan` does for models and texts.

    Another process opens the plan with `open_plan(folder, source=...)`.

    Args:
        source: where activations come from; it must be `Listed`.
        recipe: how atoms are chosen and encode.
        folder, shard_rows, spare: as in `plan`.

    Raises:
        ValueError: as `plan`.
    """
    return _planned(source, recipe, Path(folder), shard_rows, spare, {}, {})


@checked
def open_plan(
    folder: str | Path, *, model: Any = None, source: Listed | None = None, rule: Rule | None = None
) -> Plan:
    """Open a plan that was made before, in this process or another one, here or on another machine.

    Args:
        folder: the folder of the plan.
        model: the model, or where it is now; default: the place that the plan recorded.
        source: the source that `plan_from` was given.
        rule: the rule, if it is one of your own.

    Raises:
        ValueError: there is no plan, it is damaged, or of another version.
    """
    folder = Path(folder)
    content = _content(folder)
    recipe = _recipe(content["settings"]["recipe"], rule)
    if source is None and model is not None:
        source = _reopened(folder, content["source"], model)
    return Plan(folder, content, recipe, source)


def _planned(
    source: Listed, recipe: Recipe, folder: Path, shard_rows: int, spare: float,
    record: Mapping[str, Any], described: Mapping[str, Any],
) -> Plan:  # fmt: skip
    at_least(1, shard_rows=shard_rows)
    if not 0 <= spare < math.inf:
        raise ValueError(f"spare must be a number of at least 0, got {spare}")
    if not isinstance(source, Listed):
        raise TypeError(f"source must have listing and rows_from (Listed), got {type(source).__name__}")
    _check_resumable(recipe)
    # What the rows are is known once all texts have been read, and so are the settings to compare.
    shards, bounds = _shards(source, recipe, shard_rows, spare)
    provenance = {hook: source.provenance(hook) for hook in source.hooks}
    if described:  # texts in memory are read from a file of the plan, which says nothing of them
        told = Provenance(**described)
        path = next(iter(provenance.values())).dataset_path if told.text_field else None
        where: dict[str, Any] = dict(
            texts=told.texts, text_field=told.text_field, split=told.split, dataset_path=path
        )
        provenance = {hook: replace(known, **where) for hook, known in provenance.items()}
    settings = {
        "format": _FORMAT,
        "hooks": list(source.hooks),
        "recipe": recipe.record(),
        "shard_rows": shard_rows,
        "spare": spare,
        "model": next(iter(provenance.values())).model_name,
        "texts": next(iter(provenance.values())).texts_read_sha256,
        "source": {k: v for k, v in record.items() if k not in ("model", "texts")},
    }
    content = _plain(
        {
            "settings": settings,
            "source": record,
            "provenance": {hook: asdict(known) for hook, known in provenance.items()},
            "shards": [asdict(shard) for shard in shards],
            "bounds": bounds,
        }
    )
    check_enough(recipe, sum(shard.n_rows for shard in shards))
    if (folder / _PLAN).exists():
        before = _content(folder)
        for name, value in content["settings"].items():
            if before["settings"].get(name) != value:
                raise ValueError(
                    f"folder={str(folder)!r} holds a plan with another {name}: "
                    f"{before['settings'].get(name)!r} there, {value!r} here"
                )
        if before["shards"] != content["shards"]:
            raise ValueError(f"folder={str(folder)!r} holds a plan of other texts or tokens")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / _PLAN) as (file,):
            file.write_text(json.dumps(content, indent=1))
    return Plan(folder, content, recipe, source)


def _shards(
    source: Listed, recipe: Recipe, shard_rows: int, spare: float
) -> tuple[list[Shard], list[int]]:
    """The shards of a source, and the bounds of the samples (`Point.bounds`)."""
    dry = Point(recipe, 1, torch.float32, torch.device("cpu")).bounds(spare)
    shards: list[Shard] = []
    mark, n_batches, n_rows, seen = None, 0, 0, hashlib.sha256()
    for batch in source.listing():
        mark = batch.mark if mark is None else mark
        n_batches, n_rows = n_batches + 1, n_rows + len(batch.places)
        seen.update(batch.places.identity.tobytes())
        for bound in dry:
            bound.update(batch.places)
        if n_rows >= shard_rows:
            shards.append(Shard(mark, n_batches, n_rows, seen.hexdigest()))
            mark, n_batches, n_rows, seen = None, 0, 0, hashlib.sha256()
    if mark is not None:
        shards.append(Shard(mark, n_batches, n_rows, seen.hexdigest()))
    return shards, [bound.value() for bound in dry]


def _check_resumable(recipe: Recipe) -> None:
    point = Point(recipe, 1, torch.float32, torch.device("cpu"))
    if not isinstance(point.selector, Resumable):
        raise ValueError(
            f"rule must not depend on the order of the stream to be split, got {recipe.rule!r}: its "
            "selector has no state, load and merge"
        )


def _record(
    source: ModelSource, texts: str | Path | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All that opens the source again, as plain data; `texts` is None for those in the plan's folder."""
    tokenizer = settings.get("tokenizer")
    plain = {k: v for k, v in settings.items() if isinstance(v, str | int | float) and k != "device"}
    return {
        **plain,
        "model": source.model.source,
        "loader": source.model.loader,
        "tokenizer": str(tokenizer) if isinstance(tokenizer, str | Path) else None,
        "texts": None if texts is None else _absolute(texts),
        "cutting": asdict(source.tokenization.cutting),
        **({"tokens": tokens.record()} if (tokens := source.tokenization.tokens) else {}),
    }


def _reopened(folder: Path, record: Mapping[str, Any], model: Any) -> ModelSource:
    if not record:
        raise ValueError(f"source must be given: the plan in {folder} was made by plan_from")
    settings = dict(record)
    model = settings.pop("model") if model is None else model
    settings.pop("model", None)
    texts, cutting = settings.pop("texts"), settings.pop("cutting")
    hooks, tokens = settings.pop("hooks"), settings.pop("tokens", None)
    if model is None:
        raise ValueError(f"model must be given: the plan in {folder} does not know where it is")
    return ModelSource(
        model,
        folder / _TEXTS if texts is None else texts,
        hooks,
        Cutting(**cutting),
        tokens=None if tokens is None else TokenFilter(**tokens),
        **settings,
    )


def _absolute(texts: str | Path) -> str:
    """The file from wherever another process runs; a data set's name as it is."""
    return str(Path(texts).resolve()) if Path(texts).exists() else str(texts)


def _stored(texts: Iterable[str | Ids], file: Path) -> Path:
    """The texts in a file of the plan.

    Raises:
        ValueError: the file is there, with other texts.
        TypeError: a text is no string.
    """
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    if file.exists():
        with file.open(encoding="ascii") as stored:
            for number, (line, before) in enumerate(itertools.zip_longest(lines, stored)):
                if line != before:
                    raise ValueError(
                        f"folder={str(file.parent)!r} holds a plan of other texts: text {number} differs"
                    )
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as (temporary,), temporary.open("w", encoding="ascii") as stream:
        stream.writelines(lines)
    return file


def _content(folder: Path) -> dict[str, Any]:
    """The plan of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = folder / _PLAN
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = content["settings"]["format"] == _FORMAT
        if known:
            _check_parts(content)
    except FileNotFoundError as error:
        raise ValueError(f"folder={str(folder)!r} holds no plan: {_PLAN} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {said(error)}") from error
    if not known:
        raise ValueError(f"{file} is of another version of itda-lens")
    return content


def _check_parts(content: Mapping[str, Any]) -> None:
    """Build everything that a plan needs once, so that damage is told when it is opened."""
    for shard in content["shards"]:
        Shard(**shard)
    for record in content["provenance"].values():
        Provenance(**record)
    for name in ("bounds", "source"):
        len(content[name])
    len(content["settings"]["hooks"])


def _recipe(record: Mapping[str, Any], rule: Rule | None) -> Recipe:
    """The recipe that gave this record.

    Raises:
        ValueError: the rule is one of the user's own and was not given, or another one was.
    """
    settings = dict(record)
    fields = dict(settings.pop("rule"))
    name = fields.pop("name")
    kinds = {type(known).__name__: type(known) for known in RULES.values()}
    if rule is None:
        if name not in kinds:
            raise ValueError(f"rule must be given: {name} is not one of {', '.join(sorted(kinds))}")
        rule = kinds[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    coding = Coding(**{k: settings.pop(k) for k in ("k", "method", "signed", "rtol")})
    recipe = Recipe(settings.pop("d_sae", None), coding, rule, **settings)
    if recipe.record() != record:
        raise ValueError(f"rule must be that of the plan, got {rule!r}")
    return recipe


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """The content after a way through JSON."""
    return json.loads(json.dumps(content))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
