"""Noticing that a rank is gone: dead with its node, frozen, or cut off from the network.

A process that is killed is noticed on its own node at once. On other nodes, and when a process only
hangs, a collective would wait for ten minutes or more. So every rank beats like a heart in the
store of the launch and listens to the others; whoever has not been heard for :data:`LOST_AFTER`
seconds is named, and the listener ends.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import distributed

BEAT = 2.0
"""Seconds between two beats."""
LOST_AFTER = 30.0
"""Seconds of silence after which a rank counts as lost."""
DONE = b"done"


class RollCall:
    """One rank's beat, and its ear for all others."""

    def __init__(self, store: Any, rank: int, size: int, *, lost_after: float = LOST_AFTER) -> None:
        self.store = store
        self.rank = rank
        self.lost_after = lost_after
        self.others = [other for other in range(size) if other != rank]
        self.beats = 0
        now = time.monotonic()
        self.heard = dict.fromkeys(self.others, (b"", now))
        self.hosts = dict.fromkeys(self.others, "its host has not been heard")
        self.answered = now

    def beat(self) -> None:
        """Tell the others that this rank lives, and where."""
        self.beats += 1
        self.store.set(str(self.rank), f"{self.beats} {socket.gethostname()}")

    def end(self) -> None:
        """Tell the others that this rank has nothing left to do."""
        self.store.set(str(self.rank), DONE)

    def missing(self) -> str | None:
        """Say who has been silent for too long; None while everybody is heard."""
        now = time.monotonic()
        for other in self.others:
            said = self.store.get(str(other)) if self.store.check([str(other)]) else b""
            if said != self.heard[other][0]:
                self.heard[other] = said, now
                self.hosts[other] = said.decode().partition(" ")[2]
        for other, (said, since) in self.heard.items():
            if said != DONE and now - since > self.lost_after:
                where = self.hosts[other]
                return f"rank {other} ({where}) is lost: nothing heard for {now - since:.0f} s"
        return None

    def round(self) -> str | None:
        """Beat and listen once; a store that does not answer is where rank 0's node was."""
        now = time.monotonic()
        try:
            self.beat()
            found = self.missing()
        except distributed.DistError:
            if now - self.answered < self.lost_after:
                return None
            silent = now - self.answered
            return f"the node where the ranks meet is lost: no answer for {silent:.0f} s"
        self.answered = now
        return found


@contextmanager
def answering(
    lost: Callable[[str], None], *, beat: float = BEAT, lost_after: float = LOST_AFTER
) -> Iterator[None]:
    """Take part in the roll call inside the block; ``lost`` is told once who is missing.

    Needs a process group. ``lost`` is called in a thread, while the main one may wait for ever.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    call = RollCall(_store(lost_after), rank, size, lost_after=lost_after)
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            message = call.round()
            if message and not over.is_set():
                lost(message)
                return
            over.wait(beat)

    threading.Thread(target=_end_with_parent, args=(over, beat), daemon=True).start()
    thread = threading.Thread(target=go_on, name="roll call", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * beat)
        with _unanswered():
            call.end()


def _end_with_parent(over: threading.Event, beat: float) -> None:
    """Ask this process to stop once its launcher has been killed and can no longer do so."""
    parent = os.getppid()
    while not over.wait(beat):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


@contextmanager
def _unanswered() -> Iterator[None]:
    try:
        yield
    except distributed.DistError:  # the store has gone with the node that held it
        return


def _store(timeout: float) -> Any:
    """Open a connection of our own to the launch's store: one connection serves one thread."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(  # type: ignore[attr-defined] # public, but not in __all__
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )
    return distributed.PrefixStore("unlearn/roll-call", store)  # type: ignore[attr-defined]
