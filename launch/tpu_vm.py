"""A study on a Cloud TPU slice, through queued resources.

python launch/tpu_vm.py up     --name=ema --zone=us-west4-a --accelerator=v5litepod-16 --runtime=…
python launch/tpu_vm.py run    --name=ema -- python -m ema_jax.main --config=… --workdir=gs://…
python launch/tpu_vm.py logs   --name=ema
python launch/tpu_vm.py delete --name=ema

`up` creates the slice, waits for it and installs the project. `run` starts the command on every
worker and streams the first worker's log; after a preemption it creates the slice again and
restarts the command, which resumes at its last stage or checkpoint. So `--workdir` has to outlive
the slice. What was created is recorded in `.launch/`; nothing else is ever deleted. A Hugging Face
token is named by its secret in Secret Manager (`--hf_token_secret`) and read on the workers.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import NAME, PROJECT, ROOT, SECRET, ZONE, Parser, Shell, fail, matching

RECORDS = Path(".launch")
_GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")


class Slice:
    """One queued resource and its node, both with the same name."""

    def __init__(self, settings: dict[str, Any], shell: Shell):
        self.settings, self.shell = settings, shell
        self.name = settings["name"]
        self._where = [f"--zone={settings['zone']}"]
        if settings["project"]:
            self._where.append(f"--project={settings['project']}")

    def create(self) -> None:
        """Requests the slice; the request is recorded first."""
        s = self.settings
        spot = ["--spot"] if s["spot"] else []
        if not self.shell.dry_run:
            RECORDS.mkdir(exist_ok=True)
            _record(self.name).write_text(json.dumps(s, indent=2) + "\n")
        self.shell.must(
            [
                *_gcloud("queued-resources", "create"),
                self.name,
                *self._where,
                f"--node-id={self.name}",
                f"--accelerator-type={s['accelerator']}",
                f"--runtime-version={s['runtime']}",
                *spot,
            ],
            "creating the slice",
        )

    def state(self) -> str:
        """State of the queued resource, as gcloud prints it."""
        command = [*_gcloud("queued-resources", "describe"), self.name, *self._where]
        return self.shell.ask([*command, "--format=value(state.state)"], "ACTIVE") or "UNKNOWN"

    def wait(self, timeout: float, poll: float) -> None:
        """Waits until the slice is active; looks every `poll` seconds, for at most `timeout`."""
        deadline = time.monotonic() + timeout
        while (state := self.state()) != "ACTIVE":
            if state in _GONE:
                fail(f"{self.name}: the queued resource is {state}; see gcloud's describe for why")
            if time.monotonic() > deadline:
                fail(f"{self.name}: still {state} after {timeout:g} s; `up` again keeps waiting")
            print(f"{self.name}: {state}", file=sys.stderr)
            time.sleep(poll)

    def install(self) -> None:
        """Copies the committed tree to every worker and installs it there."""
        archive = "/tmp/ema_jax.tar.gz"
        pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
        self.shell.must(pack, "packing the project")
        copy = [*_gcloud("tpu-vm", "scp"), archive, f"{self.name}:{archive}", *self._where]
        self.shell.must([*copy, "--worker=all"], "copying the project")
        self._everywhere(
            f"mkdir -p ema_jax && tar -xzf {archive} -C ema_jax && "
            "python3 -m venv venv && venv/bin/pip install -q './ema_jax[tpu]'",
            "installing the project",
        )

    def start(self, command: list[str]) -> None:
        """Starts the command on every worker in the background; log and exit code go to files."""
        secret = self.settings["hf_token_secret"]
        token = (
            f'export HF_TOKEN="$(gcloud secrets versions access latest --secret={secret})" && '
            if secret
            else ""
        )
        line = f"({shlex.join(command)}) >../run.log 2>&1; echo $? >../run.exit"
        self._everywhere(
            f"{token}export EMA_JAX_COORDINATOR=auto && . venv/bin/activate && cd ema_jax && "
            f"rm -f ../run.exit && nohup sh -c {shlex.quote(line)} >/dev/null 2>&1 &",
            "starting the command",
        )

    def follow(self) -> int | None:
        """Streams the first worker's log; returns the exit code, None if the slice is lost."""
        watch = (
            "touch run.log; tail -n +1 -F run.log 2>/dev/null & "
            "while [ ! -e run.exit ]; do sleep 5; done; sleep 1; kill $!; exit $(cat run.exit)"
        )
        code = self.shell.run(self._ssh(watch, worker="0"))
        # gcloud gives the command's own code, and 255 or 1 where the connection or VM is gone.
        return code if code == 0 or self.state() == "ACTIVE" else None

    def delete(self) -> None:
        """Deletes the queued resource with its node, and the record of it."""
        command = [*_gcloud("queued-resources", "delete"), self.name, *self._where]
        self.shell.must([*command, "--force", "--quiet"], "deleting the slice")
        if not self.shell.dry_run:
            _record(self.name).unlink()

    def _everywhere(self, line: str, what: str) -> None:
        self.shell.must(self._ssh(line, worker="all"), what)

    def _ssh(self, line: str, worker: str) -> list[str]:
        ssh = [*_gcloud("tpu-vm", "ssh"), self.name, *self._where]
        return [*ssh, f"--worker={worker}", f"--command={line}"]


