"""Names as people type them: paths, places on the Hub, what each command line makes of them."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hf_selortho import SelOrthoConfig, SelOrthoSAE
from hf_selortho.commands.main import COMMANDS
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.errors import SelOrthoError
from hf_selortho.formats import load_sae
from hf_selortho.utils.names import RepoRef, activations_of, local_path, located, repo_id, subfolder_of
from hf_selortho.utils.options import _READERS, OneLineParser

ODD = ("org/x:main", "git@huggingface.co:org/x", "http://[::1", "org/x@", "@main")
URL = "https://huggingface.co"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory and home folder, with runs/demo, a folder named like a repository, and odd names."""
    for name in ("runs/demo", "org/local", " blanks ", "back\\slash", "with,comma"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        *((text, "runs/demo") for text in ("runs/demo/", "./runs//demo", " runs/demo\n", "runs\\demo\\")),
        *((text, "runs/demo") for text in ("runs/./x/../demo", ".\\runs/demo")),
        *((text, "HOME/runs/demo") for text in ("~/runs/demo/", "~\\runs\\demo", " ~/runs//demo")),
        *((text, "HOME/runs/demo") for text in ("file://HOME/runs/demo", "file://localhostHOME/runs/demo/")),
        *(
            (text, "runs/demo")
            for text in ("'runs/demo'", "“runs/demo”", "\u200bruns/demo\xa0", "file:runs/demo", "$RUNS/demo")
        ),
        *((text, "HOME/runs/demo") for text in ("~/runs/demo", "FILE://HOME/runs/demo")),
        (" blanks ", " blanks "),
        ("back\\slash", "back\\slash"),
        ("link/../x", "link/../x"),  # of what the link leads to
        ("new/folder/", "new/folder"),
        ("//tmp//x", "/tmp/x"),
    ],
)
def test_a_path_is_what_was_meant(typed: str, path: str, home: Path) -> None:
    assert local_path(typed.replace("HOME", str(home))) == path.replace("HOME", str(home))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "--output_dir is empty"),
        (" \t", "--output_dir is empty"),
        ("a\0b", "NUL byte"),
        ("~nobody-here/x", "that of an unknown user"),
        ("C:\\Users\\me", "not an address, a path of Windows"),
        (f"{URL}/org/name", "expected a path of this machine, not an address"),
        *((text, "expected a path of this machine") for text in ("file://server/x", "s3://bucket/x", "~~")),
        ("'\"", "--output_dir is empty"),
        ("a\ud800", "half a character"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(typed: str, said: str, home: Path) -> None:
    with pytest.raises(SelOrthoError, match=said):
        local_path(typed, "--output_dir")


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        *((text, "org/name") for text in ("org/name", " org/name/", "org//name", "org\\name", "hf.co/org/name")),
        *((text, "org/name") for text in (f"{URL}/org/name/?x=1#y", "HTTPS://HuggingFace.co/org/name.git")),
        *((text, "org/name") for text in ("hf://org/name", "hf://models/org/name", "huggingface.co/org/name")),
        *((f"{URL}/org/name/{page}/main/sub/x/", "org/name@main/sub/x") for page in ("tree", "commits")),
        *((f"{URL}/org/name/{page}/v1/sub/config.json", "org/name@v1/sub") for page in ("blob", "resolve")),
        (f"{URL}/org/name/tree/refs%2Fpr%2F3/sub", "org/name@refs/pr/3/sub"),
        (f"{URL}/org/name/tree/feature%2Fx/sub", "org/name@feature%2Fx/sub"),
        ("hf://org/name@v1//sub/./x/", "org/name@v1/sub/x"),
        (f"{URL}/org/name/tree/main/a%20b", "org/name@main/a b"),
        *((f"{URL}/org/name/{page}", "org/name") for page in ("discussions/3", "settings")),
        *((text, "org/name") for text in ("'org/name'", "org/name.git", "\ufefforg/name")),
        ("org/local", "org/local"),
    ],
)
def test_a_place_on_the_hub_is_read_as_it_is_copied(typed: str, place: str, home: Path) -> None:
    ref = RepoRef.parse(typed)
    assert str(ref) == place and RepoRef.parse(str(ref)) == ref
    assert ref.is_local == (place == "org/local")  # a folder named like a repository goes before it


@pytest.mark.parametrize(
    "typed", ["./nope", "~/nope", "a b/c", "org/name/../x", "org/name@..%2Fx", "", "../org/x", *ODD]
)
def test_what_is_no_place_is_refused_in_one_line(typed: str, home: Path) -> None:
    with pytest.raises(SelOrthoError):
        RepoRef.parse(typed)


@pytest.mark.parametrize(
    ("kind", "typed", "said"),
    [
        ("SAE", f"{URL}/datasets/org/x", "is among the Hub's datasets: expected one of its models"),
        ("dataset", "https://example.com/org/x", "is no address of https://huggingface.co, the Hub"),
        ("dataset", f"{URL}/datasets/org/x/tree/main/data", "a whole repository, of the Hub"),
        ("model", "models/llama/7b", "a whole repository, of the Hub"),
    ],
)
def test_another_kind_of_place_is_refused(kind: Any, typed: str, said: str, home: Path) -> None:
    with pytest.raises(SelOrthoError, match=said):
        RepoRef.parse(typed, kind=kind)


