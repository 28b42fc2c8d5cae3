"""Names of hook points, taken apart and sorted."""

import json

import pytest

from itda_lens.records import HookPoint
from itda_lens.sae import dictionaries_in
from itda_lens.sources import hook_is_per_head


@pytest.mark.parametrize(
    ("name", "layer", "kind", "per_head"),
    [
        ("blocks.10.hook_resid_post", 10, "hook_resid_post", False),
        ("blocks.0.attn.hook_z", 0, "attn.hook_z", True),
        ("blocks.3.attn.hook_q", 3, "attn.hook_q", True),
        ("blocks.3.attn.hook_rot_k", 3, "attn.hook_rot_k", True),
        ("blocks.3.attn.o.hook_in", 3, "attn.o.hook_in", True),
        ("blocks.3.mlp.out.hook_in", 3, "mlp.out.hook_in", False),
        ("blocks.3.attn.hook_pattern", 3, "attn.hook_pattern", False),
        ("hook_embed", None, "hook_embed", False),
        ("ln_final.hook_normalized", None, "ln_final.hook_normalized", False),
        ("model.layers.7", 7, "", False),
        ("transformer.h.0.mlp", 0, "mlp", False),
        ("gpt_neox.layers.3", 3, "", False),
        ("encoder.block.1.layer.0.SelfAttention", 1, "layer.0.SelfAttention", False),
        ("model.language_model.layers.12.mlp.experts.4", 12, "mlp.experts.4", False),
        ("blocks.10.hook_out.hook_sae_acts_post", 10, "hook_out.hook_sae_acts_post", False),
        ("layer²", None, "layer²", False),
        ("conv1d", None, "conv1d", False),
        ("", None, "", False),
    ],
)  # fmt: skip
def test_parse(name, layer, kind, per_head):
    assert HookPoint.parse(name) == HookPoint(name, layer, kind, per_head)


def test_saelens_flattens_heads_at_hook_z_only():
    names = ["blocks.0.attn.hook_z", "blocks.0.attn.hook_q", "blocks.0.hook_resid_post", "hook_embed"]
    assert [HookPoint.parse(name).reshape_activations for name in names] == ["hook_z"] + ["none"] * 3
    assert [hook_is_per_head(name) for name in names] == [True, False, False, False]


def test_layers_sort_by_number():
    names = [
        "hook_embed",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_mlp_out",
        "blocks.2.hook_resid_post",
        "model.layers.5.mlp",
        "blocks.10.hook_resid_post",
    ]
    assert sorted(sorted(names), key=lambda name: HookPoint.parse(name).sort_key) == names
    folders = ["run2", "run10", "run²", ""]
    assert sorted(folders, key=lambda name: HookPoint.parse(name).sort_key)[1:3] == folders[:2]


def test_dictionaries_of_a_folder_come_by_layer(tmp_path):
    names = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 5, 10, 11)]
    for name in sorted(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cfg.json").write_text(json.dumps({}))
    assert [folder.name for folder in dictionaries_in(tmp_path)] == names
