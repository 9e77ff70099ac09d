"""Read a feature index as you would in a notebook: the most frequent features, what they fire on, their pairs.

python examples/feature_index.py runs/demo    # or owner/name of the Hub
"""

import sys

from hf_selortho.features import FeatureIndex

index = FeatureIndex.open(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
print(f"{len(index)} features, {index.pairs} pairs")

for summary in index.most_frequent(3):
    feature = index.feature(summary.feature)  # one small request where the index is on the Hub
    print(f"\nfeature {feature.feature} ({feature.label!r}) fires on {feature.frequency:.1%} of the tokens")
    print("  top positive logits:", ", ".join(repr(effect.token) for effect in feature.promoted[:5]))
    for context in feature.contexts[:2]:
        before, after = context.tokens[: context.peak], context.tokens[context.peak + 1 :]
        text = "".join([*before, "[", context.tokens[context.peak], "]", *after])
        print(f"  {context.activation:6.2f}  {text!r}")
    for a, b in index.pairs_of(feature.feature)[:1]:
        pair = index.pair(a, b)
        print(f"  pair ({a}, {b}): {pair.pair_class}, correlation {pair.correlation:.2f}")
