"""One process at a time: one workflow writes to the results, one job works on a stage, one fetches a file.

A lock is a lease: a file that is made atomically, says who has it (host, process, batch job), and is renewed for as
long as its holder lives. So it holds between hosts as well, where locks of the kernel (`flock`) often end at a host's
border without a word. A holder on this machine that was killed is known by its process id, one elsewhere by a lease
that is no longer renewed.

Whoever takes over from a dead holder makes the file <lock>.<the dead one's token>: only one can, and the holder is
always the last of that chain. Nothing is ever replaced, so that nobody can take a living holder's lease for the dead
one's that was there before.
"""

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from adder.core.errors import UserError

BEAT = 10.0  # seconds between renewals
# A holder elsewhere is dead whose lease is so old by the file server's clock, and wasn't renewed before our eyes for so
# long by ours: neither a clock that jumps nor a file server that stalls is enough.
STALE = 90.0
WATCHED = 25.0
LONGEST_WAIT = 1.0  # seconds between two looks
EXIT_STATUS = 75  # of a process whose lease went to another


@dataclass(frozen=True)
class _Holder:
    """Who has a lease. machine: where process ids mean the same; started: tells a process from a later one's id."""

    name: str
    process: int
    host: str
    machine: str
    started: str
    job: str
    token: str

    @classmethod
    def this_process(cls, name: str) -> "_Holder":
        return cls(
            name=name,
            process=os.getpid(),
            host=socket.gethostname(),
            machine=_machine(),
            started=_state_of(os.getpid())[1],
            job=os.environ.get("SLURM_JOB_ID", ""),
            token=secrets.token_hex(8),
        )

    def __str__(self) -> str:
        if not self.process:
            return self.name
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.name} (process {self.process} on {self.host}{job})"

    @property
    def is_here(self) -> bool:
        """Whether this process can see the holder's."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether the process is there, for one that is_here."""
        state, started = _state_of(self.process)
        return state not in ("", "Z", "X") and started == self.started


@dataclass(frozen=True)
class _Seen:
    """A lease of somebody's, as it was looked at; `renewed`: its time stamp in ns."""

    place: Path
    holder: _Holder
    renewed: int


class Lease:
    """A lock that this process has, renewed until it is closed."""

    def __init__(self, path: Path, place: Path, holder: _Holder):
        self.path, self.place, self.holder = path, place, holder
        self._over = threading.Event()
        self._renewals = threading.Thread(target=self._renew, daemon=True, name=f"lease {path.name}")
        self._renewals.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Let others have it."""
        atexit.unregister(self.close)
        if self._over.is_set() or os.getpid() != self.holder.process:  # a forked process has it not
            return
        self._over.set()
        self._renewals.join()
        chain = [seen.place for seen in _chain(self.path)]
        if self.place in chain:  # the first one first: what is left of a chain without it belongs to nobody
            for place in chain:
                place.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(BEAT):
            try:
                last = _last(self.path)
                if last is None or last.holder.token != self.holder.token:
                    self._lost(f"it is {last.holder}'s now" if last else f"{self.path} is gone")
                os.utime(self.place)
                renewed = time.monotonic()
            except OSError as error:  # the file server's trouble may pass
                if time.monotonic() - renewed > STALE:
                    self._lost(f"it couldn't be renewed: {error}")

    def _lost(self, why: str) -> None:
        """End at once: another may be writing to the same files."""
        if self._over.is_set():
            return
        with contextlib.suppress(OSError):
            print(
                f"{self.path}: {self.holder} was not heard of for too long; {why}: ending", file=sys.stderr, flush=True
            )
        os._exit(EXIT_STATUS)


def take(folder: Path, name: str) -> Lease:
    """Lock `folder`/.lock until the lease is closed or this process ends. `name` is what this process is to others.

    Raises UserError, which names the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def busy(holder: _Holder) -> None:
        lost = "" if holder.is_here else f"; if {holder.host} is lost, start again in two minutes"
        raise UserError(f"{holder} is writing to {folder}/; wait for it, or end it{lost}")

    return _acquire(folder / ".lock", name, busy)[0]


