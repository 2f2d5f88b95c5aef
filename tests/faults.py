"""Make everything go wrong in a whole workflow, again and again, and see that it ends with the same bytes.

Usage: python tests/faults.py [KIND=NUMBER …] [--seed N] [--seconds N]
       (all kinds without any: kills=1000 full=400 damage=300 clock=20 starts=60)

kills: a stage is killed with -9 and started again until it finishes. Half of the kills come at a random moment of the
    stage's time, half at one of its operations on files (opened, renamed, linked, removed), so that the milliseconds
    between two renames are met as often as the training.
full: the disk is full after a random number of bytes. The results are on a file system of memory where one can be
    mounted; elsewhere no file may grow above a random size. One sentence says so; then there is room again.
damage: a file of a finished stage or of what is kept of it is cut short, has a bit turned round or is gone, with its
    time stamp put back or not. The next start names it and makes it anew.
clock: the clock is moved, forth or back by up to ten years, for a stage and for what is there.
starts: two start the same stage, and one of them may be killed.

After each of them the stage's files must be those of a run that nobody disturbed, byte for byte (but for the seconds
that a stage tells), with nothing beside them that a killed process has left. Tokens stand in the environment, in an
address and with a judge all along, and in no file.
"""

import argparse
import contextlib
import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflow_scripts")]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from adder.workflow import run_folder, stage_runner  # noqa: E402 - the paths above come first
from fault_workflow import Workflow, workflow  # noqa: E402

WHOLE = {"kills": 1000, "full": 400, "damage": 300, "clock": 20, "starts": 60}
MOST_BROKEN = 10  # promises, before it is no use to go on
IN_A_LIFE = 5  # kills before a stage is let finish
FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
DAMAGES = ("cut short", "bit turned", "gone")


