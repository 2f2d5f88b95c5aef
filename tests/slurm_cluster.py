"""A real Slurm on this machine: a controller, accounting, and nodes in name that all run here.

Debian's packages as they are, started by hand as root, each with files and ports of its own. Only the configuration
must be the system's, in /etc/slurm: Snakemake's plugin takes SLURM_CONF out of its jobs' environment. A node has a
host's name and processes of its own, in namespaces of the kernel, so that no node sees whether another's process lives.
"""

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SYSTEM = Path("/etc/slurm")
MADE_HERE = "# Made by Adder's tests, which remove it.\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd", "sbatch", "sacctmgr")
# In the environment of all that is started, so that nothing of it is left.
MARK = "ADDER_TEST_SLURM"
# Runs a program as on a host of its own, which is gone with all of its processes when this one is killed.
AS_A_HOST = (
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--uts",
    "sh",
    "-c",
    'hostname "$0" && exec "$@"',
)
NODES = ("node1", "node2")
# More than this machine may have: nodes are what their configuration says.
CPUS, MEMORY_MB, GPUS = 32, 64_000, 2
ACCOUNT = "lab"


def missing() -> str | None:
    """Why there can be no Slurm here, in a sentence; None where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a Slurm can only be started by root"
    if absent := [name for name in PROGRAMS if _program(name) is None]:
        return f"Debian's slurm-wlm, munge, slurmdbd and mariadb-server aren't installed here: no {', '.join(absent)}"
    if any(_of_others(SYSTEM / name) for name in ("slurm.conf", "gres.conf")):
        return f"this machine has a Slurm of its own in {SYSTEM}"
    if subprocess.run([*AS_A_HOST, NODES[0], "true"], capture_output=True, check=False).returncode:
        return "root may make no namespaces here, in which nodes are hosts of their own"
    return None


class Cluster:
    """A running Slurm: `sinfo` and the others talk to it."""

    def __init__(self, room: Path):
        self.room = room
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all of it. Raises AssertionError, with the log, for a part that doesn't come up."""
        (self.room / "log").mkdir()
        (self.room / "state").mkdir()
        ports = iter(_free_ports(4 + len(NODES)))
        database, accounting, controller = next(ports), next(ports), next(ports)
        host = platform.node()
        SYSTEM.mkdir(exist_ok=True)
        nodes = "".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={next(ports)} CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN\n"
            for node in NODES
        )
        _write(
            SYSTEM / "slurm.conf",
            SLURM.format(room=self.room, host=host, controller=controller, dbd=accounting) + nodes,
        )
        # Device files of no meaning: what a job sees is CUDA_VISIBLE_DEVICES.
        devices = "".join(f"Name=gpu File={device}\n" for device in ("/dev/zero", "/dev/null")[:GPUS])
        _write(SYSTEM / "gres.conf", devices)
        _write(self.room / "slurmdbd.conf", SLURMDBD.format(room=self.room, port=accounting, database=database))
        key = self.room / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

        munge = [f"--{name}-file={self.room}/munge.{name}" for name in ("key", "pid", "seed", "log")]
        self._begin("munged", "--foreground", "--force", f"--socket={self.room}/munge.socket", *munge)
        # Nobody but this machine's root reaches it, so it needs no users; slurmdbd's procedures need the tables.
        install = ("mariadb-install-db", "--no-defaults", f"--datadir={self.room}/db", "--user=root", "--skip-test-db")
        self.command(*install, "--auth-root-authentication-method=normal")
        self._begin(
            "mariadbd", "--no-defaults", f"--datadir={self.room}/db", f"--socket={self.room}/mysql.socket",
            f"--pid-file={self.room}/mysql.pid", f"--port={database}", "--bind-address=127.0.0.1", "--user=root",
            "--skip-grant-tables", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        self._until(lambda: _listens(database), "mariadbd")
        self._begin("slurmdbd", "-D", SLURM_CONF=f"{self.room}/slurm.conf")
        self._until(lambda: _listens(accounting), "slurmdbd")
        for what in (["cluster", "adder"], ["account", ACCOUNT], ["user", "root", f"account={ACCOUNT}"]):
            self.command("sacctmgr", "-i", "add", *what)
        self._begin("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split().count("idle") >= 2, "slurmctld")

    def start_node(self, node: str) -> None:
        """Start a node, for the first time or again."""
        slurmd = _program("slurmd")
        assert slurmd is not None
        self._begin(*AS_A_HOST, node, slurmd, "-D", "-N", node, name=node)

    def lose_node(self, node: str) -> None:
        """Kill a node with all that runs on it, as a loss of power does, and let the controller know."""
        lost = self.daemons.pop(node)
        lost.kill()
        lost.wait()
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    def bring_node_back(self, node: str) -> None:
        """The node after lose_node, ready for jobs."""
        self.start_node(node)
        # It comes back by registering. An update of its state before that would only delay it.
        self._until(lambda: "State=IDLE" in self.command("scontrol", "show", "node", node), node)

    def command(self, *arguments: str) -> str:
        """What a command of Slurm's says. Raises AssertionError where it fails."""
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Jobs that wait or run: id, state, reason, node, and the rule and wildcards that they are for."""
        rows = self.command("squeue", "-h", "-o", "%i|%T|%r|%N|%k").splitlines()
        return [dict(zip(("id", "state", "reason", "node", "comment"), row.split("|"), strict=True)) for row in rows]

    @contextlib.contextmanager
    def paused(self, job: str) -> Iterator[list[int]]:
        """Have the stage of a running job stand still, for as long as other things take, on machines of any speed.

        Gives its processes.
        """
        stages = [
            process
            for process in _marked("SLURM_JOB_ID", job)
            if b".snakemake/scripts/" in Path(f"/proc/{process}/cmdline").read_bytes()
        ]
        assert stages, f"no process of job {job}"
        for process in stages:
            os.kill(process, signal.SIGSTOP)
        try:
            yield stages
        finally:
            for process in stages:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    @contextlib.contextmanager
    def closed(self, partition: str) -> Iterator[None]:
        """Have no job of a partition start; those that run go on. So what waits can be looked at at any speed."""
        self.command("scontrol", "update", f"partitionname={partition}", "state=down")
        try:
            yield
        finally:
            self.command("scontrol", "update", f"partitionname={partition}", "state=up")

    def stop(self) -> None:
        """End all of it, and leave nothing."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired, OSError):
            self.command("scancel", "--user=root")
        for name, daemon in reversed(self.daemons.items()):
            daemon.kill() if name in NODES else daemon.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        for process in _marked(MARK, str(self.room)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in self.daemons.values():
            daemon.wait()

    def _begin(self, program: str, *arguments: str, name: str = "", **variables: str) -> None:
        path = _program(program)
        assert path is not None
        log = (self.room / "log" / f"{name or program}.out").open("ab")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {MARK: str(self.room), **variables}
        self.daemons[name or program] = subprocess.Popen(
            [path, *arguments], stdout=log, stderr=log, env=environment, cwd=self.room, start_new_session=True
        )

    def _until(self, there: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + 300
        while not there():
            dead = name in self.daemons and self.daemons[name].poll() is not None
            assert not dead and time.monotonic() < deadline, f"{name} didn't come up:\n{self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in self.room.glob("log/*"))


@contextlib.contextmanager
def running(room: Path) -> Iterator[Cluster]:
    """Have a Slurm, whose files are in the empty folder `room`; one at a time on a machine."""
    with open("/tmp/.adder-test-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cluster = Cluster(room)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            for name in ("slurm.conf", "gres.conf"):
                if not _of_others(SYSTEM / name):
                    (SYSTEM / name).unlink(missing_ok=True)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _of_others(file: Path) -> bool:
    return file.exists() and not file.read_text(errors="replace").startswith(MADE_HERE)


def _write(file: Path, text: str) -> None:
    file.write_text(MADE_HERE + text)
    file.chmod(0o600 if file.name == "slurmdbd.conf" else 0o644)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def was_sent(number: signal.Signals, process: int) -> bool:
    """Whether a process that stands still was sent a signal: that waits for it to go on, or has ended it (a shell)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    status = dict(line.split(":", 1) for line in lines)
    return bool((int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) & 1 << number - 1)


def _marked(name: str, value: str) -> list[int]:
    """Processes whose environment has the variable."""
    wanted, found = f"{name}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


SLURM = """ClusterName=adder
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is put back into the queue waits for so long before it starts again; 120 s by itself. A node that needs
# longer to start a job refuses it.
AuthInfo=socket={room}/munge.socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={room}/munge.socket
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
ReturnToService=2
SlurmctldPort={controller}
SlurmctldPidFile={room}/slurmctld.pid
SlurmdPidFile={room}/slurmd-%n.pid
SlurmctldLogFile={room}/log/slurmctld.log
SlurmdLogFile={room}/log/slurmd-%n.log
StateSaveLocation={room}/state
SlurmdSpoolDir={room}/spool-%n
SlurmdTimeout=300
KillWait=30
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=gpu Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL MaxTime=20 State=UP
"""

SLURMDBD = """AuthType=auth/munge
AuthInfo=socket={room}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={room}/log/slurmdbd.log
PidFile={room}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=root
StorageLoc=slurm_acct_db
"""
