"""Two hosts: network namespaces that a shaped link joins, torchrun's own rendezvous, and one of them dying."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bench import sent_bytes
from conftest import ROOT, Ran, clean_environ, run_here
from test_ranks import SAME_WEIGHTS, SETTINGS, difference, tiny_environ

import train_gpt as pg
from records.experiments.plan import read_recipe

pytestmark = pytest.mark.slow

RATE, DELAY = "1gbit", "1ms"  # of the link, each way


def ip(*words: str) -> str:
    """What iproute2 prints. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Host(NamedTuple):
    namespace: str
    address: str
    device: str  # its end of the link

    def start(self, folder: Path, *command: object, **environ: object) -> subprocess.Popen:
        """A command of this host; what it says is in folder/said."""
        folder.mkdir(exist_ok=True)
        inside = ["ip", "netns", "exec", self.namespace, sys.executable, *map(str, command)]
        environ = clean_environ(GLOO_SOCKET_IFNAME=self.device, **environ)
        with open(folder / "said", "w") as said:
            return subprocess.Popen(inside, cwd=folder, env=environ, stdout=said, stderr=said)

    def sent(self) -> int:
        """Bytes that have left on the link, headers of TCP and IP among them."""
        return json.loads(ip("-n", self.namespace, "-s", "-j", "link", "show", self.device))[0]["stats64"]["tx"][
            "bytes"
        ]

    def end(self) -> None:
        """Whatever runs on it."""
        if pids := ip("netns", "pids", self.namespace).split():
            subprocess.run(["kill", "-9", *pids], stderr=subprocess.DEVNULL)  # some may have ended since


def shape(host: Host) -> str:
    """Give this end of the link a rate and, where the kernel can, a delay; returns what it got."""
    if not shutil.which("tc"):
        return "unshaped: no tc"
    kinds = {
        f"netem {RATE} {DELAY}": ["netem", "delay", DELAY, "rate", RATE, "limit", "10000"],
        f"tbf {RATE}": ["tbf", "rate", RATE, "burst", "128kb", "latency", "50ms"],
    }
    for said, kind in kinds.items():
        command = ["tc", "-n", host.namespace, "qdisc", "add", "dev", host.device, "root", *kind]
        if not (ran := subprocess.run(command, capture_output=True, text=True)).returncode:
            return said
    return f"unshaped: {ran.stderr.strip()}"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and `ip` of iproute2")
    hosts = [Host(f"golf{os.getpid()}-{n}", f"10.77.0.{n}", f"golf{n}") for n in (1, 2)]
    first, second = hosts
    try:
        try:
            for host in hosts:
                ip("netns", "add", host.namespace)
            ends = [[host.device, "netns", host.namespace] for host in hosts]
            ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                ip("-n", host.namespace, "link", "set", device, "up")
        for link in {shape(host) for host in hosts}:
            print(f"link between hosts: {link}")
            if link.startswith("unshaped"):
                warnings.warn(f"link between hosts {link}", stacklevel=1)
        yield hosts
    finally:
        for namespace in {host.namespace for host in hosts} & set(re.findall(r"\S+", ip("netns", "list"))):
            next(host for host in hosts if host.namespace == namespace).end()
            ip("netns", "delete", namespace)


def run_on(
    hosts: list[Host],
    folders: list[Path],
    script: Path,
    words: tuple[str, ...] = ("--nnodes=2",),
    of_last: dict[str, object] | None = None,
    **environ: object,
) -> list[int]:
    """A script on one process of each host that torchrun joins with these arguments; returns torchrun's exit codes.
    of_last: variables of the last host alone.

    Both hosts have this machine's name, which is no address of theirs: so each is told its own, and who waits for whom.
    """
    meeting, running = ["--rdzv_backend=c10d", f"--rdzv_endpoint={hosts[0].address}:29500"], []
    for n, (host, folder) in enumerate(zip(hosts, folders, strict=True)):
        own = [f"--local_addr={host.address}", f"--rdzv_conf=is_host={int(n == 0)},last_call_timeout=20"]
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=1", *words, *meeting, *own]
        here = environ | (of_last or {} if host is hosts[-1] else {})
        running.append(host.start(folder, *torchrun, script, **here))
    until = time.monotonic() + 300
    try:
        return [process.wait(max(1.0, until - time.monotonic())) for process in running]
    finally:
        for host in hosts:
            host.end()
        for process in running:
            process.wait()


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def ran_in(folder: Path) -> Ran:
    return Ran(0, said(folder), "", folder / "runs" / "run", folder / "logs" / "run.txt")


