from __future__ import annotations

import json
import os
import threading

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.run_folder import MetricsLog, check_output_folder, prepare_output_folder, write_json


def test_a_folder_with_something_in_it_is_refused(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SelOrthoError, match="is not empty: choose another --output_dir, .*--overwrite_output_dir"):
        check_output_folder(tmp_path, overwrite=False, resuming=False)
    assert check_output_folder(tmp_path, overwrite=False, resuming=True) == tmp_path
    with pytest.raises(SelOrthoError, match="holds no run of this script, so nothing in it is overwritten"):
        check_output_folder(tmp_path, overwrite=True, resuming=False)
    (tmp_path / "metrics.jsonl").write_text("")
    assert check_output_folder(tmp_path, overwrite=True, resuming=False) == tmp_path
    assert (tmp_path / "thesis.tex").exists()


def test_overwriting_removes_a_run_and_nothing_else(tmp_path) -> None:
    for name in ("thesis.tex", "config.json", "metrics.jsonl", "checkpoints/step_000010/trainer.json", "data/x.csv",
                 "pair_history/step_000121.safetensors", "layer_3/pair_history/step_000121.safetensors"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    prepare_output_folder(tmp_path, overwrite=True, resuming=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "data/x.csv",
        "thesis.tex",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "thesis.tex"}


@pytest.mark.parametrize(
    "name",
    ["checkpoints/epoch_3.bin", "debug/notes.txt", "trackers/mine/x", "layer_3/debug/a.log", "pair_history/a.csv"],
)
def test_folders_of_others_with_the_same_names_are_no_run(name, tmp_path) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(SelOrthoError, match="holds no run of this script, so nothing in it is overwritten"):
        check_output_folder(tmp_path, overwrite=True, resuming=False)
    (tmp_path / "metrics.jsonl").write_text("")  # of a run that somebody has put beside it
    if not name.startswith("trackers"):
        prepare_output_folder(
            check_output_folder(tmp_path, overwrite=True, resuming=False), overwrite=True, resuming=False
        )
        assert (tmp_path / name).read_text() == "years of work" and not (tmp_path / "metrics.jsonl").exists()


def test_what_an_interrupted_run_leaves_can_be_overwritten(tmp_path) -> None:
    for name in (".lock", "checkpoints/.step_000010.tmp/x.json", "debug/step_000001_rank_1_2.safetensors",
                 "trackers/hf_selortho/events", "layer_3/.metrics.jsonl.tmp",
                 "pair_history/step_000001.safetensors", "layer_3/pair_history/.step_000121.safetensors.tmp",
                 ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    check_output_folder(tmp_path, overwrite=True, resuming=False)
    prepare_output_folder(tmp_path, overwrite=True, resuming=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock", ".metrics.jsonl.tmp"]


def test_batches_kept_by_the_run_itself_are_not_removed(tmp_path) -> None:
    (tmp_path / "debug").mkdir()
    for number in (1, 2):
        (tmp_path / "debug" / f"step_00000{number}.safetensors").write_text("x")
    os.utime(tmp_path / "debug" / "step_000001.safetensors", (1000, 1000))
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_output_folder(tmp_path, overwrite=True, resuming=False, since=2000)
    assert [path.name for path in (tmp_path / "debug").iterdir()] == ["step_000002.safetensors"]


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


def test_a_file_in_the_way(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SelOrthoError, match="is a file: choose another --output_dir"):
        check_output_folder(tmp_path / "file", overwrite=True, resuming=False)
    with pytest.raises(SelOrthoError, match="cannot create output folder .*choose another --output_dir"):
        prepare_output_folder(tmp_path / "file" / "below", overwrite=False, resuming=False)


def test_json_has_no_nan_and_no_half_files(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1.5, None]


def test_log_resumes_at_a_step_without_repeating_or_losing_one(tmp_path) -> None:
    path, timings = tmp_path / "metrics.jsonl", tmp_path / "timings.jsonl"
    log = MetricsLog(tmp_path)
    for step in (1, 10, 20, 30):
        row = {"step": step, "tokens": step * 5, "loss": 2.0 * step, "fvu": step / 100, "peak_correlation": None}
        log.add(row, {"seconds_per_step": 1.0})
    before = path.read_bytes()
    path.write_text(path.read_text() + '{"step": 40, "fv')  # the process was killed while writing
    again = MetricsLog(tmp_path, resume_at=20)
    assert before.startswith(path.read_bytes()) and len(again) == 3
    assert (again.mean_loss(5), again.mean_loss(20), again.mean_loss(99)) == (30, 40, 40)
    row = {"step": 30, "tokens": 150, "loss": None, "fvu": 0.5, "peak_correlation": 0.9}
    again.add(row, {"seconds_per_step": 2.0})
    for file in (path, timings):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 10, 20, 30]
    means = {"loss": 40, "fvu": pytest.approx(0.35), "peak_correlation": 0.9, "seconds_per_step": 1.5}
    assert again.mean_of_last(20) == means
    assert MetricsLog(tmp_path).rows == [] and path.read_text() == ""


def test_the_timings_of_a_step_are_not_among_its_figures(tmp_path) -> None:
    log = MetricsLog(tmp_path)
    log.add({"step": 1, "loss": 1.0}, {"seconds_per_step": 0.25})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}
    assert json.loads((tmp_path / "timings.jsonl").read_text()) == {"step": 1, "seconds_per_step": 0.25}
    assert log.rows == [{"step": 1, "loss": 1.0, "seconds_per_step": 0.25}]
