"""A Slurm cluster of one node on this machine, for tests: real daemons, a folder of its own, no systemd, no cgroups.

    apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server
    python -m tests.helpers.slurm_cluster FOLDER      # starts one, prints what a shell has to export, ends with Ctrl-C

With `accounts` slurmdbd and MariaDB run too, so that sacct knows how jobs ended; without, submitit cannot tell.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")
NEEDED_FOR_ACCOUNTS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def lacking(*, accounts: bool) -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in NEEDED + NEEDED_FOR_ACCOUNTS * accounts if shutil.which(name, path=PATH) is None]


class Cluster:
    """The daemons and their folder; `environment` is what a command needs to use the cluster."""

    def __init__(self, folder: Path, *, accounts: bool, cpus: int = 2) -> None:
        self.folder, self.accounts, self.cpus = folder, accounts, cpus
        self.daemons: list[subprocess.Popen] = []
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Start all daemons and return when the node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(exist_ok=True)
        self.folder.chmod(0o755)
        self._munge()
        ports = _free_ports(4)
        (self.folder / "slurm.conf").write_text(self._settings(*ports[:3]))
        if self.accounts:
            self._accounts(ports[2], ports[3])
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D", "-c")
        self._wait(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"), "the node to be idle")

    def ask(self, *command: str) -> str:
        """Return what a command of Slurm prints."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def stop(self) -> None:
        """End what was started, last first."""
        self.ask("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    # ---- parts

    def _munge(self) -> None:
        """Start munge with a key and a socket of its own; it wants folders that nobody else can write."""
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755, exist_ok=True)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in places.items()))
        self._wait(lambda: (folder / "socket").exists(), "munge")

    def _settings(self, controller: int, node: int, database: int) -> str:
        host, user, folder = socket.gethostname().partition(".")[0], getpass.getuser(), self.folder
        store = ["AccountingStorageType=accounting_storage/none"]
        if self.accounts:
            store = ["AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageHost=127.0.0.1"]
            store += [f"AccountingStoragePort={database}", f"AccountingStoragePass={folder}/munge/socket"]
        lines = [
            *("ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmUser={user}", f"SlurmdUser={user}"),
            *(f"SlurmctldPort={controller}", f"SlurmdPort={node}"),
            *("AuthType=auth/munge", f"AuthInfo=socket={folder}/munge/socket", "CryptoType=crypto/munge"),
            # nothing of systemd and cgroups: processes are found by their parents
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none"),
            *("MpiDefault=none", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core", "ReturnToService=2"),
            "SchedulerParameters=sched_interval=1,batch_sched_delay=0",
            # a job that was put back into the queue starts again at once
            *("MinJobAge=300", "KillWait=10", "JobRequeue=1"),
            *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool"),
            *(f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd.pid"),
            *(f"SlurmctldLogFile={folder}/log/slurmctld", f"SlurmdLogFile={folder}/log/slurmd"),
            *store,
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory=4000 State=UNKNOWN",
            f"PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP",
        ]
        return "\n".join(lines) + "\n"

    def _accounts(self, database: int, port: int) -> None:
        """Start MariaDB and slurmdbd, and make this cluster known to them."""
        data, user = self.folder / "data", getpass.getuser()
        install = ["mariadb-install-db", "--no-defaults", f"--user={user}", f"--datadir={data}", "--skip-test-db"]
        install += ["--auth-root-authentication-method=normal"]
        subprocess.run(install, env=os.environ | self.environment, check=True, capture_output=True, timeout=120)
        place = [f"--datadir={data}", f"--socket={data}/socket", f"--pid-file={data}/pid", f"--port={port}"]
        self._daemon("mariadbd", "--no-defaults", f"--user={user}", "--bind-address=127.0.0.1", *place)
        client = ["mariadb", "--no-defaults", "--user=root", "--protocol=tcp", "--host=127.0.0.1", f"--port={port}"]
        ready = "create database if not exists slurm_acct_db"
        self._wait(lambda: self._works(*client, f"--execute={ready}"), "MariaDB")
        lines = [
            *(
                "AuthType=auth/munge",
                f"AuthInfo=socket={self.folder}/munge/socket",
                "DbdHost=localhost",
                "DbdAddr=127.0.0.1",
            ),
            *(f"DbdPort={database}", f"SlurmUser={user}", "StorageType=accounting_storage/mysql"),
            *("StorageHost=127.0.0.1", f"StoragePort={port}", "StorageUser=root", "StorageLoc=slurm_acct_db"),
            *(f"LogFile={self.folder}/log/slurmdbd", f"PidFile={self.folder}/slurmdbd.pid"),
        ]
        (self.folder / "slurmdbd.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "slurmdbd.conf").chmod(0o600)
        self._daemon("slurmdbd", "-D")
        self._wait(lambda: self._works("sacctmgr", "--immediate", "add", "cluster", "test"), "slurmdbd")

    def _works(self, *command: str) -> bool:
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, timeout=60)
        (self.folder / "log" / "last").write_bytes(done.stdout + done.stderr)
        return done.returncode == 0

    def _daemon(self, program: str, *arguments: str) -> None:
        environment = os.environ | self.environment
        with (self.folder / "log" / f"{program}.out").open("wb") as log:
            command = [shutil.which(program, path=PATH) or program, *arguments]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(process)

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [daemon.args[0] for daemon in self.daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (self.folder / "log").iterdir())
                raise RuntimeError(f"waited for {what}; ended: {ended}\n{logs}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def running(folder: Path, *, accounts: bool, cpus: int = 2) -> Iterator[Cluster]:
    """Run a cluster while the block runs."""
    cluster = Cluster(folder, accounts=accounts, cpus=cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    """Run a cluster until Ctrl-C."""
    with running(Path(sys.argv[1]).absolute(), accounts=not lacking(accounts=True)) as cluster:
        print("\n".join(f"export {key}={value}" for key, value in cluster.environment.items()), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
