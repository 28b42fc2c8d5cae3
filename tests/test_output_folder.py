"""Folders above an output: made for it, and gone with it."""

import pytest
import torch

from itda_lens import fit
from itda_lens.training import output_folder


@pytest.fixture(scope="module")
def itda():
    return fit(torch.randn(40, 6), d_sae=8, k=2)


class TestFoldersAbove:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError, SystemExit])
    def test_go_when_nothing_was_written(self, error, tmp_path):
        with pytest.raises(error), output_folder(tmp_path / "a" / "b" / "out") as folder:  # noqa: PT012
            (folder / "half").write_text("")
            raise error
        assert list(tmp_path.iterdir()) == []

    def test_that_were_there_stay(self, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(ValueError), output_folder(tmp_path / "a" / "b" / "out"):  # noqa: PT011
            raise ValueError
        assert [path.name for path in tmp_path.rglob("*")] == ["a"]

    def test_that_hold_other_things_by_then_stay(self, tmp_path):
        with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "a" / "b" / "out"):  # noqa: PT012
            (tmp_path / "a" / "notes.txt").write_text("")
            raise KeyboardInterrupt
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "notes.txt"]

    def test_hold_dictionaries_that_were_finished(self, itda, tmp_path):
        def fail():
            with output_folder(tmp_path / "a" / "out") as folder:
                itda.save_model(folder / "first")
                raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="finished are in"):
            fail()
        (kept,) = (tmp_path / "a").iterdir()
        assert kept.name.startswith("out.kept-")

    def test_go_when_the_place_is_refused(self, tmp_path, monkeypatch):
        def full(folder):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("itda_lens.training.output.probe", full)
        with pytest.raises(OSError, match="No space left"), output_folder(tmp_path / "a" / "out"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_stay_when_all_is_well(self, itda, tmp_path):
        with output_folder(tmp_path / "a" / "b" / "out") as folder:
            itda.save_model(folder / "first")
        assert [path.name for path in (tmp_path / "a" / "b" / "out").iterdir()] == ["first"]
