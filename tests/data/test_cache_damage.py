"""Damaged activations on disk: every fault is named, whatever it is, and a full disk loses nothing."""

from __future__ import annotations

import copy
import hashlib
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
from hf_selortho.data.activation_cache import HELD_OUT, TRAIN, ActivationStore, ShardError, parse_manifest
from hf_selortho.data.cache_batches import ShardBatches, held_out_batches, layer_statistics
from hf_selortho.data.cache_folder import ShardFolder
from hf_selortho.data.cache_report import read_manifest
from scripts import cache_activations

ROOT = Path(__file__).parents[2]
LAYERS = [1, 2]
SMALL_DISK = "2m"  # the estimate fits into it, the records of the shards beside it do not


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def command(tiny_lm_dir, sample_documents, tmp_path_factory) -> Callable[[Path], list[str]]:
    """`command(folder)`: arguments of a harvest of layers 1 and 2 in a dozen shards."""
    texts = tmp_path_factory.mktemp("damage") / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents[:100]))
    return lambda folder: [
        *("--model", str(tiny_lm_dir("llama")), "--lm_dtype", "float32", "--dataset", str(texts)),
        *("--layers", *map(str, LAYERS), "--stored_dtype", "float32", "--shard_tokens", "400"),
        *("--held_out_fraction", "0.2", "--eval_samples", "20", "--output_dir", str(folder), "--cpu"),
    ]


