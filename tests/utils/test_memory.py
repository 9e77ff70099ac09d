"""Memory that may still be taken: of the machine, of a container, and shared between processes."""

from __future__ import annotations

import torch

from hf_selortho.utils.memory import available_memory, existing_folder, free_disk, room_in_container


def test_processes_share_the_machine(monkeypatch) -> None:
    cpu = torch.device("cpu")
    alone = available_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone is not None and 0.2 < available_memory(cpu) / alone < 0.3


def test_room_under_the_limit_of_a_container(tmp_path) -> None:
    """What caches of files hold is free."""
    for name, value in (("max", "1000"), ("current", "900")):
        (tmp_path / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text("anon 5\nfile 300\ninactive_file 200\nactive_file 100\n")
    assert room_in_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert room_in_container(tmp_path) is None and room_in_container(tmp_path / "none") is None


def test_a_folder_that_does_not_exist_yet(tmp_path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert free_disk(tmp_path / "a" / "b") > 0
