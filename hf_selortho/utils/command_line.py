"""Run a command so that a mistake is one line and exit code 2, the log is readable, and no output holds a secret."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import select
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]

from ..errors import SelOrthoError, is_out_of_memory, out_of_memory
from .imports import after_import

_SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "TRACKIO_TOKEN",
    "EXPLAIN_API_KEY", "OPENAI_API_KEY"
)  # fmt: skip
_SHORTEST_SECRET = 8  # shorter ones, such as "none" for a server of one's own, are words
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # set by accelerate launch, by torchrun
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # by torchrun, by kinds of MPI


def run_script(main: Callable[[], None]) -> None:
    """Run a main function; exit with 2 and one line on standard error if the user can mend what is wrong."""
    _set_up_logging()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has read enough
        if not _screen_is_gone():  # but another process
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)  # as if SIGPIPE had ended it
    except SelOrthoError as error:
        _end(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except Exception as error:
        if is_out_of_memory(error):
            _end(out_of_memory(error, "end other programs"))
        from .library_errors import explained  # whose imports of libraries nobody else needs to wait for

        if (said := explained(error)) is None:
            raise
        said.__cause__ = error
        _end(said)


def _screen_is_gone() -> bool:
    """Tell whether nobody reads the standard output any more."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end(error: SelOrthoError) -> NoReturn:
    """Say what is wrong in a line, after it with `--verbose` where it comes from, and exit."""
    sys.stderr.write(f"{_program()}: error: {without_secrets(' '.join(str(error).split()))}\n")
    if "--verbose" in sys.argv:
        sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
    sys.exit(2)


def check_launcher() -> None:
    """Raise a SelOrthoError under `accelerate launch --cpu --num_processes N`, which starts one process whatever N.

    On Linux, this process has SIGTERM when `accelerate launch` ends, which passes no signal on.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if asked and "MASTER_ADDR" in os.environ and not started_processes():
        raise SelOrthoError(
            "accelerate launch starts a single process on CPUs, whatever --num_processes says: use "
            f"torchrun --nproc_per_node N {sys.argv[0].replace('selortho ', '-m hf_selortho ')} --cpu ..."
        )


def launch_command(name: str, argv: Sequence[str] | None = None) -> str:
    """Return the command that started this run, launcher included, without `--resume_from_checkpoint` and secrets.

    Args:
        name: of the command, if its arguments came from Python.
        argv: these arguments; None for those of the command line.
    """
    command = shlex.join(_typed_command() if argv is None else ["selortho", name, *argv])
    return without_secrets(changed_command(command, resume_from_checkpoint=None))


def changed_command(command: str, **options: str | None) -> str:
    """Return a command line with these options in place of those that it has of the same names; None leaves one out."""
    words, dropping = list[str](), False
    for word in shlex.split(command):
        if word.startswith("--"):
            dropping = word[2:].split("=", 1)[0].replace("-", "_") in options
        if not dropping:
            words.append(word)
    added = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return shlex.join([*words, *added])


def program(name: str) -> str:
    """Return how the user can call `selortho` or `python` here: by name, or by path where that finds another one."""
    installed = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if found and installed.is_file() and Path(found).samefile(installed):
        return name
    here = os.path.relpath(installed) if installed.is_file() else os.path.relpath(sys.executable)
    return shlex.quote(here) if installed.is_file() or name == "python" else f"{shlex.quote(here)} -m hf_selortho"


def say(words: str) -> None:
    """Write to standard error, which may be gone: the first Ctrl-C ends the `tee` of `... 2>&1 | tee log` as well."""
    try:
        sys.stderr.write(words)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # or the end of the process would fail on what is left to write


def without_secrets(text: str) -> str:
    """Replace access tokens by `***`: those in the environment, and whatever looks like one of the Hub."""
    for name in _SECRETS:
        if len(secret := os.environ.get(name) or "") >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return _HUB_TOKEN.sub("***", text)


def started_processes() -> int:
    """Count the processes that torchrun or a kind of MPI says it has started; 0 without them."""
    return next((int(os.environ[name]) for name in _SIZES if int(os.environ.get(name, -1)) >= 0), 0)


def _typed_command() -> list[str]:
    """The command line of the launcher that started this process, or else its own."""
    try:
        parent = psutil.Process().parent() if any(name in os.environ for name in _LAUNCHED) else None
        launcher = [] if parent is None else parent.cmdline()
    except psutil.Error:  # it has ended
        launcher = []
    if not {sys.argv[0], "hf_selortho"} & set(launcher):
        own = sys.argv[0].split() if sys.argv[0].startswith("selortho ") else ["python", sys.argv[0]]
        return [*own, *sys.argv[1:]]
    python, *rest = launcher
    return ["python", *rest] if rest[0].startswith("-") else [os.path.basename(rest[0]), *rest[1:]]


class _DiscreetFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def _program() -> str:
    """The program as users type it: a command, a script's name, or `python -m` and that of a module."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.origin == sys.argv[0]:
        return f"python -m {module.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_DiscreetFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hf_selortho").setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which complains of a home that cannot be written
    after_import("transformers.utils.logging", _quieten_transformers)
    after_import(
        "datasets.utils.logging", lambda: logging.getLogger("datasets").setLevel(logging.CRITICAL)
    )  # it raises the same


def _quieten_transformers() -> None:
    transformers_logging = sys.modules["transformers.utils.logging"]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of weights that load in a second
