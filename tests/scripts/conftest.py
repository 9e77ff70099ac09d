"""What the tests of the scripts share."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState, PartialState


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def arguments(tiny_lm_dir, sample_text_files, tmp_path):
    """`arguments(max_steps=3, penalty="none", ...)`: a command line for a run of seconds in `tmp_path/run`."""

    def build(**changes: object) -> list[str]:
        settings = {
            "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "layer": 1, "dataset": sample_text_files.csv,
            "context_length": 32, "d_sae": 64, "pair_fraction": 0.01, "batch_size": 128, "buffer_contexts": 32,
            "refresh_every": 4, "max_steps": 12, "learning_rate": 1e-3, "logging_steps": 5, "eval_samples": 30,
            "eval_ce_samples": 8, "output_dir": tmp_path / "run", "cpu": True, **changes,
        }  # fmt: skip
        return [part for key, value in settings.items() if value is not None for part in (f"--{key}", str(value))]

    return build


def command(settings: dict, changes: dict) -> list[str]:
    """A command line; a value of True is a flag, a list several words, None nothing."""
    parts: list[str] = []
    for key, value in {**settings, **changes}.items():
        if value is not None:
            words = [] if value is True else map(str, value if isinstance(value, list) else [value])
            parts += [f"--{key}", *words]
    return parts


@pytest.fixture
def sourceless(tmp_path):
    """Settings that runs share, without a source of activations."""

    def build(**changes: object) -> list[str]:
        settings = {
            "d_sae": 64, "pair_fraction": 0.01, "batch_size": 128, "max_steps": 8, "learning_rate": 1e-3,
            "eval_samples": 30, "eval_ce_samples": 8, "output_dir": tmp_path / "run", "cpu": True,
        }  # fmt: skip
        return command(settings, changes)

    return build


@pytest.fixture
def live(sourceless, tiny_lm_dir, sample_text_files):
    """Arguments of runs with the language model."""

    def build(**changes: object) -> list[str]:
        source = {
            "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "dataset": sample_text_files.csv,
            "context_length": 32, "buffer_contexts": 32, "refresh_every": 4,
        }  # fmt: skip
        return sourceless(**{**source, **changes})

    return build
