"""A real Slurm of one node, private to the tests: own folder, ports, key and configuration, nothing of the system's.

Run as root (slurmd starts jobs as their owner). The packages are Debian's slurmctld, slurmd, slurm-client and munge.
Nothing here installs by itself; once, as root on Debian: python3 -m tests.cluster.one_node_slurm --install
To try things by hand, run any command inside one: python3 -m tests.cluster.one_node_slurm bash
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")

CONFIGURATION = """
ClusterName=koala-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# No cgroups, no binding, no accounting: a container has none of what they need.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
# React at once: jobs here live for seconds.
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
MinJobAge=300
KillWait=5
ReturnToService=2
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
"""


class CannotStart(RuntimeError):
    """Slurm cannot run here; the message says why."""


def install() -> None:
    """Installs Debian's packages, unless Slurm's programs are there. Only ever at somebody's request.

    Raises:
        CannotStart: the packages cannot be had.
    """
    if all(map(shutil.which, PROGRAMS)):
        return
    if not shutil.which("apt-get"):
        raise CannotStart("no apt-get to install Slurm with")
    quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True, "text": True}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(command, timeout=240, **quiet)
    if done.returncode != 0:
        raise CannotStart(f"apt-get could not install Slurm: {done.stderr.strip().splitlines()[-1:]}")


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class OneNodeSlurm:
    """Starts munged, slurmctld and slurmd in ``folder``; ``environment`` makes any client command talk to them.

    Raises:
        CannotStart: not root, programs are missing, a daemon ends, or the node is not idle within 30 seconds (with the
            ends of the logs).
    """

    def __init__(self, folder: Path):
        if os.geteuid() != 0:
            raise CannotStart("a private Slurm needs root")
        if missing := [program for program in PROGRAMS if not shutil.which(program)]:
            install = "python3 -m tests.cluster.one_node_slurm --install (Debian, root)"
            raise CannotStart(f"no {', '.join(missing)}: {install}")
        self.folder, self.daemons = folder, []
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                folder=folder,
                host=socket.gethostname().split(".")[0],
                controller_port=free_port(),
                node_port=free_port(),
            )
        )
        shutil.copy(Path(__file__).with_name("sacct"), folder / "bin/sacct")
        self.environment = os.environ | {
            "SLURM_CONF": str(configuration),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        try:
            self._start(
                "munged",
                "--foreground",
                "--force",
                "--num-threads=2",
                f"--key-file={key}",
                f"--socket={folder}/munge.socket",
                f"--pid-file={folder}/munged.pid",
                f"--seed-file={folder}/munge.seed",
                f"--log-file={folder}/munged.log",
            )
            self._wait_for_daemons(lambda: (folder / "munge.socket").exists())
            self._start("slurmctld", "-D", "-i")
            self._start("slurmd", "-D", "-N", socket.gethostname().split(".")[0])
            self._wait_for_daemons(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).stdout.strip() == "idle")
        except BaseException:
            self.stop()
            raise

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as output:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    def wait(self, ready, complaint: str, job: str | None = None, seconds: float = 120) -> None:
        """Returns once ``ready()``; raises TimeoutError with the complaint and the job's state if that takes long."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"{complaint} after {seconds} s {self.job(job) if job else ''}")
            time.sleep(0.1)

    def _wait_for_daemons(self, ready) -> None:
        def ready_or_dead():
            if any(daemon.poll() is not None for daemon in self.daemons):
                raise TimeoutError("a daemon ended")
            return ready()

        try:
            self.wait(ready_or_dead, "not ready", seconds=30)
        except TimeoutError as error:
            tails = [
                f"{log.name}: {log.read_text()[-600:]}"
                for log in self.folder.iterdir()
                if log.suffix in (".out", ".log")
            ]
            raise CannotStart(f"{error}\n" + "\n".join(tails)) from None

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess:
        """A client command, its text captured."""
        return subprocess.run(
            command, env=self.environment, check=check, timeout=timeout, capture_output=True, text=True
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` knows: JobState, Restarts, ExitCode, NumTasks, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def wait_for(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job's description once its state is one of ``states``."""
        self.wait(lambda: self.job(job_id)["JobState"] in states, f"job {job_id} is not {states}", job_id, seconds)
        return self.job(job_id)

    def start_now(self, job_id: str) -> None:
        """Lets a job that was queued again start in the next second; Slurm would have it wait two minutes.

        Not in this one: slurmd refuses what was submitted to it in the second in which it killed the job's former life
        ("Job credential revoked"), and the job ends as failed.
        """
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+1")

    def stop(self) -> None:
        """Cancels what runs and ends the daemons."""
        if len(self.daemons) > 1:
            subprocess.run(["scancel", "--user", "root", "--signal=KILL"], env=self.environment, capture_output=True)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["--install"]:
        try:
            sys.exit(install())
        except CannotStart as reason:
            sys.exit(str(reason))
    with tempfile.TemporaryDirectory() as scratch:
        slurm = OneNodeSlurm(Path(scratch) / "slurm")
        try:
            status = subprocess.run(sys.argv[1:] or ["sinfo"], env=slurm.environment).returncode
        finally:
            slurm.stop()
    sys.exit(status)
