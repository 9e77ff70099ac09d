"""Harvests with a small random model: what is written, and that interruptions leave no trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_selortho import SelOrthoError
from hf_selortho.data.activation_cache import HELD_OUT, TRAIN, ActivationStore
from hf_selortho.data.cache_batches import layer_statistics
from hf_selortho.data.cache_folder import ShardFolder
from hf_selortho.data.cache_writer import HarvestSettings, ShardHarvest, assemble_manifest
from hf_selortho.data.contexts import ContextStream, held_out_contexts
from hf_selortho.data.texts import TextSource, open_documents
from hf_selortho.language_models.capture import ActivationCapture

LAYERS = (1, 3)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Made:
    folder: Path
    run: Callable[..., None]
    capture: ActivationCapture
    stream: Callable[..., ContextStream]


@pytest.fixture
def harvest(tiny_lm, sample_documents, tmp_path) -> Callable[..., Made]:
    """`harvest(folder, documents=60, shard_tokens=400, ...)`: an object whose `run()` harvests, or goes on."""
    lm = tiny_lm("llama")

    def build(name: str = "acts", documents: int = 60, ratio: float | None = 1.3, **changes) -> Made:
        path = tmp_path / f"{documents}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents[:documents]))
        texts = open_documents(TextSource(str(path), held_out_fraction=0.2))
        settings = HarvestSettings(
            64, **{"stored_dtype": "float32", "shard_tokens": 400, **changes}, max_norm_ratio=ratio
        )
        folder = ShardFolder(tmp_path / name)
        capture = ActivationCapture(lm, LAYERS, batch_tokens=256)
        plan = {
            "model": {"name": lm.name, "revision": lm.revision, "dtype": "float32"},
            "text": {
                "dataset": str(path), "revision": None, "config": None, "split": "train", "text_column": None,
                "held_out_fraction": 0.2,
            },
            "contexts": {"context_length": 64, "prepend_bos": True, "min_tokens": 8},
            "harvested_layers": list(LAYERS),
            "stored_dtype": settings.stored_dtype,
            "max_norm_ratio": ratio,
        }  # fmt: skip

        def stream() -> ContextStream:
            return ContextStream(texts, lm.tokenizer, context_length=64, endless=False)

        def run() -> None:
            if folder.begin(plan):
                held_out = list(held_out_contexts(texts, lm.tokenizer, limit=9, context_length=64))
                ShardHarvest(capture, stream(), held_out, folder, settings).run()
                folder.finish(assemble_manifest(folder, capture, plan, settings, {}), "card\n")

        return Made(folder.folder, run, capture, stream)

    return build


def test_shards_hold_what_the_language_model_says(harvest) -> None:
    made = harvest()
    made.run()
    store = ActivationStore(str(made.folder))
    made.capture.max_norms = tuple(store.manifest.layer(layer)["max_norm"] for layer in LAYERS)
    stream, dropped = made.stream(), 0
    assert len(store.manifest.shards) > 3
    for entry in store.manifest.shards:
        shard, expected = store.read(entry, LAYERS), made.capture.capture_all(stream.take_tokens(400))
        assert len(shard) == entry.rows == len(expected)
        for layer in LAYERS:
            assert torch.equal(shard.by_layer[layer], expected.by_layer[layer])
        for name in ("document_ids", "positions", "token_ids", "context_ids"):
            assert torch.equal(getattr(shard.origins, name), getattr(expected.origins, name))
        dropped += expected.dropped_sinks
    assert stream.take(1) == []
    assert store.manifest.content["counts"]["dropped_sinks"] == dropped > 0
    assert store.manifest.content["counts"]["documents"] == stream.counts["documents"]


def test_held_out_documents_are_others_and_their_contexts_whole(harvest) -> None:
    made = harvest()
    made.run()
    store = ActivationStore(str(made.folder))
    contexts = store.held_out_contexts()
    trained = {d for e in store.manifest.shards for d in store.read(e, LAYERS).origins.document_ids.tolist()}
    assert len(contexts) == 9 and not trained & {context.document_id for context in contexts}
    bos = made.capture.lm.tokenizer.bos_token_id
    (entry,) = store.manifest.held_out
    origins = store.read(entry, LAYERS, HELD_OUT).origins
    for number, context in enumerate(contexts):
        rows = origins.context_ids == number
        assert context.input_ids[0] == bos and rows.any()
        places = origins.positions[rows].tolist()
        assert [context.input_ids[place] for place in places] == origins.token_ids[rows].tolist()


def test_statistics_are_those_of_the_rows(harvest) -> None:
    made = harvest(ratio=1.3)
    made.run()
    store = ActivationStore(str(made.folder))
    for layer in LAYERS:
        rows = torch.cat([store.read(e, [layer], TRAIN).by_layer[layer] for e in store.manifest.shards]).double()
        found, content = layer_statistics(store, layer), store.manifest.layer(layer)
        torch.testing.assert_close(found.mean, rows.mean(0).float(), atol=1e-5, rtol=1e-5)
        assert found.scale == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean().sqrt()), rel=1e-5)
        made.capture.max_norms = (None, None)
        everything = made.capture.capture_all(made.stream().take(10_000))
        norms = everything.by_layer[layer].double().norm(dim=1)
        for q in (0.01, 0.25, 0.5, 0.95, 0.999):
            assert content["norm_quantiles"][f"{q:g}"] == pytest.approx(float(norms.quantile(q)), rel=0.02)
        assert content["norm_quantiles"]["1"] == pytest.approx(float(norms.max()))
        assert content["dropped_sinks"] == int((norms > content["max_norm"]).sum()) > 0
        assert sum(content["sinks_by_position"].values()) == content["dropped_sinks"]
        assert sum(content["norm_histogram"]["counts"]) == len(norms)
        largest = [entry["norm"] for entry in content["largest_norms"]]
        assert largest == pytest.approx(norms.topk(16).values.tolist()) and not content["largest_norms"][0]["kept"]


def test_without_a_limit_nothing_is_a_sink(harvest) -> None:
    made = harvest(ratio=None)
    made.run()
    content = ActivationStore(str(made.folder)).manifest.content
    assert content["counts"]["dropped_sinks"] == 0 and content["layers"]["1"]["max_norm"] is None


class _Killed(BaseException):
    """Stands for a process that ends on the spot."""


def test_killed_at_any_write_a_harvest_goes_on_and_leaves_no_trace(harvest, monkeypatch) -> None:
    made = harvest("whole", documents=25)
    made.run()
    expected = contents(made.folder)
    write, left, deaths = ShardFolder.write, 0, 0

    def dying(self: ShardFolder, path: str, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            if deaths % 2:  # half of a file under its temporary name
                (self.work / f"{path.replace('/', '-')}.tmp").write_bytes(data[: len(data) // 2])
            raise _Killed
        write(self, path, data)

    killed = harvest("killed", documents=25)
    monkeypatch.setattr(ShardFolder, "write", dying)
    while not (killed.folder / "manifest.json").is_file() or (killed.folder / ".harvest").exists():
        left = deaths % 7  # a shard takes four writes
        try:
            killed.run()
        except _Killed:
            deaths += 1
            assert deaths < 100
    assert deaths > 10 and contents(killed.folder) == expected


def test_interrupted_while_it_cleans_up(harvest, monkeypatch) -> None:
    made = harvest("whole", documents=25)
    made.run()
    other = harvest("other", documents=25)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(_Killed))
    with pytest.raises(_Killed):
        other.run()
    monkeypatch.undo()
    other.run()
    assert contents(other.folder) == contents(made.folder)


def test_a_finished_harvest_is_not_done_again_and_other_settings_are_refused(harvest) -> None:
    harvest().run()
    made = harvest()
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    made.run()
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before
    with pytest.raises(SelOrthoError, match=r"other settings \(max_norm_ratio 1.3 -> None\)"):
        harvest(ratio=None).run()
    (made.folder.parent / "mine").mkdir()
    (made.folder.parent / "mine" / "thesis.tex").touch()
    with pytest.raises(SelOrthoError, match="is not empty and holds no harvest"):
        harvest("mine").run()


def test_bfloat16_is_the_nearest_one(harvest) -> None:
    exact, rounded = harvest("exact"), harvest("rounded", stored_dtype="bfloat16")
    exact.run(), rounded.run()
    stores = [ActivationStore(str(made.folder)) for made in (exact, rounded)]
    a, b = (store.read(store.manifest.shards[0], [1]).by_layer[1] for store in stores)
    assert torch.equal(a.bfloat16(), b)


def test_texts_without_a_context(harvest) -> None:
    with pytest.raises(SelOrthoError, match="held-out context|no activation to train on"):
        harvest(documents=1).run()


def test_overwriting_removes_a_harvest_and_nobody_elses_files(harvest) -> None:
    made = harvest()
    made.run()
    own = set(contents(made.folder))
    for name in ("notes.txt", "layer_1/mine.txt", "layer_x/00000.safetensors"):
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_text("mine")
    assert made.folder.joinpath("manifest.json").is_file()
    assert ShardFolder(made.folder).begin({"new": "plan"}, overwrite=True)
    assert set(contents(made.folder)) == {
        "notes.txt", "layer_1/mine.txt", "layer_x/00000.safetensors", ".harvest/plan.json"
    }  # fmt: skip
    assert "manifest.json" in own


def test_a_manifest_of_something_else_is_not_overwritten(tmp_path) -> None:
    (tmp_path / "tokens").mkdir()
    for name in ("manifest.json", "tokens/00000.safetensors"):
        (tmp_path / name).write_text('{"name": "an app"}')
    with pytest.raises(SelOrthoError, match="is not empty and holds no harvest"):
        ShardFolder(tmp_path).begin({}, overwrite=True)
    assert set(contents(tmp_path)) == {"manifest.json", "tokens/00000.safetensors"}


def test_killed_while_an_old_harvest_is_removed(harvest, monkeypatch) -> None:
    """Whatever has been removed, the command that overwrites can be run again, and no other takes the rest for its."""
    made = harvest()
    made.run()
    folder, removals = ShardFolder(made.folder), 0

    class Killed(BaseException):
        pass

    unlink = Path.unlink

    def killing(path: Path, missing_ok: bool = False) -> None:
        nonlocal removals
        if removals == 0:
            raise Killed
        removals -= 1
        unlink(path, missing_ok=missing_ok)

    for removed in (1, 3, 7):
        removals = removed
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", killing)
            folder.begin({"new": "plan"}, overwrite=True)
        with pytest.raises(SelOrthoError, match="--overwrite_output_dir"):
            folder.begin({"new": "plan"})
        with pytest.raises(SelOrthoError):
            ActivationStore(str(made.folder))
    assert folder.begin({"new": "plan"}, overwrite=True)
    assert set(contents(made.folder)) == {".harvest/plan.json"}


def test_an_unfinished_harvest_of_the_same_settings_goes_on_instead_of_being_overwritten(tmp_path) -> None:
    folder = ShardFolder(tmp_path / "acts")
    assert folder.begin({"a": 1})
    folder.write("tokens/00000.safetensors", b"rows")
    assert folder.begin({"a": 1}, overwrite=True)
    assert (tmp_path / "acts" / "tokens" / "00000.safetensors").is_file()
    assert folder.begin({"a": 2}, overwrite=True)
    assert not (tmp_path / "acts" / "tokens").exists()
