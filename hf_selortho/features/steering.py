"""Text that the language model writes while some of its features are scaled or held at a value."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import finite_number, object_of, text_of, whole_number
from ..errors import SelOrthoError
from ..language_models.loading import LanguageModel
from ..language_models.token_text import BYTES, TokenTexts
from ..modeling_selortho import SelOrthoSAE
from .sampling import Sampling, choose, end_ids
from .token_features import FeatureCapture

SteerMode = Literal["scale", "clamp"]


@dataclass(frozen=True)
class Steer:
    """What becomes of one feature's activation on every token that the language model reads.

    "scale": `value` times what it is. 0 ablates the feature, 1 leaves it, negative numbers push the other way.
    "clamp": `value`, in the unit of the SAE's activations, whether or not the feature fires. It cannot be negative, as
    no activation is.

    Raises:
        SelOrthoError: another mode, or a value that is not allowed.
    """

    feature: int
    mode: SteerMode
    value: float

    def __post_init__(self) -> None:
        if self.mode not in get_args(SteerMode):
            raise SelOrthoError(
                f"mode {self.mode!r} of feature {self.feature}: choose {' or '.join(get_args(SteerMode))}"
            )
        whole_number(self.feature, "feature")
        finite_number(self.value, f"{self.mode} of feature {self.feature}")
        if self.mode == "clamp" and self.value < 0:
            raise SelOrthoError(
                f"clamp {self.value} of feature {self.feature}: activations are never negative; take 0 or more, or "
                "scale by a negative number to push the other way"
            )


@dataclass(frozen=True)
class Generation:
    """A prompt and how the language model goes on."""

    prompt: str
    text: str  # the continuation only
    token_ids: list[int]  # BOS, prompt and continuation
    tokens: list[str]  # as text, see [`TokenTexts`]
    prompt_tokens: int  # how many of them are BOS and prompt
    steers: tuple[Steer, ...]
    # (tokens, steers): of the steered features before each is changed; 0 on BOS, other special tokens and sinks, on
    # which the SAE says nothing and which are left alone
    feature_acts: Tensor
    ended: bool  # the language model ended the text itself

    def __len__(self) -> int:
        return len(self.tokens)


class Steering:
    """A language model and an SAE that changes features while it writes.

    At the SAE's site the activations x become

        x' = x + sum_f (value_f - h_f(x)) W_dec[f] * input_scale

    on every token that it reads, prompt and continuation. What the SAE does not reconstruct stays as it is, so that a
    feature scaled by 1 changes nothing. The SAE need not read the value again from x', as encoder and decoder
    directions differ. With a transcoder, which reads x and reconstructs y at its target, it is y that changes:

        y' = y + sum_f (value_f - h_f(x)) W_dec[f] * output_scale

    The layers are hooked only while a token is computed, never while a caller holds the iterator of [`stream`]. But a
    language model must not compute something else in another thread at that moment, which would be steered, too: with
    threads, hold one lock for each language model around each step. Random numbers are of a generator of its own, and
    the global one is neither read nor changed.

    Args:
        sae: a trained SAE.
        lm: the language model, loaded or by name; default: the one of the training, at the very commit.
        token: access token of the Hub; without it, the stored one or HF_TOKEN.

    Raises:
        SelOrthoError: as [`FeatureCapture`].
    """

    def __init__(self, sae: SelOrthoSAE, lm: LanguageModel | str | None = None, token: str | None = None) -> None:
        reader = FeatureCapture(sae, lm, token)
        self.sae, self.lm = sae, reader.lm
        self._capture, self._cutter = reader.activations, reader.cutter
        self._end_ids, self._texts = end_ids(self.lm), TokenTexts(self.lm.tokenizer)
        takes = inspect.signature(self.lm.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers 5.20 has the latter
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def generate(self, prompt: str, steers: Sequence[Steer] = (), sampling: Sampling | None = None) -> Generation:
        """The prompt and its continuation; arguments and errors of [`stream`]."""
        *_, last = self.stream(prompt, steers, sampling)
        return last

    def stream(
        self, prompt: str, steers: Sequence[Steer] = (), sampling: Sampling | None = None
    ) -> Iterator[Generation]:
        """What has been written so far, after each new token. It may be abandoned at any time.

        Without steers and at temperature 0, the tokens are those of the language model's own greedy `generate`.

        Args:
            prompt: any text; one that spells a special token stays text.
            steers: at most one for each feature; their effects add up.
            sampling: how tokens are chosen and how many; default: the likeliest, 40.

        Raises:
            SelOrthoError: an empty prompt, one that does not fit the SAE's contexts together with the tokens asked
                for, a feature out of range or named twice; while generating, logits that are not finite.
        """
        sampling = Sampling() if sampling is None else object_of(sampling, Sampling, "sampling", "as Sampling(40)")
        if isinstance(steers, Steer):
            raise SelOrthoError("steers is a single Steer: expected a list of them, as in [steer]")
        steers = tuple(steers)
        self._check(steers)
        prompt_ids = self._read(text_of(prompt, "prompt"), sampling.max_new_tokens)
        return self._steps(prompt, prompt_ids, steers, sampling)

    def _steps(
        self, prompt: str, prompt_ids: list[int], steers: tuple[Steer, ...], sampling: Sampling
    ) -> Iterator[Generation]:
        run = _Run(self, steers)
        logits = run.read(prompt_ids)
        generator = torch.Generator().manual_seed(sampling.seed)
        token_ids = list(prompt_ids)
        for _ in range(sampling.max_new_tokens):
            token_id = choose(logits, sampling, generator)
            ended = token_id in self._end_ids
            if not ended:
                token_ids.append(token_id)
                logits = run.read([token_id])
            tokens = self._texts.of(token_ids, prompt)
            text = self._continuation(token_ids, len(prompt_ids))
            yield Generation(
                prompt=prompt,
                text=text.rstrip("\ufffd") if BYTES.search(tokens[-1]) else text,  # half a character
                token_ids=list(token_ids),
                tokens=tokens,
                prompt_tokens=len(prompt_ids),
                steers=steers,
                feature_acts=torch.cat(run.feature_acts),
                ended=ended,
            )
            if ended:
                return

    def _continuation(self, token_ids: list[int], prompt_tokens: int) -> str:
        """Some tokenizers drop a space in front: hence the whole text without the prompt, where that is its start."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        decode = self.lm.tokenizer.decode
        whole, start = str(decode(token_ids, **options)), str(decode(token_ids[:prompt_tokens], **options))
        return whole[len(start) :] if whole.startswith(start) else str(decode(token_ids[prompt_tokens:], **options))

    def _check(self, steers: Sequence[Steer]) -> None:
        d_sae = self.sae.W_dec.shape[0]
        features = [object_of(steer, Steer, "steers", "as in [Steer(12, 'clamp', 5.0)]").feature for steer in steers]
        for feature in features:
            whole_number(feature, "feature", end=d_sae)
            if features.count(feature) > 1:
                raise SelOrthoError(f"feature {feature} is steered {features.count(feature)} times: expected once")

    def _read(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Token ids of the prompt, with BOS as in training."""
        contexts = self._cutter.cut([(0, prompt)])
        if not contexts:
            raise SelOrthoError(f"the prompt {prompt[:80]!r} holds no token: give at least one word")
        limit, bos = self.sae.config.context_length, int(self.sae.config.prepend_bos)
        tokens = sum(len(context.input_ids) - bos for context in contexts)
        if bos + tokens + max_new_tokens > limit:
            room = limit - bos - max_new_tokens
            remedy = f"shorten the prompt to {room} tokens or ask for fewer" if room > 0 else "ask for fewer new tokens"
            raise SelOrthoError(
                f"a prompt of {tokens} tokens{' after BOS' * bos} and {max_new_tokens} new ones: the SAE was trained "
                f"on contexts of {limit} tokens; {remedy}"
            )
        return contexts[0].input_ids


class _Run:
    """One text: the language model's cache of keys and values, and what the SAE reads on the way."""

    def __init__(self, steering: Steering, steers: Sequence[Steer]) -> None:
        self._steering, self._steers = steering, steers
        self._cache: Any = None
        sae = steering.sae
        features = torch.tensor([steer.feature for steer in steers], dtype=torch.int64, device=sae.device)
        values = torch.tensor([float(steer.value) for steer in steers], device=sae.device)
        self._features, self._values = features, values
        self._clamped = torch.tensor([steer.mode == "clamp" for steer in steers], dtype=torch.bool, device=sae.device)
        self._directions = sae.raw_directions(features)  # (steers, d_out)
        self.feature_acts: list[Tensor] = []  # (tokens, steers) of each step

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Let the language model read the next tokens; logits (vocabulary,) of the one after them, on the CPU."""
        lm, capture = self._steering.lm, self._steering._capture
        input_ids = torch.tensor([token_ids], dtype=torch.int64, device=capture.device)  # (1, t)
        cache_name = self._steering._cache_name
        options = {cache_name: self._cache, "use_cache": True, **self._steering._last_logits}
        with capture.splice_from(lambda read, changed: self._changed(read, changed, input_ids)):
            output = lm.model(input_ids=input_ids, **options)
        self._cache = getattr(output, cache_name, None)
        if self._cache is None:
            raise SelOrthoError(
                f'"{lm.name}" ({type(lm.model).__name__}) keeps no keys and values of what it has read, without which '
                "its next tokens cannot be computed one by one; use a language model that does"
            )
        logits = output.logits[0, -1].float().cpu()
        if not logits.isfinite().all():
            what = ", ".join(f"{steer.mode} {steer.value} of feature {steer.feature}" for steer in self._steers)
            raise SelOrthoError(
                f"the logits of the language model are not finite after {what or 'no steering'}: take smaller values, "
                "or load it in bfloat16 or float32"
            )
        return logits

    def _changed(self, read: Tensor, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """What the SAE reconstructs (1, t, d_out) with the features changed that fire on what it reads (1, t, d_in)."""
        if not self._steers:
            self.feature_acts.append(torch.zeros(read.shape[1], 0))
            return hidden
        kept = self._steering._capture.keep_mask(input_ids, torch.ones_like(input_ids), read)[..., None]  # (1, t, 1)
        x = read.where(kept | read.isfinite(), 0).to(self._steering.sae.device)
        acts = self._steering.sae.encode(x)[..., self._features].float()  # (1, t, steers)
        wanted = torch.where(self._clamped, self._values, self._values * acts)
        shift = ((wanted - acts) @ self._directions).to(hidden.device)  # (1, t, d_out)
        self.feature_acts.append(acts.where(kept.to(acts.device), 0)[0].cpu())
        return torch.where(kept.to(hidden.device), (hidden.float() + shift).to(hidden.dtype), hidden)
