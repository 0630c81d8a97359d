"""N processes of one command on this machine, as on N hosts: for rehearsals, or one per GPU.

python launch/local.py --processes=2 --devices=2 -- \
    python -m ema_jax.main --config=configs/tiny.py --workdir=runs/tiny --config.mesh='(-1,1,1)'

On GPUs, with JAX_PLATFORMS=cuda in the environment, each process takes the one of its number.
Each line of output is marked with its process. A signal is forwarded to all of them. When one
fails, the others get `--grace` seconds to save their state and end.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from common import Parser, fail


def main() -> int:
    """Starts the processes and waits for them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices of each")
    parser.add_argument("--port", type=int, help="of the coordinator; a free one by default")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds to end after a failure")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    if options.processes < 1 or options.devices < 1:
        fail("--processes and --devices: at least 1 each")
    if not options.command:
        fail("no command: give it after --, as in -- python -m ema_jax.main --config=…")
    port = options.port or _free_port()
    environments = [
        {
            "EMA_JAX_COORDINATOR": f"localhost:{port}",
            "EMA_JAX_NUM_PROCESSES": str(options.processes),
            "EMA_JAX_PROCESS_ID": str(i),
            "JAX_LOCAL_DEVICE_IDS": str(i),  # its GPU; else every process takes all of them
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={options.devices}",
            # Threads of XLA's pool. A collective between processes holds one while it waits: with
            # no more threads than devices, two collectives can wait for each other for ever.
            "NPROC": str(max(os.cpu_count() or 1, 4 * options.devices)),
        }
        for i in range(options.processes)
    ]
    if options.dry_run:
        for environment in environments:
            settings = [f"{key}={value}" for key, value in environment.items()]
            print(shlex.join(["env", *settings, *options.command]))
        return 0
    try:
        processes = [
            subprocess.Popen(
                options.command,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for environment in environments
        ]
    except OSError as error:
        fail(f"{options.command[0]}: {error.strerror}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _send(processes, number))
    readers = [
        threading.Thread(target=_relay, args=(i, process.stdout), daemon=True)
        for i, process in enumerate(processes)
    ]
    for reader in readers:
        reader.start()
    code = _wait(processes, options.grace)
    for reader in readers:
        reader.join()
    return code


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    """The exit code of the first process that failed, or 0."""
    first, deadline = 0, float("inf")
    while None in [process.poll() for process in processes]:
        for i, process in enumerate(processes):
            if process.returncode and not first:
                first = process.returncode
                print(f"[{i}] ended with {first}; the others get {grace:g} s", file=sys.stderr)
                _send(processes, signal.SIGTERM)
                deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
        time.sleep(0.05)
    first = first or next((p.returncode for p in processes if p.returncode), 0)
    return first if first >= 0 else 128 - first


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _relay(i: int, output: IO[str] | None) -> None:
    assert output is not None
    for line in output:
        print(f"[{i}] {line}", end="", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
