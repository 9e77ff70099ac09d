"""Caches of a small random model: what is written, and that interruptions leave no trace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from hf_selortho import SelOrthoError
from hf_selortho.data.activation_cache import ActivationCache
from hf_selortho.data.cache_batches import CachedBatches
from hf_selortho.data.cache_folder import CacheFolder
from hf_selortho.data.cache_manifest import HELD_OUT, CacheError, CacheSettings
from hf_selortho.data.cache_writer import CacheWriter
from hf_selortho.data.contexts import ContextStream, Cutter, held_out_contexts
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

    def cache(self) -> ActivationCache:
        return ActivationCache(str(self.folder))


@pytest.fixture
def make(tiny_lm, sample_documents, tmp_path) -> Callable[..., Made]:
    """`make(folder, documents=60, ratio=1.3, ...)`: an object whose `run()` writes a cache, or goes on."""
    lm = tiny_lm("llama")

    def build(name: str = "acts", documents: int = 60, ratio: float | None = 1.3, dtype: str = "float32") -> Made:
        path = tmp_path / f"{documents}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sample_documents[:documents]))
        texts = open_documents(TextSource(str(path), held_out_fraction=0.2))
        settings = CacheSettings(
            **{"dataset": str(path), "held_out_fraction": 0.2, "text_fingerprint": texts.fingerprint},
            **{"text_rows": documents, "seed": 0, "lm_name": lm.name, "lm_revision": lm.revision},
            **{"lm_dtype": "float32", "lm_batch_tokens": 256, "lm_device": "cpu", "tokenizer_sha256": "0" * 64},
            **{"context_length": 64, "prepend_bos": True, "min_tokens": 8, "layers": LAYERS, "stored_dtype": dtype},
            **{"site": "resid_post", "target": None},
            **{"max_norm_ratio": ratio, "max_tokens": None, "held_out_contexts": 9, "shard_tokens": 400},
            processes=1,
        )
        folder, capture = CacheFolder(tmp_path / name), ActivationCapture(lm, LAYERS, batch_tokens=256)

        def stream() -> ContextStream:
            return ContextStream(texts, Cutter(lm.tokenizer, context_length=64), endless=False)

        def run(overwrite: bool = False) -> None:
            if folder.begin(settings, overwrite=overwrite):
                held_out = list(held_out_contexts(texts, Cutter(lm.tokenizer, context_length=64), 9))
                writer = CacheWriter(capture, stream(), held_out, folder, settings)
                writer.run(tqdm(disable=True))
                folder.finish(writer.manifest({}), "card\n")

        return Made(folder.folder, run, capture, stream)

    return build


def test_shards_hold_what_the_language_model_says(make) -> None:
    made = make()
    made.run()
    cache = made.cache()
    made.capture.max_norms = tuple(cache.manifest.layer(layer).max_norm for layer in LAYERS)
    stream, dropped = made.stream(), 0
    assert len(cache.manifest.shards) > 3
    for entry in cache.manifest.shards:
        shard, expected = cache.read(entry, LAYERS), made.capture.capture_all(stream.take_tokens(400))
        assert len(shard) == entry.rows == len(expected)
        assert torch.equal(shard.origins.table, expected.origins.table)
        assert all(torch.equal(shard.by_layer[layer], expected.by_layer[layer]) for layer in LAYERS)
        dropped += expected.dropped_sinks
    assert stream.take(1) == []
    assert cache.manifest.counts.dropped_sinks == dropped > 0
    assert cache.manifest.counts.documents == stream.counts["documents"]


def test_held_out_documents_are_others_and_their_contexts_whole(make) -> None:
    made = make()
    made.run()
    cache = made.cache()
    contexts = cache.held_out_contexts()
    trained = {d for e in cache.manifest.shards for d in cache.read(e, LAYERS).origins.document_ids.tolist()}
    assert len(contexts) == 9 and not trained & {context.document_id for context in contexts}
    (entry,) = cache.manifest.held_out
    origins = cache.read(entry, LAYERS, HELD_OUT).origins
    for number, context in enumerate(contexts):
        rows = origins.context_ids == number
        assert context.input_ids[0] == made.capture.lm.tokenizer.bos_token_id and rows.any()
        places = origins.positions[rows].tolist()
        assert [context.input_ids[place] for place in places] == origins.token_ids[rows].tolist()


def test_statistics_are_those_of_the_rows(make) -> None:
    made = make()
    made.run()
    cache = made.cache()
    made.capture.max_norms = (None, None)
    everything = made.capture.capture_all(made.stream().take(10_000))
    for layer in LAYERS:
        rows = torch.cat([cache.read(e, [layer]).by_layer[layer] for e in cache.manifest.shards]).double()
        statistics = CachedBatches(cache, [layer], batch_size=1).statistics()[layer]
        summary = cache.manifest.layer(layer)
        torch.testing.assert_close(statistics.mean, rows.mean(0).float(), atol=1e-5, rtol=1e-5)
        assert statistics.scale == pytest.approx(float((rows - rows.mean(0)).square().sum(1).mean().sqrt()), rel=1e-5)
        norms = everything.by_layer[layer].double().norm(dim=1)
        for q in (0.01, 0.5, 0.99, 0.999):
            assert summary.norm_quantile(q) == pytest.approx(float(norms.quantile(q)), rel=0.04)
        assert summary.norm_quantile(1) == summary.largest_norm == pytest.approx(float(norms.max()))
        assert sum(summary.sinks_by_position) == int((norms > summary.max_norm).sum()) > 0
        assert sum(summary.norm_histogram) == len(norms)


class _Killed(BaseException):
    """Stands for a process that ends on the spot."""


def test_killed_at_any_write_a_cache_goes_on_and_leaves_no_trace(make, monkeypatch) -> None:
    made = make("whole", documents=25)
    made.run()
    expected = contents(made.folder)
    write, left, deaths = CacheFolder.write, 0, 0

    def dying(self: CacheFolder, path: str, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            if deaths % 2:  # half of a file under its temporary name
                (self.work / f"{path.replace('/', '-')}.tmp").write_bytes(data[: len(data) // 2])
            raise _Killed
        write(self, path, data)

    killed = make("killed", documents=25)
    monkeypatch.setattr(CacheFolder, "write", dying)
    while not (killed.folder / "manifest.json").is_file():
        with pytest.raises(CacheError):
            killed.cache()
        left = deaths % 7  # a shard takes four writes
        try:
            killed.run()
        except _Killed:
            deaths += 1
            assert deaths < 100
    assert deaths > 10 and contents(killed.folder) == expected


def test_killed_while_the_work_folder_is_removed(make, monkeypatch) -> None:
    made = make(documents=25)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(_Killed))
        with pytest.raises(_Killed):
            made.run()
    made.cache()  # complete
    made.run()
    assert not any(name.startswith(".") for name in contents(made.folder))


def test_a_finished_cache_is_not_written_again_and_other_settings_are_refused(make) -> None:
    made = make(documents=25)
    made.run()
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    made.run()
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before
    with pytest.raises(SelOrthoError, match=r"other settings \(max_norm_ratio 1.3 -> None\)"):
        make(documents=25, ratio=None).run()
    (made.folder.parent / "mine").mkdir()
    (made.folder.parent / "mine" / "manifest.json").write_text('{"name": "an app"}')
    for overwrite in (False, True):
        with pytest.raises(SelOrthoError, match="is not empty and holds no cache"):
            make("mine").run(overwrite)


@pytest.mark.parametrize("removals", [0, 1, 7])
def test_overwriting_survives_a_kill_and_leaves_other_files_alone(removals, make, monkeypatch) -> None:
    """Whatever has been removed, no part of the old cache is taken for the new one's."""
    fresh, made = make("fresh", documents=25, ratio=None), make(documents=25)
    fresh.run(), made.run()
    mine = ("notes.txt", "layer_1/mine.txt", "layer_x/00000.safetensors")
    for name in mine:
        (made.folder / name).parent.mkdir(exist_ok=True)
        (made.folder / name).write_text("mine")
    unlink = Path.unlink

    def dying(path: Path, missing_ok: bool = False) -> None:
        nonlocal removals
        removals -= 1
        if removals < 0:
            raise _Killed
        unlink(path, missing_ok=missing_ok)

    other = make(documents=25, ratio=None)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(Path, "unlink", dying)
        other.run(overwrite=True)
    other.run(overwrite=True)
    for name in mine:
        (made.folder / name).unlink()
    assert contents(made.folder) == contents(fresh.folder)
    manifest = other.cache().manifest  # of max_norm_ratio None
    assert manifest.counts.dropped_sinks == 0 and manifest.layer(1).max_norm is None


def test_bfloat16_is_the_nearest_one(make) -> None:
    exact, rounded = make("exact", documents=25), make("rounded", documents=25, dtype="bfloat16")
    exact.run(), rounded.run()
    a, b = (made.cache().read(made.cache().manifest.shards[0], [1]).by_layer[1] for made in (exact, rounded))
    assert torch.equal(a.bfloat16(), b)


def test_texts_without_a_context(make) -> None:
    with pytest.raises(SelOrthoError, match="held-out context|no activation to train on"):
        make(documents=1).run()