# -----------------------------------------------------------------------------
# THE SAME RUN
# -----------------------------------------------------------------------------


def test_two_hosts_train_to_the_weights_of_one(hosts, tiny_data, tmp_path):
    alone = run_here(tmp_path / "alone", tiny_data, **SETTINGS)
    folders, before = [tmp_path / "first", tmp_path / "second"], [host.sent() for host in hosts]
    codes = run_on(hosts, folders, ROOT / "train_gpt.py", **tiny_environ(tiny_data, RUN_ID="run"))
    assert codes == [0, 0], "\n".join(map(said, folders))
    together = ran_in(folders[0])
    assert together.result["world_size"] == 2 and "world_size:2 " in together.out
    assert difference(together, alone) < SAME_WEIGHTS
    # The first address has the main rank, which alone speaks and writes.
    assert [path.name for path in folders[1].iterdir()] == ["said"] and "step:" not in said(folders[1])
    least = SETTINGS["ITERATIONS"] * sent_bytes(pg.Hyperparameters.from_env(tiny_environ(tiny_data)), 2, torch.float32)
    assert all(host.sent() - sent > least for host, sent in zip(hosts, before, strict=True))  # it did go over the link


def test_hosts_that_would_make_different_runs_do_not_begin(hosts, tiny_data, tmp_path):
    folders, environ = [tmp_path / "first", tmp_path / "second"], tiny_environ(tiny_data, RUN_ID="run")
    codes = run_on(hosts, folders, ROOT / "train_gpt.py", of_last=dict(SEED=7, DATA_PATH=f"{tiny_data}/"), **environ)
    assert codes == [1, 1]  # torchrun's
    lines = [re.findall("^error: .*", said(folder), re.MULTILINE) for folder in folders]
    assert lines == [["error: ranks 0 and 1 differ in SEED; start the same run on every host"], []]
    assert not any((folder / "logs").exists() for folder in folders)


def test_what_a_step_of_cpu_mini_takes_and_sends(hosts, tiny_data, tmp_path):
    """A process of one thread, and one on each host. gloo sums a matrix's gradient whole, where its parts would do: so
    of matrices it sends half as much again as has to be sent."""
    environ = read_recipe(ROOT / "records" / "recipes" / "cpu_mini.env")
    environ |= dict(DEVICE="cpu", DATA_PATH=tiny_data, VOCAB_SIZE=512, COMPILE=0, EVAL_STRIDE=0, TTT_ENABLED=0)
    environ |= dict(TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, FIT_TO_CAP=0, RUN_ID="run")
    hp = pg.Hyperparameters.from_env({name: str(value) for name, value in environ.items()})

    def run(n: int, steps: int) -> tuple[float, list[int]]:
        """Seconds of the fastest step, and what each host sent in all."""
        before, folders = [host.sent() for host in hosts], [tmp_path / f"{n}-{steps}-{host.device}" for host in hosts]
        settings = environ | dict(ITERATIONS=steps)
        codes = run_on(hosts[:n], folders[:n], ROOT / "train_gpt.py", (f"--nnodes={n}",), **settings)
        assert codes == [0] * n, said(folders[0])
        times = [int(ms) for ms in re.findall(r"train_loss:\S+ train_time:(\d+)ms", said(folders[0]))]
        sent = [host.sent() - start for host, start in zip(hosts, before, strict=True)]
        return min(b - a for a, b in itertools.pairwise(times)) / 1000, sent

    (alone, _), (_, few), (together, many) = run(1, 10), run(2, 2), run(2, 10)
    sent = max(b - a for a, b in zip(few, many, strict=True)) / 8
    least = sent_bytes(hp, 2, pg.activation_dtype(hp.dtype, torch.device("cpu")))
    print(f"fastest step of one {alone:.3f} s, of two {together:.3f} s: efficiency {alone / together / 2:.0%}")
    print(f"a rank sends {sent / 1e6:.2f} MB a step, at least {least / 1e6:.2f} MB: {sent / least:.2f} times")
    assert 1 < sent / least < 1.7


