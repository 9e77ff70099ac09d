"""The tables of a benchmark, as Markdown that can be read on a screen too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import ACTIVATIONS
from benchmarks.steps import PHASES
from hf_selortho.errors import SelOrthoError

Rows = Sequence[Mapping[str, Any]]


def load_peers(path: str) -> list[dict[str, Any]]:
    """Timings of other implementations: `{"name": seconds a step}`, or `{"name": {"width": seconds a step}}`.

    Raises:
        SelOrthoError: no such file, or something else in it.
    """
    expected = '{"name": seconds a step} or {"name": {"number of features": seconds a step}}'
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = [
            {"peer": name, "width": None if width is None else int(width), "seconds_per_step": float(seconds)}
            for name, value in content.items()
            for width, seconds in (value.items() if isinstance(value, dict) else [(None, value)])
        ]
    except OSError as error:
        raise SelOrthoError(f"--peers {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise SelOrthoError(f"--peers {path}: expected JSON like {expected} ({error})") from error
    if any(not entry["seconds_per_step"] > 0 for entry in entries):
        raise SelOrthoError(f"--peers {path}: expected seconds above 0")
    return entries


def report(content: Mapping[str, Any]) -> str:
    """The whole benchmark in Markdown: what it ran on, the timings, where the time goes, what was left out."""
    parts = [_conditions(content), times_table(content["rows"], content["peers"], content["batch"])]
    parts += [
        "Seconds a step by phase (median). Selection and penalty (with its gradient) are timed by themselves and taken "
        "off forward and backward; the optimiser's time holds the check of the gradient's norm.",
        phases_table(content["rows"]),
        "Tokens a second of each stage by itself, and of all of them one after the other.",
        stages_table(content["rows"], content["batch"], content["supply"]),
    ]
    skipped = [f"- {_where(row)}, {row['label']}: {row['skipped']}" for row in content["rows"] if row["skipped"]]
    if skipped:
        parts += ["Not measured:", "\n".join(skipped)]
    return "\n\n".join(part for part in parts if part) + "\n"


def times_table(rows: Rows, peers: Rows, batch: int) -> str:
    """Seconds a step of every case, with the ratios to the two yardsticks, and the peers."""
    header = [
        "features", "activation", "L0", "case", "s/step", "least", "tokens/s", "x encoder", "x no penalty", "memory"
    ]  # fmt: skip
    body = [
        [
            f"{row['width']:,}", ACTIVATIONS.get(row["activation"], row["activation"]), _number(row["l0"], "g0"),
            row["label"], _number(row["seconds_per_step"]), _number(row["seconds_per_step_min"]),
            _number(row["tokens_per_second"], "count"), _number(row["ratio_to_encoder"], "ratio"),
            _number(row["ratio_to_no_penalty"], "ratio"), _bytes(row["memory_bytes"]),
        ]
        for row in rows
        if "seconds_per_step" in row
    ]  # fmt: skip
    for peer in peers:
        seconds = peer["seconds_per_step"]
        width = "?" if peer["width"] is None else f"{peer['width']:,}"
        speed = _number(batch / seconds, "count")
        body.append([width, "", "", f"{peer['peer']} (peer)", _number(seconds), "", speed, "", "", ""])
    return table(header, body, left=(1, 3))


def phases_table(rows: Rows) -> str:
    """Seconds a step by phase."""
    body = [
        [f"{row['width']:,}", row["activation"], row["label"]]
        + [_number(row["seconds_by_phase"][name]) for name in PHASES]
        for row in rows
        if row.get("seconds_by_phase")
    ]
    return table(["features", "activation", "case", *PHASES], body, left=(1, 2))


def stages_table(rows: Rows, batch: int, supply: Mapping[str, float] | None) -> str:
    """Tokens a second of language model and buffer (where they were measured), SAE, selection, penalty, optimiser."""
    header = ["features", "activation", "case"]
    header += ["LM", "buffer"] * (supply is not None) + ["SAE", "selection", "penalty", "optimiser", "all"]
    body = []
    for row in rows:
        if row.get("seconds_by_phase"):
            stages = stage_speeds(row["seconds_by_phase"], row["seconds_per_step"], batch, supply)
            speeds = [_number(speed, "count") for speed in stages.values()]
            body.append([f"{row['width']:,}", row["activation"], row["label"], *speeds])
    return table(header, body, left=(1, 2))


def stage_speeds(
    phases: Mapping[str, float], seconds: float, batch: int, supply: Mapping[str, float] | None
) -> dict[str, float | None]:
    """Tokens a second by stage, None for one that takes no time; "all": one after the other, `seconds` a step."""
    spent = {
        "SAE": phases["forward"] + phases["backward"],
        "selection": phases["selection"],
        "penalty": phases["penalty"],
        "optimiser": phases["optimiser"] + phases["normalisation"],
    }
    speeds = {name: batch / value if value > 0 else None for name, value in spent.items()}
    if supply is None:
        return {**speeds, "all": batch / seconds}
    lm, buffer = supply["lm_tokens_per_second"], supply["buffer_tokens_per_second"]
    return {"LM": lm, "buffer": buffer, **speeds, "all": 1 / (seconds / batch + 1 / lm + 1 / buffer)}


def table(header: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """A Markdown table with aligned columns, numbers to the right; empty if it has no rows."""
    if not body:
        return ""
    cells = [[text.replace("|", "\\|") for text in row] for row in (header, *body)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [t.ljust(w) if n in left else t.rjust(w) for n, (t, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [f"{':' if n in left else '-'}{'-' * (w - 2)}{'-' if n in left else ':'}" for n, w in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def _conditions(content: Mapping[str, Any]) -> str:
    torch_version = content["versions"].get("torch", "?")
    lines = [
        f"{content['hardware']}, {content['threads']} threads, torch {torch_version}, {content['date']}",
        f"batch {content['batch']} tokens, d_in {content['d_in']}, {content['steps']} rounds; cases take turns, "
        "ratios are taken within a round and their median is given",
        f"activations: {content['source']}",
        *content["notes"],
    ]
    if content["supply"] is not None:
        supply = content["supply"]
        speeds = f"{supply['lm_tokens_per_second']:,.0f} tokens/s, buffer {supply['buffer_tokens_per_second']:,.0f}"
        lines.append(f"language model {supply['model']} up to layer {supply['layer']}: {speeds} tokens/s")
    return "\n".join(f"- {line}" for line in lines)


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['width']:,} features, {row['activation']}"


def _number(value: float | None, kind: str = "seconds") -> str:
    if value is None:
        return ""
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "g0":
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    if kind == "ratio":
        return f"{value:.2f}"
    if value == 0 or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")  # three significant digits


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
