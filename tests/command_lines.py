"""Command lines of `selortho` as text: found in documents and messages, and read by the real parsers, without a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hf_selortho.commands.arguments import PARSERS
from hf_selortho.commands.main import COMMANDS
from hf_selortho.data import cache_report
from hf_selortho.training.arguments import parse_arguments
from hf_selortho.training.variants import make_variants

SCRIPTS = {
    "train.py": "train", "cache_activations.py": "cache", "evaluate_sae.py": "evaluate",
    "build_feature_index.py": "index", "push_to_hub.py": "push", "deploy_space.py": "space",
}  # fmt: skip
_START = re.compile(
    r"^\W*(?:\S*selortho|python -m hf_selortho\S*|accelerate launch|torchrun|\S*python) .*", re.MULTILINE
)


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the command of `selortho` and its arguments, for each line of a text that is a whole command line."""
    for match in _START.finditer(text.replace("\\\n", " ")):
        line = match[0].strip("> `").split("`")[0]
        if "..." in line or "COMMAND" in line or "FOLDER" in line:
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose, with an apostrophe
            continue
        if "hf_selortho.data.cache_report" in words:
            yield ["report", *words[words.index("hf_selortho.data.cache_report") + 1 :]]
            continue
        for place, word in enumerate(words[:-1]):
            if Path(word).name in SCRIPTS:
                yield [SCRIPTS[Path(word).name], *words[place + 1 :]]
                break
            if (Path(word).name == "selortho" or word == "hf_selortho") and words[place + 1] in COMMANDS:
                yield words[place + 1 :]
                break


def check_command(name: str, argv: list[str]) -> None:
    """Parse a command line and check that its options can be meant together; raises as the command would."""
    if name == "train":
        make_variants(parse_arguments(argv))
    elif name in PARSERS:
        PARSERS[name](argv)
    else:
        with mock.patch.object(cache_report, "ActivationCache"), mock.patch.object(cache_report, "report_table", str):
            with mock.patch.object(cache_report, "draw_report"), mock.patch("sys.stdout"):
                cache_report.main(argv)
