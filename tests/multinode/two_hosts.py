"""Two hosts on one machine: train on both, kill one, resume on the other.

    sudo -E python tests/multinode/two_hosts.py                  # all scenarios
    sudo -E python tests/multinode/two_hosts.py --only killed

A host is a set of network, process, mount and UTS namespaces (`ip netns` of iproute2,
`unshare` of util-linux) with its own /dev/shm; a veth pair joins the two. They see the
same files, as the nodes of a cluster see a shared folder. When a host is killed, the
kernel ends all of its processes as SIGKILL would and closes their connections. When it
is unplugged first, as in a power cut, the other host is not notified.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
RUN = "examples_deepspeed/MoE/run.sh"
INTERFACE = "eth0"
TRAIN_ITERS = 40
START_SECONDS = 300.0
"""Limit of a start, which takes 10 s on two idle cores."""
END_SECONDS = 60.0
"""Limit within which a run that lost a host ends."""
SENTENCE = "the quick brown fox jumps over the lazy dog. "
SETTINGS = {
    "TOKENIZER_TYPE": "ByteTokenizer",
    "NUM_LAYERS": 2,
    "HIDDEN_SIZE": 32,
    "NUM_ATTN_HEADS": 2,
    "SEQ_LEN": 32,
    "INIT_STD": 0.1,
    "EP_SIZE": 4,
    "THRESHOLD": 0.8,
    "GLOBAL_BATCH_SIZE": 8,
    "TRAIN_ITERS": TRAIN_ITERS,
    "LOG_INTERVAL": 1,
    "EVAL_ITERS": 0,
    "SAVE_INTERVAL": 8,
    "OMP_NUM_THREADS": 1,
    "DS_ACCELERATOR": "cpu",
}
INIT = (
    'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && trap "" CHLD && echo ready '
    "&& exec sleep infinity"
)
"""First process of a host."""

# Stand-ins for ssh and pdsh. As with the real ones, a session has a bare environment,
# and pdsh joins its words into one line for the shell of each host.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do case $1 in -o | -p | -l) shift 2 ;; *) shift ;; esac; done
host=$1; shift
exec env -i HOME="$HOME" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    nsenter --target "$(cat "@FOLDER@/$host")" --all sh -c "$*"
"""
PDSH = """#!/usr/bin/env bash
set -o pipefail
[ "$1 $2 $4" = "-S -f -w" ] && IFS=, read -ra hosts <<<"$5" && shift 5 || exit 64
for i in "${!hosts[@]}"; do
    line=${*//%n/$i}
    { ssh "${hosts[i]}" "${line//%h/${hosts[i]}}" 2>&1 </dev/null | sed -u "s/^/${hosts[i]}: /"; } &
    pids[i]=$!
done
worst=0
for pid in "${pids[@]}"; do
    wait "$pid" || { status=$?; [ "$status" -le "$worst" ] || worst=$status; }
done
exit "$worst"
"""


