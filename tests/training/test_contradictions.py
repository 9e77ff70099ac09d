"""Settings that contradict one another are refused, each row of the tables; what is documented is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.arguments import list_presets
from hf_selortho.training.contradictions import CACHE, EVALUATE, PUSH, SPACE, TRAIN
from hf_selortho.utils.options import warn_once
from tests.command_lines import check_command, commands_in

ROOT = Path(__file__).parents[2]
TRAINS = "train --model org/lm --layer 3"
CACHED = "train --activations acts"
PUSHES, SPACES = "push . --repo_id org/x", "space --space org/y --sae org/x"
CACHES = "cache --model org/lm --layers 3"

# command, its options in two words or more, the last of the message
REFUSED = [
    (
        TRAINS,
        "--warmup_steps 600 --decay_steps 600",
        "warmup_steps 600.0 with --decay_steps 600.0 and --max_steps 1000",
    ),
    (TRAINS, "--warmup_steps 0.7 --decay_steps 0.5", "warmup_steps 0.7 with --decay_steps 0.5 and --max_steps 1000"),
    (TRAINS, "--warmup_steps 0.5 --decay_steps 600", "warmup_steps 0.5 with --decay_steps 600.0 and --max_steps 1000"),
    (TRAINS, "--warmup_steps 1001", "warmup_steps 1001.0 with --decay_steps 0 and --max_steps 1000"),
    (TRAINS, "--warmup_steps 2.5", "warmup_steps 2.5: expected a whole number of steps"),
    (TRAINS, "--decay_steps -5", "decay_steps -5.0: expected a whole number of steps"),
    (TRAINS, "--decay_steps inf", "decay_steps inf: expected a whole number of steps"),
    (TRAINS, "--resample_every 1000", "resample_every 1000 with --max_steps 1000"),
    (TRAINS, "--resample_every 10 --max_steps 12", "resample_every 10 with --dead_after_tokens 200000 and"),
    (TRAINS, "--batch_size 65536", "refresh_every 24 with --batch_size 65536 and --buffer_contexts 2048 and --context"),
    (TRAINS, "--min_support 5000", "min_support 5000 with --batch_size 4096"),
    (TRAINS, "--d_sae 1", "d_sae 1 with --penalty selective"),
    (TRAINS, "--eval_samples 4 --eval_ce_samples 5", "eval_ce_samples 5 with --eval_samples 4"),
    (TRAINS, "--probes quick --eval_samples 0", "probes quick with --eval_samples 0"),
    (TRAINS, "--probes all --held_out_fraction 0", "probes all with --held_out_fraction 0"),
    (CACHED, "--probes quick", "probes quick with --activations acts"),
    ("evaluate org/x", "--sets all", "sets all with --probes False"),
    (TRAINS, "--min_tokens 128", "min_tokens 128 with --context_length 128 and --prepend_bos True"),
    (TRAINS, "--streaming --dataset python-docs", "streaming True with --dataset python-docs"),
    (TRAINS, "--chat_column a --text_column b", "chat_column a with --text_column b: both say which column to read"),
    ("index org/x", "--chat_column a --text_column b", "chat_column a with --text_column b"),
    ("train --model org/lm", "--module a.3.mlp --site mlp_in", "module a.3.mlp with --site"),
    ("train --model org/lm", "--module a.3.mlp --layer 3", "module a.3.mlp: its path says in which layer"),
    (TRAINS, "--input_statistics measured", "input_statistics measured with --init_from None"),
    (TRAINS, "--freeze decoder --resample_every 100", "freeze decoder with --resample_every 100"),
    (TRAINS, "--side input", "side input with --module None"),
    (TRAINS, "--layers 3 5", "layer 3 with --layers 3 5"),
    (TRAINS, "--twin --penalty none", "twin True with --penalty none and --ortho_coefficient 0.03"),
    (TRAINS, "--twin --ortho_coefficient 0", "twin True with --penalty selective and --ortho_coefficient 0.0"),
    (TRAINS, "--push_to_hub", "push_to_hub True with --hub_model_id None"),
    (TRAINS, "--hub_model_id org/x", "push_to_hub False with --hub_model_id org/x"),
    (TRAINS, "--hub_private", "hub_private True with --push_to_hub False"),
    (TRAINS, "--dataset_id org/x", "dataset_id org/x with --push_to_hub False"),
    (TRAINS, "--model_id org/x", "model_id org/x with --push_to_hub False"),
    (TRAINS, "--hub_license mit", "hub_license mit with --push_to_hub False"),
    (TRAINS, "--report_to none wandb", "report_to none wandb: none is no tracker"),
    (TRAINS, "--activation topk --k 4 --l1_coefficient 0.1", "l1_coefficient 0.1 with --activation topk"),
    (TRAINS, "--activation topk --k 4 --resample_every 1000", "resample_every 1000 with --max_steps 1000"),
    (TRAINS, "--l0_coefficient 1", "l0_coefficient 1.0 with --activation relu"),
    (TRAINS, "--aux_k 4", "aux_k 4 with --activation relu"),
    (TRAINS, "--penalty none --ortho_coefficient 1", "ortho_coefficient 1.0 with --penalty none"),
    (TRAINS, "--penalty none --ortho_budget gradient", "ortho_budget gradient with --penalty none"),
    (TRAINS, "--penalty ortsae --reduction sum", "reduction sum with --penalty ortsae"),
    (TRAINS, "--penalty full --penalty_space decoder", "penalty_space decoder with --penalty full"),
    (TRAINS, "--penalty full --decoder_ratio 1", "decoder_ratio 1.0 with --penalty full"),
    (TRAINS, "--decoder_pairs nearest", "decoder_pairs nearest with --decoder_ratio 0.0"),
    (TRAINS, "--ortho_budget_value 0.1", "ortho_budget_value 0.1 with --ortho_budget none"),
    (TRAINS, "--k 4", "k=4: only activation='topk' and 'batchtopk' take k, not 'relu'"),
    (TRAINS, "--d_sae 8 --activation topk --k 9", "k=9: expected at most d_sae=8"),
    (CACHES, "--streaming", "streaming True with --max_tokens None"),
    (CACHES, "--min_tokens 64 --context_length 64", "min_tokens 64 with --context_length 64 and --prepend_bos True"),
    ("cache --model org/lm", "--layers 3 3", "layers 3 3: expected each layer once"),
    ("evaluate org/x", "--eval_samples 4 --eval_ce_samples 5", "eval_ce_samples 5 with --eval_samples 4"),
    ("index .", "--revision v1", "--revision v1: what is on this machine has no revisions"),
    ("evaluate .", "--revision v1", "--revision v1: what is on this machine has no revisions"),
    ("train --model . --layer 1", "--model_revision v1", "--model_revision v1: what is on this machine"),
    ("cache --model org/lm --layers 1", "--dataset . --dataset_revision v1", "--dataset_revision v1: what is on"),
    ("index org/x", "--tokens 0", "tokens 0: expected at least 1"),
    ("index org/x", "--held_out_fraction 1.5", "held_out_fraction 1.5: expected a share in (0, 1]"),
    ("index org/x", "--streaming --dataset python-docs", "streaming True with --dataset python-docs"),
    (PUSHES, "--create_pr --overwrite", "create_pr True with --overwrite True: a pull request replaces nothing"),
    (PUSHES, "--license_link https://x", "license_link https://x with --license None"),
    (SPACES, "--create_pr --overwrite", "create_pr True with --overwrite True: a pull request replaces nothing"),
    (SPACES, "--from_index --wheel_url x.whl", "wheel_url x.whl with --from_index True: both say where"),
    (SPACES, "--twin org/x", "sae org/x with --twin org/x: an SAE is no twin of itself"),
    ("evaluate org/x", "--streaming --dataset python-docs", "streaming True with --dataset python-docs"),
]
# The same, where a warning is enough.
HARMLESS = [
    (TRAINS, "--dead_after_tokens 5000000", "dead_after_tokens 5000000 with --max_steps 1000 and --batch_size 4096"),
    (TRAINS, "--selection_interval 9 --max_steps 8", "selection_interval 9 with --max_steps 8"),
    (TRAINS, "--buffer_reuse 2 --max_steps 24", "buffer_reuse 2.0 with --refresh_every 24 and --max_steps 24"),
    (CACHES, "--eval_samples 9 --held_out_fraction 0", "eval_samples 9 with --held_out_fraction 0.0"),
    (TRAINS, "--eval_samples 4 --held_out_fraction 0", "eval_samples 4 with --held_out_fraction 0.0"),
    (CACHED, "--model_revision main", "model_revision main with --model None"),
    (CACHED, "--lm_dtype float32", "lm_dtype float32 with --model None"),
    (CACHED, "--refresh-every 9", "refresh_every 9 with --activations acts"),
    (CACHED, "--buffer_reuse 2", "buffer_reuse 2.0 with --activations acts"),
    (CACHED, "--streaming", "streaming True with --activations acts"),
    (TRAINS, "--keep_checkpoints 3", "keep_checkpoints 3 with --checkpoint_every 0"),
    (TRAINS, "--max_skipped 3", "max_skipped 3 with --non_finite stop"),
    ("evaluate org/x", "--probing_texts 50", "probing_texts 50 with --label_column None"),
]


@pytest.mark.parametrize(("command", "options", "message"), REFUSED, ids=lambda part: part)
def test_what_contradicts_itself_is_refused_in_a_line_with_both_values_and_a_remedy(command, options, message) -> None:
    with pytest.raises(SelOrthoError) as refused:
        name, *argv = f"{command} {options}".split()
        check_command(name, argv)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("command", "options", "message"), HARMLESS)
def test_what_has_no_effect_is_named(command, options, message, caplog) -> None:
    warn_once.cache_clear()
    name, *argv = f"{command} {options}".split()
    check_command(name, argv)
    [warning] = caplog.messages
    assert message in warning and "\n" not in warning


def test_every_row_of_the_tables_has_a_case() -> None:
    messages = " ".join(message for _, _, message in (*REFUSED, *HARMLESS))
    alike = {"hub_revision", "lm_batch_tokens", "jumprelu_bandwidth", "jumprelu_threshold", "aux_coefficient"}
    alike |= {"selection_space", "correlation_threshold", "carry_decay", "penalty_schedule"}  # of one line of the table
    for row in (*TRAIN, *CACHE, *EVALUATE, *PUSH, *SPACE):
        assert row.options.split()[0] in alike or f"{row.options.split()[0]} " in messages, row.options


@pytest.mark.parametrize(
    "accepted",
    [
        "--warmup_steps 0.4 --decay_steps 0.6",
        "--warmup_steps 1000",
        "--max_steps 4 --logging_steps 100 --checkpoint_every 100",  # the last steps are logged, the last one is kept
        "--max_steps 4 --eval_samples 0 --eval_ce_samples 9",
        "--penalty none --pair_fraction 0.01 --min_support 2",  # of the correlations that are measured
        "--penalty none --ortho_coefficient 0",
        '--penalty none --penalty_space decoder --variants {"b":{"penalty":"selective"}}',  # acts in one of them
        '--twin --ortho_coefficient 0 --variants {"b":{"ortho_coefficient":1}}',
        "--overwrite_output_dir --resume_from_checkpoint auto",
    ],
)
def test_what_can_be_meant_is_accepted(accepted) -> None:
    check_command("train", [*TRAINS.split()[1:], *accepted.split()])


def test_presets_with_any_penalty_and_activation_are_accepted(tmp_path) -> None:
    for name in list_presets():
        for changes in ("", "--twin", "--penalty none", "--activation topk --k 8", "--activation jumprelu"):
            check_command("train", ["--preset", name, *changes.split()])
        check_command("cache", ["--preset", name])
    preset = {"model": "org/lm", "layer": 3, "activation": "topk", "k": 4, "l1_coefficient": 0.1}
    (tmp_path / "mine.json").write_text(json.dumps(preset))  # one for several runs may say what some do not use
    check_command("train", ["--preset", str(tmp_path / "mine.json")])


def test_every_command_line_of_the_documents_is_accepted(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "hf_selortho" / "commands").glob("*.py")]
    files += [path for name in ("examples", "experiments", "scripts") for path in (ROOT / name).glob("*.py")]
    found = [command for path in files for command in commands_in(path.read_text(encoding="utf-8"))]
    assert len(found) > 40 and {"train", "cache", "evaluate", "index", "push", "space"} <= {name for name, *_ in found}
    for name, *argv in found:
        for path in (Path(word) for word in argv if word.startswith("path/to/")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        check_command(name, argv)
