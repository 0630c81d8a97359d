"""A study as a Kubernetes JobSet, one process per host, on GPUs or on a TPU slice of GKE.

python launch/k8s/jobset.py apply --name=ema --image=REGISTRY/ema_jax:TAG --claim=runs --hosts=4 \
    --tpu=tpu-v5-lite-podslice:4x4:4 -- python -m ema_jax.main --config=… --workdir=/runs/ema
python launch/k8s/jobset.py logs   --name=ema
python launch/k8s/jobset.py delete --name=ema

`--tpu=ACCELERATOR:TOPOLOGY:CHIPS_PER_HOST`, or `--gpus=N` per host. The claim is a ReadWriteMany
volume, mounted at /runs. A Hugging Face token comes from the key `token` of the secret `--secret`.
Only a JobSet with the label of this launcher is replaced or deleted.
"""

import json
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import NAME, Parser, Shell, fail, matching

TEMPLATE = Path(__file__).with_name("jobset.yaml")
OWNER = "ema-jax-launch"


def main() -> int:
    """Runs the action that the arguments name."""
    parser = Parser(description=__doc__)
    name = matching(NAME, "ema-v5e-16")
    parser.add_argument("action", choices=("apply", "logs", "delete"))
    parser.add_argument("--name", required=True, type=name)
    parser.add_argument("--namespace", default="default", type=name)
    parser.add_argument("--image", type=matching(r"[\w./:@-]+", "REGISTRY/NAME:TAG"))
    parser.add_argument("--claim", type=name, help="the shared volume's claim")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="per host")
    parser.add_argument("--tpu", type=matching(r"[a-z0-9-]+:\d+(x\d+)+:\d+", "tpu-v6e-slice:4x4:4"))
    parser.add_argument("--secret", default="hf-token", type=name)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--dry_run", action="store_true")
    options, command = parser.parse_known_args()
    command = command[1:] if command[:1] == ["--"] else command
    if command and options.action != "apply":
        fail(f"{command[0]}: unexpected; only apply takes a command, after --")
    shell = Shell(dry_run=options.dry_run)
    kubectl = ["kubectl", f"--namespace={options.namespace}"]
    try:
        if options.action == "logs":
            selector = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
            follow = ["--follow", "--prefix", "--max-log-requests=512"]
            return shell.run([*kubectl, "logs", selector, *follow])
        owner = _owner(shell, kubectl, options.name)
        if owner not in (OWNER, None):
            fail(f"jobset {options.name}: not made by this launcher; choose another --name")
        if options.action == "delete":
            if owner is None:
                fail(f"jobset {options.name}: none in namespace {options.namespace}")
            shell.must([*kubectl, "delete", "jobset", options.name], "deleting the JobSet")
            return 0
        manifest = _manifest(options, command)
        shell.must([*kubectl, "apply", "--filename=-"], "applying the JobSet", stdin=manifest)
        return 0
    except FileNotFoundError as error:
        fail(f"{error.filename}: not installed here; see kubernetes.io/docs/tasks/tools")


def _owner(shell: Shell, kubectl: list[str], name: str) -> str | None:
    """The `managed-by` label of the JobSet with that name; None if there is no such JobSet."""
    label = r"{.metadata.name} {.metadata.labels.app\.kubernetes\.io/managed-by}"
    find = [*kubectl, "get", "jobset", name, "--ignore-not-found", f"--output=jsonpath={label}"]
    answer = shell.ask(find, f"{name} {OWNER}")
    if answer is None:
        fail("kubectl: the cluster does not answer, or has no JobSets (jobset.sigs.k8s.io)")
    return answer.partition(" ")[2] if answer else None


def _manifest(options: object, command: list[str]) -> str:
    o = vars(options)
    for field in ("image", "claim"):
        if o[field] is None:
            fail(f"apply: --{field} is required")
    if (o["gpus"] is None) == (o["tpu"] is None):
        fail("apply: give one of --gpus and --tpu")
    if not command:
        fail("apply: no command: give it after --, as in -- python -m ema_jax.main --config=…")
    if o["hosts"] < 1 or (o["gpus"] is not None and o["gpus"] < 1) or o["restarts"] < 0:
        fail("--hosts and --gpus: at least 1 each; --restarts: at least 0")
    selector: dict[str, str] = {}
    resource, count = "nvidia.com/gpu", o["gpus"]
    if o["tpu"]:
        accelerator, topology, chips = o["tpu"].split(":")
        resource, count = "google.com/tpu", int(chips)
        selector = {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        }
    values = {key: o[key] for key in ("name", "namespace", "image", "claim", "hosts", "secret")}
    values |= {"restarts": o["restarts"], "resource": resource, "count": count}
    # JSON is valid YAML: no argument is ever read as anything but text.
    values |= {"selector": json.dumps(selector), "command": json.dumps(command)}
    return string.Template(TEMPLATE.read_text()).substitute(values)


if __name__ == "__main__":
    sys.exit(main())
