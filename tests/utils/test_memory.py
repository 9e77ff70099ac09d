"""Memory that may still be taken: of the machine, of a container, and shared between processes."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_selortho import SelOrthoError
from hf_selortho.commands import browse, cache, evaluate, index, train
from hf_selortho.utils.memory import (
    available_memory,
    free_disk,
    is_out_of_memory,
    room_in_container,
    where_memory_ends,
)


@contextmanager
def limited(limit: int, name: str, room: int) -> Iterator[None]:
    """A limit of this process, as of `ulimit`, so far above what it takes."""
    status = Path("/proc/self/status").read_text()
    taken = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (taken + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


def test_processes_share_the_machine(monkeypatch) -> None:
    cpu = torch.device("cpu")
    alone = available_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone is not None and 0.2 < available_memory(cpu) / alone < 0.3


@pytest.mark.parametrize(("limit", "name"), [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_a_limit_of_the_process_counts_with_some_to_spare_and_is_not_shared(limit, name, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with limited(limit, name, (1 << 29) + 1_000_000):
        assert 0 < available_memory(torch.device("cpu")) <= 1_000_000
    with limited(limit, name, 1_000_000):
        assert available_memory(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("groups", "base", "limit", "usage", "prefix"),
    [
        ("1:cpu:/\n0::/", "", "memory.max", "memory.current", ""),
        ("0::/outer/inner", "", "memory.max", "memory.current", ""),
        ("4:memory:/docker/1a2b", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ],
    ids=["v2", "v2 of a service", "v1 seen from within the container"],
)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_room_under_the_limits_of_containers(groups, base, limit, usage, prefix, level, tmp_path) -> None:
    """What caches of files hold is free; every level around the process counts; v1 writes a number for "no limit"."""
    (tmp_path / "groups").write_text(groups + "\n")
    places = [tmp_path / base / Path(groups.rsplit("/", level)[0].rpartition(":")[2].lstrip("/"))]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name, value in ((limit, "1000"), (usage, "900")):
            (place / name).write_text(f"{value}\n")
        stat = f"{prefix}inactive_file 200\n{prefix}active_file 100\nanon 5\nfile 300\n"
        (place / "memory.stat").write_text(stat)
    assert room_in_container(tmp_path, tmp_path / "groups") == 400
    (places[0] / limit).write_text("max\n")
    assert room_in_container(tmp_path, tmp_path / "groups") is None
    assert room_in_container(tmp_path, tmp_path / "none") is None


def _huge_tensor() -> object:
    return torch.empty(1 << 55)


def _huge_array() -> object:
    return np.empty(1 << 55)


def _huge_bytes() -> object:
    return bytearray(1 << 60)


def _no_room_to_load() -> None:
    raise ImportError("libx.so: failed to map segment from shared object")


def _no_room_to_list() -> None:
    raise OSError(12, "Cannot allocate memory", "folder")


def _blamed_on_something_else() -> None:
    try:
        _huge_tensor()
    except RuntimeError as error:
        raise SelOrthoError("cannot load the language model") from error


@pytest.mark.parametrize(
    "take",
    [_huge_tensor, _huge_array, _huge_bytes, _no_room_to_load, _no_room_to_list, _blamed_on_something_else],
)
def test_where_memory_runs_out_a_line_says_what_to_lower(take: Callable[[], object]) -> None:
    with pytest.raises(SelOrthoError, match=r"^out of memory \(.*\): lower --d_sae, or allow this process more"):
        where_memory_ends("lower --d_sae")(take)()


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(2, "No such file"), SelOrthoError("memory")])
def test_other_errors_are_not_taken_for_a_lack_of_memory(error) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), where_memory_ends("lower --d_sae"):
        raise error


def test_a_folder_that_does_not_exist_yet(tmp_path) -> None:
    assert free_disk(tmp_path / "a" / "b") > 0


@pytest.mark.parametrize("command", [train, cache, evaluate, index, browse])
def test_a_command_with_hardly_any_room_is_refused_at_once(command) -> None:
    with limited(resource.RLIMIT_AS, "VmSize", 100_000_000):
        with pytest.raises(SelOrthoError, match="ulimit -v, -d.* leave it less than 0.54 GB beside its libraries"):
            command.main(["nothing"])


def test_a_limit_below_what_torch_needs_ends_in_one_line() -> None:
    limit = [f"ulimit -v 300000; exec {sys.executable} -m hf_selortho train --help"]
    done = subprocess.run(["bash", "-c", *limit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("selortho train: error: out of memory (") and line.endswith(
        "allow this process more (ulimit -v)"
    )
