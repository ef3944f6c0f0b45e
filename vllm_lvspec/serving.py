"""Start a real `vllm serve`, wait until it answers, and never leave it behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


class ServerError(RuntimeError):
    """The server did not come up, or has died."""


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen
    log: Path

    def metric(self, name: str) -> float:
        """Sum of all series of the counter `name` in vLLM's `/metrics`."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as reply:
            text = reply.read().decode()
        return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def serve(
    model: str | Path,
    *arguments: str,
    timeout: float = 600,
    on_wait: Callable[[float], None] = lambda seconds: None,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS` on a free local port for as long as the context lasts.

    `on_wait(seconds)` is called while the engine starts. The server has a process group of its own, which is ended
    when the context is left in whatever way. Raises ServerError with the end of the log where it does not come up.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="lvspec-") as folder:
        log = Path(folder) / "server.log"
        command = [*_vllm_command(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={"VLLM_NO_USAGE_STATS": "1", **os.environ, **(environment or {})},
            )
        server = Server(f"http://127.0.0.1:{port}", process, log)
        try:
            _wait(server, timeout, on_wait)
            yield server
        finally:
            _end(process)


def _vllm_command() -> Sequence[str]:
    beside = Path(sys.executable).with_name("vllm")
    return [str(beside)] if beside.exists() else ["vllm"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(server: Server, timeout: float, on_wait: Callable[[float], None]) -> None:
    started = time.monotonic()
    while not server.is_healthy():
        seconds = time.monotonic() - started
        if server.process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {server.process.returncode}:\n{_tail(server.log)}")
        if seconds > timeout:
            raise ServerError(f"vllm serve did not answer within {timeout:.0f} s:\n{_tail(server.log)}")
        on_wait(seconds)
        time.sleep(0.5)


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _end(process: subprocess.Popen) -> None:
    """End the server and all its workers: politely first, then surely; another Ctrl-C does not cut this short."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    try:
        _end_group(process)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


def _end_group(process: subprocess.Popen) -> None:
    for sign, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except (ProcessLookupError, PermissionError):
                break
            time.sleep(0.1)
    process.wait()
