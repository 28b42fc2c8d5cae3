"""Dictionaries on the hub, against a local folder that stands for it; no network."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders
from typer.testing import CliRunner

import itda_lens
from itda_lens import ITDA, Label, fit
from itda_lens.__main__ import app
from itda_lens.sae import load_sparsity, provenance_of, push, save_sparsity
from itda_lens.sae.card import MARK
from itda_lens.sae.hub import exposed, without_paths

D = 12
REPO = "someone/dictionaries"
HOME = "/home/someone/secret"
METADATA = dict(
    model_name="m_1", hook_name="blocks.1.hook_resid_post", context_size=8, prepend_bos=True,
    dataset_path=f"{HOME}/book.txt",
    itda_build=dict(model=f"{HOME}/models/m_1", texts=f"{HOME}/book.txt", recipe=dict(seed=1)),
)  # fmt: skip


def make(seed=0, **metadata) -> ITDA:
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(seed)) + 1
    labels = [
        Label(i // 9, i % 9, 3, (5, 9), f"token{i}", f"a private sentence [[token{i}]]", name=f"name{i}")
        for i in range(200)
    ]
    return fit(x, d_sae=20, k=3, labels=labels, metadata=METADATA | metadata)


def http(kind, message):
    """An error of the hub's, without a response."""
    error = kind.__new__(kind)
    OSError.__init__(error, message)
    return error