# -----------------------------------------------------------------------------
# A HOST DIES
# -----------------------------------------------------------------------------

LOST = r"^error: rank (\d) lost another rank, see its error; go on with the same command and RESUME=([^\s,]+)(.*)$"


# A checkpoint after every step whose time is known.
LONG = dict(SETTINGS, ITERATIONS=8, CHECKPOINT_EVERY=1e-6, EVAL_STRIDE=0, TTT_ENABLED=0)


def dying(rank: int) -> str:
    """Jobs of broken.py: this rank and its torchrun are killed in the sixth step."""
    return json.dumps([dict(fault=["accumulate_gradients", 6, "die_with_torchrun", rank])])


@pytest.mark.parametrize("victim, disk", [(1, "own"), (0, "own"), (0, "shared")])
def test_the_other_host_says_so_and_the_rest_goes_on_to_the_same_end(victim, disk, hosts, tiny_data, tmp_path):
    folders, left = [tmp_path / "first", tmp_path / "second"], 1 - victim
    environ = tiny_environ(tiny_data, **LONG, RUN_ID="run", JOBS=dying(victim))
    if disk == "shared":
        environ["OUT_DIR"] = str(tmp_path / "shared")
    codes = run_on(hosts, folders, ROOT / "tests" / "broken.py", **environ)
    heard = said(folders[left])
    assert codes[victim] == -signal.SIGKILL and codes[left] == 1, heard
    seconds = (folders[left] / "said").stat().st_mtime - (folders[victim] / "fault").stat().st_mtime
    assert seconds < 45, heard
    assert len(re.findall(r"^(?:error|limit|interrupted|warning): ", heard, re.MULTILINE)) == 1
    assert 'train_gpt.py", line' not in heard  # no traceback of the script's own
    ((rank, checkpoint, where),) = re.findall(LOST, heard, re.MULTILINE)
    assert int(rank) == left and where == ("" if left == 0 or disk == "shared" else ", which is on the host of rank 0")

    out = tmp_path / ("shared" if disk == "shared" else "first")
    written = out / checkpoint
    assert pg.read_checkpoint(written).meta["step"] in (4, 5)
    alone = run_here(tmp_path / "alone", tiny_data, **LONG)
    on = run_here(out, tiny_data, **LONG, RESUME=written)
    assert (on.code, on.err) == (0, "") and f"resume:step:{on.result['resumed_at'][0]} " in on.out
    assert difference(on, alone) < SAME_WEIGHTS


def test_torchrun_itself_goes_on_with_the_rest(hosts, tiny_data, tmp_path):
    """Where it may do with one host, and the dead one was not where all meet: from the newest checkpoint."""
    folders, words = [tmp_path / "first", tmp_path / "second"], ("--nnodes=1:2", "--max-restarts=1")
    environ = tiny_environ(tiny_data, **LONG, RUN_ID="run", RESUME="auto", JOBS=dying(1))
    codes = run_on(hosts, folders, ROOT / "tests" / "broken.py", words, **environ)
    assert codes == [0, -signal.SIGKILL], said(folders[0])
    on = ran_in(folders[0])
    worlds = re.findall(r"^world_size:(\d)|^resume:(step:[45]) ", on.out, re.MULTILINE)
    assert worlds == [("2", ""), ("1", ""), ("", f"step:{on.result['resumed_at'][0]}")]
    assert difference(on, run_here(tmp_path / "alone", tiny_data, **LONG)) < SAME_WEIGHTS
