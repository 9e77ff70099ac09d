"""If one process of a run ends or vanishes, all the others end too, within a minute and with one line that says so.

Nobody else sees to that: torchrun ends the processes of its own machine only, and a process in a long computation, or
blocked in a collective, would not notice for as long as the computation or the collective's timeout lasts.

How processes that are done leave their group without harm is here, too.
"""

from __future__ import annotations

import gc
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist
from accelerate import Accelerator

from ..errors import SelOrthoError

_ALIVE, _DONE = b".", b"d"  # all that is ever said after the greeting
_CAUSE_SECONDS = 2.0  # how long a failed process waits to learn whether a lost one is what made it fail
_WRITE_SECONDS = 5.0  # how long a stderr that nobody reads may keep a process from ending


class ProcessWatch:
    """Ends this process when another process of the run has ended without `finish`, or is silent for `timeout` seconds.

    Every process has a connection to the first one, over which a daemon thread says every `interval` seconds that it is
    alive. The kernel closes the connections of a process that dies, however it dies: the first one notices at once and
    ends, whereby all others notice. Silence is for what closes nothing: a stopped process, a machine without power or
    network. These are plain connections, not collectives of a gloo group: a collective that runs in a thread cannot be
    ended in order, and gloo finds the network between machines by itself only if their names lead to it.

    `with ProcessWatch(hint):` starts and finishes it. After an exception it does not wait for the others: this process
    ends with its own error, which the others notice. That is why `finish` does not belong in a `finally`.

    `timeout` has to be longer than any native call that keeps Python's lock.
    """

    def __init__(self, resume_hint: str, interval: float = 2.0, timeout: float = 45.0) -> None:
        self.resume_hint = " ".join(resume_hint.split())
        self.interval, self.timeout = interval, timeout
        self._is_first = False
        self._peers: list[_Peer] = []  # the first process has all the others, they have the first
        self._thread: threading.Thread | None = None
        self._finished, self._failed, self._lost = threading.Event(), threading.Event(), threading.Event()
        self._message = ""

    def start(self) -> None:
        """Connect the processes and watch them; a collective. A single process has nobody to watch."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        self._is_first = dist.get_rank() == 0
        try:
            self._peers = self._accept() if self._is_first else [self._connect()]
        except OSError as error:
            raise SelOrthoError(
                f"the processes of this run cannot connect to the first one at {_address()}: {error}; does a firewall "
                "block connections between the machines?"
            ) from error
        self._wake, self._woken = socket.socketpair()  # by which the main thread tells the other that a flag is set
        self._thread = threading.Thread(target=self._watch, name="process watch", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait, for as long as it takes, until every process has called this; then they may end in any order."""
        if self._thread is not None:
            self._finished.set()
            self._wake.send(b"!")
            self._thread.join()
            self._thread = None
            self._wake.close()
            self._woken.close()

    def __enter__(self) -> ProcessWatch:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.finish()
        elif self._thread is not None:
            self._failed.set()
            self._wake.send(b"!")
            # when a process is lost, a collective fails with a RuntimeError, often before the thread has noticed
            if isinstance(error, RuntimeError) and self._lost.wait(_CAUSE_SECONDS):
                sys.stderr.write(self._message)

    def _accept(self) -> list[_Peer]:
        """Connections from all other processes; strangers, who do not know the token, are turned away."""
        others, deadline = dist.get_world_size() - 1, time.monotonic() + self.timeout
        token = secrets.token_bytes(16)
        with _listener(others + 64) as listener:
            dist.broadcast_object_list([listener.getsockname()[1], token], src=0)
            peers: list[_Peer] = []
            while len(peers) < others:
                listener.settimeout(max(0.001, deadline - time.monotonic()))
                connection, _ = listener.accept()
                greeting = _read_greeting(connection, len(token) + 4)
                if greeting[:-4] == token:
                    peers.append(_Peer(connection, int.from_bytes(greeting[-4:], "big")))
                else:
                    connection.close()
        return peers

    def _connect(self) -> _Peer:
        """The connection to the first process, which tells all others its port."""
        told: list[int | bytes] = [0, b""]
        dist.broadcast_object_list(told, src=0)
        port, token = told
        assert isinstance(port, int) and isinstance(token, bytes)
        connection = socket.create_connection((_address(), port), timeout=self.timeout)
        connection.sendall(token + dist.get_rank().to_bytes(4, "big"))
        return _Peer(connection, 0)

    def _watch(self) -> None:
        """The thread: listen to the others, tell them how this process is, end with them or because of them."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._all_finished():
                lost = self._tell() or self._hear(selector, self.interval)
                if self._failed.is_set():
                    self._fail(selector, lost)
                if lost is not None:
                    self._end(lost)
        self._leave()

    def _all_finished(self) -> bool:
        """Whether this process is done and the others are; what the first one says, it says for all."""
        return self._finished.is_set() and all(peer.done for peer in self._peers)

    def _tell(self) -> _Peer | None:
        """Tell the others how this process is; who is lost, if anybody is."""
        word = _DONE if self._finished.is_set() and not self._is_first else _ALIVE
        return next((peer for peer in self._peers if not peer.tell(word)), None)

    def _hear(self, selector: selectors.BaseSelector, seconds: float) -> _Peer | None:
        """Listen until the time is up, or a flag is set, or all are done; who is lost, if anybody is.

        Silence is counted in own rounds, not by the clock: a process that was itself stopped blames nobody.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.data is None:
                    self._woken.recv(64)
                    return None
                peer: _Peer = key.data
                if not peer.hear():
                    return peer
            if self._all_finished():
                return None
        for peer in self._peers:
            peer.silent_rounds += 1
        return next((peer for peer in self._peers if peer.silent_rounds * self.interval >= self.timeout), None)

    def _leave(self) -> None:
        """Say the last word, and wait until the others have read it: closing a connection early would destroy it."""
        for peer in self._peers:
            if self._is_first:
                peer.tell(_DONE)
            else:
                peer.hang_up()
        for peer in self._peers:
            peer.wait_until_closed(self.timeout)

    def _end(self, lost: _Peer) -> NoReturn:
        """End at once, as the main thread may be blocked in a collective or in native code.

        No file suffers: all are written under another name first, and readers of logs expect a last line that is cut.
        """
        self._explain(lost)
        writer = threading.Thread(target=sys.stderr.write, args=[self._message], daemon=True)  # as it may block
        writer.start()
        writer.join(_WRITE_SECONDS)
        os._exit(1)

    def _fail(self, selector: selectors.BaseSelector, lost: _Peer | None) -> NoReturn:
        """This process ends with its own error: find out whether a lost process is the reason, and hang nowhere.

        It keeps silent, such that the others do not wait for it should it hang on its way out.
        """
        until = time.monotonic() + self.timeout
        while (left := until - time.monotonic()) > 0:
            lost = lost or self._hear(selector, min(left, self.interval))
            if lost is not None:
                self._explain(lost)
                self._lost.set()
                time.sleep(max(0.0, until - time.monotonic()))
        os._exit(1)

    def _explain(self, lost: _Peer) -> None:
        which = f" (rank {lost.rank})" if self._is_first else ""  # the others know only that the first one is gone
        self._message = (  # below a progress bar
            f"\nanother process of this run{which} has ended or cannot be reached; this one stops too: "
            f"{self.resume_hint}\n"
        )


