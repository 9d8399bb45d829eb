"""A server of Weights & Biases for tests: it keeps the history, config and files of runs.

It answers those requests of wandb that a run cannot do without, with what a server has:
lines of history with their offset, as they are sent, and the last of them to a run that resumes.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HISTORY = "wandb-history.jsonl"
_SUMMARY = "wandb-summary.json"


@dataclass
class StoredRun:
    """What the server has of a run."""

    lines: dict[int, str] = field(default_factory=dict)
    """lines of history by offset"""
    summary: str = "{}"
    config: str = "{}"
    files: set[str] = field(default_factory=set)
    """names of uploaded files"""
    artifacts: list[list[str]] = field(default_factory=list)
    """sorted aliases of each version of an artifact"""

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(self.lines[offset]) for offset in sorted(self.lines)]


class WandbServer:
    """Context manager that serves at `url` from a thread."""

    def __init__(self):
        self.runs: dict[str, StoredRun] = {}
        server = self

        class Handler(_Handler):
            runs = server.runs

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # connections of a killed process
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def variables(self) -> dict[str, str]:
        """Environment of a process that uses this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    runs: dict[str, StoredRun]

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _reply(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            return gzip.decompress(body)
        return body

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        _, _, run, name = self.path.split("/", 3)
        self.runs[run].files.add(name)
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            answer = getattr(self, f"_answer_{name}", lambda variables: {})
            self._reply({"data": answer(request.get("variables") or {})})
            return
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if found:
            self._store(self.runs[found[1]], json.loads(body).get("files", {}))
        self._reply({})

    def _store(self, run: StoredRun, files: dict[str, Any]) -> None:
        history = files.get(_HISTORY, {"offset": 0, "content": []})
        for i, line in enumerate(history["content"]):
            run.lines[history["offset"] + i] = line
        if _SUMMARY in files:
            run.summary = files[_SUMMARY]["content"][-1]

    def _answer_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}

    def _answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}}
        history = [run.lines[offset] for offset in sorted(run.lines)]
        bucket = {
            "id": "1",
            "name": variables["name"],
            "displayName": "run",
            "summaryMetrics": run.summary,
            "config": run.config,
            "historyLineCount": len(history),
            "historyTail": json.dumps(history[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }
        model = {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}
        return {"model": {**model, "bucket": bucket}}

    def _answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], StoredRun())
        if variables.get("config"):
            run.config = variables["config"]
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}
        bucket = {
            "id": "1",
            "name": variables["name"],
            "displayName": "run",
            "description": "",
            "config": run.config,
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.lines),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": not run.lines}}

    def _answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Note the version, and say that its files are there already."""
        wanted = variables["input"]
        run = self.runs[wanted["runName"]]
        run.artifacts.append(sorted(entry["alias"] for entry in wanted["aliases"]))
        artifact = {
            "id": "1",
            "state": "COMMITTED",
            "artifactSequence": {"latestArtifact": {"id": "1"}},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"http://{self.headers['Host']}/upload/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
