"""Options of a command line as fields of dataclasses: descriptions, ranges of values, errors in one line."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

from ..errors import SelOrthoError
from .names import Kind, RepoRef, activations_of, endpoint, local_path, repo_id, subfolder_of, trimmed

logger = logging.getLogger(__name__)


class Range(NamedTuple):
    """What the value of an argument may be; part of its annotation, `Annotated[int, Range(...)]`."""

    holds: Callable[[Any], bool]
    words: str


def one_of(*values: str) -> Range:
    """Return the range of these values."""
    return Range(lambda v: v in values, f"{', '.join(values[:-1])} or {values[-1]}")


Count = Annotated[int, Range(lambda v: v >= 1, "at least 1")]
CountOrZero = Annotated[int, Range(lambda v: v >= 0, "at least 0")]
Above0 = Annotated[float, Range(lambda v: v > 0, "a number above 0")]
Positive = Annotated[float, Range(lambda v: 0 < v < math.inf, "a finite number above 0")]
Seed = Annotated[int, Range(lambda v: 0 <= v < 1 << 32, "a number from 0 to 4294967295")]
Above1 = Annotated[float, Range(lambda v: v > 1, "a number above 1")]
AtLeast1 = Annotated[float, Range(lambda v: 1 <= v < math.inf, "a finite number of at least 1")]
Share = Annotated[float, Range(lambda v: 0 <= v < 1, "a number in [0, 1)")]


Steps = Annotated[
    float,
    Range(
        lambda v: 0 <= v < 1 or (v >= 1 and float(v).is_integer()),
        "a whole number of steps, or a share of max_steps below 1",
    ),
]


class Contradiction(NamedTuple):
    """Options whose values cannot be meant together; `holds` is asked with all values by name, and `given` (names)."""

    options: str  # names, with blanks between them, as the message shows them with their values
    holds: Callable[[Any], bool]
    words: str  # why, and what to do
    everywhere: bool = False  # of several SAEs in a run, it has to hold for all
    harmless: bool = False  # a warning is enough, as for what command lines of several kinds have in common


def acts_with(options: str, other: str, *values: Any, harmless: bool = False) -> list[Contradiction]:
    """List options that do nothing, though somebody has typed them, unless another one has one of some values.

    Args:
        options: names. other: name of the other one. values: with which they act; none: with any but 0 and "none".
        harmless: see [`Contradiction`].
    """

    def idle(name: str) -> Callable[[Any], bool]:
        return lambda v: name in v.given and _asked(getattr(v, name)) and not acts(getattr(v, other))

    def acts(value: Any) -> bool:
        return value in values if values else _asked(value)

    named = " or ".join(map(str, values)).join((" ", ""))
    words = f"it acts only {'without' if values == (None,) else 'with'} --{other}{named if any(values) else ''}"
    return [
        Contradiction(f"{name} {other}", idle(name), f"{words}; leave one out", True, harmless)
        for name in options.split()
    ]


def refuse_contradictions(table: Sequence[Contradiction], given: frozenset[str], *settings: Mapping[str, Any]) -> None:
    """Raise a SelOrthoError for the first row of a table that holds, or warn of one that is harmless.

    Args:
        table: the rows. given: names of the options on the command line. settings: values by name, for each SAE.
    """
    values = [SimpleNamespace(**chosen, given=given) for chosen in settings]
    for row in table:
        held = [v for v in values if row.holds(v)]
        if held and (len(held) == len(values) or not row.everywhere):
            typed = [_as_typed(name, getattr(held[0], name)) for name in row.options.split()]
            said = f"{' with '.join(typed[:2])}{''.join(f' and {rest}' for rest in typed[2:])}: {row.words}"
            if not row.harmless:
                raise SelOrthoError(said)
            warn_once(said)


@functools.cache  # a command line may be parsed twice
def warn_once(text: str) -> None:
    """Log a warning, the first time."""
    logger.warning("%s", text)


def given_names(argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the options on a command line; they may have hyphens, truth values also be --no_..."""
    names = {part[2:].split("=", 1)[0].replace("-", "_") for part in argv if part.startswith("--")}
    return frozenset(names | {name.removeprefix("no_") for name in names})


def _asked(value: Any) -> bool:
    return value not in (0, None, "none", [])