def command(*words: str) -> str:
    """Run a short program and return its output.

    Raises:
        RuntimeError: the program failed; the message has its output.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def missing() -> str:
    """Return why hosts cannot be created here, or '' if they can."""
    if os.geteuid() != 0:
        return "not root"
    programs = ("ip", "unshare", "nsenter")
    absent = [program for program in programs if not shutil.which(program)]
    if absent:
        return f"{' '.join(absent)} not installed (packages iproute2 and util-linux)"
    try:
        with two_hosts():
            return ""
    except RuntimeError as error:
        return str(error)


class Host:
    """A running host.

    Args:
        name: also its hostname.
        space: name of its network namespace.
        address: its IP address.
    """

    def __init__(self, name: str, space: str, address: str):
        self.name = name
        self.space = space
        self.address = address
        enter_network = ["ip", "netns", "exec", space]
        unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
        self.process = subprocess.Popen(
            [*enter_network, *unshare, "sh", "-c", INIT, name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name}: {self.process.communicate()[1].strip()}")
        pid = self.process.pid
        self.init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def enter(self) -> list[str]:
        """The words that precede a command to run it on this host."""
        return ["nsenter", "--target", str(self.init), "--all"]

    def kill(self) -> None:
        """Kill all processes of the host; the kernel closes their connections."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
        self.process.communicate()

    def unplug(self) -> None:
        """Disconnect the network without closing connections."""
        command("ip", "-n", self.space, "link", "set", INTERFACE, "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Create hosts `node-0` and `node-1` at 10.77.0.1 and 10.77.0.2; remove them.

    Raises:
        RuntimeError: this machine does not allow it.
    """
    spaces = [f"moe-{os.getpid()}-{i}" for i in range(2)]
    with contextlib.ExitStack() as stack:
        for space in spaces:
            command("ip", "netns", "add", space)
            stack.callback(command, "ip", "netns", "del", space)
        first_end = [INTERFACE, "netns", spaces[0]]
        second_end = ["name", INTERFACE, "netns", spaces[1]]
        command("ip", "link", "add", *first_end, "type", "veth", "peer", *second_end)
        hosts = []
        for i, space in enumerate(spaces):
            address = f"10.77.0.{i + 1}"
            inside = ["ip", "-n", space]
            command(*inside, "link", "set", "lo", "up")
            command(*inside, "address", "add", f"{address}/24", "dev", INTERFACE)
            command(*inside, "link", "set", INTERFACE, "up")
            hosts.append(Host(f"node-{i}", space, address))
            stack.callback(hosts[-1].kill)
        yield hosts


class Run:
    """A running program; `lines` is what it has printed and what was waited for."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            argv,
            env=env,
            cwd=REPO,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, pattern: str, seconds: float) -> str:
        """Wait for the next line in which the pattern is found.

        Raises:
            RuntimeError: there is none before the program ends or the time is over.
        """
        for line in self._new_lines(seconds, f"no {pattern!r}"):
            if re.search(pattern, line):
                return line
        raise RuntimeError(f"ended with {self.process.wait()} before {pattern!r}\n{self.text}")

    def end(self, seconds: float) -> int:
        """Wait for the program to end and return its exit code.

        Raises:
            RuntimeError: it does not end in time.
        """
        for _ in self._new_lines(seconds, "did not end"):
            pass
        return self.process.wait(timeout=seconds)

    def _new_lines(self, seconds: float, failure: str) -> Iterator[str]:
        """Yield lines as they are printed, up to the program's last one."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._new.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"{failure} within {seconds} s\n{self.text}") from None
            if line is None:
                return
            self.lines.append(line)
            yield line

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Lab:
    """The folder that all hosts share, with a corpus; starts tiny runs on the hosts."""

    def __init__(self, folder: Path):
        self.folder = folder
        corpus = folder / "corpus.jsonl"
        texts = [f"document {i}: " + SENTENCE * (4 + i % 5) for i in range(60)]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command(
            sys.executable,
            str(REPO / "tools/preprocess_data.py"),
            "--input",
            str(corpus),
            "--output-prefix",
            str(folder / "data"),
            "--append-eod",
            "--tokenizer-type",
            "ByteTokenizer",
        )

    def environment(self, out: str, interface: str, **more: object) -> dict[str, str]:
        settings = {
            **SETTINGS,
            "PYTHON": sys.executable,
            "DATA_PATH": self.folder / "data_text_document",
            "OUTPUT_DIR": self.folder / out,
            "GLOO_SOCKET_IFNAME": interface,
            **more,
        }
        return {**os.environ, **{name: str(value) for name, value in settings.items()}}

    def on(
        self, host: Host, out: str, *flags: str, interface: str = INTERFACE, **more: object
    ) -> Run:
        """Start run.sh on one host."""
        return Run(
            [*host.enter(), f"--wd={REPO}", "bash", RUN, *flags],
            self.environment(out, interface, **more),
        )

    def on_both(self, hosts: list[Host], out: str, *flags: str, **more: object) -> list[Run]:
        """Start run.sh on each host with two ranks each, without ssh."""
        return [
            self.on(
                host,
                out,
                *flags,
                NODE_RANK=i,
                MASTER_ADDR=hosts[0].address,
                NUM_NODES=2,
                NUM_GPUS=2,
                **more,
            )
            for i, host in enumerate(hosts)
        ]

    def by_ssh(self, hosts: list[Host], out: str) -> Run:
        """Start run.sh here, on a third machine, with a hostfile.

        ssh is a stand-in, and so is pdsh where it is not installed.
        """
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, text in (("ssh", SSH), ("pdsh", PDSH)):
            if name == "ssh" or not shutil.which(name):
                (programs / name).write_text(text.replace("@FOLDER@", str(self.folder)))
                (programs / name).chmod(0o755)
        for host in hosts:
            (self.folder / host.name).write_text(str(host.init))
        hostfile = self.folder / "hosts"
        hostfile.write_text(
            "# the remaining hosts\n" + "".join(f"{host.name} slots=2\n" for host in hosts)
        )
        env = self.environment(out, INTERFACE, HOSTFILE=hostfile)
        return Run(["bash", RUN], {**env, "PATH": f"{programs}:{env['PATH']}"})

    def metrics(self, out: str) -> dict[int, dict]:
        """Read the metrics by iteration; the second row of one that was done twice."""
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["iteration"]: row for row in rows if row["kind"] == "train"}

    def on_one_host(self, host: Host) -> dict[int, dict]:
        """Run the reference, four ranks on one host, and return its metrics."""
        reference = self.on(host, "one", interface="lo", NUM_GPUS=4)
        assert reference.end(START_SECONDS) == 0, reference.text
        return self.metrics("one")


def check_error_exit(run: Run, seconds: float) -> str:
    """Check that a run that lost a host fails in time, with one clear line per rank.

    Returns:
        the error lines.
    """
    code = run.end(seconds)
    lines = list(run.lines)
    for i, line in enumerate(lines):
        if line.startswith("run.sh: exit code") and lines[i - 1] in lines[: i - 1]:
            del lines[i - 1]  # run.sh repeats the first error
            break
    errors = [line for line in lines if re.search(r"(^|\] |: )error: ", line)]
    assert code != 0, f"exit code 0 although a host was lost\n{run.text}"
    assert 1 <= len(errors) <= 2 and "Traceback" not in run.text, run.text
    return "\n".join(errors)


def check_equal(rows: dict[int, dict], reference: dict[int, dict]) -> None:
    """Check that a run on two hosts, as far as it came, equals the one on one host."""
    # The file may be a line behind the log, which showed 20 iterations.
    assert len(rows) >= 19, f"only {len(rows)} iterations"
    for i, row in rows.items():
        for key in ("loss", "aux_loss", "grad_norm", "lr", "consumed_samples"):
            assert row[key] == reference[i][key], (
                f"iteration {i}: {key} is {row[key]} on two hosts, {reference[i][key]} on one"
            )
    say(f"{len(rows)} iterations on two hosts and on one: equal to the last bit")


def wait_for_error_exit(run: Run) -> str:
    """Check that a run fails in time, and return its error lines."""
    start = time.monotonic()
    error = check_error_exit(run, END_SECONDS)
    say(f"it ended after {time.monotonic() - start:.1f} s with {error!r}")
    return error


def killed(lab: Lab) -> None:
    """NODE_RANK on two hosts of two ranks: one is killed, the other resumes alone."""
    with two_hosts() as hosts:
        both = lab.on_both(hosts, "two")
        both[0].wait_for("1 of 4 experts on each rank", START_SECONDS)
        both[0].wait_for("iteration +20/40", START_SECONDS)
        hosts[1].kill()
        wait_for_error_exit(both[0])
        logs = [lab.folder / "two" / name for name in ("log.txt", "log.node-1.txt")]
        assert ["iteration 20/40" in log.read_text() for log in logs] == [True, False]
        rows = lab.metrics("two")
        reference = lab.on_one_host(hosts[0])
        check_equal(rows, reference)
        start = partial(lab.on, hosts[0], "two", interface="lo", NUM_GPUS=2)
        check_resume(lab, start, reference)


def check_resume(lab: Lab, start: Callable[[], Run], reference: dict[int, dict]) -> None:
    """Check that the run of four ranks resumes with two, where it was saved.

    It reads the same samples, and its losses differ by rounding only.
    """
    saved = int((lab.folder / "two/checkpoints/latest").read_text().removeprefix("iter_"))
    resumed = start()
    assert resumed.end(START_SECONDS) == 0, resumed.text
    for message in (f"starting at iteration {saved}", "2 of 4 experts on each rank"):
        assert message in resumed.text, f"{message}?\n{resumed.text}"
    rows = lab.metrics("two")
    assert sorted(rows) == list(range(1, TRAIN_ITERS + 1)), "an iteration is missing"
    differences = {}
    for i in range(saved + 1, TRAIN_ITERS + 1):
        assert rows[i]["consumed_samples"] == reference[i]["consumed_samples"]
        differences[i] = abs(rows[i]["loss"] - reference[i]["loss"])
    first = differences[saved + 1]
    largest = max(differences.values())
    say(
        f"resumed at {saved} on half the ranks: the first loss differs by {first:.1e}, the "
        f"largest difference is {largest:.1e}"
    )
    assert first <= 1e-3 and largest <= 5e-3, differences


def pdsh(lab: Lab) -> None:
    """HOSTFILE: one call starts both hosts; rank 0's is killed; the other resumes."""
    with two_hosts() as hosts, contextlib.ExitStack() as stack:

        def start(hosts: list[Host]) -> Run:
            run = lab.by_ssh(hosts, "two")
            stack.callback(run.kill)  # what runs here does not end with the hosts
            return run

        both = start(hosts)
        both.wait_for("node-0: .*iteration +20/40", START_SECONDS)
        hosts[0].kill()
        assert wait_for_error_exit(both).startswith("node-1: [rank ")
        rows = lab.metrics("two")
        reference = lab.on_one_host(hosts[1])
        check_equal(rows, reference)
        check_resume(lab, partial(start, hosts[1:]), reference)


