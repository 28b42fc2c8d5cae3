"""Nonsense for `bench`, output folders, and classes and their methods, told by the argument's name."""

import inspect

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from test_arguments import NAN, POSITIVE, REAL, ROWS, SWITCH, WHOLE, X, within

import itda_lens
from itda_lens import ITDA, ITDAConfig, SparseCodes, fit
from itda_lens.compare import Moments, RunningMoments, RunningRelative
from itda_lens.sae import coded, load_sparsity, reconstructed, save_sparsity, sparse_codes
from itda_lens.saebench import bench
from itda_lens.training import output_folder, save_all

PATHS = [None, 3, True, ["x"], b"x"]
TENSORS = [None, "x", 3, X.long(), X + 1j, X.to_sparse(), X > 0, X.numpy()]
NO_ROWS = [None, "x", 3, [[1.0]], *TENSORS[3:], X[:, :3], X[0, 0], X / 0]

CONFIG = dict(
    d_in=POSITIVE, d_sae=POSITIVE, k=POSITIVE, signed=SWITCH, rtol=[*REAL, 1.0], threshold=REAL,
    mirrored=SWITCH, apply_b_dec_to_input=SWITCH, l0=[*REAL, 0], method=["x", 3, True, None, ["mp"]],
    dtype=["x", 3, None, torch.float32], device=[3, None, torch.device("cpu"), b"cpu"],
    normalize_activations=["x", 3, None, True], reshape_activations=["x", 3, None, True],
    metadata=[3, "x", [1], None],
)  # fmt: skip

METHODS = {
    "encode": dict(x=NO_ROWS), "forward": dict(x=NO_ROWS), "encode_sparse": dict(x=NO_ROWS),
    "decode": dict(feature_acts=[*TENSORS, X, X[0, 0]]),
    "decode_sparse": dict(codes=[*TENSORS, X, (X, X)]),
    "calibrate": dict(x=[*NO_ROWS, X[:0]], l0=[*REAL, 0, None, 5], k=POSITIVE),
    "prefix": dict(m=[*POSITIVE, None, 9]), "save_model": dict(path=PATHS),
    "fold_activation_norm_scaling_factor": dict(scaling_factor=[*REAL, 0, None]),
}  # fmt: skip
"""The methods of ITDA that take arguments, with values that they do not take."""

OF_SAELENS = {
    "fold_activation_whitening",
    "from_dict",
    "process_sae_in",
    "process_state_dict_for_loading",
}
OF_SAELENS |= {"get_sae_config_class_for_architecture"}

ELSEWHERE = {"extended", "push_to_hub", "with_atoms"}
"""Methods whose bad input stands in tests/test_extended.py, tests/test_hub.py and tests/test_sae.py."""

FUNCTIONS = {
    "bench": dict(
        saes=[None, 3, "x", [], [3], {"a": 3}, {}], evals=[None, 3, "core", [], ["x"], [3]],
        out=PATHS, texts=[3, [3], []], data=[3, True, ["x"], b"x"],
        model=[3, True, ["x"], b"x"], codes=["x", 3, None],
        settings=[3, "x", ["x"], {"x": {}}, {"saelens": 3}],
        device=["x", 3, True, ["x"], b"x"], dtype=["x", 3, None, torch.float32], batch_size=POSITIVE,
        text_field=[3, None, b"x"], split=[3, None, b"x"], baselines=["x", 3, [3], "random"],
        train_texts=[3], progress=SWITCH,
    ),
    "output_folder": dict(path=PATHS, overwrite=SWITCH),
    "save_all": dict(dictionaries=[None, 3, "x", [1], {"a": 3}, {3: None}], folder=PATHS),
    "coded": dict(sae=[None, 3, "x", torch.nn.Linear(2, 2)], x=[*NO_ROWS, X[0]], batch_size=POSITIVE),
    "sparse_codes": dict(sae=[None, 3, "x", torch.nn.Linear(2, 2)], x=NO_ROWS, batch_size=POSITIVE),
    "reconstructed": dict(sae=[None, 3, "x", torch.nn.Linear(2, 2)], x=NO_ROWS, batch_size=POSITIVE),
    "load_sparsity": dict(folder=PATHS),
    "save_sparsity": dict(folder=PATHS, feature_density=[*TENSORS, X, X[0] * NAN, X[0] + 9]),
    "Moments.of": dict(x=ROWS, y=ROWS),
    "RunningMoments.update": dict(xs=[None, 3, X, [], [X[0]], [X.long()], [X * NAN], [X[:3]]],
                                  ys=[None, 3, X, [], [X[0]], [X.long()], [X * NAN], [X[:3]]]),
    "RunningMoments.pair": dict(i=[*WHOLE, 1, None], j=[*WHOLE, 1, None]),
    "RunningRelative.update": dict(xs=[None, 3, X, [], [X[0]], [X.long()], [X * NAN], [X[:3]]],
                                   ys=[None, 3, X, [], [X[0]], [X.long()], [X * NAN], [X[:3]]]),
    "RunningRelative": dict(anchors_x=[None, 3, X, [], [X[0]], [X.long()], [X * NAN]],
                            anchors_y=[None, 3, X, [], [X[0]], [X.long()], [X * NAN]], centred=SWITCH),
}  # fmt: skip


