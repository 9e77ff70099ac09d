from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_selortho.data.contexts import ContextStream, Cutter, held_out_contexts
from hf_selortho.language_models.contexts import Context, pad_batch
from hf_selortho.data.texts import Documents, TextSource, open_documents
from hf_selortho.errors import SelOrthoError

Write = Callable[[list[str]], Documents]


@pytest.fixture
def write(tmp_path) -> Write:
    """Documents of a jsonl file with these texts, one in ten held out."""

    def build(texts: list[str]) -> Documents:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return open_documents(TextSource(dataset=str(path)))

    return build


def _one_epoch(documents: Documents, cutter: Cutter) -> list[Context]:
    return list(ContextStream(documents, cutter, endless=False))


def test_contexts_hold_every_token_of_a_document_in_order_and_of_no_other(
    write, tiny_tokenizer, sample_documents
) -> None:
    documents = write(sample_documents)
    pieces: dict[int, list[int]] = {}
    for context in _one_epoch(documents, Cutter(tiny_tokenizer, context_length=16, min_tokens=1)):
        assert context.input_ids[0] == tiny_tokenizer.bos_token_id
        assert 2 <= len(context.input_ids) <= 16
        pieces.setdefault(context.document_id, []).extend(context.input_ids[1:])

    expected = {number: text for number, text in documents.train(epoch=0, seed=0)}
    assert pieces.keys() == expected.keys()
    assert len(expected) > 300
    for number, ids in pieces.items():
        assert tiny_tokenizer.decode(ids) == expected[number]


def test_short_ends_are_dropped_and_counted(write, tiny_tokenizer) -> None:
    texts = ["word " * count for count in range(1, 60)]
    documents = write(texts)
    cutter = Cutter(tiny_tokenizer, context_length=10, prepend_bos=False, min_tokens=4)
    stream = ContextStream(documents, cutter, endless=False)
    contexts = list(stream)

    trained = [text for _, text in documents.train(0, 0)]
    lengths = [len(tiny_tokenizer(text, add_special_tokens=False).input_ids) for text in trained]
    tails = [length % 10 for length in lengths if 0 < length % 10 < 4]
    assert len(contexts) == sum(length // 10 + (length % 10 >= 4) for length in lengths)
    counts = {"documents": len(trained), "contexts": len(contexts)}
    assert stream.counts == {**counts, "dropped_tails": len(tails)}
    assert min(len(context.input_ids) for context in contexts) >= 4


@pytest.mark.parametrize("before", [0, 1, 64, 65, 1500])
def test_resumed_stream_goes_on_with_the_very_next_context(before, write, tiny_tokenizer, sample_documents) -> None:
    documents = write(sample_documents[:150])
    cutter = Cutter(tiny_tokenizer, context_length=32)
    stream = ContextStream(documents, cutter, seed=3)
    stream.take(before)
    state = json.loads(json.dumps(stream.state_dict()))
    assert len(json.dumps(state)) < 400

    resumed = ContextStream(documents, cutter, seed=3)
    resumed.take(7)  # a state replaces whatever the stream did before
    resumed.load_state_dict(state)
    assert resumed.take(900) == stream.take(900)
    assert resumed.epoch == stream.epoch > 0
    assert resumed.counts == stream.counts


def test_ranks_share_the_documents_and_one_without_any_is_told(write, tiny_tokenizer, sample_documents) -> None:
    documents = write(sample_documents)
    cutter = Cutter(tiny_tokenizer)
    streams = [ContextStream(documents, cutter, rank=rank, world_size=2, endless=False) for rank in range(2)]
    shares = [{context.document_id for context in stream} for stream in streams]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == {number for number, _ in documents.train(0, 0)}
    alone = write(["one document that is long enough to train on, all alone in its file"])
    streams = [ContextStream(alone, cutter, rank=rank, world_size=2) for rank in range(2)]
    assert len(streams[0].take(3)) == 3
    with pytest.raises(SelOrthoError, match="process 2 of 2: 0 documents"):
        streams[1].take(1)


def test_text_that_spells_a_special_token_stays_text(write, tiny_tokenizer) -> None:
    text = "An <eos> in the text, and a <bos>, end nothing and begin nothing."
    stream = ContextStream(write([text]), Cutter(tiny_tokenizer, prepend_bos=False))
    (context,) = stream.take(1)
    assert tiny_tokenizer.decode(context.input_ids) == text
    assert not {tiny_tokenizer.eos_token_id, tiny_tokenizer.bos_token_id} & set(context.input_ids)


def test_texts_that_are_all_too_short_end_in_an_error(write, tiny_tokenizer) -> None:
    documents = write([f"a{number}" for number in range(200)])
    trained = sum(1 for _ in documents.train(0, 0))
    with pytest.raises(SelOrthoError, match=rf"{trained} documents, none with 8 tokens or more.*min_tokens"):
        ContextStream(documents, Cutter(tiny_tokenizer)).take(1)
    with pytest.raises(SelOrthoError, match=rf"{200 - trained} documents are held out"):
        next(held_out_contexts(documents, Cutter(tiny_tokenizer), limit=5))


def test_settings_that_cannot_work_are_refused(tiny_tokenizer) -> None:
    with pytest.raises(SelOrthoError, match="--min_tokens 8: expected at least 1, and at most the 7 tokens"):
        Cutter(tiny_tokenizer, context_length=8)
    without_bos = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(SelOrthoError, match="--prepend_bos false"):
        Cutter(without_bos)
    Cutter(without_bos, prepend_bos=False)


def test_held_out_contexts_are_the_same_every_time_and_never_trained_on(
    write, tiny_tokenizer, sample_documents, caplog
) -> None:
    documents, cutter = write(sample_documents), Cutter(tiny_tokenizer)
    held_out = list(held_out_contexts(documents, cutter, limit=20))
    assert len(held_out) == 20
    assert held_out == list(held_out_contexts(documents, cutter))[:20]
    trained = {context.document_id for context in _one_epoch(documents, cutter)}
    everything = list(held_out_contexts(documents, cutter, limit=10_000))
    assert "10000 were asked for" in caplog.text
    held = {context.document_id for context in everything}
    assert not held & trained
    assert len(held | trained) == 400


def test_pad_batch_pads_on_the_right() -> None:
    input_ids, attention_mask = pad_batch([Context(0, [2, 5, 6]), Context(9, [2])], pad_id=7)
    torch.testing.assert_close(input_ids, torch.tensor([[2, 5, 6], [2, 7, 7]]))
    torch.testing.assert_close(attention_mask, torch.tensor([[1, 1, 1], [1, 0, 0]]))