def unplugged(lab: Lab) -> None:
    """A power cut closes no connection: the other host waits for --timeout-minutes."""
    with two_hosts() as hosts:
        both = lab.on_both(
            hosts, "two", "--timeout-minutes", "0.5", TRAIN_ITERS=100000, SAVE_INTERVAL=0
        )
        both[0].wait_for("iteration +20/", START_SECONDS)
        hosts[1].unplug()
        hosts[1].kill()
        assert "--timeout-minutes" in wait_for_error_exit(both[0])


def unshared(lab: Lab) -> None:
    """OUTPUT_DIR is not shared: the first save fails on both hosts."""
    out = lab.folder / "two"
    out.mkdir()
    with two_hosts() as hosts:
        command(*hosts[1].enter(), "mount", "-t", "tmpfs", "tmpfs", str(out))
        both = lab.on_both(hosts, "two")
        both[0].wait_for("iteration +7/", START_SECONDS)
        for run in both:
            error = wait_for_error_exit(run)
            assert "iter_0000008" in error and "no checkpoint was saved" in error
        assert not list(out.glob("checkpoints/latest")) and not list(
            out.glob("checkpoints/iter_*")
        )


SCENARIOS: dict[str, Callable[[Lab], None]] = {
    "killed": killed,
    "pdsh": pdsh,
    "unplugged": unplugged,
    "unshared": unshared,
}


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SCENARIOS),
        default=list(SCENARIOS),
        metavar="SCENARIO",
        help=", ".join(SCENARIOS),
    )
    names = parser.parse_args().only
    # An exit, unlike the default handler, removes the hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reason = missing()
    if reason:
        print(f"no hosts can be created here: {reason}", file=sys.stderr)
        return 2
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            say(f"== {name}: {SCENARIOS[name].__doc__}")
            SCENARIOS[name](Lab(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
