"""Two hosts on one machine: training on both, one of them killed, resumed on the other with half the ranks.

    sudo -E python tests/multinode/two_hosts.py                  # all scenarios
    sudo -E python tests/multinode/two_hosts.py --only killed

A host is a network, process, mount and name space of its own (`ip netns` of iproute2, `unshare` of util-linux) with its
own /dev/shm; a veth pair joins the two. They see the same files, as the nodes of a cluster see a shared folder. When a
host is killed, the kernel ends all of its processes as SIGKILL would and closes their connections; when it is unplugged
first, as in a power cut, nobody tells the other one.
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
START_SECONDS = 300.0  # a start is 10 s on two idle cores
END_SECONDS = 60.0  # within which a run that lost a host ends
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
INIT = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && trap "" CHLD && echo ready && exec sleep infinity'

# ssh and pdsh for hosts that are namespaces: a session has a bare environment, and pdsh joins its words into one line
# for the shell of each host, as the real ones do.
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
for pid in "${pids[@]}"; do wait "$pid" || { status=$?; [ "$status" -le "$worst" ] || worst=$status; }; done
exit "$worst"
"""


def command(*words: str) -> str:
    """Run a program that is done at once; its output.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def missing() -> str:
    """Why no hosts can be made here; empty when they can."""
    if os.geteuid() != 0:
        return "not root"
    if absent := [
        program for program in ("ip", "unshare", "nsenter") if not shutil.which(program)
    ]:
        return f"{' '.join(absent)} not installed (packages iproute2 and util-linux)"
    try:
        with two_hosts():
            return ""
    except RuntimeError as error:
        return str(error)


class Host:
    """A running host; `name` is also its hostname."""

    def __init__(self, name: str, space: str, address: str):
        self.name, self.space, self.address = name, space, address
        self.process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                space,
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--uts",
                "sh",
                "-c",
                INIT,
                name,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {name}: {self.process.communicate()[1].strip()}")
        pid = self.process.pid
        self.init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def enter(self) -> list[str]:
        """Words that start a program on this host."""
        return ["nsenter", "--target", str(self.init), "--all"]

    def kill(self) -> None:
        """End all its processes at once; its connections are closed."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
        self.process.communicate()

    def unplug(self) -> None:
        """Take its network away without a word to the other side."""
        command("ip", "-n", self.space, "link", "set", INTERFACE, "down")


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts, `node-0` and `node-1`, that reach each other at 10.77.0.1 and 10.77.0.2; gone afterwards.

    Raises:
        RuntimeError: this machine does not allow it.
    """
    spaces = [f"moe-{os.getpid()}-{i}" for i in range(2)]
    with contextlib.ExitStack() as stack:
        for space in spaces:
            command("ip", "netns", "add", space)
            stack.callback(command, "ip", "netns", "del", space)
        command(
            "ip",
            "link",
            "add",
            INTERFACE,
            "netns",
            spaces[0],
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "netns",
            spaces[1],
        )
        hosts = []
        for i, space in enumerate(spaces):
            command("ip", "-n", space, "link", "set", "lo", "up")
            command(
                "ip", "-n", space, "address", "add", f"10.77.0.{i + 1}/24", "dev", INTERFACE
            )
            command("ip", "-n", space, "link", "set", INTERFACE, "up")
            hosts.append(Host(f"node-{i}", space, f"10.77.0.{i + 1}"))
            stack.callback(hosts[-1].kill)
        yield hosts


class Run:
    """A started program and what it printed so far, in `lines`."""

    def __init__(self, argv: list[str], env: dict[str, str]):
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
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
            self._news.put(line.rstrip("\n"))
        self._news.put(None)

    def wait_for(self, pattern: str, seconds: float) -> str:
        """The next line in which the pattern is found.

        Raises:
            RuntimeError: the program ended, or the time is over, without one.
        """
        for line in self._new_lines(seconds, f"no {pattern!r}"):
            if re.search(pattern, line):
                return line
        raise RuntimeError(f"ended with {self.process.wait()} before {pattern!r}\n{self.text}")

    def end(self, seconds: float) -> int:
        """Its exit code, once it has ended.

        Raises:
            RuntimeError: it does not end in time.
        """
        for _ in self._new_lines(seconds, "did not end"):
            pass
        return self.process.wait(timeout=seconds)

    def _new_lines(self, seconds: float, failure: str) -> Iterator[str]:
        """New lines up to the program's last one."""
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._news.get(timeout=max(0.0, until - time.monotonic()))
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
    """The folder that all hosts share, and how a tiny run on them is started."""

    def __init__(self, folder: Path):
        self.folder = folder
        corpus = folder / "corpus.jsonl"
        corpus.write_text(
            "".join(
                json.dumps({"text": f"document {i}: " + SENTENCE * (4 + i % 5)}) + "\n"
                for i in range(60)
            )
        )
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
        """run.sh on one host."""
        return Run(
            [*host.enter(), f"--wd={REPO}", "bash", RUN, *flags],
            self.environment(out, interface, **more),
        )

    def on_both(self, hosts: list[Host], out: str, *flags: str, **more: object) -> list[Run]:
        """run.sh on each host, two ranks each, without ssh."""
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
        """run.sh here, on a third machine, with a hostfile and a stand-in for ssh, and for pdsh where there is none."""
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
            "# those that are left\n" + "".join(f"{host.name} slots=2\n" for host in hosts)
        )
        env = self.environment(out, INTERFACE, HOSTFILE=hostfile)
        return Run(["bash", RUN], {**env, "PATH": f"{programs}:{env['PATH']}"})

    def metrics(self, out: str) -> dict[int, dict]:
        """What the run wrote for each iteration; of an iteration that was done twice, the second."""
        lines = (self.folder / out / "metrics.jsonl").read_text().splitlines()
        return {m["iteration"]: m for m in map(json.loads, lines) if m["kind"] == "train"}

    def on_one_host(self, host: Host) -> dict[int, dict]:
        """Metrics of the whole run with four ranks on one host: what the others are compared with."""
        whole = self.on(host, "one", interface="lo", NUM_GPUS=4)
        assert whole.end(START_SECONDS) == 0, whole.text
        return self.metrics("one")


