"""The commands that are shown at the end of others: they fit what was done, and can be typed as they are."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_selortho.commands import cache, evaluate, index, train
from hf_selortho.commands.advice import to_go_on, to_publish
from hf_selortho.commands.main import COMMANDS
from hf_selortho.training.arguments import HubArguments
from hf_selortho.utils.command_line import changed_command, program
from tests.command_lines import check_command, commands_in

ROOT = Path(__file__).parents[2]
Typed = Callable[..., list[list[str]]]
DO = {"train": train.main, "evaluate": evaluate.main, "index": index.main}


@pytest.fixture
def advised(arguments, capsys, monkeypatch, tmp_path) -> Typed:
    """`advised(twin=True, ...)`: what a run of these arguments in this folder says to type next."""
    monkeypatch.chdir(tmp_path)

    def run(*more: str, **changes: object) -> list[list[str]]:
        capsys.readouterr()
        train.main([*arguments(**{"output_dir": "my runs/a b", "max_steps": 2, **changes}), *more])
        commands = list(commands_in(capsys.readouterr().out))
        for name, *argv in commands:
            check_command(name, argv)
            options = [part for part in argv if part.startswith("--")]
            assert len(options) == len(set(options)), argv
        return commands

    return run


def names(commands: list[list[str]]) -> list[str]:
    return [name for name, *_ in commands]


def test_a_run_is_followed_by_its_evaluation_index_page_and_twin_which_all_work(advised, tmp_path) -> None:
    commands = advised("--overwrite_output_dir", "--ortho-budget", "gradient", output_dir="my runs/a b/")
    assert names(commands) == ["evaluate", "index", "browse", "train"]
    twin = commands[-1]
    assert {"--ortho_budget", "--ortho-budget", "--overwrite_output_dir"}.isdisjoint(twin)
    assert twin[-4:] == ["--ortho_coefficient", "0", "--output_dir", "my runs/a b-twin"]
    for name, *argv in commands:
        if name in DO:
            DO[name](argv)
    assert json.loads((tmp_path / "my runs/a b-twin/config.json").read_text())["ortho_coefficient"] == 0
    assert (tmp_path / "my runs/a b/feature_index/index.json").is_file()
    again = advised("--overwrite_output_dir")
    assert names(again) == ["evaluate", "index", "browse"], "the twin is there"
    assert "--overwrite" in again[1], "so is an index, of the SAE before"
    index.main(again[1][1:])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"penalty": "none"}, ["evaluate", "index", "browse"]),
        ({"ortho_coefficient": 0}, ["evaluate", "index", "browse"]),
        ({"held_out_fraction": 0, "eval_samples": 0}, ["browse", "train"]),
        ({"variants": '{"b": {"penalty": "none"}}'}, ["evaluate", "index", "browse"]),
        ({"streaming": True}, ["evaluate", "index", "browse", "train"]),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_makes_no_sense_for_a_run_is_not_advised(changes, expected, advised) -> None:
    commands = advised(**changes)
    assert names(commands) == expected
    if "streaming" in changes:
        assert all("--streaming" in command for command in commands if command[0] != "browse")


def test_a_cache_is_followed_by_a_training_on_it_which_works(
    tiny_lm_dir, sample_text_files, tmp_path, monkeypatch, capsys
) -> None:
    """There are fewer tokens than in a batch by default, and a run in the folder that is advised by default."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sae").mkdir(parents=True)
    texts = ["--dataset", str(sample_text_files.csv), "--max_tokens", "1500", "--eval_samples", "4"]
    cache.main(["--model", str(tiny_lm_dir("llama")), "--layers", "1", "2", *texts, "--output_dir", "my acts", "--cpu"])
    training, report = commands_in(capsys.readouterr().out)
    assert training[-4:] == ["--batch_size", "1024", "--output_dir", "runs/sae-2"] and "--cpu" in training
    assert report == ["report", "my acts", "--output", "norms.png"]
    train.main([*training[1:], "--max_steps", "2"])
    assert (tmp_path / "runs/sae-2/layer_2_twin/model.safetensors").is_file()


def test_options_are_replaced_however_they_were_written() -> None:
    command = (
        "torchrun --nproc_per_node 2 scripts/train.py --output-dir 'a b' --layers 1 2 --output_dir=c --push_to_hub"
    )
    changed = changed_command(command, output_dir="d e", push_to_hub=None, seed="1")
    assert changed == "torchrun --nproc_per_node 2 scripts/train.py --layers 1 2 --output_dir 'd e' --seed 1"
    assert to_go_on("python train.py --resume-from-checkpoint 'a b' --seed 1").endswith(
        "train.py --seed 1 --resume_from_checkpoint auto"
    )


def test_a_run_that_could_not_be_published_is_published_as_it_was_meant() -> None:
    hub = HubArguments(
        push_to_hub=True, hub_model_id="org/x", hub_private=True, hub_revision="my branch", hub_license="mit"
    )
    ((name, *argv),) = commands_in(to_publish(Path("a b"), hub))
    check_command(name, argv)
    assert [name, *argv] == [
        "push", "a b", "--repo_id", "org/x", "--revision", "my branch", "--license", "mit", "--private"
    ]  # fmt: skip


def test_programs_are_named_such_that_the_ones_of_this_environment_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("python", "selortho"):
        assert Path(program(name)).is_file() and Path(program(name)).name == name
        shutil.copy("/bin/true", tmp_path / name)
        assert Path(program(name)).name == name and program(name) != name, "another one comes first"


def test_every_option_that_a_message_names_exists(capsys) -> None:
    known = {"nproc_per_node", "num_processes", "force", "version", "no_"}  # of torchrun, accelerate, hf download ...
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            importlib.import_module(f"hf_selortho.commands.{name}").main(["--help"])
        known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    for path in (ROOT / "hf_selortho").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", node.value))
                assert named <= known, (path.name, node.lineno, named - known)
