"""How well an SAE has found the features of synthetic data, by SAELens's metrics and by the ground truth itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from experiments.synthetic_data import SyntheticData, TokenStream, derived_seed, sae_lens
from hf_selortho.evaluation.metrics import correlation_summary, max_decoder_cosine

EVALUATION_SEED = derived_seed("evaluation", 0)  # of the tokens that SAEs are scored on, which no training draws
MATCHED, RECOVERED = 0.5, 0.8  # cosines from which an SAE's feature stands for a true one, and has found it
MIN_SUPPORT = 20  # tokens of each kind from which a pair's absorption is counted
_CORRELATION_TOKENS = 4096  # the batch of `top_correlation`


@dataclass(frozen=True)
class Matches:
    """Which of the SAE's features stand for which true ones, by the cosine of their directions."""

    best: Tensor  # (F,) float32, the largest cosine of each true feature with any decoder row
    feature: Tensor  # (F,) int64, the SAE's feature that stands for it, one to one; -1 for none
    rows: Tensor  # (n, d) float32, the decoder at norm 1


@torch.no_grad()
def score_sae(
    sae: Any, data: SyntheticData, *, samples: int, batch_size: int = 1024, seed: int = EVALUATION_SEED
) -> dict[str, float]:
    """Score a trained SAE on fresh tokens.

    By SAELens (`eval_sae_on_synthetic_data`; each of the SAE's features stands for the true feature of the largest
    absolute cosine there):
        mcc: mean absolute cosine of the best one-to-one matching of decoder rows and true directions.
        uniqueness: true features that any row stands for, over the number of rows.
        precision, recall, f1: of the SAE's features as detectors of their true features; means over the features.
        explained_variance: 1 - squared error / variance.
        l0, true_l0: features that fire per token, the SAE's and the true ones.
        dead_features: that fired on none of the samples.
        shrinkage: mean norm of the reconstruction over that of the activation.

    By our own functions: `top_correlation` (mean |c| of the top 0.1% of pairs of a batch of 4096 tokens, both features
    of which fire on at least 4) and `max_decoder_cosine` (mean over the features of their largest decoder cosine).

    By the ground truth: those of [`direction_scores`] and, in a hierarchy, of [`absorption_scores`].

    Args:
        sae: a [`SelOrthoSAE`] or an SAE of SAELens, on the CPU: its `W_dec` (n, d), `encode` and `decode` are used.
        data: that it was trained on.
        samples, batch_size: fresh tokens to look at, and how many at once.
        seed: of these tokens.

    Returns:
        The figures by name. What is not defined, as when no pair has enough support, is NaN.
    """
    sae.eval()
    stream = TokenStream(data, seed)
    theirs = sae_lens("sae_lens.synthetic").eval_sae_on_synthetic_data(
        sae, stream, stream, num_samples=samples, batch_size=batch_size
    )
    activations, _ = data.sample(min(samples, _CORRELATION_TOKENS), torch.Generator().manual_seed(seed))
    matches = match_features(sae.W_dec, data.directions)
    scores = {
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "precision": theirs.classification.precision,
        "recall": theirs.classification.recall,
        "f1": theirs.classification.f1_score,
        "explained_variance": theirs.explained_variance,
        "l0": theirs.sae_l0,
        "true_l0": theirs.true_l0,
        "dead_features": float(theirs.dead_latents),
        "shrinkage": theirs.shrinkage,
        "top_correlation": correlation_summary(sae.encode(activations), min_support=4).top,
        "max_decoder_cosine": float(max_decoder_cosine(sae.W_dec).mean()),
        **direction_scores(matches, data),
    }
    if (data.parents >= 0).any():
        scores |= absorption_scores(sae, data, matches, samples=samples, batch_size=batch_size, seed=seed)
    return scores