def leave_process_group(accelerator: Accelerator) -> None:
    """End what `accelerator` has started and destroy the process group, whose threads are gone when this returns.

    They must be: gloo's threads drop the tensors of a collective a moment after it is over, and need Python's lock for
    that (torch 2.13). Where the interpreter ends before they have, the process aborts. And where the group outlives
    its destruction in a `DistributedDataParallel`, the end of that model waits for the threads without letting go of
    the lock: the process hangs. So whoever holds such a model lets go of it before calling this (`Trainer.release`).
    """
    accelerator.free_memory()  # its own references to the models
    gc.collect()  # which the line above does before it lets go of them
    accelerator.end_training()


class _Peer:
    """The connection to another process."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        self.connection, self.rank = connection, rank
        self.silent_rounds, self.done = 0, False
        connection.setblocking(False)

    def tell(self, word: bytes) -> bool:
        """Whether the other end is still there."""
        try:
            self.connection.send(word)
        except BlockingIOError:  # it reads nothing; its silence will tell
            return True
        except OSError:
            return False
        return True

    def hear(self) -> bool:
        """Whether the other end is still there."""
        try:
            words = self.connection.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.silent_rounds = 0
        self.done = self.done or _DONE in words
        return bool(words)

    def hang_up(self) -> None:
        """Unlike `close`, this works even if a forked child has the connection too."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def wait_until_closed(self, timeout: float) -> None:
        """Close after the other end has."""
        self.connection.settimeout(timeout)
        try:
            while self.connection.recv(4096):
                pass
        except OSError:
            pass
        self.connection.close()


def _address() -> str:
    """Where the first process is: the others have reached it there before."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _listener(backlog: int) -> socket.socket:
    """A socket at a free port that takes connections over IPv4 and, where there is one, IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
        except OSError:  # switched off in the kernel
            pass
    return socket.create_server(("", 0), backlog=backlog)


def _read_greeting(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if they do not come soon."""
    connection.settimeout(5.0)
    greeting = b""
    try:
        while len(greeting) < size and (part := connection.recv(size - len(greeting))):
            greeting += part
    except OSError:
        pass
    return greeting