class Done:
    """What was done so far, by kind and stage."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.broken: list[str] = []

    def add(self, kind: str, stage: str) -> None:
        """Count one."""
        self.counts.setdefault(kind, Counter())[stage] += 1

    def of(self, kind: str) -> Counter[str]:
        """By stage."""
        return self.counts.setdefault(kind, Counter())

    def least(self, kind: str, stages: list[str]) -> str:
        """The stage that has had the fewest of a kind."""
        return min(stages, key=lambda name: (self.of(kind)[name], stages.index(name)))


def at_operation(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """A fault that acts at the `number`-th operation on files."""

    def install() -> None:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            # Files that are only read don't count: they leave nothing.
            if event not in FILE_EVENTS or (event == "open" and not _writes(arguments)):
                return
            count += 1
            if count == number:
                act()

        sys.addaudithook(hook)

    return install


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def operations(flow: Workflow, name: str) -> int:
    """How many operations on files a stage makes, undisturbed."""
    reading, writing = os.pipe()

    def count() -> None:
        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in FILE_EVENTS and (event != "open" or _writes(arguments)):
                os.write(writing, b".")

        sys.addaudithook(hook)

    os.set_blocking(reading, False)
    flow.forget(name)
    child = flow.begin(name, count)
    found = 0
    while True:
        status = child.wait(0.05)
        with contextlib.suppress(BlockingIOError):
            found += len(os.read(reading, 1 << 16))
        if status is not None:
            break
    with contextlib.suppress(BlockingIOError):
        found += len(os.read(reading, 1 << 16))
    os.close(reading)
    os.close(writing)
    assert status == 0, flow.shown()
    return found


class Kills:
    """Kill -9 at any moment."""

    def __init__(self, flow: Workflow, chance: random.Random):
        self.flow, self.chance = flow, chance
        self.operations: dict[str, int] = {}

    def __call__(self, name: str, done: Done, left: int) -> None:
        """A life of a stage: killed until it has had enough, then let finish."""
        flow, chance = self.flow, self.chance
        at_operations = [chance.random() < 0.5 for _ in range(min(IN_A_LIFE, left))]
        if any(at_operations) and name not in self.operations:
            self.operations[name] = operations(flow, name)
        flow.forget(name)
        for is_at_operation in at_operations:
            if is_at_operation:
                child = flow.begin(name, at_operation(chance.randint(1, self.operations[name]), kill_itself))
                status = child.wait()
                child.kill()  # what it had started
            else:
                child = flow.begin(name)
                status = child.wait(chance.uniform(0, flow.lasts[name]))
                status = child.kill() if status is None else status
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"{name} failed by itself ({status}):\n{flow.shown()}"
            done.add("kills", name)
        flow.finish(name)
        flow.assert_whole(name)


class FullDisk:
    """The disk has no room left after so many bytes."""

    def __init__(self, flow: Workflow, chance: random.Random):
        self.flow, self.chance = flow, chance
        self.is_mounted = os.path.ismount(flow.results)
        records = {name: stage_runner.read_record(flow.folder_of(name)) for name in flow.stages}
        self.sizes = {
            name: [known["bytes"] for known in record["outputs"].values()] for name, record in records.items() if record
        }

    def __call__(self, name: str, done: Done, left: int) -> None:
        """One start without room, one with."""
        flow = self.flow
        flow.forget(name)
        with self._filled(name) if self.is_mounted else contextlib.nullcontext(self._no_large_files(name)) as fault:
            child = flow.begin(name, fault)
            status = child.wait()
            shown = flow.shown()
        if status == 0:  # there was just enough
            flow.assert_whole(name)
            return
        assert status == 1, f"{name} ended with status {status}:\n{shown}"
        last = shown.strip().splitlines()[-1]
        assert "Traceback" not in shown and ("room" in last or "full" in last), f"{name} says:\n{shown}"
        done.add("full", name)
        flow.finish(name)
        flow.assert_whole(name)

    @contextlib.contextmanager
    def _filled(self, name: str) -> Iterator[Callable[[], None]]:
        # More than what stays: of checkpoints and candidates there is more for a while.
        free = self.chance.randrange(0, 2 * sum(size + 4096 for size in self.sizes[name]))
        filler = self.flow.results / "filler"
        room = shutil.disk_usage(self.flow.results).free
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, room - free))
        try:
            yield lambda: None
        finally:
            filler.unlink()

    def _no_large_files(self, name: str) -> Callable[[], None]:
        limit = self.chance.randrange(0, max(self.sizes[name]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


class Damage:
    """A file is damaged between two starts."""

    def __init__(self, flow: Workflow, chance: random.Random):
        self.flow, self.chance = flow, chance

    def __call__(self, name: str, done: Done, left: int) -> None:
        """Damage one file of a stage, or of what is kept of it while the stage's folder is lost."""
        flow, chance = self.flow, self.chance
        folder = flow.folder_of(name)
        record = stage_runner.read_record(folder)
        assert record is not None
        kept = flow.results / "cache" / record["stage"] / record["fingerprint"]
        of_kept = chance.random() < 0.3
        files = [path for path in sorted((kept if of_kept else folder).rglob("*")) if path.is_file()]
        damaged = chance.choice(files)
        damage(damaged, chance)
        if of_kept:
            shutil.rmtree(folder)
        said, ran = flow.start()
        assert name in ran, f"{damaged}: damaged, and {name} wasn't made anew (ran {ran}; said {said})"
        is_gone = damaged.name == stage_runner.RECORD  # then there is no stage, and nothing to say
        assert of_kept or is_gone or any(str(damaged) in sentence or str(folder) in sentence for sentence in said), said
        for other in flow.stages:
            flow.assert_whole(other)
        assert not flow.start()[1] and not run_folder.verify(flow.results / "default")
        done.add("damage", name)


