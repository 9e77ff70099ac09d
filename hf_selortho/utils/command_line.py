"""What the scripts share: one-line errors with exit code 2, a readable log, and processes on CPUs."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers.utils import logging as transformers_logging

from ..errors import SelOrthoError
from .memory import local_processes

_LAUNCHERS = ("accelerate", "torchrun", "python")
_SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "TRACKIO_TOKEN"
)  # fmt: skip
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_PARENT_DEATH_SIGNAL = 1  # of Linux' prctl
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: nothing may be between fork and exec


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; exits with 2 and one line on standard error if the user can mend what is wrong."""
    _set_up_logging()
    try:
        main()
    except SelOrthoError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def use_all_cores(threads: int | None = None) -> None:
    """Give this process its share of the machine's cores (or `threads`).

    `accelerate launch` sets OMP_NUM_THREADS to 1 on a machine without a GPU, which would leave all cores but one idle.
    """
    torch.set_num_threads(threads or max(1, own_cores() // local_processes()))


def own_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch_command(script: str, argv: Sequence[str] | None = None) -> str:
    """The command that started this run, `accelerate launch` included, without a wish to resume and without secrets.

    Args:
        script: name of the script as users type it, if they gave its arguments from Python.
        argv: these arguments; None for those of the command line.
    """
    command = _typed_command() if argv is None else ["accelerate", "launch", script, *argv]
    return without_secrets(shlex.join(_without_resuming(command)))


def say(words: str) -> None:
    """Write to standard error, which may be gone: the first Ctrl-C ends the `tee` of `... 2>&1 | tee log` as well."""
    try:
        sys.stderr.write(words)
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # or the end of the process would fail on what is left to write


def without_secrets(text: str) -> str:
    """The text without access tokens: those in the environment, and whatever looks like one of the Hub."""
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return _HUB_TOKEN.sub("***", text)


def _typed_command() -> list[str]:
    """The outermost command line of this process and those above it that names the script: what somebody typed."""
    own = psutil.Process()
    for process in reversed([own, *own.parents()]):
        try:
            line = process.cmdline()
        except psutil.Error:  # of another user
            continue
        if sys.argv[0] in line:
            names = [os.path.basename(part) for part in line]
            start = next((n for n, name in enumerate(names) if name.startswith(_LAUNCHERS)), None)
            if start is not None and start + 1 < len(line):
                by_python = names[start].startswith("python") and names[start + 1].startswith(_LAUNCHERS)
                start += by_python  # a launcher that is a Python script
                return [names[start], *line[start + 1 :]]
    return ["python", *sys.argv]


def _without_resuming(command: Sequence[str]) -> list[str]:
    name, kept, skip = "--resume_from_checkpoint", [], False
    for part in command:
        if not skip and part != name and not part.startswith(f"{name}="):
            kept.append(part)
        skip = part == name
    return kept


def start_cpu_processes() -> None:
    """Do what `accelerate launch --cpu --num_processes N` asks for, which accelerate itself leaves to mpirun.

    On CPUs it starts a single process, whatever N, and passes N on to nobody: it is read from the command line of the
    parent process. This process then becomes torchrun, which starts the N processes. Returns if there is nothing to do.
    Between machines, gloo would take the interface that the machine's own name leads to: often the loopback.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # it started this process
        end_with_parent()
    started_by_accelerate = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    parent = psutil.Process().parent()
    if not started_by_accelerate or "WORLD_SIZE" in os.environ or parent is None:
        return
    try:
        arguments = torchrun_arguments(parent.cmdline())
    except SelOrthoError as error:
        _exit_with(error)
    if arguments is not None:
        if "--master_addr" in arguments:
            interface = interface_towards(arguments[arguments.index("--master_addr") + 1])
            if interface is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments, *sys.argv])


def torchrun_arguments(command: Sequence[str]) -> list[str] | None:
    """Arguments of torchrun that do what the command line of an `accelerate launch` asks for; None for one process."""
    if "launch" in command:
        given = list(command[command.index("launch") + 1 :])
    else:  # python -m accelerate.commands.launch, or accelerate-launch
        names = ("accelerate.commands.launch", "accelerate-launch", "launch.py")
        start = next((n for n, part in enumerate(command) if part.endswith(names)), None)
        if start is None:
            return None
        given = list(command[start + 1 :])
    launch, _ = launch_command_parser().parse_known_args(given)
    if launch.config_file is not None or (os.path.isfile(default_config_file) and not launch.cpu):  # as accelerate does
        defaults = load_config_from_file(launch.config_file)
        for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            if getattr(launch, name) is None:
                setattr(launch, name, getattr(defaults, name, None))
    processes, machines = launch.num_processes or 1, launch.num_machines or 1
    if processes % machines:
        raise SelOrthoError(
            f"--num_processes {processes} is not a multiple of --num_machines {machines}: it counts the processes of "
            "all machines together"
        )
    if processes <= 1:
        return None
    per_machine = ["--nproc_per_node", str(processes // machines)]
    if machines == 1:
        return ["--standalone", *per_machine]
    return [
        *("--nnodes", str(machines), "--node_rank", str(launch.machine_rank or 0), *per_machine),
        *("--master_addr", str(launch.main_process_ip), "--master_port", str(launch.main_process_port)),
    ]


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches a host name or address; None if there is no way."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in {one.address.split("%")[0] for one in found}), None)


def end_with_parent() -> None:
    """Let this process have SIGTERM when the one that started it ends; on Linux only.

    `accelerate launch` passes no signal on, and a plan that is killed would leave its trainings running.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class _Discreet(logging.Formatter):
    """Says no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def _exit_with(error: SelOrthoError) -> NoReturn:
    line = without_secrets(" ".join(str(error).split()))
    sys.stderr.write(f"{_program()}: error: {line}\n")
    sys.exit(2)


def _program() -> str:
    """The program as users type it: a script's name, or `python -m` and that of a module."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module is not None and module.origin == sys.argv[0]:
        return f"python -m {module.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Discreet("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hf_selortho").setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # of weights that load in a second
