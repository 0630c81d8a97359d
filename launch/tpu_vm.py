"""A study on a Cloud TPU slice, through queued resources.

python launch/tpu_vm.py up     --name=ema --zone=us-west4-a --accelerator=v5litepod-8 --runtime=…
python launch/tpu_vm.py run    --name=ema -- python -m ema_jax.main --config=… --workdir=gs://…
python launch/tpu_vm.py logs   --name=ema
python launch/tpu_vm.py delete --name=ema

`up` creates the slice, waits for it and installs the project. `run` starts the command on every
worker and streams the first worker's log; after a preemption it creates the slice again and
restarts the command, which resumes at its last stage or checkpoint. What was created is recorded in
`.launch/`; nothing else is ever deleted. A Hugging Face token is named by its secret in Secret
Manager (`--hf_token_secret`) and read on the workers.

A study works in a folder, and the slice's disks vanish with it. So `--workdir` is one of two:

- `gs://BUCKET/FOLDER`: the command gets a folder on the slice, which is filled from there before it
  starts and copied back (`gcloud storage rsync`) every five minutes, at its end, and before
  `delete`, which keeps the slice if that fails. For slices of one host.
- a folder below `/mnt/ema`, where `up --nfs=HOST:/SHARE` mounts a share (Filestore, say) on every
  worker. Slices of several hosts need one: all their processes read what the first one writes.

At home: `gcloud storage rsync -r gs://BUCKET/FOLDER runs/mine`, then open the report.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import NAME, PROJECT, ROOT, SECRET, ZONE, Parser, Shell, fail, matching

RECORDS = Path(".launch")
SHARE = Path("/mnt/ema")
SECONDS_BETWEEN_COPIES = 300
_GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")
# A lock is its process's own; what is being written has another name until it is whole.
_UNFINISHED = r"(^|.*/)\.(lock/|.*\.(tmp|old)(/|$)).*"
# Names of buckets have 3 to 63 characters.
_BUCKET = r"gs://[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9](/[\w./=+-]*)?"
_NFS = r"[\w.-]+:/[\w./-]+"
# Cores a host of the first kind, chips a host of the other; up to eight chips may be one host.
_CORES_A_HOST, _CHIPS_A_HOST, _ONE_HOST = 8, 4, 8


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
        if self.settings.get("nfs"):
            mount = f"sudo mount -t nfs {self.settings['nfs']} {SHARE}"
            self._everywhere(
                f"mountpoint -q {SHARE} || (sudo apt-get install -qy nfs-common && "
                f"sudo mkdir -p {SHARE} && {mount} && sudo chmod a+w {SHARE})",
                "mounting the share",
            )
        self._everywhere(
            f"mkdir -p ema_jax && tar -xzf {archive} -C ema_jax && "
            "python3 -m venv venv && venv/bin/pip install -q './ema_jax[tpu]'",
            "installing the project",
        )

    def start(self, command: list[str], bucket: str | None) -> None:
        """Starts the command on every worker in the background; log and exit code go to files."""
        secret = self.settings["hf_token_secret"]
        token = (
            f'export HF_TOKEN="$(gcloud secrets versions access latest --secret={secret})" && '
            if secret
            else ""
        )
        line = f"({shlex.join(command)}) >../run.log 2>&1; code=$?; "
        if bucket:
            line = _kept_in(bucket, line)
        line += "echo $code >../run.exit"
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

    def copy_results(self) -> None:
        """Copies what the slice's disk alone may hold to its bucket; keeps the slice if it cannot.

        Of a slice that is gone there is nothing left to copy.
        """
        for bucket in self.settings.get("results", ()):
            if self.state() in _GONE:
                return
            local = _local(bucket)
            line = f"cd ema_jax && (test ! -d {local} || {_rsync(local, bucket)})"
            what = f"copying the results to {bucket} (nothing was deleted; --discard gives them up)"
            self.shell.must(self._ssh(line, worker="0"), what)

    def keeps_in(self, bucket: str) -> None:
        """Records a bucket's folder, to which results are copied before the slice is deleted."""
        known = self.settings.get("results", [])
        self.settings["results"] = [*known, *({bucket} - {*known})]
        if not self.shell.dry_run:
            _record(self.name).write_text(json.dumps(self.settings, indent=2) + "\n")

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
    parser.add_argument("--nfs", type=matching(_NFS, "10.0.0.2:/share"), help="see above")
    parser.add_argument("--discard", action="store_true", help="delete without a copy of results")
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
            if not options.discard:
                known.copy_results()
            known.delete()
            return 0
        if options.action == "logs":
            return known.follow() or 0
        if not command:
            fail("run: no command: give it after --, as in -- python -m ema_jax.main --config=…")
        command, bucket = _with_workdir(known, command)
        return _run(known, command, bucket, options)
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
        fields = ("name", *wanted, "project", "spot", "nfs", "hf_token_secret")
        made = Slice({field: getattr(options, field) for field in fields}, shell)
        made.create()
    made.wait(options.timeout, options.poll)
    made.install()
    return 0


