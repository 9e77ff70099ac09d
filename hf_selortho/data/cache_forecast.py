"""What a harvest would need and take: the harvest itself in small for some seconds, and arithmetic for the rest."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SelOrthoError
from ..language_models.capture import ActivationCapture
from ..utils.memory import available_memory, existing_folder, memory_now, recent_peak, start_peak
from .activation_cache import STORED_DTYPES
from .cache_folder import ShardFolder
from .cache_writer import HarvestSettings, ShardHarvest
from .contexts import ContextStream

PROBE_SECONDS = 20.0
_WARM_UP_TOKENS = 2048


@dataclass(frozen=True)
class HarvestForecast:
    """A harvest, before it has begun."""

    tokens: float  # BOS included, over all processes
    tokens_per_second: float  # of one process
    processes: int
    language_model: int  # bytes
    shards: int  # bytes of those being computed and written
    peak: int  # bytes of a process, on its device
    available: int | None
    host_available: int | None  # memory of the machine for the shards, where the device has its own; else None
    disk: float

    @property
    def seconds(self) -> float:
        """Time that the harvest will take."""
        return self.tokens / self.processes / self.tokens_per_second


def probe_harvest(
    capture: ActivationCapture,
    stream: ContextStream,
    settings: HarvestSettings,
    tokens: float,
    disk: float,
    folder: Path,
) -> HarvestForecast:
    """Harvest for some seconds into a folder that is thrown away, and extrapolate.

    Args:
        capture: the layers to read. stream: contexts, endless. settings: of the harvest in full.
        tokens, disk: tokens and bytes of the harvest in full.
        folder: where that would go; the probe writes beside it.
    """
    device = capture.device
    model = sum(parameter.numel() * parameter.element_size() for parameter in capture.lm.model.parameters())
    available = available_memory(device)
    loaded = memory_now(device)
    beside = existing_folder(folder)
    speed = throwaway_harvest(capture, stream, _in_small(settings, _WARM_UP_TOKENS, 1), beside)
    small = max(_WARM_UP_TOKENS, min(settings.shard_tokens, int(speed * PROBE_SECONDS / 3)))
    start_peak(device)
    speed = throwaway_harvest(capture, stream, _in_small(settings, small, 3), beside)
    layers, row = len(capture.layers), capture.lm.d_model * STORED_DTYPES[settings.stored_dtype].itemsize
    # one shard is computed while the one before it is written, of which one layer is being turned into bytes
    in_flight = (2 * layers + 2) * row
    full = min(settings.shard_tokens, int(tokens / settings.processes) + 1)
    peak, host_available = recent_peak(device), None
    if device.type == "cpu":
        peak += in_flight * (full - small)
    else:
        host_available = available_memory(torch.device("cpu"))
    return HarvestForecast(
        tokens=tokens,
        tokens_per_second=speed,
        processes=settings.processes,
        language_model=model,
        shards=in_flight * full,
        peak=peak,
        available=None if available is None else available + loaded,
        host_available=host_available,
        disk=disk,
    )


def forecast_words(found: HarvestForecast) -> str:
    """A forecast as a table."""
    minutes, seconds = divmod(round(found.seconds), 60)
    hours, minutes = divmod(minutes, 60)
    on_device, owner = (found.shards, "of a process") if found.host_available is None else (0, "on the accelerator")
    rows = [
        ("language model", f"{found.language_model / 1e9:.2f} GB"),
        ("shards computed and written", f"{found.shards / 1e9:.2f} GB"),
        ("libraries, forward passes", f"{(found.peak - found.language_model - on_device) / 1e9:.2f} GB"),
        (f"peak memory {owner}", f"{found.peak / 1e9:.2f} GB"),
        ("disk", f"{found.disk / 1e9:.2f} GB"),
        ("speed", f"{found.tokens_per_second * found.processes:,.0f} tokens/s"),
        ("time", f"{hours} h {minutes} min {seconds} s"),
    ]
    return "\n".join([f"{found.tokens:,.0f} tokens", *(f"  {name:<30}{value:>18}" for name, value in rows)]) + "\n"


def refuse_what_cannot_fit(found: HarvestForecast) -> None:
    """Raise a SelOrthoError if there is too little memory."""
    if found.available is not None and found.peak > found.available:
        raise SelOrthoError(
            f"this harvest needs {found.peak / 1e9:.2f} GB of memory, {found.available / 1e9:.2f} GB are available: "
            "lower --shard_tokens or --lm_batch_tokens, or read fewer --layers"
        )
    if found.host_available is not None and found.shards > found.host_available:
        raise SelOrthoError(
            f"the shards being computed and written need {found.shards / 1e9:.2f} GB of the machine's memory, "
            f"{found.host_available / 1e9:.2f} GB are available: lower --shard_tokens, or read fewer --layers"
        )


def throwaway_harvest(
    capture: ActivationCapture, stream: ContextStream, settings: HarvestSettings, place: Path
) -> float:
    """Tokens a second of a harvest, from text to files in a folder inside `place` that is then removed.

    Raises:
        SelOrthoError: `place` cannot be written.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=".probe-", dir=place)
    except OSError as error:
        raise SelOrthoError(f"cannot write to {place}: {error.strerror}; choose another --output_dir") from error
    with folder:
        target = ShardFolder(Path(folder.name))
        target.begin({})
        return ShardHarvest(capture, stream, [], target, settings).run().tokens_per_second


def _in_small(settings: HarvestSettings, shard_tokens: int, shards: int) -> HarvestSettings:
    """The harvest of so many shards by one process."""
    return dataclasses.replace(
        settings, shard_tokens=shard_tokens, max_tokens=shards * shard_tokens, rank=0, processes=1
    )
