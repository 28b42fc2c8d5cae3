"""How a dictionary came to be: the entries of its metadata, typed, read and written in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from itda_lens.records.cutting import Cutting
from itda_lens.records.local_paths import is_local_path, known_name

BUILD_KEY = "itda_build"
"""The entry of a dictionary's metadata that holds everything for which SAELens has no entry."""

_PACKAGES = ("itda-lens", "torch", "transformers", "transformer-lens", "sae-lens")

_HOSTS = ("model_name", "model_class_name", "hook_name", "context_size", "prepend_bos", "dataset_path")
"""Entries that SAELens and its tools know. They stand beside `BUILD_KEY`, and are believed before it."""

_PATHS = ("model_name", "model", "texts", "dataset_path")
"""Fields that may hold a path of this machine instead of a name."""
_MAPPINGS = ("tokens", "chats", "recipe", "versions")
"""Fields that are mappings of their own, and empty where nothing is known."""


class Metadata(Protocol):
    """The methods of SAELens's `SAEMetadata` that are used here; a dict has them too."""

    def get(self, key: str, /) -> Any: ...
    def __setitem__(self, key: str, value: Any, /) -> None: ...


@dataclass(frozen=True)
class Provenance:
    """Where the activations of a dictionary came from, and how its atoms were chosen.

    A field that is not recorded is None. A dictionary that was fitted to bare activations knows of no
    model, and an SAE of another library records little.

    Attributes:
        model_name: the name by which SAELens's tools know and load the model.
        model_class_name: the class that SAELens loads it with.
        hook_name: the hook point.
        model: the folder or hub name that the model can be loaded from again. A folder is known on the
            machine that saved the dictionary only; see `local`.
        loader: the library that it was loaded with.
        context_size, prepend_bos, keep_special_tokens: as in `Cutting`.
        dataset_path: the file or data set that the texts came from, by SAELens's name for it.
        texts: the file or data set, or the type of an object in memory.
        text_field, split: where in the file or data set the texts stood.
        texts_fingerprint: digest of the first texts, which tells texts apart before all are read.
        texts_read_sha256: digest of all texts that were read.
        vocabulary_sha256: digest of the tokenizer's vocabulary.
        batch_size: contexts, or rows, that were read at once.
        max_tokens: the most tokens that should count.
        n_tokens: tokens that counted.
        tokens: the conditions of the `TokenFilter`; empty where there was none.
        chats: how conversations were read: which special tokens counted, a digest of the template, the
            options that it got, and how many conversations were cut. Empty for texts.
        seconds: how long the build took.
        recipe: the settings of the build: the rule and its fields, the encoder, the seed.
        versions: installed versions of the packages that a build depends on.
        others: entries of `BUILD_KEY` that this version does not know.
    """

    model_name: str | None = None
    model_class_name: str | None = None
    hook_name: str | None = None
    model: str | None = None
    loader: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    keep_special_tokens: bool | None = None
    dataset_path: str | None = None
    texts: str | None = None
    text_field: str | None = None
    split: str | None = None
    texts_fingerprint: str | None = None
    texts_read_sha256: str | None = None
    vocabulary_sha256: str | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    n_tokens: int | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)
    chats: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Metadata) -> "Provenance":
        """The provenance that the metadata of a dictionary, or of any SAE of SAELens, records.

        Files of version 0.1 are read too, in which the settings of the recipe stood among the others.
        """
        record = dict(metadata.get(BUILD_KEY) or {})
        known = {
            f.name: record.pop(f.name)
            for f in fields(cls)
            if f.name in record and f.name not in ("recipe", "others")
        }
        recipe = record.pop("recipe", None)
        if recipe is None:
            recipe = {name: record.pop(name) for name in _RECIPE_OF_0_1 if name in record}
        # A user who gives one field of a cutting beside SAELens's entries may give the third there too.
        for name in (*_HOSTS, "keep_special_tokens"):
            if (value := metadata.get(name)) is not None:
                known[name] = value
        return cls(**known, recipe=recipe, others=record)

    def into(self, metadata: Metadata) -> None:
        """Write everything that is known into the metadata of a dictionary."""
        for name in _HOSTS:
            if (value := getattr(self, name)) is not None:
                metadata[name] = value
        metadata[BUILD_KEY] = self.record()

    def record(self) -> dict[str, Any]:
        """All that is known but the entries that SAELens knows, as plain data for JSON."""
        skipped = {*_HOSTS, *_MAPPINGS, "others"}
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        record = {name: value for name, value in known.items() if value is not None}
        record |= dict(self.others)
        record |= {name: dict(getattr(self, name)) for name in _MAPPINGS if getattr(self, name)}
        return record

    @property
    def local(self) -> dict[str, str]:
        """The fields that hold paths of this machine, as `with_local` takes them; empty if none does.

        Elsewhere they are of no use, and they tell strangers the names of users and folders. So files
        that travel hold `without_paths` of the metadata, and these stay here in a file of their own.
        """
        found = {name: getattr(self, name) for name in _PATHS if is_local_path(getattr(self, name))}
        if "model" in found and self.model_name is not None:
            found["model_name"] = self.model_name
        return found

    def with_local(self, local: Mapping[str, str]) -> "Provenance":
        """Put the paths of this machine back into a record that holds names in their place.

        Args:
            local: entries that `local` gave. A path whose name is not the recorded one is left out.
        """
        names = {name: known_name(value) for name, value in local.items()}
        found: dict[str, Any] = {
            name: local[name]
            for name in ("model_name", "texts", "dataset_path")
            if name in local and getattr(self, name) == names[name]
        }
        if "model" in local and self.model is None and names.get("model_name") == self.model_name:
            found["model"] = local["model"]
        return replace(self, **found)

    @property
    def cutting(self) -> Cutting:
        """How texts were cut; where that is not recorded, the defaults of `Cutting`."""
        recorded = {f.name: getattr(self, f.name) for f in fields(Cutting)}
        return Cutting(**{name: value for name, value in recorded.items() if value is not None})

    def needed(self, name: str, why: str) -> Any:
        """A field that must be recorded.

        Raises:
            ValueError: it is not; the message ends with `why`.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the dictionary's metadata names no {name}{why}")
        return value


_RECIPE_OF_0_1 = (
    "d_sae", "k", "preset", "seed", "method", "signed", "loss_threshold", "l0", "update",
    "least_cosine", "rtol",
)  # fmt: skip


def without_paths(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as files that travel hold them: names in place of paths of this machine.

    A model's folder is left out, since its last part could be the name of another model on the hub.
    """
    build = metadata.get(BUILD_KEY)
    shared = {name: _shared(name, value) for name, value in metadata.items()}
    if isinstance(build, Mapping):
        known = {name: _shared(name, value) for name, value in build.items()}
        if is_local_path(build.get("model")):
            del known["model"]
        shared[BUILD_KEY] = known
    return shared


def _shared(name: str, value: Any) -> Any:
    return known_name(value) if name in _PATHS and is_local_path(value) else value


def agreed(several: Sequence[Provenance], *names: str) -> Provenance:
    """The values of some fields, in which all records that have them agree; other fields stay None.

    Raises:
        ValueError: two disagree; the message names the field and the values.
    """
    found = {}
    for name in names:
        values = list(dict.fromkeys(v for p in several if (v := getattr(p, name)) is not None))
        if len(values) > 1:
            raise ValueError(
                f"dictionaries that are taken together must agree in {name}, got "
                f"{' and '.join(map(repr, values))}"
            )
        found[name] = values[0] if values else None
    return Provenance(**found)


def agreed_cutting(several: Sequence[Provenance]) -> Cutting:
    """How the texts of several dictionaries were cut.

    Raises:
        ValueError: two were cut in different ways.
    """
    return agreed(several, *(f.name for f in fields(Cutting))).cutting


def versions() -> dict[str, str]:
    """Installed versions of the packages that a build depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found