def match_features(W_dec: Tensor, directions: Tensor) -> Matches:
    """Match the true directions (F, d) with the decoder rows (n, d), one to one, for the largest sum of cosines.

    A match counts if its cosine is at least 0.5.
    """
    rows = nn.functional.normalize(W_dec.detach().float(), dim=1)
    cosine = directions @ rows.T  # (F, n)
    true, own = linear_sum_assignment(cosine.numpy(), maximize=True)
    true, own = torch.as_tensor(true), torch.as_tensor(own)
    counts = cosine[true, own] >= MATCHED
    feature = torch.full((len(directions),), -1)
    feature[true[counts]] = own[counts]
    return Matches(cosine.amax(1), feature, rows)


def direction_scores(matches: Matches, data: SyntheticData) -> dict[str, float]:
    """Say what the decoder's directions tell about the true features.

    Returns:
        recovered: share of the true features whose largest decoder cosine is at least 0.8.
        recovered_parents, recovered_children: the same of the features that have children, and of those that have a
            parent (in the middle of a tree, both); in a hierarchy.
        merged: mean over the matched children of the cosine of the child's decoder row with the true direction of its
            parent, less the true cosine of the two: how much of the parent the SAE has built into the child, as it has
            to where the parent is absorbed; in a hierarchy.
    """
    recovered = (matches.best >= RECOVERED).double()
    scores = {"recovered": float(recovered.mean())}
    children = data.children
    if len(children) == 0:
        return scores
    found = children[matches.feature[children] >= 0]
    parents = data.directions[data.parents[found]]  # (matched children, d)
    cosine = (matches.rows[matches.feature[found]] * parents).sum(1)
    true_cosine = (data.directions[found] * parents).sum(1)
    return {
        **scores,
        "recovered_parents": float(recovered[data.parents[children].unique()].mean()),
        "recovered_children": float(recovered[children].mean()),
        "merged": float((cosine - true_cosine).double().mean()),
    }


@torch.no_grad()
def absorption_scores(
    sae: Any, data: SyntheticData, matches: Matches, *, samples: int, batch_size: int, seed: int
) -> dict[str, float]:
    """Measure how much more often a parent's feature is silent where a child is active than where none is.

    For a true parent and child that both have an SAE feature of their own:
    P(the parent's feature is silent | parent and child active) - P(it is silent | parent active, none of its children).
    The second term takes off what the feature misses anyway. (With topk, tokens on which children fire have more
    features that compete for k, so that a little is left also without absorption.)

    Args:
        sae: on the CPU.
        data: hierarchical.
        matches: of the SAE's decoder with the true directions.
        samples, batch_size, seed: of the tokens.

    Returns:
        absorption: mean over the pairs with at least 20 tokens of either kind; NaN if there are none.
        absorption_pairs: how many those are.
        silent_with_child, silent_alone: means of the two terms.
    """
    child = ((data.parents >= 0) & (matches.feature >= 0)).nonzero()[:, 0]
    child = child[matches.feature[data.parents[child]] >= 0]
    parent = data.parents[child]
    together, alone, silent_together, silent_alone = torch.zeros(4, len(child), dtype=torch.float64)
    children = data.children
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, batch_size):
        activations, strengths = data.sample(min(batch_size, samples - start), generator)
        active = strengths > 0
        silent = sae.encode(activations)[:, matches.feature[parent]] == 0
        with_child = torch.zeros(active.shape).index_add_(1, data.parents[children], active[:, children].float()) > 0
        both = active[:, parent] & active[:, child]
        neither = active[:, parent] & ~with_child[:, parent]
        together += both.sum(0)
        alone += neither.sum(0)
        silent_together += (both & silent).sum(0)
        silent_alone += (neither & silent).sum(0)
    enough = (together >= MIN_SUPPORT) & (alone >= MIN_SUPPORT)
    with_child_share = float((silent_together[enough] / together[enough]).mean())
    alone_share = float((silent_alone[enough] / alone[enough]).mean())
    return {
        "absorption": with_child_share - alone_share,
        "absorption_pairs": float(enough.sum()),
        "silent_with_child": with_child_share,
        "silent_alone": alone_share,
    }