class Hub:
    """A folder a repository; a folder `@REVISION` beside it for every other revision."""

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root, self.private, self.commits = root, {}, []
        for name in ("create_repo", "repo_info", "list_repo_files", "create_commit"):
            own = getattr(self, name)
            monkeypatch.setattr(
                huggingface_hub.HfApi, name, lambda api, *a, _own=own, **k: _own(*a, **k)
            )
        for where in (huggingface_hub, pretrained_sae_loaders):
            monkeypatch.setattr(where, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def create_repo(self, repo, private, exist_ok):
        self.private.setdefault(repo, private)
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def repo_info(self, repo):
        return SimpleNamespace(private=self.private[repo])

    def list_repo_files(self, repo):
        folder = self.root / repo
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def create_commit(self, repo, operations, commit_message):
        for one in operations:
            file = self.root / repo / one.path_in_repo
            if isinstance(one, huggingface_hub.CommitOperationDelete):
                file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(one.path_or_fileobj, file)
        self.commits.append(commit_message)
        return SimpleNamespace(commit_url=f"hub/{repo}/commit/{len(self.commits)}")

    def download(self, repo_id, filename, **kwargs):
        file = self.root / repo_id / filename
        if not file.exists():
            raise EntryNotFoundError(f"no {filename} in {repo_id}")
        return str(file)

    def snapshot(self, repo, revision=None, allow_patterns=()):
        source = self.root / (repo if revision is None else f"{repo}@{revision}")
        if not source.is_dir():
            raise LocalEntryNotFoundError(f"no {repo} at {revision}")
        target = self.root.parent / "cache" / source.relative_to(self.root)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        files = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=list(allow_patterns)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


HOOK = METADATA["hook_name"]


def test_there_and_back(hub):
    itda = make()
    x = torch.randn(30, D)
    assert itda.push_to_hub(REPO, figures={"FVU": 0.12345}) == f"hub/{REPO}/commit/1"
    files = ["README.md", f"{HOOK}/cfg.json", f"{HOOK}/sae_weights.safetensors"]
    assert hub.list_repo_files(REPO) == files
    for name in (REPO, f"{REPO}/{HOOK}"):
        loaded = itda_lens.load(name)
        assert torch.equal(loaded.encode(x), itda.encode(x))
        assert loaded.labels == itda.labels
    theirs = SAE.from_pretrained(REPO, HOOK)
    assert type(theirs) is ITDA
    assert torch.equal(theirs.encode(x), itda.encode(x))
    assert itda.cfg.metadata.dataset_path == METADATA["dataset_path"]  # ours is as it was


def test_no_path_of_the_machine_travels(hub):
    make(note=["C:\\Users\\someone\\x.txt", {"a": "file:///srv/y", "b": "~/z"}, "org/name"]).push_to_hub(
        REPO
    )
    for file in hub.list_repo_files(REPO):
        content = (hub.root / REPO / file).read_bytes()
        for word in (b"/home", b"secret", b"Users", b"srv"):
            assert word not in content, file
    loaded = itda_lens.load(REPO)
    assert loaded.cfg.metadata.note == ["x.txt", {"a": "y", "b": "z"}, "org/name"]
    record = provenance_of(loaded)
    assert (record.model, record.texts, record.dataset_path) == ("m_1", "book.txt", "book.txt")


def test_without_paths():
    assert without_paths("/") == "/"
    assert without_paths({"a": ("/x/y", 3, None, True, "a/b", "a \\ b")}) == {
        "a": ["y", 3, None, True, "a/b", "a \\ b"]
    }


@pytest.mark.parametrize("kind", ["full", "places", "none"])
def test_what_labels_expose(hub, kind):
    itda = make()
    itda.push_to_hub(REPO, labels=kind)
    loaded = itda_lens.load(REPO)
    readme = (hub.root / REPO / "README.md").read_text()
    if kind == "none":
        assert not hasattr(loaded, "labels")
        assert "carries no labels" in readme
        return
    for own, label in zip(itda.labels, loaded.labels, strict=True):
        texts = (label.token, label.context, label.name)
        assert texts == ((own.token, own.context, own.name) if kind == "full" else (None,) * 3)
        assert (label.key, label.chars, label.cosine) == (own.key, own.chars, own.cosine)
    assert ("quote the token" in readme) == (kind == "full")
    assert ("quote no text" in readme) == (kind == "places")


def test_a_view_and_a_dictionary_without_labels(hub):
    itda = make()
    view = exposed(itda.nonnegative(), "places")
    assert view.cfg.mirrored
    assert view.labels[20].cosine == -itda.labels[0].cosine
    del vars(itda.cfg.metadata)["itda_labels"]
    itda.push_to_hub(REPO)
    assert "carries no labels" in (hub.root / REPO / "README.md").read_text()


class TestCard:
    def test_says_how_to_load_and_what_it_is(self, hub):
        make().push_to_hub(REPO, figures={"FVU": 0.12345, "L0": 3})
        readme = (hub.root / REPO / "README.md").read_text()
        assert readme.startswith("---\nlibrary_name: itda-lens\n")
        for part in (
            "import itda_lens\n", f'load("{REPO}")', f'SAE.from_pretrained("{REPO}", "{HOOK}")',
            "# Dictionaries of activations of m\\_1\n", "| folder | FVU | L0 |", "| 0.1235 | 3 |",
            "| context\\_size | 8 |", "| texts | book.txt |",
        ):  # fmt: skip
            assert part in readme, part

    def test_its_code_runs(self, hub):
        make().push_to_hub(REPO)
        readme = (hub.root / REPO / "README.md").read_text()
        namespace: dict[str, object] = {}
        for block in readme.split("```python\n")[1:]:
            exec(block.split("```")[0], namespace)
        assert isinstance(namespace["itda"], ITDA)
        assert isinstance(namespace["sae"], ITDA)

    def test_foreign_text_is_text(self, hub):
        make(model_name="<script>|x`\n# no").push_to_hub(REPO, name="a")
        readme = (hub.root / REPO / "README.md").read_text()
        assert "<script>" not in readme
        assert "\\<script\\>\\|x\\`\\\\n\\# no" in readme

    def test_one_for_all_dictionaries_of_the_repository(self, hub):
        make().push_to_hub(REPO, name="first", labels="places", figures={"FVU": 0.5})
        make(1, hook_name="h2").push_to_hub(REPO)
        readme = (hub.root / REPO / "README.md").read_text()
        assert "| first | blocks.1.hook\\_resid\\_post |" in readme
        assert "| h2 | h2 |" in readme
        assert "| first | 0.5 |" in readme
        assert readme.index("quote no text") > 0 < readme.index("quote the token")
        with pytest.raises(ValueError, match=f"{REPO} holds {REPO}/first, {REPO}/h2"):
            itda_lens.load(REPO)

    def test_one_of_somebody_s_own_stays(self, hub):
        make().push_to_hub(REPO)
        readme = hub.root / REPO / "README.md"
        assert MARK in readme.read_text()
        readme.write_text("My own words.")
        make(1).push_to_hub(REPO)
        assert readme.read_text() == "My own words."


def test_sparsity_goes_with_its_weights(hub):
    push({HOOK: make()}, REPO, densities={HOOK: torch.linspace(0, 1, 20)})
    file = hub.root / REPO / HOOK / "sparsity.safetensors"
    torch.testing.assert_close(load_sparsity(file.parent), torch.linspace(0, 1, 20).double())
    push({HOOK: make(1)}, REPO)
    assert not file.exists()


def test_revisions(hub):
    old, new = make(), make(1)
    old.push_to_hub(REPO)
    (hub.root / REPO).rename(hub.root / f"{REPO}@v1")
    new.push_to_hub(REPO)
    assert torch.equal(itda_lens.load(REPO, revision="v1").W_dec, old.W_dec)
    assert torch.equal(itda_lens.load(f"{REPO}/{HOOK}").W_dec, new.W_dec)
    with pytest.raises(FileNotFoundError, match=f"no dictionary '{REPO}' on the hub: no .* at v2"):
        itda_lens.load(REPO, revision="v2")


def test_damage_on_the_hub_is_told(hub):
    make().push_to_hub(REPO, name="a")
    make(1).push_to_hub(REPO, name="b")
    folder = hub.root / REPO
    shutil.copy(folder / "a" / "sae_weights.safetensors", folder / "b" / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="not of one save"):
        itda_lens.load(f"{REPO}/b")
    (folder / "a" / "sae_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no sae_weights.safetensors"):
        itda_lens.load(f"{REPO}/a")
    shutil.rmtree(folder / "a")
    shutil.rmtree(folder / "b")
    with pytest.raises(FileNotFoundError, match="the repository holds none"):
        itda_lens.load(REPO)


def test_bad_input(hub, tmp_path, monkeypatch):
    itda = make()
    for repo in ("name", "a/b/c", "/a", "../a", "a/..", ""):
        with pytest.raises(ValueError, match="repo must be of the form 'org/name'"):
            itda.push_to_hub(repo)
    with pytest.raises(ValueError, match="names of folders such as 'a/b', got '../x'"):
        itda.push_to_hub(REPO, name="../x")
    with pytest.raises(ValueError, match="labels must be one of"):
        itda.push_to_hub(REPO, labels="some")
    with pytest.raises(ValueError, match="figures must be of the dictionaries"):
        push({"a": itda}, REPO, figures={"b": {"FVU": 1.0}})
    with pytest.raises(ValueError, match="must hold at least one"):
        push({}, REPO)
    assert not hub.commits
    itda.push_to_hub(REPO)
    with pytest.raises(ValueError, match="private must be False for .* public already"):
        itda.push_to_hub(REPO, private=True)
    assert len(hub.commits) == 1
    itda.save_model(tmp_path / "here")
    with pytest.raises(ValueError, match="revision is for repositories on the hub"):
        itda_lens.load(tmp_path / "here", revision="main")
    for name in ("nothing", "./x/y", "/no/where", "a//b", Path("a/b")):
        with pytest.raises(FileNotFoundError, match=r"no folder .* named org/name or org/name/folder"):
            itda_lens.load(name)

    def refuse(self, *args, **kwargs):
        raise http(HfHubHTTPError, "401 Unauthorized\nlong story")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match=f"{REPO} cannot be pushed to the hub: 401 Unauthorized$"):
        itda.push_to_hub(REPO)

    def missing(*args, **kwargs):
        raise http(RepositoryNotFoundError, "404 not found\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(FileNotFoundError, match="no dictionary 'a/b/c' on the hub: 404 not found$"):
        itda_lens.load("a/b/c")


def test_command(hub, tmp_path, monkeypatch):
    for name in ("x", "y"):
        make(len(name)).save_model(tmp_path / "mine" / name)
    save_sparsity(tmp_path / "mine" / "x", torch.zeros(20))
    arguments = ["push", str(tmp_path / "mine"), "--repo", REPO, "--labels", "places", "--private"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f'itda_lens.load("{REPO}/x")' in result.output
    assert f"Pushed 2 dictionaries: hub/{REPO}/commit/1" in result.output
    assert hub.private[REPO]
    assert len(hub.commits) == 1
    assert f"{REPO}/x/sparsity.safetensors" in [f"{REPO}/{f}" for f in hub.list_repo_files(REPO)]
    assert all(one.token is None for one in itda_lens.load(f"{REPO}/y").labels)
    config = json.loads((hub.root / REPO / "x" / "cfg.json").read_text())
    assert config["architecture"] == "itda"
    with pytest.raises(ValueError, match="repo must be of the form"):
        CliRunner().invoke(app, ["push", "nowhere", "--repo", "x"], catch_exceptions=False)


def test_the_page_says_what_works(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    itda = fit(x, d_sae=80, k=3, metadata=dict(hook_name=HOOK))
    itda.save_model("gpt2-dictionaries/blocks.6.hook_resid_post")
    take, repo = hub.snapshot, "my-name/gpt2-itda"

    def snapshot(repo, revision=None, allow_patterns=()):
        return take(repo, None if revision == "main" else revision, allow_patterns)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    page = (Path(__file__).parent.parent / "docs" / "hub.md").read_text()
    blocks = page.split("```py\n")[1:]
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(block.split("```")[0], namespace)
    assert hub.private[repo]
    assert torch.equal(namespace["same"].W_dec, itda.W_dec[:64])
    assert type(namespace["sae"]) is ITDA


def test_the_command_measures_for_the_card(hub, tmp_path, tiny_folder, texts):
    (itda,) = itda_lens.build(str(tiny_folder), texts, HOOK, d_sae=8, k=2, progress=False).values()
    itda.save_model(tmp_path / "one")
    (tmp_path / "held-out.txt").write_text("\n".join(texts))
    arguments = [
        "push",
        str(tmp_path / "one"),
        "--repo",
        REPO,
        "--texts",
        str(tmp_path / "held-out.txt"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    readme = (hub.root / REPO / "README.md").read_text()
    assert "| folder | FVU | L0 | CE-loss score | tokens measured on |" in readme
    figures = json.loads((hub.root / REPO / "one" / "cfg.json").read_text())["metadata"]["itda_figures"]
    assert 0 < figures["FVU"] < 1
    assert f"| one | {figures['FVU']:.4g} | {figures['L0']:.4g} |" in readme
    for file in hub.list_repo_files(REPO):
        assert str(tiny_folder).encode() not in (hub.root / REPO / file).read_bytes()
