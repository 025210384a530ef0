"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(path: Path, *, busy: Callable[[str], None]) -> Generator[None]:
    """Hold the lock file `path`. While another process holds it, `busy(who)` is called once: it may raise; if not, wait.

    The lock is the kernel's (`flock`), so that it is free the moment its holder is dead, however it died: no claim is ever
    stale, and no process number is mistaken for another's. The file itself only says who holds it; a file that is left
    over means nothing. A file system without locks, and Windows, are trusted to have one process.
    """
    opened = _locked(path, busy)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(opened)


def name_of(process: int) -> str:
    """What a lock file says of a process of this machine that holds it."""
    return f"process {process} on {socket.gethostname()}"


def _locked(path: Path, busy: Callable[[str], None]) -> int:
    told = False
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _taken(opened, wait=False):
                if not told:
                    busy(os.read(opened, 200).decode(errors="replace") or "another process")
                    told = True
                _taken(opened, wait=True)
            if _is(path, opened):  # and not a file that its last holder has removed meanwhile
                with suppress(OSError):  # a full disk is no reason not to hold the lock
                    os.ftruncate(opened, 0)
                    os.pwrite(opened, name_of(os.getpid()).encode(), 0)
                return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)


def _taken(opened: int, *, wait: bool) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return True


def _is(path: Path, opened: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(opened))
    except FileNotFoundError:
        return False