def test_a_repository_to_write_to_and_cached_activations_are_read_likewise(home: Path) -> None:
    assert {repo_id(text) for text in ("org/x", " org/x/ ", f"{URL}/org/x", "hf://org/x")} == {"org/x"}
    assert repo_id(f"{URL}/spaces/org/x", "Space") == "org/x"
    for text in ("x", "../x", "org/x@y", "org/x/y", f"{URL}/datasets/org/x", "örg/x"):
        with pytest.raises(SelOrthoError):
            repo_id(text)
    assert activations_of(f"{URL}/datasets/org/x/tree/v1") == activations_of("Hub: org/x@v1/ ") == "hub:org/x@v1"
    assert str(RepoRef.parse(f"{URL}/datasets/org/x/viewer/default/train", kind="dataset")) == "org/x"
    assert activations_of("~/runs/demo/") == str(home / "runs/demo")


def test_a_name_and_its_revision_do_not_contradict_each_other(home: Path) -> None:
    assert located("org/x@v1/sub", {"revision": " v1 "}) == ("org/x", {"revision": "v1", "subfolder": "sub"})
    with pytest.raises(SelOrthoError, match="has the revision 'v1', revision says 'v2': leave one out"):
        located("org/x@v1", {"revision": "v2"})
    assert subfolder_of("./a\\b//c/../d/") == "a/b/d" and subfolder_of("./") is None
    with pytest.raises(SelOrthoError, match="leads out of the repository"):
        subfolder_of("a/../../b")


def test_the_python_api_reads_names_alike_and_records_the_normal_one(home: Path) -> None:
    sae = SelOrthoSAE(SelOrthoConfig(d_in=4, d_sae=8, activation="topk", k=2))
    sae.save_pretrained(home / "runs/demo")
    for load in (SelOrthoSAE.from_pretrained, SelOrthoConfig.from_pretrained, load_sae):
        assert load("~\\runs/demo/ ").name_or_path in (str(home / "runs/demo"), "")
        assert load(" runs", subfolder="./demo/") is not None
    (home / "t.txt").write_text("one\ntwo\nthree\n")
    assert open_documents(TextSource(dataset=" ./t.txt")).name == "t.txt"


def options_of(name: str) -> dict[str, argparse.Action]:
    """The options of a command that take text."""
    actions: dict[str, argparse.Action] = {}

    def stop(self: OneLineParser, *_: object, **__: object) -> None:
        actions.update({action.dest: action for action in self._actions})
        raise SystemExit

    with mock.patch.object(OneLineParser, "parse_known_args", stop), pytest.raises(SystemExit):
        importlib.import_module(f"hf_selortho.commands.{name}").main([])
    return actions


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_names_something_is_read_at_the_door(name: str) -> None:
    options = options_of(name)
    assert "verbose" in options
    words = ("folder", "Folder", "file", "Hub id", "owner/name", "Branch", "repository")
    plain = {"separator", "encoding", "model_id", "dataset_id"}  # `PublicIds` reads these two itself
    plain |= {"hub_license", "license", "license_link", "commit_message", "wheel_url", "saelens"}
    plain.add("overwrite_output_dir")
    for option, action in options.items():
        takes_text = action.nargs != 0 and action.type in (None, str) and not action.choices
        if takes_text and any(word in str(action.help) for word in words):
            assert option in _READERS or option in plain or action.const is not None, (option, action.help)


@pytest.mark.parametrize("option", _READERS)
def test_an_empty_name_is_refused_by_the_name_of_its_option(option: str) -> None:
    with pytest.raises(SelOrthoError, match=f"^--{option} is empty"):
        _READERS[option](" ", f"--{option}")


def test_a_list_may_have_commas_but_a_name_keeps_its_own(home: Path) -> None:
    parser = OneLineParser()
    parser.add_argument("--seeds", nargs="+", default=[])
    parser.add_argument("--layers", nargs="+", type=int, default=[])
    typed = ["--seeds", "runs/demo/,./runs/x", "with,comma", " ~/y", "--layers", "3,", "5,8"]
    parsed = parser.parse_args(typed)
    assert parsed.seeds == ["runs/demo", "runs/x", "with,comma", str(home / "y")] and parsed.layers == [3, 5, 8]


def test_a_run_of_one_sae_and_its_twin_stands_for_the_sae(home: Path) -> None:
    run = home / "runs" / "demo"
    for name in ("layer_9", "layer_9_twin"):
        (run / name).mkdir()
        (run / name / "config.json").write_text("{}")
    assert located("runs/demo", {}) == ("runs/demo/layer_9", {})
    assert located("runs/demo", {"subfolder": "layer_9_twin"}) == ("runs/demo", {"subfolder": "layer_9_twin"})
    assert located("runs/demo", {}, "model")[0] == "runs/demo"
    (run / "layer_5").mkdir()
    (run / "layer_5" / "config.json").write_text("{}")
    assert located("runs/demo", {})[0] == "runs/demo", "of several layers none is the one that is meant"
