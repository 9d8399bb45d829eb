"""The hosts of two_hosts.py and its scenarios.

Skipped, with the reason, where hosts cannot be created.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from two_hosts import SCENARIOS, Host, command, missing, two_hosts

from helpers.waiting import LIMIT_SECONDS

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module", autouse=True)
def hosts_are_possible():
    reason = missing()
    if reason:
        pytest.skip(f"no hosts can be created here: {reason}")


def start_python(host: Host, program: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*host.enter(), sys.executable, "-uc", program], stdout=subprocess.PIPE, text=True
    )


SERVER = """
import socket
with socket.create_server(("10.77.0.2", 7000)) as server:
    print("listening")
    peer, _ = server.accept()
    peer.sendall(socket.gethostname().encode())
    peer.recv(1)
"""
CLIENT = """
import os, socket
with socket.create_connection(("10.77.0.2", 7000)) as server:
    print(socket.gethostname(), "reached", server.recv(100).decode(), flush=True)
    server.settimeout(1)
    try:
        print("closed" if server.recv(100) == b"" else "data")
    except TimeoutError:
        print("silent")
"""


@pytest.mark.parametrize(("unplug", "connection"), [(False, "closed"), (True, "silent")])
def test_only_unplugged_host_leaves_connections_open(unplug, connection):
    with two_hosts() as (first, second):
        server = start_python(second, SERVER)
        assert server.stdout.readline() == "listening\n"
        client = start_python(first, CLIENT)
        assert client.stdout.readline() == "node-0 reached node-1\n"
        if unplug:
            second.unplug()
        second.kill()
        assert client.communicate(timeout=LIMIT_SECONDS)[0] == connection + "\n"
        assert server.wait(timeout=LIMIT_SECONDS) == -signal.SIGKILL


def test_interrupt_removes_the_hosts():
    program = (
        "import signal\nfrom two_hosts import two_hosts\nwith two_hosts() as hosts:\n"
        "    print(*(host.init for host in hosts), flush=True)\n    signal.pause()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=HERE,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    spaces = f"moe-{process.pid}-"
    assert len(pids) == 2 and command("ip", "netns", "list").count(spaces) == 2
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=LIMIT_SECONDS)[1]
    assert spaces not in command("ip", "netns", "list")
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_missing_requirements_are_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "not root"
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(HERE))
    assert missing() == "ip unshare nsenter not installed (packages iproute2 and util-linux)"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="ip netns add .*/: .*"):
        command("ip", "netns", "add", "a/b/")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_passes(name):
    done = subprocess.run(
        [sys.executable, str(HERE / "two_hosts.py"), "--only", name],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it ended after" in done.stdout