@pytest.fixture(scope="module")
def harvested(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harvested") / "acts"
    cache_activations.main(command(folder))
    return folder


@pytest.fixture
def acts(harvested, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(harvested, tmp_path / "acts"))


def use(store: ActivationStore) -> None:
    """Read everything that a training reads."""
    for layer in store.manifest.layers:
        layer_statistics(store, layer)
    store.held_out_contexts()
    for _ in held_out_batches(store, LAYERS, 50):
        pass
    batches = ShardBatches(store, LAYERS, batch_size=50, pool_tokens=1)
    try:
        batches.memory_bytes()
        batches.next_batch()
        for entry in store.manifest.shards:
            store.read(entry, LAYERS)
    finally:
        batches.release()


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(folder: Path) -> str:
    """What opening the folder says, on one line."""
    with pytest.raises(ShardError) as caught:
        ActivationStore(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_intact_copy_is_read(acts) -> None:
    store = ActivationStore(str(acts))
    use(store)
    assert len(store.manifest.shards) > 8 and store.manifest.layers == (1, 2) and len(store.manifest.held_out) > 1


@pytest.mark.parametrize("place", [0, 8, 0.3, 0.9, -1])  # header's length, header, values
@pytest.mark.parametrize("folder", ["tokens", "layer_1", "held_out/tokens", "held_out/layer_2"])
def test_a_flipped_byte_is_found_when_it_is_read(folder, place, acts) -> None:
    name = f"{folder}/00001.safetensors"
    data = bytearray((acts / name).read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 1
    (acts / name).write_bytes(data)
    store = ActivationStore(str(acts))  # reads no shard
    with pytest.raises(
        ShardError, match=f"{name} is damaged: its sha256 is .* restore it from a copy, or harvest again"
    ):
        use(store)
    part = HELD_OUT if folder.startswith(HELD_OUT) else TRAIN
    entries = store.manifest.held_out if part else store.manifest.shards
    other = 2 if folder == "layer_1" else 1
    store.read(entries[0], LAYERS, part)  # its neighbours are none the worse
    if "layer" in folder:
        store.read(entries[1], [other], part)
    with pytest.raises(ShardError, match=name):
        store.read(entries[1], LAYERS, part)
    if folder == "held_out/tokens":
        with pytest.raises(ShardError, match=name):
            store.held_out_contexts()


@pytest.mark.parametrize("name", ["tokens/00003.safetensors", "held_out/layer_1/00000.safetensors"])
@pytest.mark.parametrize("left", [0, 7, 1000, -1])
def test_a_truncated_shard_is_refused_at_once(name, left, acts) -> None:
    data = (acts / name).read_bytes()
    (acts / name).write_bytes(data[:left])
    found = refused(acts)
    assert f"{name} has {len(data[:left])} bytes, expected {len(data)}" in found


def test_missing_shards_are_refused_at_once(acts) -> None:
    (acts / "layer_2" / "00002.safetensors").unlink()
    assert "layer_2/00002.safetensors is missing; restore it from a copy" in refused(acts)
    (acts / "layer_2" / "00002.safetensors").symlink_to("gone")
    assert "layer_2/00002.safetensors is missing; restore it from a copy" in refused(acts)
    shutil.rmtree(acts / "held_out" / "tokens")
    assert "held_out/tokens/00000.safetensors is missing (and" in refused(acts)


def test_a_shard_that_is_gone_once_the_store_is_open(acts) -> None:
    store = ActivationStore(str(acts))
    (acts / "tokens" / "00000.safetensors").unlink()
    with pytest.raises(ShardError, match=r"tokens/00000.safetensors cannot be read \(No such file"):
        store.read(store.manifest.shards[0], LAYERS)
    (acts / "tokens" / "00001.safetensors").write_bytes(b"short")
    with pytest.raises(ShardError, match=r"tokens/00001.safetensors has 5 bytes, expected"):
        store.read(store.manifest.shards[1], LAYERS)


@pytest.mark.parametrize("name", ["layer_1/00099.safetensors", "layer_7/00000.safetensors", "model.safetensors"])
def test_a_shard_that_does_not_belong_there_is_refused(name, acts) -> None:
    (acts / name).parent.mkdir(exist_ok=True)
    shutil.copy(acts / "layer_1" / "00000.safetensors", acts / name)
    assert f"{name} is not in manifest.json" in refused(acts)


@pytest.mark.parametrize("name", ["layer_2/00002.safetensors", "held_out/tokens/00000.safetensors", "manifest.json"])
def test_links_that_lead_out_of_the_folder_are_refused(name, acts, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (acts / name).rename(elsewhere)
    (acts / name).symlink_to(elsewhere)
    assert f"{name} is a link or below one that leads out of the folder, to {elsewhere}" in refused(acts)
    (acts / name).unlink()
    (acts / name).symlink_to(os.path.relpath(elsewhere, (acts / name).parent))  # with ..
    assert f"{name} is a link or below one that leads out of the folder, to {elsewhere}" in refused(acts)
    elsewhere.rename(acts / "kept")
    (acts / name).unlink()
    (acts / name).symlink_to(os.path.relpath(acts / "kept", (acts / name).parent))
    use(ActivationStore(str(acts)))  # it stays inside
    (acts.parent / "link").symlink_to(acts)
    use(ActivationStore(str(acts.parent / "link")))  # the user's own choice


def test_a_folder_that_is_a_link_out_is_refused(acts, tmp_path) -> None:
    (acts / "layer_1").rename(tmp_path / "elsewhere")
    (acts / "layer_1").symlink_to(tmp_path / "elsewhere")
    assert "layer_1/00000.safetensors is a link or below one that leads out of the folder" in refused(acts)


def test_a_link_that_appears_once_the_store_is_open_is_refused(acts, tmp_path) -> None:
    store = ActivationStore(str(acts))
    (acts / "tokens" / "00000.safetensors").rename(tmp_path / "elsewhere")
    (acts / "tokens" / "00000.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardError, match=r"tokens/00000.safetensors is a link or below one that leads out"):
        store.read(store.manifest.shards[0], LAYERS)


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(harvested, tmp_path) -> None:
    snapshot = tmp_path / "datasets--org--acts" / "snapshots" / ("c0ffee" + "0" * 34)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in harvested.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(harvested)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    use(ActivationStore(str(snapshot)))
    read_manifest(snapshot)
    (snapshot / "manifest.json").unlink()
    (snapshot / "manifest.json").symlink_to(harvested / "manifest.json")
    assert "manifest.json is a link or below one that leads out of the folder" in refused(snapshot)
    with pytest.raises(ShardError, match=r"manifest.json is a link that leads out of the folder"):
        read_manifest(snapshot)


def test_a_manifest_larger_than_any_is_not_read(acts, monkeypatch) -> None:
    with (acts / "manifest.json").open("r+b") as file:
        file.truncate((256 << 20) + 1)  # of holes: nothing is written
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path))
    assert "has 268,435,457 bytes, a manifest at most 268,435,456" in refused(acts)
    with pytest.raises(ShardError, match="has 268,435,457 bytes, a manifest at most"):
        read_manifest(acts)
    assert read == []


def test_other_files_harm_nobody(acts) -> None:
    (acts / ".gitattributes").touch()
    (acts / "pictures").mkdir()
    (acts / "pictures" / "norms.png").touch()
    use(ActivationStore(str(acts)))


def exchange(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def test_exchanged_shards_are_found(acts) -> None:
    exchange(acts / "layer_1" / "00000.safetensors", acts / "layer_2" / "00000.safetensors")  # of the same size
    with pytest.raises(ShardError, match="layer_[12]/00000.safetensors is damaged"):
        use(ActivationStore(str(acts)))
    exchange(acts / "tokens" / "00000.safetensors", acts / "held_out" / "tokens" / "00000.safetensors")
    assert "tokens/00000.safetensors has" in refused(acts)


def changed(acts: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the manifest anew."""
    content = json.loads((acts / "manifest.json").read_text())
    change(content)
    (acts / "manifest.json").write_text(json.dumps(content))


def setting(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """`setting("shards", 0, "rows", to=3)`: what [`changed`] shall do."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def renaming(path: str) -> Callable[[dict[str, Any]], None]:
    """Another path for the tokens of the first shard."""

    def change(content: Any) -> None:
        files = content["shards"][0]["files"]
        files[path] = files.pop("tokens/00000.safetensors")

    return change


FILE = ("shards", 0, "files", "tokens/00000.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("version", to=2), "is of version 2, this hf_selortho reads 1: update with pip install -U hf_selortho"),
        (setting("format", to="other"), 'expected "format": "hf_selortho.activations"'),
        (renaming("../tokens/00000.safetensors"), "shard 0 has the files"),
        (renaming("/etc/passwd"), "shard 0 has the files"),
        (setting("shards", 0, "files", "../x.safetensors", to={"sha256": "", "bytes": 1}), "shard 0 has the files"),
        (setting("shards", 0, "number", to="../../x"), "a shard numbered '../../x'"),
        (setting("shards", 1, "number", to=-1), "a shard numbered -1"),
        (setting("shards", 1, "rows", to=-5), "of -5 rows"),
        (setting("shards", 1, "rows", to=0), "of 0 rows"),
        (setting("shards", 1, "rows", to=1.5), "of 1.5 rows"),
        (setting("shards", 1, "rows", to=True), "of True rows"),
        (setting(*FILE, "sha256", to="x"), "shard 0 has a file without a sha256 of 64 hexadecimal digits"),
        (
            setting("shards", 0, "rows", to=10**12),
            "manifest.json is damaged: shard 0 of 1000000000000 rows has a file of fewer",
        ),
        (setting("shards", 0, "rows", to=10**30), "manifest.json is damaged: shard 0 of 1000"),
        (setting("shards", 0, "number", to=10**30), "shard 1000000000000000000000000000000 has the files"),
        (setting(*FILE, "bytes", to=10**12), "tokens/00000.safetensors has .* bytes, expected 1000000000000;"),
        (setting(*FILE, "bytes", to=float("inf")), "manifest.json is damaged"),
        (setting(*FILE, "bytes", to=-3), "manifest.json is damaged"),
        (setting("shards", 0, "files", to=["tokens/00000.safetensors"]), "shard 0 has the files"),
        (lambda c: c["shards"].append(c["shards"][0]), "a number occurs twice in shards"),
        (setting("shards", to=[]), "lists no shard"),
        (setting("shards", to=7), "manifest.json is damaged"),
        (setting("layers", to=["1", "2"]), "manifest.json is damaged"),
        (setting("layers", to=None), "manifest.json is damaged"),
        (setting("layers", "1", "d_in", to=31), "the mean of layer 1 is not 31 numbers"),
        (setting("layers", "1", "d_in", to=10**12), "the mean of layer 1 is not 1000000000000 numbers"),
        (setting("layers", "1", "mean", 3, to="x"), "the mean of layer 1 is not 32 numbers"),
        (setting("layers", "1", "scale", to=float("nan")), "hook_name, scale or median_norm of layer 1"),
        (setting("layers", "1", "scale", to=float("inf")), "hook_name, scale or median_norm of layer 1"),
        (setting("layers", "1", "median_norm", to=10**400), "hook_name, scale or median_norm of layer 1"),
        (setting("layers", "1", "mean", 0, to=float("nan")), "the mean of layer 1 is not 32 numbers"),
        (setting("layers", "1", "scale", to=0), "hook_name, scale or median_norm of layer 1"),
        (setting("layers", "1", "max_norm", to=-1), "max_norm of layer 1 is -1"),
        (setting("layers", "../1", to={}), "manifest.json is damaged"),
        (setting("stored_dtype", to="float16"), "stored_dtype is 'float16', expected one of bfloat16, float32"),
        (setting("stored_dtype", to=[]), "manifest.json is damaged"),
        (lambda c: c["layers"]["2"].pop("scale"), "manifest.json is damaged: no 'scale'"),
        (lambda c: c.pop("counts"), "manifest.json is damaged: no 'counts'"),
        (setting("text", to="x"), "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(change, message, acts) -> None:
    changed(acts, change)
    found = refused(acts)
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"not JSON", "not valid JSON"),
        (b'{"format": ', "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"rows": ' + b"9" * 10_000 + b"}", "manifest.json is "),
        (b"[]", "is no manifest of activations"),
        (b"null", "is no manifest of activations"),
    ],
)
def test_what_is_no_manifest_is_refused(data, message, acts) -> None:
    (acts / "manifest.json").write_bytes(data)
    assert message in refused(acts)


def test_rows_and_widths_that_the_shards_do_not_have_are_found(acts) -> None:
    manifest = (acts / "manifest.json").read_bytes()
    rows = json.loads(manifest)["shards"][0]["rows"]
    for other in (rows - 1, rows + 1):
        changed(acts, setting("shards", 0, "rows", to=other))
        with pytest.raises(ShardError, match=rf"layer_1/00000.safetensors holds \({rows}, 32\) .* expected \({other}"):
            use(ActivationStore(str(acts)))
        store = ActivationStore(str(acts))
        with pytest.raises(ShardError, match=f"tokens/00000.safetensors does not hold .* of {other} rows"):
            store.read(store.manifest.shards[0], [])
        (acts / "manifest.json").write_bytes(manifest)
    changed(acts, lambda content: content["layers"]["2"].update(d_in=31, mean=[0.0] * 31))
    with pytest.raises(ShardError, match=r"layer_2/0000\d.safetensors holds \(\d+, 32\) of .*, expected \(\d+, 31\)"):
        use(ActivationStore(str(acts)))
    (acts / "manifest.json").write_bytes(manifest)
    changed(acts, setting("stored_dtype", to="bfloat16"))
    with pytest.raises(ShardError, match=r"of torch.float32, expected .* of torch.bfloat16"):
        use(ActivationStore(str(acts)))


def test_folders_that_hold_no_activations(acts, tmp_path) -> None:
    assert "no such folder of activations" in refused(tmp_path / "nowhere")
    assert "no such folder of activations" in refused(acts / "manifest.json")
    (acts / "manifest.json").rename(acts / "manifest.txt")
    assert "holds no manifest.json" in refused(acts)
    (acts / "manifest.json").mkdir()
    assert "holds no manifest.json" in refused(acts)


def test_an_unfinished_harvest_is_refused(acts) -> None:
    (acts / ".harvest").mkdir()
    assert "is not finished: run its scripts/cache_activations.py command once more" in refused(acts)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from([10**12, -(10**12), 10**30, 10**400, 1e300, "", "1", "../x", "/x", "bfloat16"])
    | st.text(max_size=5)
)
_UNREAD = {"norm_histogram", "norm_quantiles", "largest_norms", "sinks_by_position", "versions"}  # but by the report
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), _SCALARS, max_size=3)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values; of the items of a list, those of the first two."""
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


def mutate(content: Any, data: st.DataObject) -> None:
    """Change, delete, double or add a value somewhere."""
    *path, key = data.draw(st.sampled_from([path for path in places(content) if not _UNREAD & set(path)]))
    for step in path:
        content = content[step]
    action = data.draw(st.sampled_from(["change", "change", "delete", "double", "add"]))
    if action == "delete":
        del content[key]
    elif action == "double" and isinstance(content, list):
        content.append(copy.deepcopy(content[key]))
    elif action == "add" and isinstance(content, dict):
        content[data.draw(st.text(max_size=5) | st.sampled_from(["3", "../x", "held_out"]))] = data.draw(_VALUES)
    else:
        content[key] = data.draw(_VALUES)


@pytest.fixture(scope="module")
def mutable(harvested, tmp_path_factory) -> tuple[Path, bytes]:
    """A copy whose manifest may be overwritten, and the original one."""
    folder = Path(shutil.copytree(harvested, tmp_path_factory.mktemp("mutable") / "acts"))
    return folder, (folder / "manifest.json").read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_other_manifest_opens_or_is_refused(mutable, data) -> None:
    """What opens can be read, or says in the words of the package why it cannot."""
    folder, original = mutable
    content = json.loads(original)
    for _ in range(data.draw(st.integers(1, 2))):
        mutate(content, data)
    (folder / "manifest.json").write_text(json.dumps(content))
    try:
        use(ActivationStore(str(folder)))
    except SelOrthoError as error:
        assert str(error)


def test_any_value_in_any_place_opens_or_is_refused(mutable) -> None:
    folder, original = mutable
    opened = 0
    for *path, key in [path for path in places(json.loads(original)) if not _UNREAD & set(path) and 1 not in path]:
        for value in (None, -1, 10**30, 10**400, float("inf"), float("nan"), "1", [], {}):
            content = json.loads(original)
            setting(*path, key, to=value)(content)
            (folder / "manifest.json").write_text(json.dumps(content))
            try:
                use(ActivationStore(str(folder)))
                opened += 1
            except SelOrthoError as error:
                assert str(error)
    assert opened  # a harvest's seed, say, decides nothing when it is read


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_other_bytes_are_refused_or_mean_the_same(harvested, data) -> None:
    """Bytes overwritten, cut out or doubled anywhere in the manifest."""
    found = bytearray((harvested / "manifest.json").read_bytes())
    start = data.draw(st.integers(0, len(found)))
    end = data.draw(st.integers(start, min(len(found), start + 40)))
    found[start:end] = data.draw(st.binary(max_size=8) | st.just(bytes(found[start:end] * 2)))
    try:
        parse_manifest(bytes(found), "manifest.json")
    except ShardError as error:
        assert "manifest.json" in str(error)


# the disk had room when the harvest looked; other programs have taken it since
ROOM_TAKEN_LATER = """
import runpy, shutil, sys, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 40)
sys.argv[0] = "scripts/cache_activations.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_loses_nothing(small_disks, command, harvested, capsys) -> None:
    small_disk = small_disks(SMALL_DISK)
    folder = small_disk.folder / "acts"
    ended = subprocess.run(
        [sys.executable, "-c", ROOM_TAKEN_LATER, *command(folder)],
        **{"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "preexec_fn": small_disk.limit},
        **{"capture_output": True, "text": True, "timeout": 120, "check": False},
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr and "Error" not in ended.stderr
    last = ended.stderr.rstrip().splitlines()[-1]
    assert last.startswith("cache_activations.py: error: cannot write ") and small_disk.reason in last
    assert "the shards written so far are safe" in last and "run the same command again to go on" in last
    assert "is not finished" in refused(folder)
    assert not list(folder.rglob("*.tmp"))

    expected = contents(harvested)
    records = list(ShardFolder(folder).records(TRAIN))
    written = [path for record in records for path in record.content["files"]]
    assert len(records) > 2 or not small_disk.mounted
    assert {path: contents(folder)[path] for path in written} == {path: expected[path] for path in written}
    before = {path: (folder / path).stat().st_mtime_ns for path in written}

    small_disk.enlarge()
    cache_activations.main(command(folder))
    assert contents(folder) == expected
    assert {path: (folder / path).stat().st_mtime_ns for path in written} == before  # not written again
    use(ActivationStore(str(folder)))
