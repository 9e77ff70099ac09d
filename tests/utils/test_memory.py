"""Memory that may still be taken: of the machine, of control groups, and shared between processes."""

from __future__ import annotations

import torch

from hf_selortho.utils import memory as memory_use
from hf_selortho.utils.memory import available_memory, existing_folder, free_disk


def test_processes_share_the_machine(monkeypatch) -> None:
    cpu = torch.device("cpu")
    alone = available_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone is not None and 0.2 < available_memory(cpu) / alone < 0.3


def test_room_in_nested_control_groups(tmp_path) -> None:
    """The tightest limit counts, and what caches of files hold is free."""
    (tmp_path / "own").write_text("0::/outer/inner\n")
    for group, limit, used, cached in (("outer", 1000, 900, 300), ("outer/inner", "max", 500, 0)):
        folder = tmp_path / "cgroup" / group
        folder.mkdir(parents=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\nfile {cached}\ninactive_file {cached - 100}\nactive_file 100\n")
    assert memory_use._room_in_containers(tmp_path / "cgroup", tmp_path / "own") == [400]


def test_room_in_a_control_group_of_version_1(tmp_path) -> None:
    (tmp_path / "own").write_text("8:pids:/x\n4:memory:/x\n0::/\n")
    folder = tmp_path / "cgroup" / "memory" / "x"
    folder.mkdir(parents=True)
    for name, value in (("limit_in_bytes", 2000), ("usage_in_bytes", 500)):
        (folder / f"memory.{name}").write_text(str(value))
    (folder / "memory.stat").write_text("inactive_file 50\nactive_file 0\ntotal_inactive_file 70\n")
    assert memory_use._room_in_containers(tmp_path / "cgroup", tmp_path / "own") == [1550]
    assert memory_use._room_in_containers(tmp_path / "cgroup", tmp_path / "none") == []


def test_a_folder_that_does_not_exist_yet(tmp_path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert free_disk(tmp_path / "a" / "b") > 0
