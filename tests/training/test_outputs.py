from __future__ import annotations

import json

import pytest

from hf_selortho import SelOrthoError
from hf_selortho.training.outputs import MetricsLog, check_output_folder, prepare_output_folder, write_json


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
    for name in ("thesis.tex", "config.json", "metrics.jsonl", "checkpoints/step_000010/trainer.json", "data/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    prepare_output_folder(tmp_path, overwrite=True, resuming=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "data/x.csv",
        "thesis.tex",
    ]


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
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 10, 20, 30):
        log.add({"step": step, "tokens": step * 5, "fvu": step / 100, "peak_correlation": None})
    path.write_text(path.read_text() + '{"step": 40, "fv')  # the process was killed while writing
    again = MetricsLog(path, resume_at=20)
    again.add({"step": 30, "tokens": 150, "fvu": 0.5, "peak_correlation": 0.9})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 10, 20, 30]
    assert again.mean_of_last(20) == {"fvu": pytest.approx(0.35), "peak_correlation": 0.9}
    assert MetricsLog(path).rows == [] and path.read_text() == ""
