"""Damaged activation caches: every fault is named in one line, whatever it is, and a full disk loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_selortho import SelOrthoError
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import CachedBatches, held_out_batches
from hf_selortho.data.cache_manifest import CacheError
from hf_selortho.data.cache_report import report_table
from scripts import cache_activations
from tests.data.caches import write_cache
from tests.data.test_cache_writer import contents

ROOT = Path(__file__).parents[2]
LAYERS = [2, 5]


@pytest.fixture
def acts(tmp_path) -> Path:
    """A cache to do harm to."""
    folder = tmp_path / "acts"
    write_cache(folder, [40, 30], held_out=(20,))
    return folder


def use(cache: ActivationCache) -> None:
    """Read everything that a training and the report read."""
    report_table(cache.manifest)
    for _ in held_out_batches(cache, LAYERS, 7):
        pass
    batches = CachedBatches(cache, LAYERS, batch_size=5, pool_tokens=1)
    try:
        batches.statistics()
        batches.memory_bytes()
        for _ in range(14):
            batches.next_batch()
    finally:
        batches.release()


def refused(folder: Path) -> str:
    """What opening and reading the folder says, on one line."""
    with pytest.raises(CacheError) as caught:
        use(ActivationCache(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("folder", "place"),  # of the header's length, the header, the values
    [("tokens", 0), ("layer_2", 100), ("held_out/tokens", 8), ("held_out/layer_5", -1)],
)
def test_a_flipped_byte_is_found_when_it_is_read(folder, place, acts) -> None:
    use(ActivationCache(str(acts)))
    flip(acts / folder / "00000.safetensors", place)
    ActivationCache(str(acts))  # reads no shard
    found = refused(acts)
    assert f"{folder}/00000.safetensors is damaged: its sha256 is" in found and "restore it from a copy" in found
    other = CachedBatches(ActivationCache(str(acts)), [5], batch_size=5)  # a layer that is not read harms nobody
    if folder == "layer_2":
        other.next_batch()
    other.release()


def link_out(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "layer_5/00001.safetensors has .* bytes, expected"),
        (lambda path: path.write_bytes(b""), "layer_5/00001.safetensors has 0 bytes, expected"),
        (lambda path: path.unlink(), "layer_5/00001.safetensors is missing"),
        (lambda path: shutil.copy(path, path.with_name("00099.safetensors")), "layer_5/00099.safetensors is not in"),
        (link_out, "layer_5/00001.safetensors is a link or below one that leads out of the folder, to .*elsewhere"),
        (lambda path: shutil.copy(path.parents[1] / "layer_2" / path.name, path), "layer_5/00001.* is damaged"),
        (lambda path: (path.parents[1] / "manifest.json").unlink(), "holds no cache of activations"),
        (lambda path: shutil.rmtree(path.parents[1]), "holds no cache of activations"),
    ],
)
def test_harm_to_a_file_is_named(harm, message, acts) -> None:
    harm(acts / "layer_5" / "00001.safetensors")
    assert re.search(message, refused(acts))


def test_an_unfinished_cache_and_a_shard_that_goes_later_are_refused(acts) -> None:
    cache = ActivationCache(str(acts))
    (acts / "tokens" / "00000.safetensors").unlink()
    with pytest.raises(CacheError, match=r"tokens/00000.safetensors cannot be read \(No such file"):
        cache.read(cache.manifest.shards[0], LAYERS)
    (acts / "manifest.json").unlink()
    (acts / ".unfinished").mkdir()
    assert "holds no finished cache of activations: run the same command once more" in refused(acts)


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(acts, tmp_path) -> None:
    snapshot = tmp_path / "datasets--org--acts" / "snapshots" / ("c0ffee" + "0" * 34)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in acts.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(acts)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (snapshot / ".gitattributes").touch()
    use(ActivationCache(str(snapshot)))


def setting(*path: Any, to: Any) -> Callable[[Any], None]:
    """`setting("shards", 0, "rows", to=3)`: a change of a manifest's content."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