def damage(path: Path, chance: random.Random) -> None:
    """Cut a file short, turn one of its bits round or remove it; its time stamp may be put back."""
    how, stat = chance.choice(DAMAGES), path.stat()
    if how == "gone" or not stat.st_size:
        path.unlink()
        return
    with contextlib.suppress(PermissionError):
        path.chmod(0o644)
    if how == "cut short":
        os.truncate(path, chance.randrange(stat.st_size))
    else:
        place = chance.randrange(stat.st_size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    if chance.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class Clock:
    """The clock is moved."""

    def __init__(self, flow: Workflow, chance: random.Random):
        self.flow, self.chance = flow, chance

    def __call__(self, name: str, done: Done, left: int) -> None:
        """A stage computed at another time; then all time stamps of the results moved: nothing is made anew."""
        flow, years = self.flow, self.chance.uniform(-10, 10)
        seconds = years * 365 * 86400

        def move() -> None:
            real, real_ns = time.time, time.time_ns
            time.time = lambda: real() + seconds
            time.time_ns = lambda: real_ns() + int(seconds * 1e9)

        flow.forget(name)
        child = flow.begin(name, move)
        assert child.wait() == 0, flow.shown()
        flow.start()
        for path in flow.results.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                stat = path.stat()
                with contextlib.suppress(OSError):
                    os.utime(path, ns=(stat.st_atime_ns, max(1, stat.st_mtime_ns + int(seconds * 1e9))))
        assert not flow.start()[1], "with other time stamps something is made anew"
        for other in flow.stages:
            flow.assert_whole(other)
        done.add("clock", name)


class Starts:
    """Two at once."""

    def __init__(self, flow: Workflow, chance: random.Random):
        self.flow, self.chance = flow, chance

    def __call__(self, name: str, done: Done, left: int) -> None:
        """Both end well with one result, or the one that lives does."""
        flow, chance = self.flow, self.chance
        flow.forget(name)
        first = flow.begin(name)
        time.sleep(chance.uniform(0, flow.lasts[name]))
        second = flow.begin(name)
        ends = [second]
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0, flow.lasts[name] / 2))
            first.kill()
        else:
            ends.append(first)
        statuses = [child.wait() for child in ends]
        assert statuses == [0] * len(ends), f"{name}: {statuses}:\n{flow.shown()}"
        flow.assert_whole(name)
        done.add("starts", name)


KINDS: dict[str, Callable[[Workflow, random.Random], Callable[[str, Done, int], None]]] = {
    "kills": Kills,
    "full": FullDisk,
    "damage": Damage,
    "clock": Clock,
    "starts": Starts,
}


def run(
    folder: Path,
    wanted: dict[str, int],
    seed: int = 0,
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> Done:
    """Make as many faults of each kind as `wanted`, or as fit into `seconds`; what was made and came out wrong."""
    done, end = Done(), time.monotonic() + seconds
    with on_memory(folder / "results"), workflow(folder) as flow:
        flow.run_all()
        flow.start()
        say("undisturbed: " + ", ".join(f"{name} {lasts:.1f} s" for name, lasts in flow.lasts.items()))
        stages = list(flow.stages)
        for kind, number in wanted.items():
            chance = random.Random(f"{seed} {kind}")
            make = KINDS[kind](flow, chance)
            began, tries = time.monotonic(), 0
            while (made := done.of(kind).total()) < number and time.monotonic() < end and tries < 3 * number + 40:
                tries += 1
                name = stages[tries % len(stages)] if kind == "full" else done.least(kind, stages)
                try:
                    make(name, done, min(number - made, max(1, number // len(stages))))
                except AssertionError as error:
                    done.broken.append(f"{kind} of {name}: {error}")
                    say(done.broken[-1])
                    if len(done.broken) > MOST_BROKEN:
                        return done
                    done.add(kind, name)
                    flow.forget(name)
                    flow.start()
            flow.start()  # what tells seconds may be another now
            flow.assert_no_secrets()
            say(f"{kind}: {done.of(kind).total()} {dict(done.of(kind))}, {time.monotonic() - began:.0f} s")
    return done


@contextlib.contextmanager
def on_memory(folder: Path) -> Iterator[None]:
    """Mount a file system of 64 MB of memory at `folder` where this process may."""
    folder.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    is_mounted = libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=64m") == 0
    assert is_mounted or ctypes.get_errno() in (errno.EPERM, errno.EACCES, errno.ENODEV), os.strerror(
        ctypes.get_errno()
    )
    try:
        yield
    finally:
        if is_mounted:
            libc.umount2(str(folder).encode(), 2)  # MNT_DETACH


def main() -> None:
    """Run what the command line asks for and say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND=NUMBER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    pairs = [kind.split("=") for kind in asked.kinds]
    wanted = {kind: int(number) for kind, number in pairs} or WHOLE
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        done = run(Path(scratch) / "w", wanted, asked.seed, asked.seconds, lambda text: print(text, flush=True))
    if done.broken:
        sys.exit(f"{len(done.broken)} came out wrong")
    made = ", ".join(f"{counts.total():,} {kind}" for kind, counts in done.counts.items())
    print(f"{made}: every result the same, seed {asked.seed}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