@contextlib.contextmanager
def held(path: Path, busy: Callable[[str], object]) -> Iterator[bool]:
    """Have the file `path` locked, waiting for whoever has it; yield whether another had it. The file is gone after.

    `busy` is called with who has it, once, before waiting; it may raise instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    told: list[str] = []

    def tell(holder: _Holder) -> None:
        if not told:
            told.append(str(holder))
            busy(told[0])

    lease, waited = _acquire(path, "another process", tell)
    with lease:
        yield waited


def _acquire(path: Path, name: str, busy: Callable[[_Holder], object]) -> tuple[Lease, bool]:
    """The lease of `path`, and whether it was waited for; `busy` is told of a living holder at every look."""
    own = _Holder.this_process(name)
    waited, pause = False, 0.005
    since, seen_before = time.monotonic(), None
    while True:
        last = _last(path)
        if last is None:
            if _make(path, own):
                return Lease(path, path, own), waited
            continue
        if last != seen_before:
            since, seen_before = time.monotonic(), last
        if last.holder.is_here:
            silent = dead = not last.holder.is_alive
        else:
            silent = _age(last) >= STALE
            dead = silent and time.monotonic() - since >= WATCHED
        if dead:
            place = _successor(path, last)
            if _make(place, own):
                if _is_last(path, own):
                    return Lease(path, place, own), waited
                place.unlink(missing_ok=True)  # the dead one's was cleared away meanwhile
            continue
        if not silent:
            busy(last.holder)
            waited = True
        time.sleep(pause)
        pause = min(LONGEST_WAIT, pause * 1.5)


def _chain(path: Path) -> Iterator[_Seen]:
    """The leases of `path`, each of which took over from the one before."""
    place = path
    while (seen := _look(place)) is not None:
        yield seen
        place = _successor(path, seen)


def _last(path: Path) -> _Seen | None:
    """The lease of whoever has `path`; None where nobody has."""
    chain = list(_chain(path))
    return chain[-1] if chain else None


def _is_last(path: Path, own: _Holder) -> bool:
    last = _last(path)
    return last is not None and last.holder.token == own.token


def _successor(path: Path, seen: _Seen) -> Path:
    return path.with_name(f"{path.name}.{seen.holder.token}")


def _make(place: Path, own: _Holder) -> bool:
    """Make a lease's file, whole and at once; False where there is one."""
    text = f"{own}\n{json.dumps(asdict(own))}\n"
    ready = place.with_name(f"{place.name}.{own.token}.new")
    try:
        ready.write_text(text)
        try:
            os.link(ready, place)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _fill(place, text)
        return True
    finally:  # also where the disk is full
        ready.unlink(missing_ok=True)


def _fill(place: Path, text: str) -> bool:
    """Make a lease's file at once and fill it right after; False where there is one."""
    try:
        file = place.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        place.unlink(missing_ok=True)
        raise
    return True


def _look(place: Path) -> _Seen | None:
    """A lease as it is now; what can't be read, such as one that is being filled, is somebody's elsewhere."""
    try:
        with place.open() as file:  # opened anew each time, which makes NFS ask the server
            status = os.fstat(file.fileno())
            text = file.read()
    except FileNotFoundError:
        return None
    first, _, rest = text.partition("\n")
    try:
        holder = _Holder(**json.loads(rest))
    except (ValueError, TypeError):
        holder = _Holder(first or "another process", 0, "", "", "", "", f"{status.st_ino:x}")
    return _Seen(place, holder, status.st_mtime_ns)


def _age(seen: _Seen) -> float:
    """Seconds since a lease was renewed, by the clock that its time stamp is of: the file server's."""
    probe = seen.place.with_name(f"{seen.place.name}.{secrets.token_hex(4)}.now")
    probe.touch()
    try:
        return (probe.stat().st_mtime_ns - seen.renewed) / 1e9
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """Where a process id means the same: this boot of this machine, and the container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _state_of(process: int) -> tuple[str, str]:
    """(state, time of start) of a process here; the state is "" where there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return "", ""
    except ProcessLookupError:
        return "", ""
    try:
        os.kill(process, 0)  # without /proc, as on macOS
    except ProcessLookupError:
        return "", ""
    except PermissionError:
        pass
    return "?", ""