FILE = ("shards", 0, "files", "tokens/00000.safetensors")
NO_PATH = {"sha256": "0" * 64, "bytes": 9}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("version", to=2), "is of version 2, this hf_selortho reads version 3: cache the activations again"),
        (setting("format", to="other"), 'expected "format": "hf_selortho.activations"'),
        (setting("shards", 0, "files", "../x.safetensors", to=NO_PATH), "files of shards 0 is"),
        (setting("shards", 0, "number", to="../../x"), r"shards\[0\].number is '../../x', expected a whole number"),
        (setting("shards", 1, "number", to=-1), r"shards\[1\].number is -1, expected a whole number of at least 0"),
        (setting("shards", 0, "rows", to=10**12), "rows of shards 0 is 1000000000000, expected at most"),
        (setting("shards", 0, "rows", to=39), r"layer_2/00000.safetensors does not hold .* of shape \(39, 4\)"),
        (setting(*FILE, "sha256", to="x"), "tokens/00000.safetensors is damaged: its sha256 is .*, expected x"),
        (setting(*FILE, "bytes", to=10**12), "tokens/00000.safetensors has .* bytes, expected 1000000000000;"),
        (setting("shards", to=[]), r"shards is \(\), expected at least one"),
        (setting("layers", to=[2]), r"layers is \(2,\), expected those of the statistics"),
        (setting("statistics", "2", "mean", 3, to="x"), r"statistics.2.mean\[3\] is 'x', expected a finite number"),
        (setting("statistics", "2", "scale", to=0), "statistics.2.scale is 0.0, expected a number above 0"),
        (setting("statistics", "2", "median_norm", to=10**400), "statistics.2.median_norm is 1000"),
        (lambda content: content["statistics"]["2"].pop("scale"), "statistics.2.scale is missing"),
        (setting("stored_dtype", to="float16"), "stored_dtype is 'float16', expected bfloat16 or float32"),
        (setting("counts", to="x"), "counts is 'x', expected Counts"),
        (lambda content: content.pop("lm_name"), "lm_name is missing"),
        (lambda content: content.clear(), "is no manifest of cached activations"),
    ],
)
def test_a_wrong_manifest_is_refused(change, message, acts) -> None:
    content = json.loads((acts / "manifest.json").read_text())
    change(content)
    (acts / "manifest.json").write_text(json.dumps(content))
    found = refused(acts)
    assert re.search(message, found), found


SCALARS = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from([10**30, 10**400, "", "1", "../x"])
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), value=VALUES)
def test_any_other_manifest_is_read_or_refused(tmp_path_factory, data, value) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutable"
    if not folder.exists():
        write_cache(folder, [40, 30], held_out=(20,))
    original = (folder / "manifest.json").read_bytes()
    content = parent = json.loads(original)
    while True:  # down to some value, which changes
        key = data.draw(st.sampled_from(range(len(parent)) if isinstance(parent, list) else sorted(parent)))
        if not isinstance(parent[key], (dict, list)) or not parent[key] or data.draw(st.booleans()):
            break
        parent = parent[key]
    parent[key] = value
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        use(ActivationCache(str(folder)))
    except SelOrthoError as error:
        assert "\n" not in str(error)
    finally:
        (folder / "manifest.json").write_bytes(original)


# the disk had room when the script looked; other programs have taken it since
ROOM_TAKEN_LATER = """
import runpy, shutil, sys, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)
sys.argv[0] = "scripts/cache_activations.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_loses_nothing(small_disks, tiny_lm_dir, sample_documents, tmp_path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents[:100]))
    options = [
        *("--model", str(tiny_lm_dir("llama")), "--lm_dtype", "float32", "--dataset", str(texts), "--cpu"),
        *("--layers", "1", "2", "--stored_dtype", "float32", "--shard_tokens", "400", "--eval_samples", "20"),
    ]
    small_disk = small_disks("1m")
    folder, whole = small_disk.folder / "acts", tmp_path / "whole"
    command = [sys.executable, "-c", ROOM_TAKEN_LATER, *options, "--output_dir", str(folder)]
    ended = subprocess.run(
        command,
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "preexec_fn": small_disk.limit},
        **{"capture_output": True, "text": True, "timeout": 120, "check": False},
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    last = ended.stderr.rstrip().splitlines()[-1]
    assert last.startswith("cache_activations.py: error: cannot write ") and small_disk.reason in last
    assert "the shards written so far are safe" in last and "run the same command again to go on" in last
    assert "holds no finished cache" in refused(folder) and not list(folder.rglob("*.tmp"))
    written = {path: (folder / path).stat().st_mtime_ns for path in contents(folder) if path.startswith("tokens/")}
    small_disk.enlarge()
    for target in (whole, folder):
        cache_activations.main([*options, "--output_dir", str(target)])
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    assert contents(folder) == contents(whole)
    kept = sorted(written)[:-1]  # all but the one that was being written
    assert kept and all((folder / path).stat().st_mtime_ns == written[path] for path in kept)