def ended(run: Run, seconds: float) -> str:
    """What a run said when it had lost the other host: it ends in time, not with 0, with one clear line per rank."""
    code = run.end(seconds)
    errors = [line for line in run.lines if re.search(r"(^|\] |: )error: ", line)]
    assert code != 0, f"exit code 0 although a host was lost\n{run.text}"
    assert 1 <= len(errors) <= 2 and "Traceback" not in run.text, run.text
    return errors[0]


def same(got: dict[int, dict], whole: dict[int, dict]) -> None:
    """Whether a run on two hosts is, as far as it came, the one on one host."""
    assert len(got) >= 19, (
        f"only {len(got)} iterations"
    )  # the file may be a line behind the log
    for i, m in got.items():
        for key in ("loss", "aux_loss", "grad_norm", "lr", "consumed_samples"):
            assert m[key] == whole[i][key], (
                f"iteration {i}: {key} is {m[key]} on two hosts, {whole[i][key]} on one"
            )
    say(f"{len(got)} iterations on two hosts and on one: equal to the last bit")


def watch_it_end(run: Run) -> str:
    """`ended` within a minute, and said."""
    start = time.monotonic()
    said = ended(run, END_SECONDS)
    say(f"it ended after {time.monotonic() - start:.1f} s with {said!r}")
    return said


