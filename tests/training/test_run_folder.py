from __future__ import annotations

import json
import threading

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.run_folder import (
    MARKER,
    MetricsLog,
    holds_unfinished_run,
    prepare_output_folder,
    replaces_run,
)


def test_a_folder_with_something_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("of another program, or of version 0.1.0")
    for overwrite in (False, True):
        with pytest.raises(SelOrthoError, match="is not empty: choose another --output_dir; .*--overwrite_output_dir"):
            replaces_run(tmp_path, overwrite=overwrite, resuming=False)
    assert not replaces_run(tmp_path, overwrite=True, resuming=True)


def test_a_lock_and_kept_batches_leave_a_folder_free(tmp_path) -> None:
    (tmp_path / "debug").mkdir()
    (tmp_path / ".lock").touch()
    assert not replaces_run(tmp_path, overwrite=False, resuming=False)
    assert holds_unfinished_run(tmp_path) and holds_unfinished_run(tmp_path / "missing")


def test_overwriting_removes_a_run_and_nothing_beside_it(tmp_path) -> None:
    prepare_output_folder(tmp_path, replace=False)
    ours = [
        "README.md", "config.json", "metrics.jsonl", "run.json", "checkpoints/step_000010/trainer.json",
        "pictures/a.png", "trackers/hf_selortho/events", "layer_3/pair_history/.step_000121.safetensors.tmp",
        "layer_3_twin/model.safetensors",
    ]  # fmt: skip
    others = ["thesis.tex", "data/x.csv", "debug/step_000001.safetensors", "layer_3/notes.txt"]
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert not holds_unfinished_run(tmp_path)
    prepare_output_folder(tmp_path, replace=replaces_run(tmp_path, overwrite=True, resuming=False))
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*others, MARKER}
    assert holds_unfinished_run(tmp_path) and not (tmp_path / "layer_3_twin").exists()


def test_a_row_waits_for_a_checkpoint_that_finds_no_room_to_go_again(small_disks) -> None:
    disk = small_disks("64k")
    if not disk.mounted:
        pytest.skip("no file system may be mounted here")
    log = MetricsLog(disk.folder)
    filler = disk.folder / "filler"
    row = {"loss": 1.0, "note": "x" * 3000}
    log.add({"step": 1, **row}, {})
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 1000)
    with pytest.raises(SelOrthoError, match="the disk is full; make room there"):
        for step in range(2, 9):
            log.add({"step": step, **row}, {})
    lines = (disk.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, len(lines) + 1)]
    threading.Timer(1.5, filler.unlink).start()
    log.add({"step": 9, **row}, {})
    assert json.loads((disk.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 9


def test_log_resumes_at_a_step_without_repeating_or_losing_one(tmp_path) -> None:
    path, timings = tmp_path / "metrics.jsonl", tmp_path / "timings.jsonl"
    log = MetricsLog(tmp_path)
    for step in (1, 10, 20, 30):
        row = {"step": step, "tokens": step * 5, "loss": 2.0 * step, "fvu": step / 100, "peak_correlation": None}
        log.add(row, {"seconds_per_step": 1.0})
    before = path.read_bytes()
    path.write_text(path.read_text() + '{"step": 40, "fv')  # the process was killed while writing
    again = MetricsLog(tmp_path, resume_at=20)
    assert before.startswith(path.read_bytes()) and b"seconds" not in before and len(again.rows) == 3
    assert [again.mean_of_last(steps)["loss"] for steps in (1, 15, 99)] == [40, 30, pytest.approx(62 / 3)]
    row = {"step": 30, "tokens": 150, "loss": None, "fvu": 0.5, "peak_correlation": 0.9}
    again.add(row, {"seconds_per_step": 2.0})
    for file in (path, timings):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 10, 20, 30]
    means = {"loss": 40, "fvu": pytest.approx(0.35), "peak_correlation": 0.9, "seconds_per_step": 1.5}
    assert again.mean_of_last(20) == means
    assert MetricsLog(tmp_path).rows == [] and path.read_text() == ""
