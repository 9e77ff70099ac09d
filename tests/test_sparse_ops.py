from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_selortho.sparse_ops import (
    ActiveFeatures,
    SparseEncode,
    active_features,
    times_dense,
)

B, D_IN, N = 9, 5, 14


def sparse_matrix(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    h = torch.relu(torch.randn(B, N, generator=generator, dtype=dtype))
    h[4] = 0  # a token on which nothing fires
    h[:, 6] = 0  # a feature that never does
    return h


def weights(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def shuffled(active: ActiveFeatures) -> ActiveFeatures:
    """The same entries, the features of each token in another order."""
    order = torch.argsort(active.rows * N + torch.randperm(N)[active.cols])
    return ActiveFeatures(active.crow, active.cols[order], active.values[order], active.n)


@pytest.mark.parametrize("order", [lambda active: active, shuffled])
def test_forms_of_the_same_matrix(order) -> None:
    h = sparse_matrix()
    active = order(active_features(h))
    assert torch.equal(active.to_dense(), h)
    assert torch.equal(active.matrix().to_dense(), h)
    assert torch.equal(active.transposed().to_dense(), h.T)
    assert torch.equal(active.feature_rows(3, 9).to_dense(), h[:, 3:9].T)
    assert torch.equal(active.feature_columns(3, 9), h[:, 3:9])
    offsets, rows, places, cols = active.by_feature
    assert torch.equal(h.T[cols, rows], active.values[places])
    assert offsets.tolist() == [0, *(h > 0).sum(0).cumsum(0).tolist()]
    torch.testing.assert_close(active.sum_by_feature(active.values), h.sum(0))


def test_entries_may_be_zero() -> None:
    active = ActiveFeatures(torch.tensor([0, 2, 3]), torch.tensor([1, 3, 0]), torch.tensor([0.0, 2.0, 0.0]), 4)
    assert active.to_dense().tolist() == [[0, 0, 0, 2], [0, 0, 0, 0]]


def test_a_product_overwrites_its_memory() -> None:
    left = sparse_matrix()
    for right in (weights(N, 3).detach(), weights(3, N).detach().T):
        torch.testing.assert_close(times_dense(left.to_sparse_csr(), right), left @ right)
        assert not times_dense(torch.zeros(B, N).double().to_sparse_csr(), right).any()


@pytest.mark.parametrize("order", [lambda active: active, shuffled])
def test_decoding_equals_dense_autograd(order) -> None:
    h, W_dec, upstream = sparse_matrix(), weights(N, D_IN), weights(B, D_IN).detach()
    active = order(active_features(h))
    values = active.values.clone().requires_grad_()
    x_hat = active.with_values(values).decode(W_dec)
    grad_values, grad_W = torch.autograd.grad((x_hat * upstream).sum(), (values, W_dec))
    h.requires_grad_()
    expected = h @ W_dec
    grad_h, expected_W = torch.autograd.grad((expected * upstream).sum(), (h, W_dec))
    torch.testing.assert_close(x_hat, expected)
    torch.testing.assert_close(grad_W, expected_W)
    torch.testing.assert_close(grad_values, grad_h[active.rows, active.cols])


def test_decoding_by_ranges_of_features() -> None:
    h, W_dec, bounds = sparse_matrix(), weights(N, D_IN), [3, 8, N]
    active = active_features(h)
    values = active.values.clone().requires_grad_()
    parts = active.with_values(values).decode(W_dec, bounds)
    expected = torch.stack([h[:, a:b] @ W_dec[a:b] for a, b in ((0, 3), (3, 8), (8, N))], 1)
    torch.testing.assert_close(parts, expected)
    inputs = (values, W_dec)
    assert torch.autograd.gradcheck(lambda v, W: active.with_values(v).decode(W, bounds), inputs)


def test_gradients_of_decoding_in_closed_form_equal_differences() -> None:
    active, W_dec = active_features(sparse_matrix()), weights(N, D_IN)
    values = active.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, W: active.with_values(v).decode(W), (values, W_dec))


@pytest.mark.parametrize("layout", ["as it is", "by feature"])
def test_encoding_equals_dense_autograd(layout) -> None:
    x, W_enc, b_enc = weights(B, D_IN).detach(), weights(D_IN, N), weights(N)
    if layout == "by feature":
        W_enc = W_enc.detach().T.contiguous().T.requires_grad_()
    h = torch.relu(x @ W_enc + b_enc)
    active = active_features(h.detach())
    upstream = weights(B, N).detach()
    values = SparseEncode.apply(x, W_enc, b_enc, active)
    assert torch.equal(values, active.values)
    found = torch.autograd.grad((values * upstream[active.rows, active.cols]).sum(), (W_enc, b_enc))
    expected = torch.autograd.grad((h * upstream).sum(), (W_enc, b_enc))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, 40_000])
def test_few_and_many_features(n) -> None:
    h = torch.zeros(3, n)
    h[0, n - 1] = h[2, 0] = 2.0  # beyond what a 16-bit number holds
    active = active_features(h)
    assert torch.equal(active.transposed().to_dense(), h.T)


def test_an_empty_batch() -> None:
    active = active_features(torch.zeros(0, N))
    assert active.tokens == 0
    assert active.decode(weights(N, D_IN).float()).shape == (0, D_IN)