def main() -> int:
    """Runs the action that the arguments name."""
    parser = Parser(description=__doc__)
    parser.add_argument("action", choices=("up", "run", "logs", "delete"))
    parser.add_argument("--name", required=True, type=matching(NAME, "ema-v5e-16"))
    parser.add_argument("--zone", type=matching(ZONE, "us-west4-a"))
    parser.add_argument("--project", type=matching(PROJECT, "my-project"))
    parser.add_argument("--accelerator", type=matching(r"v\d\w*-\d+", "v5litepod-16"))
    parser.add_argument("--runtime", type=matching(r"[\w.-]+", "v2-alpha-tpuv5-lite"))
    parser.add_argument("--spot", action="store_true", help="may be preempted; cheaper")
    parser.add_argument("--hf_token_secret", type=matching(SECRET, "hf-token"))
    parser.add_argument("--restarts", type=int, default=10, help="after preemptions, with run")
    parser.add_argument("--timeout", type=float, default=24 * 3600.0, help="waiting, seconds")
    parser.add_argument("--poll", type=float, default=30.0, help="seconds between looks")
    parser.add_argument("--dry_run", action="store_true")
    options, command = parser.parse_known_args()
    command = command[1:] if command[:1] == ["--"] else command
    if command and options.action != "run":
        fail(f"{command[0]}: unexpected; only run takes a command, after --")
    shell = Shell(dry_run=options.dry_run)
    try:
        if options.action == "up":
            return _up(options, shell)
        known = Slice(_settings(options), shell)
        if options.action == "delete":
            known.delete()
            return 0
        if options.action == "logs":
            return known.follow() or 0
        if not command:
            fail("run: no command: give it after --, as in -- python -m ema_jax.main --config=…")
        return _run(known, command, options)
    except FileNotFoundError as error:
        fail(f"{error.filename}: not installed here; see cloud.google.com/sdk/docs/install")


def _up(options: Any, shell: Shell) -> int:
    wanted = ("zone", "accelerator", "runtime")
    if _record(options.name).exists():
        made = Slice(_settings(options), shell)
    else:
        for field in wanted:
            if getattr(options, field) is None:
                fail(f"up: --{field} is required")
        fields = ("name", *wanted, "project", "spot", "hf_token_secret")
        made = Slice({field: getattr(options, field) for field in fields}, shell)
        made.create()
    made.wait(options.timeout, options.poll)
    made.install()
    return 0


def _run(known: Slice, command: list[str], options: Any) -> int:
    for attempt in range(options.restarts + 1):
        known.start(command)
        code = known.follow()
        if code is not None:
            return code
        if attempt == options.restarts:
            break
        print(f"{known.name}: preempted; restart {attempt + 1}", file=sys.stderr)
        settings = dict(known.settings)
        known.delete()
        known = Slice(settings, known.shell)
        known.create()
        known.wait(options.timeout, options.poll)
        known.install()
    fail(f"{known.name}: preempted {options.restarts + 1} times; run again to resume")


def _settings(options: Any) -> dict[str, Any]:
    """The settings recorded when the slice was created."""
    record = _record(options.name)
    if not record.exists():
        fail(f"{record}: no such file, so {options.name} was not created from this folder")
    return json.loads(record.read_text())


def _record(name: str) -> Path:
    return RECORDS / f"{name}.json"


def _gcloud(kind: str, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", kind, verb]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.SubprocessError as error:
        fail(str(error))
