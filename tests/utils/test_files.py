from __future__ import annotations

import json

import pytest

from hf_selortho.utils.files import write_json


def test_json_has_no_nan_and_no_half_files(tmp_path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["b"] == [1.5, None]