def _as_typed(name: str, value: Any) -> str:
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def argument(default: Any, description: str) -> Any:
    """Make a dataclass field with a default and the text that `--help` shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": description})
    return field(default=default, metadata={"help": description})


def _place(kind: Kind) -> Callable[[str, str], str]:
    return lambda text, argument: str(RepoRef.parse(text, kind=kind, argument=argument))


def _json_or_path(text: str, argument: str) -> str:
    return local_path(text, argument) if text.rstrip().endswith(".json") else trimmed(text, argument)


# How each option that names something is read, in every command; the rest of the package gets normalised names.
_READERS: dict[str, Callable[[str, str], str | None]] = {
    **dict.fromkeys(("output_dir", "output", "target", "run", "seeds", "resume_from_checkpoint"), local_path),
    **dict.fromkeys(("template", "labels", "graph"), local_path),
    **dict.fromkeys(("preset", "variants", "layer_settings"), _json_or_path),
    **dict.fromkeys(("activations", "folder"), activations_of),
    **dict.fromkeys(("sae", "source", "twin", "compare_with", "init_from"), _place("SAE")),
    **dict.fromkeys(("model", "lm"), _place("model")),
    "dataset": _place("dataset"),
    **dict.fromkeys(("repo_id", "hub_model_id"), lambda text, argument: repo_id(text, argument=argument)),
    "explain_url": endpoint,
    "explain_model": trimmed,
    "space": lambda text, argument: repo_id(text, "Space", argument),
    **dict.fromkeys(("revision", "model_revision", "dataset_revision", "hub_revision"), trimmed),
    "subfolder": subfolder_of,
}


class OneLineParser(HfArgumentParser):
    """A parser of dataclasses whose errors are one line, without the usage text of a hundred options.

    Names are read as people type them ([`names`]), lists also with commas; every command takes `--verbose`.
    """

    def __init__(self, groups: Sequence[Any] = (), **options: Any) -> None:
        super().__init__(groups, **{"prog": os.path.basename(sys.argv[0]), "allow_abbrev": False, **options})
        words = "Show after the line of an error what a library has said."  # `run_script` does
        self.add_argument("--verbose", action="store_true", help=words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does, and normalise what names something."""
        parsed, unknown = super().parse_known_args(args, namespace)
        parsed.__dict__.pop("verbose", None)
        options = {action.dest: (action.option_strings or [action.dest])[0] for action in self._actions}
        for name, read in _READERS.items():
            value = getattr(parsed, name, None)
            if isinstance(value, str):
                setattr(parsed, name, read(value, options[name]))
            elif isinstance(value, list):
                setattr(parsed, name, [read(item, options[name]) for item in value])
        return parsed, unknown

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.nargs == "+":  # with commas too, but for a file whose name has them
            items = (text if os.path.lexists(text) else text.split(",") for text in arg_strings)
            parts = [part for item in items for part in ([item] if isinstance(item, str) else item)]
            arg_strings = [part for part in parts if part.strip()] or arg_strings
        return super()._get_values(action, arg_strings)

    def parse_all(self, argv: Sequence[str] | None) -> list[Any]:
        """Parse into the dataclasses, then a namespace of the other arguments, if any; unknown ones exit with code 2.

        Args:
            argv: the arguments; None for those of the command line.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        *parsed, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all arguments)\n")


def parse_options(
    group: Any, argv: Sequence[str] | None, table: Sequence[Contradiction] = (), **positional: str
) -> tuple[Any, Any]:
    """Parse a command line into a dataclass and a namespace of positional arguments; unknown ones exit with code 2.

    Args:
        group: the dataclass.
        argv: the arguments; None for those of the command line.
        table: what is refused.
        positional: help text of each positional argument by name.

    Raises:
        SelOrthoError: a value is not in its range, or a row of the table holds.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser([group])
    for name, description in positional.items():
        parser.add_argument(name, help=description)
    options, *rest = parser.parse_all(argv)
    check_values(options)
    others = rest[0] if rest else SimpleNamespace()
    refuse_contradictions(table, given_names(argv), {**vars(options), **vars(others)})
    return options, others


def check_values(*groups: Any) -> None:
    """Raise a SelOrthoError unless each value of the groups of arguments is in its range; None always is."""
    for group in groups:
        for name, hint in get_type_hints(type(group), include_extras=True).items():
            value = getattr(group, name)
            for part in (hint, *get_args(hint)):  # of X | None
                for allowed in getattr(part, "__metadata__", ()):
                    if value is not None and not allowed.holds(value):
                        raise SelOrthoError(f"--{name} {value}: expected {allowed.words}")