def _run(known: Slice, command: list[str], bucket: str | None, options: Any) -> int:
    for attempt in range(options.restarts + 1):
        known.start(command, bucket)
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


def _with_workdir(known: Slice, command: list[str]) -> tuple[list[str], str | None]:
    """The command with a `--workdir` that is a folder there, and the bucket's that it stands for.

    A `--workdir` whose files would vanish with the slice ends the launcher.
    """
    flags = [i for i, word in enumerate(command) if word.partition("=")[0] == "--workdir"]
    for i in flags:
        name, equals, given = command[i].partition("=")
        if not equals:
            fail("run: write --workdir=FOLDER, with =")
        if re.fullmatch(_BUCKET, given):
            hosts = _hosts(known.settings["accelerator"])
            if hosts > 1:
                fail(
                    f"run: {given}: the slice's {hosts} hosts need one folder that all of them "
                    f"see: `up --nfs=HOST:/SHARE`, then --workdir={SHARE}/…"
                )
            bucket = given.rstrip("/")
            known.keeps_in(bucket)
            return [*command[:i], f"{name}={_local(bucket)}", *command[i + 1 :]], bucket
        if given.startswith("gs:"):
            fail(
                f"run: --workdir={given}: no name of a bucket and a folder; write it like "
                "gs://my-bucket/runs/x (a bucket's name has 3 to 63 characters)"
            )
        if not known.settings.get("nfs") or not Path(given).is_relative_to(SHARE):
            fail(
                f"run: --workdir={given}: would vanish with the slice; name gs://BUCKET/FOLDER, or "
                f"a folder below {SHARE} (`up --nfs=HOST:/SHARE`)"
            )
    return command, None


def _hosts(accelerator: str) -> int:
    """Hosts of a slice, by its type: v5e and v6e count chips, the others cores."""
    kind, _, size = accelerator.partition("-")
    if kind.startswith(("v5lite", "v5e", "v6e")):
        return 1 if int(size) <= _ONE_HOST else -(-int(size) // _CHIPS_A_HOST)
    return -(-int(size) // _CORES_A_HOST)


def _local(bucket: str) -> str:
    """The folder on the slice that stands for a bucket's, from where commands run."""
    return "../results/" + bucket.removeprefix("gs://")


def _rsync(source: str, target: str) -> str:
    return f"gcloud storage rsync -r --exclude={shlex.quote(_UNFINISHED)} {source} {target}"


def _kept_in(bucket: str, line: str) -> str:
    """A shell line that gets the results so far, copies them back every now and then, and at last.

    It ends before the command starts if what there is cannot be fetched: the command would begin
    again, and its first copy overwrite what there is.
    """
    local = _local(bucket)
    # A bucket's folder without a file is no error: there is nothing yet to resume from.
    fetch = f"! gcloud storage ls {bucket}/** >/dev/null || {_rsync(bucket, local)}"
    return (
        f"mkdir -p {local}; gcloud storage ls gs://{bucket.split('/')[2]} >/dev/null && "
        f"({fetch}) || {{ echo error: {bucket}: cannot be read; echo 2 >../run.exit; exit; }} "
        ">>../run.log 2>&1; "
        f"(trap 'kill $s; exit' TERM; while sleep {SECONDS_BETWEEN_COPIES} & s=$!; wait $s; "
        f"do {_rsync(local, bucket)}; done) >../copies.log 2>&1 & copier=$!; {line}"
        f"kill $copier; wait $copier; {_rsync(local, bucket)} >>../copies.log 2>&1 || "
        f"{{ echo error: results not copied to {bucket}, see copies.log >>../run.log; "
        "[ $code -ne 0 ] || code=2; }; "
    )


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
