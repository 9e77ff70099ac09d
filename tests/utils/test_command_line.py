from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hf_selortho.errors import SelOrthoError
from hf_selortho.utils.command_line import interface_towards, torchrun_arguments, use_all_cores, without_secrets


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "python accelerate launch --cpu --num_processes 2 scripts/train.py --preset demo",
            "--standalone --nproc_per_node 2",
        ),
        ("accelerate-launch --cpu --num_processes=3 train.py", "--standalone --nproc_per_node 3"),
        ("python -m accelerate.commands.launch --cpu --num_processes 2 train.py", "--standalone --nproc_per_node 2"),
        (
            "accelerate launch --cpu --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 "
            "--main_process_port 29501 train.py --seed 3",
            "--nnodes 2 --node_rank 1 --nproc_per_node 2 --master_addr 10.0.0.1 --master_port 29501",
        ),
        (
            "accelerate launch --cpu --num_processes 2 --num_machines 2 --main_process_ip host --main_process_port 9 t",
            "--nnodes 2 --node_rank 0 --nproc_per_node 1 --master_addr host --master_port 9",
        ),
        ("accelerate launch --cpu --num_processes 1 train.py", None),
        ("accelerate launch --cpu train.py", None),
        ("/bin/bash -c something", None),
    ],
)
def test_what_accelerate_launch_was_asked_for(command, expected, monkeypatch) -> None:
    monkeypatch.setattr("hf_selortho.utils.command_line.default_config_file", "/nonexistent")
    found = torchrun_arguments(command.split())
    assert found == (None if expected is None else expected.split())


@pytest.mark.parametrize("processes", ["--num_processes 3", "--num_processes 1", ""])
def test_machines_share_the_processes_evenly(processes) -> None:
    with pytest.raises(SelOrthoError, match="is not a multiple of --num_machines 2"):
        torchrun_arguments(f"accelerate launch --cpu {processes} --num_machines 2 --machine_rank 1 train.py".split())


def test_a_config_file_of_accelerate_counts(tmp_path, monkeypatch) -> None:
    config = tmp_path / "cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nnum_machines: 1\n"
        "machine_rank: 0\nmixed_precision: 'no'\nuse_cpu: true\n"
    )
    command = ["accelerate", "launch", "--config_file", str(config), "train.py"]
    assert torchrun_arguments(command) == ["--standalone", "--nproc_per_node", "2"]
    monkeypatch.setattr("hf_selortho.utils.command_line.default_config_file", str(config))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_json_config_file", str(config))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(config))
    assert torchrun_arguments(["accelerate", "launch", "train.py"]) == ["--standalone", "--nproc_per_node", "2"]
    assert torchrun_arguments(["accelerate", "launch", "--cpu", "train.py"]) is None  # accelerate does not read it


def test_the_interface_towards_another_machine() -> None:
    assert interface_towards("127.0.0.1") == interface_towards("localhost") is not None
    assert interface_towards("nowhere.invalid") is None


def test_cores_are_shared_among_processes(monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        use_all_cores(threads=1)
        assert torch.get_num_threads() == 1
        use_all_cores()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        use_all_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


SCRIPT = """
import sys
from hf_selortho.utils.command_line import run_script
from hf_selortho.errors import SelOrthoError

def main():
    if sys.argv[1] == "mistake":
        raise SelOrthoError("layer 99 is out of range:\\n choose 0 to 17")
    if sys.argv[1] == "secret":
        raise SelOrthoError(f"--hub_token {sys.argv[2]} and {sys.argv[3]}: refused")
    if sys.argv[1] == "bug":
        raise ZeroDivisionError
run_script(main)
"""


@pytest.mark.parametrize(("what", "code"), [("nothing", 0), ("mistake", 2), ("bug", 1)])
def test_exit_codes(what, code, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, str(script), what], capture_output=True, text=True, check=False)
    assert result.returncode == code
    if what == "mistake":
        assert result.stderr == "script.py: error: layer 99 is out of range: choose 0 to 17\n"
    assert ("Traceback" in result.stderr) == (what == "bug")


@pytest.mark.parametrize(
    ("file", "module"), [("tool.py", "tool"), ("kit/__main__.py", "kit"), ("kit/tool.py", "kit.tool")]
)
def test_a_module_calls_itself_what_users_type(file, module, tmp_path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(SCRIPT)
    command = [sys.executable, "-m", module, "mistake"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr.startswith(f"python -m {module}: error: layer 99") and result.returncode == 2


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY"])
def test_secrets_of_the_environment_are_left_out(name, monkeypatch) -> None:
    monkeypatch.setenv(name, "0123456789abcdef")
    assert without_secrets("login(0123456789abcdef), 0123456789abcde") == "login(***), 0123456789abcde"
    monkeypatch.setenv(name, "")
    assert without_secrets("nothing is a secret") == "nothing is a secret"


def test_whatever_looks_like_a_token_of_the_hub_is_left_out() -> None:
    assert without_secrets(f"--token={TOKEN} --hub https://user:{TOKEN}@huggingface.co") == (
        "--token=*** --hub https://user:***@huggingface.co"
    )
    assert without_secrets("hf_selortho hf_hub_download hf_" + "a" * 19) == "hf_selortho hf_hub_download hf_" + "a" * 19


def test_an_error_on_the_screen_holds_no_secret(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, str(script), "secret", TOKEN, "0123456789abcdef"],
        env={**os.environ, "WANDB_API_KEY": "0123456789abcdef"},
        **{"capture_output": True, "text": True, "check": False},
    )
    assert (result.returncode, result.stderr) == (2, "script.py: error: --hub_token *** and ***: refused\n")
