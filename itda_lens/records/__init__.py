"""Plain data of the ground floor: labels, places, provenance, cutting, files that appear whole."""

from itda_lens.records.arguments import at_least, check_fields, checked, converted
from itda_lens.records.cutting import Cutting
from itda_lens.records.files import is_leftover, replacing
from itda_lens.records.hashing import mix64, text_digest
from itda_lens.records.hook_points import HookPoint
from itda_lens.records.labels import GivenLabel, Label, Labels, as_label, label_from
from itda_lens.records.local_paths import is_local_path, known_name
from itda_lens.records.places import CONTEXT_CHARS, Places, Tag
from itda_lens.records.provenance import (
    BUILD_KEY,
    Provenance,
    agreed,
    agreed_cutting,
    versions,
    without_paths,
)
from itda_lens.records.token_filter import TokenFilter

__all__ = [
    "BUILD_KEY",
    "CONTEXT_CHARS",
    "Cutting",
    "GivenLabel",
    "HookPoint",
    "Label",
    "Labels",
    "Places",
    "Provenance",
    "Tag",
    "TokenFilter",
    "agreed",
    "agreed_cutting",
    "as_label",
    "at_least",
    "check_fields",
    "checked",
    "converted",
    "is_leftover",
    "is_local_path",
    "known_name",
    "label_from",
    "mix64",
    "replacing",
    "text_digest",
    "versions",
    "without_paths",
]
