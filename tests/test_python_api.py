"""The Python API takes what is meant and refuses what it would misread, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import pytest
import torch

from hf_selortho import Pairs, SelOrthoConfig, SelOrthoError, SelOrthoSAE, decorrelation_penalty, select_pairs
from hf_selortho.evaluation.absorption import absorption
from hf_selortho.evaluation.metrics import Reconstruction, Sparsity, correlation_summary, max_decoder_cosine
from hf_selortho.evaluation.probing import sparse_probing
from hf_selortho.evaluation.sae_metrics import sae_metrics
from hf_selortho.evaluation.stability import stability
from hf_selortho.features import FeatureCapture, FeatureIndex, Sampling, Steer, Steering, TokenFeatures, inspect
from hf_selortho.formats import load_sae, write_saelens

D_IN, D_SAE = 32, 64
X = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(0))
H = torch.relu(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
PAIRS = Pairs(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.ones(2))
FEATURES = TokenFeatures("a", torch.zeros(1), ["a"], torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.ones(1, 8))


@pytest.fixture(scope="module")
def sae(tiny_lm) -> SelOrthoSAE:
    lm = tiny_lm("gemma3")
    named = {"lm_name": lm.name, "lm_revision": lm.revision, "layer": 2, "context_length": 16}
    return SelOrthoSAE(SelOrthoConfig(d_in=D_IN, d_sae=D_SAE, activation="topk", k=4, **named)).eval()


def nan(x: torch.Tensor) -> torch.Tensor:
    return x.clone().index_fill_(0, torch.tensor(1), torch.nan)


NO_ACTIVATIONS: list[tuple[Any, str]] = [
    ("the cat", "got 'the cat' (str), expected a tensor"),
    (None, "got None, expected a tensor"),
    ([["a"]], "an object of type list, expected a tensor"),
    ([[1.0, 2.0], [1.0]], "an object of type list, expected a tensor"),
    ((row for row in X), "an object of type generator"),
    (torch.tensor(1.0), "has shape (): expected (..., width)"),
    (torch.ones(2, D_IN, dtype=torch.int64), "got int64, expected dense floating-point numbers"),
    (np.ones((2, D_IN), dtype=bool), "got bool, expected dense"),
    (torch.ones(2, D_IN, dtype=torch.complex64), "got complex64"),
    (torch.ones(2, D_IN).to_sparse(), "got sparse_coo"),
    (torch.ones(2, D_IN + 1), "of shape (2, 33)"),
    (torch.ones(2, D_IN, device="meta"), "on meta: expected cpu"),
    (nan(X), "hold NaN or infinity in 1 of 5 rows, the first is number 1"),
    (X / 0, "hold NaN or infinity in 5 of 5 rows"),
]


@pytest.mark.parametrize(("value", "message"), NO_ACTIVATIONS)
@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_the_sae_refuses_what_are_no_activations(sae, method: str, value: Any, message: str) -> None:
    if isinstance(value, torch.Tensor) and method == "decode" and value.ndim == 2 and value.shape[1] == D_IN:
        value = torch.cat([value.to_dense() if value.is_sparse else value] * 2, 1)
        value = value.to_sparse() if "sparse" in message else value
    one_line(lambda: getattr(sae, method)(value), message)


@pytest.mark.parametrize("make", [lambda x: x.numpy(), lambda x: x.tolist(), list, lambda x: list(x.numpy())])
def test_the_sae_takes_arrays_and_lists_and_any_number_of_axes(sae, make: Callable[[Any], Any]) -> None:
    expected = sae.encode(X)
    torch.testing.assert_close(sae.encode(make(X)), expected)
    torch.testing.assert_close(sae.decode(make(expected.detach())), sae.decode(expected))
    torch.testing.assert_close(sae(make(X)).loss, sae(X).loss)
    torch.testing.assert_close(sae.encode(X[0]), expected[0])
    torch.testing.assert_close(sae.encode(X.double()[None]).float(), expected[None])
    assert sae.encode(X[:0]).shape == (0, D_SAE) and len(select_pairs(H[:0])) == 0
    assert select_pairs(make(H)).i.tolist() == select_pairs(H).i.tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae: sae(X[:0]), "activations of shape (0, 32): expected at least one token"),
        (lambda sae: sae.set_input_statistics(torch.zeros(3), 1.0), "input mean of shape (3,)"),
        (lambda sae: sae.select_pairs("h"), "got 'h' (str)"),
        (lambda sae: sae.capture("the cat"), "texts is 'the cat' (str): expected a list of texts; a single text goes"),
        (lambda sae: sae.capture(None), "texts is None: expected a list of texts"),
        (lambda sae: sae.capture({"a": 1}), "texts is an object of type dict"),
        (lambda sae: sae.capture({"a", "b"}), "texts is an object of type set"),
        (lambda sae: sae.capture(["a", None]), "number 1 of texts is None: expected a text"),
        (lambda sae: sae.capture([b"a"]), "number 0 of texts is b'a' (bytes)"),
        (
            lambda sae: sae.capture(["bad \ud83d tail"]),
            "holds half a character (a lone surrogate, '\\ud83d') at place 4",
        ),
        (lambda sae: inspect(sae, ["a"]), "text is an object of type list: expected a text"),
        (lambda sae: inspect("path/of/an/sae", "a"), "sae is 'path/of/an/sae' (str): expected a SelOrthoSAE"),
        (lambda sae: inspect(sae, "a", lm=3), "lm is 3: expected a folder or an id of the Hub"),
        (lambda sae: FeatureCapture(None), "sae is None: expected a SelOrthoSAE"),
        (lambda sae: Steering(sae).generate(None), "prompt is None"),
        (lambda sae: Steering(sae).generate("a", Steer(1, "scale", 2)), "steers is a single Steer"),
        (lambda sae: Steering(sae).generate("a", [3]), "steers is 3: expected a Steer"),
        (lambda sae: Steering(sae).generate("a", [], 40), "sampling is 40: expected a Sampling"),
        (lambda sae: Steering(sae).generate("a", [Steer(D_SAE, "scale", 2)]), "expected a number from 0 to 63"),
        (lambda sae: Steer(-1, "scale", 2), "feature -1: expected a number of at least 0"),
        (lambda sae: Steer(True, "scale", 2), "feature True (bool)"),
        (lambda sae: Steer(1, "scale", "2"), "scale of feature 1 '2' (str): expected a finite number"),
        (lambda sae: Sampling(max_new_tokens="3"), "max_new_tokens '3' (str): expected a whole number of at least 1"),
        (lambda sae: Sampling(temperature=None), "temperature None: expected a finite number"),
        (lambda sae: FEATURES.on(-1), "feature -1: expected a number from 0 to 7"),
        (lambda sae: FEATURES.on(True), "feature True (bool)"),
        (lambda sae: FEATURES.top("5"), "k '5' (str): expected a whole number of at least 1"),
        (lambda sae: FEATURES.strongest(-1), "k -1"),
        (lambda sae: FeatureIndex.open(None), "the SAE or its index is None"),
        (lambda sae: load_sae(""), "the SAE is '' (str): expected a folder or an id of the Hub"),
        (lambda sae: load_sae(sae), "the SAE is an object of type SelOrthoSAE"),
        (lambda sae: SelOrthoSAE.from_pretrained(3), "the SAE is 3"),
        (lambda sae: write_saelens("path", "folder"), "sae is 'path' (str): expected a SelOrthoSAE"),
        (lambda sae: sparse_probing("path", None), "sae is 'path' (str): expected a SelOrthoSAE"),
        (lambda sae: absorption("path", None), "sae is 'path' (str): expected a SelOrthoSAE"),
        (lambda sae: select_pairs(H[0]), "h has shape (8,): expected two axes"),
        (lambda sae: select_pairs(H[None]), "h has shape (1, 50, 8): expected two axes"),
        (lambda sae: select_pairs(H.long()), "h: got int64"),
        (lambda sae: select_pairs(nan(H)), "hold NaN or infinity"),
        (lambda sae: select_pairs(H, "0.1"), "pair_fraction '0.1' (str): expected a finite number"),
        (lambda sae: select_pairs(H, min_support=1.5), "min_support 1.5: expected a whole number of at least 0"),
        (lambda sae: decorrelation_penalty(H, [(0, 1)]), "pairs is an object of type list: expected a Pairs"),
        (lambda sae: decorrelation_penalty(H[:, :3], PAIRS), "pairs of features up to 3: h has 3 features"),
        (lambda sae: decorrelation_penalty(H, PAIRS, torch.nan), "coefficient nan"),
        (lambda sae: decorrelation_penalty(H, PAIRS, correlation="x"), "correlation='x'"),
        (lambda sae: decorrelation_penalty(H, PAIRS, weights=torch.ones(3)), "3 weights of 2 pairs"),
        (lambda sae: stability("a", H), "W_a: got 'a' (str)"),
        (lambda sae: max_decoder_cosine([1, 2]), "W_dec: got int64"),
        (lambda sae: correlation_summary("h"), "h: got 'h' (str)"),
        (lambda sae: Reconstruction.of(X, "x"), "reconstructions: got 'x' (str)"),
        (lambda sae: Sparsity.of(None), "feature activations: got None"),
        (lambda sae: metric("sparsity").compute(predictions="x"), "predictions: got 'x' (str)"),
        (lambda sae: metric("sparsity").compute(predictions=nan(X)), "predictions hold NaN or infinity"),
        (
            lambda sae: metric("cross_entropy").compute(predictions=X, references=[-100] * 5),
            "references from -100 to -100: expected token ids from 0 to 31",
        ),
        (lambda sae: metric("cross_entropy").compute(predictions=X, references=["a"] * 5), "references"),
        (lambda sae: SelOrthoConfig(d_in="32", d_sae=64), "d_in='32': expected"),
        (lambda sae: SelOrthoConfig(d_in=32, d_sae=True), "d_sae=True: expected"),
        (lambda sae: SelOrthoConfig(d_in=32, d_sae=64, l1_coefficient=np.float32("nan")), "l1_coefficient="),
    ],
)
def test_public_functions_refuse_what_they_would_misread(sae, call: Callable[[Any], Any], message: str) -> None:
    one_line(lambda: call(sae), message)


def test_texts_may_come_from_anything_in_order_and_numbers_from_numpy(sae) -> None:
    texts = ["The river.", "A bridge."]
    tokens = [text.tokens for text in sae.capture(texts)]
    for same in (iter(texts), np.array(texts), tuple(texts), (text for text in texts)):
        assert [text.tokens for text in sae.capture(same)] == tokens
    assert sae.capture([]) == []
    assert FEATURES.on(np.int64(3)).tolist() == FEATURES.on(torch.tensor(3)).tolist() == [1.0]


def metric(name: str) -> Any:
    return evaluate.load(sae_metrics.__file__, name)


def one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(SelOrthoError) as raised:
        call()
    assert message in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 300