@pytest.fixture
def itda(tmp_path):
    made = fit(X, d_sae=8, k=2)
    made.save_model(tmp_path / "saved")
    return made


def failures(call, argument: str, values: list) -> list[str]:
    """What is accepted, or told without the argument's name."""
    wrong = []
    for value in values:
        given = f"{argument}={value!r}"[:80]
        try:
            with within(10):
                call(value)
        except (TypeError, ValueError, FileNotFoundError) as error:
            if argument not in str(error):
                wrong.append(f"{given}: {type(error).__name__} without its name: {str(error)[:150]}")
        except Exception as error:
            wrong.append(f"{given}: from the inside: {error!r:.150}")
        else:
            wrong.append(f"{given}: accepted")
    return wrong


def test_fields_of_the_configuration():
    good = dict(d_in=6, d_sae=8, k=2)
    wrong = []
    for name, values in CONFIG.items():
        allowed = [value for value in values if not (name == "l0" and value is None)]
        wrong += failures(lambda value, name=name: ITDAConfig(**good | {name: value}), name, allowed)
    assert not wrong, "\n".join(wrong)
    assert set(CONFIG) == set(ITDAConfig.__dataclass_fields__)
    assert ITDAConfig(**good, metadata=SAEMetadata(hook_name="x")).metadata.hook_name == "x"


def test_the_constructor(itda):
    wrong = failures(ITDA, "cfg", [None, 3, "x", {}, vars(itda.cfg), ITDAConfig])
    wrong += failures(lambda value: ITDA(itda.cfg, value), "use_error_term", SWITCH)
    assert not wrong, "\n".join(wrong)


def test_methods(itda, tmp_path):
    public = {
        name
        for name, method in vars(ITDA).items()
        if inspect.isfunction(method)
        and not name.startswith("_")
        and len(inspect.signature(method).parameters) > 1
    }
    assert public - OF_SAELENS - ELSEWHERE == set(METHODS)
    wrong = []
    for name, arguments in METHODS.items():
        for argument, values in arguments.items():
            more = {"l0": 1.5} if (name, argument) == ("calibrate", "k") else {}
            more = {"l0": 1.5} if (name, argument) == ("calibrate", "x") else more
            more |= {"x": X} if name == "calibrate" and argument != "x" else {}

            def call(value, name=name, argument=argument, more=more):
                getattr(itda, name)(**more | {argument: value})

            wrong += [f"{name}: {one}" for one in failures(call, argument, values)]
    assert not wrong, "\n".join(wrong)
    itda.decode_sparse(SparseCodes(*itda.encode_sparse(X)))


@pytest.fixture(scope="module")
def built(tiny, texts, tmp_path_factory):
    """A dictionary of the tiny model that `bench` could take."""
    hook = "blocks.1.hook_resid_post"
    folder = tmp_path_factory.mktemp("built")
    itda_lens.build(tiny, texts, hook, d_sae=8, k=2, progress=False)[hook].save_model(folder)
    return folder


def test_functions(itda, tmp_path, built, tiny_folder):
    moments, relative = RunningMoments(), RunningRelative([X[:3]], [X[:3]])
    moments.update([X], [X])
    relative.update([X], [X])
    made = {
        "bench": (
            bench,
            dict(saes=[built], evals=["saelens"], out=tmp_path / "out", model=tiny_folder),
        ),
        "output_folder": (lambda **a: output_folder(**a).__enter__(), dict(path=tmp_path / "new")),
        "save_all": (save_all, dict(dictionaries={"a": itda}, folder=tmp_path / "all")),
        "coded": (lambda **a: list(coded(**a)), dict(sae=itda, x=X)),
        "sparse_codes": (sparse_codes, dict(sae=itda, x=X)),
        "reconstructed": (reconstructed, dict(sae=itda, x=X)),
        "load_sparsity": (load_sparsity, {}),
        "save_sparsity": (save_sparsity, dict(folder=tmp_path / "saved", feature_density=torch.ones(8))),
        "Moments.of": (Moments.of, dict(x=X, y=X)),
        "RunningMoments.update": (moments.update, dict(xs=[X], ys=[X])),
        "RunningMoments.pair": (moments.pair, dict(i=0, j=0)),
        "RunningRelative.update": (relative.update, dict(xs=[X], ys=[X])),
        "RunningRelative": (RunningRelative, dict(anchors_x=[X[:3]], anchors_y=[X[:3]])),
    }
    wrong = []
    for name, arguments in FUNCTIONS.items():
        function, good = made[name]
        for argument, values in arguments.items():

            def call(value, function=function, good=good, argument=argument):
                function(**good | {argument: value})

            wrong += [f"{name}: {one}" for one in failures(call, argument, values)]
    assert not wrong, "\n".join(wrong)