def killed(lab: Lab) -> None:
    """NODE_RANK on two hosts of two ranks; one is killed; the other resumes alone with its two ranks."""
    with two_hosts() as hosts:
        both = lab.on_both(hosts, "two")
        both[0].wait_for("1 of 4 experts on each rank", START_SECONDS)
        both[0].wait_for("iteration +20/40", START_SECONDS)
        hosts[1].kill()
        watch_it_end(both[0])
        logs = [
            (lab.folder / "two" / name).read_text() for name in ("log.txt", "log.node-1.txt")
        ]
        assert [set(re.findall(r"node_rank=\d", log)) for log in logs] == [
            {"node_rank=0"},
            {"node_rank=1"},
        ]
        got, whole = lab.metrics("two"), lab.on_one_host(hosts[0])
        same(got, whole)
        resumes(lab, partial(lab.on, hosts[0], "two", interface="lo", NUM_GPUS=2), whole)


def resumes(lab: Lab, start: Callable[[], Run], whole: dict[int, dict]) -> None:
    """The run of four ranks goes on with two, where it was saved, with the same samples."""
    saved = int((lab.folder / "two/checkpoints/latest").read_text().removeprefix("iter_"))
    resumed = start()
    assert resumed.end(START_SECONDS) == 0, resumed.text
    for said in (f"starting at iteration {saved}", "2 of 4 experts on each rank"):
        assert said in resumed.text, f"{said}?\n{resumed.text}"
    got = lab.metrics("two")
    assert sorted(got) == list(range(1, TRAIN_ITERS + 1)), "an iteration is missing"
    off = {i: abs(got[i]["loss"] - whole[i]["loss"]) for i in range(saved + 1, TRAIN_ITERS + 1)}
    assert all(got[i]["consumed_samples"] == whole[i]["consumed_samples"] for i in off)
    first, worst = off[saved + 1], max(off.values())
    say(
        f"resumed at {saved} on half the ranks: the first loss is {first:.1e} off, the worst {worst:.1e}"
    )
    assert first <= 1e-3 and worst <= 5e-3, off


def pdsh(lab: Lab) -> None:
    """HOSTFILE: one call starts both hosts; the first, which holds rank 0, is killed; a file of the other resumes."""
    with two_hosts() as hosts, contextlib.ExitStack() as stack:

        def start(hosts: list[Host]) -> Run:
            run = lab.by_ssh(hosts, "two")
            stack.callback(run.kill)  # what runs here does not end with the hosts
            return run

        both = start(hosts)
        both.wait_for("node-0: .*iteration +20/40", START_SECONDS)
        hosts[0].kill()
        assert watch_it_end(both).startswith("node-1: [rank ")
        got, whole = lab.metrics("two"), lab.on_one_host(hosts[1])
        same(got, whole)
        resumes(lab, partial(start, hosts[1:]), whole)


def unplugged(lab: Lab) -> None:
    """A power cut: no connection is closed, so the other host waits as long as --timeout-minutes says."""
    with two_hosts() as hosts:
        both = lab.on_both(
            hosts, "two", "--timeout-minutes", "0.5", TRAIN_ITERS=100000, SAVE_INTERVAL=0
        )
        both[0].wait_for("iteration +20/", START_SECONDS)
        hosts[1].unplug()
        hosts[1].kill()
        assert "--timeout-minutes" in watch_it_end(both[0])


def unshared(lab: Lab) -> None:
    """OUTPUT_DIR is not one folder: the first save fails on both, and nothing passes for a checkpoint."""
    out = lab.folder / "two"
    out.mkdir()
    with two_hosts() as hosts:
        command(*hosts[1].enter(), "mount", "-t", "tmpfs", "tmpfs", str(out))
        both = lab.on_both(hosts, "two")
        both[0].wait_for("iteration +7/", START_SECONDS)
        for run in both:
            said = watch_it_end(run)
            assert "iter_0000008" in said and "no checkpoint was saved" in said
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
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # through the `finally` of what is open
    if why := missing():
        print(f"no hosts can be made here: {why}", file=sys.stderr)
        return 2
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            say(f"== {name}: {SCENARIOS[name].__doc__}")
            SCENARIOS[name](Lab(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
