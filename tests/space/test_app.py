"""How the page is started: options, what stands for them, and what is said where it cannot start."""

from __future__ import annotations

import argparse
import importlib
import socket
import sys

import pytest

pytest.importorskip("gradio")  # the extra `space`, which the whole browser needs

import hf_selortho.browser
from hf_selortho import SelOrthoError
from hf_selortho.browser.app import launch
from hf_selortho.browser.options import add_options, default_of


def test_the_command_line_goes_before_the_environment_and_that_before_what_is_stored(monkeypatch) -> None:
    monkeypatch.setenv("TWIN", "org/twin")
    monkeypatch.setenv("ALLOW_OTHER_SAES", "1")
    stored = {"sae": "org/sae@main", "twin": "org/other", "lm": "none", "allow_other_saes": False}
    parser = argparse.ArgumentParser()
    add_options(parser, stored)
    options = parser.parse_args(["--lm", "org/lm"])
    assert (options.twin, options.lm, options.allow_other_saes) == ("org/twin", "org/lm", True)
    assert default_of("sae", stored) == "org/sae@main"


def test_a_port_that_cannot_be_served_is_refused_before_anything_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SelOrthoError, match=f"--port {port} of 127.0.0.1 is in use: choose another --port"):
            launch("no such folder", port=port)
    for number, host, said in ((70_000, "127.0.0.1", "from 1 to 65535"), (None, "192.0.2.1", "is not this machine")):
        with pytest.raises(SelOrthoError, match=said):
            launch("no such folder", host=host, port=number)


def test_mistakes_are_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(SelOrthoError, match="which SAE\\? pass --sae"):
        launch(None)
    with pytest.raises(SelOrthoError, match="neither on the Hub nor a local path"):
        launch("no such folder")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SelOrthoError, match='pip install "hf_selortho\\[space\\]"'):
        importlib.reload(hf_selortho.browser)
