"""`import itda_lens` is light, and registers "itda" with SAELens whichever is imported first."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY

import itda_lens
from itda_lens import _registration

HEAVY = "torch numpy sae_lens transformer_lens transformers".split()


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_is_light():
    code = f"""
import sys, itda_lens
assert "fit" in dir(itda_lens)
try:
    itda_lens.nothing
except AttributeError:
    pass
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import itda_lens; from sae_lens import SAE",
        "from sae_lens import SAE; import itda_lens",
        "import itda_lens, itda_lens.records.provenance; from sae_lens import SAE",
    ],
)
def test_sae_lens_loads_an_itda_whichever_is_imported_first(imports, tmp_path):
    torch.manual_seed(0)
    itda_lens.fit(torch.randn(50, 8), d_sae=9, k=2).save_model(tmp_path)
    code = f"""
{imports}
print(type(SAE.load_from_disk({str(tmp_path)!r})).__name__)
import itda_lens.sae
print(type(SAE.load_from_disk({str(tmp_path)!r})) is itda_lens.ITDA)
"""
    assert run_python(code) == "ITDA\nTrue\n"


def test_registering_again_does_nothing():
    before = dict(SAE_CLASS_REGISTRY)
    finders = list(sys.meta_path)
    importlib.reload(itda_lens)
    _registration.register_with_saelens()
    itda_lens.sae.register()
    assert before == SAE_CLASS_REGISTRY
    assert sys.meta_path == finders
    assert before["itda"] == (itda_lens.ITDA, itda_lens.ITDAConfig)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Modules of two lines in place of SAELens and `itda_lens.sae`."""
    (tmp_path / "stand_in_host.py").write_text("import os\nassert 'BROKEN' not in os.environ\n")
    (tmp_path / "stand_in_face.py").write_text("import stand_in_host\nstand_in_host.registered = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_registration, "HOST", "stand_in_host")
    monkeypatch.setattr(_registration, "FACE", "stand_in_face")
    finder = _registration.AfterSAELens()
    monkeypatch.setattr(_registration, "_finder", finder)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    for name in ("stand_in_host", "stand_in_face"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("first", ["stand_in_host", "stand_in_face"])
def test_the_host_is_followed_by_the_face(stand_ins, first):
    _registration.register_with_saelens()
    _registration.register_with_saelens()
    assert importlib.util.find_spec("stand_in_host") is not None
    assert "stand_in_host" not in sys.modules
    importlib.import_module(first)
    assert sys.modules["stand_in_host"].registered
    assert "stand_in_face" in sys.modules


def test_a_host_that_failed_and_is_imported_again(stand_ins, monkeypatch):
    _registration.register_with_saelens()
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(AssertionError):
        importlib.import_module("stand_in_host")
    monkeypatch.delenv("BROKEN")
    assert importlib.import_module("stand_in_host").registered


def test_a_host_that_is_not_installed(stand_ins, monkeypatch):
    monkeypatch.setattr(_registration, "HOST", "no_such_host")
    _registration.register_with_saelens()
    with pytest.raises(ModuleNotFoundError, match="no_such_host"):
        importlib.import_module("no_such_host")


def test_public_names():
    for name in itda_lens.__all__:
        assert getattr(itda_lens, name).__name__ == name
    assert itda_lens.compare.jaccard is itda_lens.jaccard
    assert itda_lens.__version__.split(".")[0].isdigit()
    with pytest.raises(AttributeError, match="module 'itda_lens' has no attribute 'nothing'"):
        itda_lens.nothing  # noqa: B018 (the access is the test)
