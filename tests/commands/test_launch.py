"""The launchers against programs that stand for gcloud, sbatch, srun and kubectl."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
RUN = ["--", "python", "-m", "ema_jax.main", "--config=configs/tiny.py", "--workdir=gs://bkt/run"]
UP = ["--zone=us-west4-a", "--accelerator=v5litepod-8", "--runtime=v2-alpha-tpuv5-lite"]
POD = [UP[0], "--accelerator=v5litepod-16", UP[2]]

# Notes how it was called, and does what the next line of its script says: an exit code and output.
FAKE = """#!{python}
import json, pathlib, sys
here = pathlib.Path({here!r})
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
for rule in json.loads((here / "rules.json").read_text()):
    if all(word in " ".join(sys.argv) for word in rule["when"]) and rule["answers"]:
        code, text = rule["answers"][0]
        rules = json.loads((here / "rules.json").read_text())
        for again in rules:
            if again["when"] == rule["when"] and len(again["answers"]) > 1:
                again["answers"].pop(0)
        (here / "rules.json").write_text(json.dumps(rules))
        print(text)
        sys.exit(code)
"""


class Cluster:
    """A folder to work in, with programs of given names on PATH."""

    def __init__(self, folder: Path, *programs: str):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in programs:
            path = self.bin / name
            path.write_text(FAKE.format(python=sys.executable, here=str(folder), name=name))
            path.chmod(0o755)
        self.rules()

    def rules(self, **answers: list[tuple[int, str]]) -> None:
        """Word (`_` for a space) that a call holds → (exit code, output) of each such call."""
        made = [{"when": [word.replace("_", " ")], "answers": a} for word, a in answers.items()]
        (self.folder / "rules.json").write_text(json.dumps(made))

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=kept | {"PATH": path} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What gcloud was asked to do."""
        return [call[4] for call in self.calls if call[0] == "gcloud"]


@pytest.fixture
def cloud(tmp_path) -> Cluster:
    return Cluster(tmp_path, "gcloud", "git")


def tpu(cloud: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cloud.run(
        sys.executable, str(LAUNCH / "tpu_vm.py"), *arguments[:1], "--poll=0.01", *arguments[1:]
    )


def refused(done: subprocess.CompletedProcess[str], said: str) -> bool:
    line = done.stderr.strip().splitlines()[-1]
    return done.returncode == 2 and line.startswith("error: ") and said in line


def test_a_slice_is_created_waited_for_installed_run_and_deleted(cloud):
    cloud.rules(describe=[(0, "WAITING_FOR_RESOURCES"), (0, "PROVISIONING"), (0, "ACTIVE")])
    assert tpu(cloud, "up", "--name=ema", *UP, "--spot").returncode == 0
    assert cloud.verbs() == ["create", "describe", "describe", "describe", "scp", "ssh"]
    create = cloud.calls[0]
    assert {"--zone=us-west4-a", "--spot", "--accelerator-type=v5litepod-8"} <= set(create)
    # Only `run` needs the rest again: the note of the slice has it.
    cloud.rules(describe=[(0, "ACTIVE")], tail=[(3, "of the study")])
    done = tpu(cloud, "run", "--name=ema", *RUN)
    assert (done.returncode, "of the study" in done.stdout) == (3, True)
    start, follow = cloud.calls[-3:-1]
    assert "--worker=all" in start
    assert "--worker=0" in follow
    assert "ema_jax.main --config=configs/tiny.py --workdir=../results/bkt/run" in start[-1]
    # From the bucket before the command, back to it while it runs and after it.
    copies = re.findall(r"rsync \S+ \S+ (\S+) (\S+)", start[-1].replace("'\"'\"'", ""))
    there, back = ("gs://bkt/run", "../results/bkt/run"), ("../results/bkt/run", "gs://bkt/run")
    assert [tuple(x.strip(";)") for x in copy) for copy in copies] == [there, back, back]
    # A slice whose results cannot be copied stays.
    cloud.rules(describe=[(0, "ACTIVE")], rsync=[(1, "denied")])
    assert refused(tpu(cloud, "delete", "--name=ema"), "copying the results to gs://bkt/run")
    assert "delete" not in cloud.verbs()
    cloud.rules(describe=[(0, "ACTIVE")])
    assert tpu(cloud, "delete", "--name=ema").returncode == 0
    assert cloud.verbs()[-2:] == ["ssh", "delete"]
    assert not (cloud.folder / ".launch/ema.json").exists()


def test_a_preempted_slice_is_made_anew_and_the_command_started_again(cloud):
    cloud.rules(describe=[(0, "ACTIVE")])
    tpu(cloud, "up", "--name=ema", *UP)
    cloud.rules(tail=[(255, ""), (0, "done")], describe=[(0, "SUSPENDED"), (0, "ACTIVE")])
    before = len(cloud.calls)
    done = tpu(cloud, "run", "--name=ema", *RUN)
    assert done.returncode == 0, done.stderr
    assert "preempted; restart 1" in done.stderr
    verbs = [call[4] for call in cloud.calls[before:] if call[0] == "gcloud"]
    again = ["delete", "create", "describe", "scp", "ssh"]
    assert verbs == ["ssh", "ssh", "describe", *again, "ssh", "ssh"]


def test_results_that_are_given_up_or_gone_are_not_copied(cloud):
    for state, flags in (("ACTIVE", ["--discard"]), ("SUSPENDED", [])):
        cloud.rules(describe=[(0, "ACTIVE")])
        assert tpu(cloud, "up", "--name=ema", *UP).returncode == 0
        assert tpu(cloud, "run", "--name=ema", *RUN).returncode == 0
        cloud.rules(describe=[(0, state)], rsync=[(1, "denied")])
        assert tpu(cloud, "delete", "--name=ema", *flags).returncode == 0


@pytest.mark.parametrize(
    ("created", "workdir", "said"),
    [
        (UP, "runs/x", "would vanish with the slice"),
        (UP, "/mnt/ema/x", "would vanish with the slice"),
        (UP, "s3://bkt/x", "would vanish with the slice"),
        (UP, "gs:/bkt/x", "no name of a bucket"),
        (UP, "gs://bkt/x; rm -rf ~", "no name of a bucket"),
        (UP, "gs://b/x", "no name of a bucket"),
        (UP, "gs://Bkt/x", "no name of a bucket"),
        (POD, "gs://bkt/x", "4 hosts need one folder"),
        ([*POD, "--nfs=10.0.0.2:/share"], "runs/x", "would vanish with the slice"),
        ([*POD, "--nfs=10.0.0.2:/share"], "/mnt/ema/x", None),
        ([UP[0], "--accelerator=v4-8", UP[2]], "gs://bkt/x", None),
        ([UP[0], "--accelerator=v4-16", UP[2]], "gs://bkt/x", "2 hosts need one folder"),
    ],
)
def test_a_workdir_outlives_the_slice(cloud, created, workdir, said):
    cloud.rules(describe=[(0, "ACTIVE")])
    assert tpu(cloud, "up", "--name=ema", *created).returncode == 0
    mounts = [call for call in cloud.calls if "sudo mount -t nfs 10.0.0.2:/share" in call[-1]]
    assert len(mounts) == any("--nfs" in flag for flag in created)
    done = tpu(cloud, "run", "--name=ema", "--", "python", f"--workdir={workdir}")
    if said is None:
        assert done.returncode == 0, done.stderr
    else:
        assert refused(done, said)
        assert not any("nohup" in call[-1] for call in cloud.calls)


def test_the_line_that_keeps_results_runs_in_a_shell(cloud):
    """With a folder in place of the bucket, and a `gcloud` that copies."""
    sys.path.insert(0, str(LAUNCH))
    try:
        import tpu_vm
    finally:
        sys.path.remove(str(LAUNCH))
    home, store = cloud.folder / "home", cloud.folder / "store"
    (home / "ema_jax").mkdir(parents=True)
    (store / "bkt/run").mkdir(parents=True)
    (store / "bkt/run/first").write_text("1")
    fake = cloud.bin / "gcloud"
    fake.write_text(
        "#!/bin/bash\n"
        f'at() {{ echo "${{1/gs:\\/\\//{store}/}}"; }}\n'
        '[ "$2" = ls ] && { ls $(at "${3%/\\*\\*}"); exit; }\n'
        'cp -r $(at "$5")/. $(at "$6")\n'
    )

    def run(command: str) -> tuple[str, str]:
        line = tpu_vm._kept_in("gs://bkt/run", f"({command}) >../run.log 2>&1; code=$?; ")
        subprocess.run(
            ["sh", "-c", f"{line}echo $code >../run.exit"],
            cwd=home / "ema_jax",
            env=os.environ | {"PATH": f"{cloud.bin}:/usr/bin:/bin"},
            check=False,
            timeout=30,
        )
        return (home / "run.exit").read_text().strip(), (home / "run.log").read_text()

    code, _ = run("cat ../results/bkt/run/first >../results/bkt/run/second; exit 3")
    assert (code, (store / "bkt/run/second").read_text()) == ("3", "1")
    (store / "bkt").rename(store / "away")  # a bucket that is not there
    (home / "run.log").unlink()
    code, log = run("echo started")
    assert code == "2"
    assert "cannot be read" in log
    assert "started" not in log


def test_restarts_are_bounded(cloud):
    cloud.rules(describe=[(0, "ACTIVE")])
    tpu(cloud, "up", "--name=ema", *UP)
    cloud.rules(
        tail=[(255, "")],
        describe=[(0, "SUSPENDED"), (0, "ACTIVE"), (0, "SUSPENDED"), (0, "ACTIVE")],
    )
    done = tpu(cloud, "run", "--name=ema", "--restarts=1", *RUN)
    assert refused(done, "preempted 2 times")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_slice_that_will_not_come_ends_the_wait(cloud, state):
    cloud.rules(describe=[(0, state)])
    assert refused(tpu(cloud, "up", "--name=ema", *UP), state)
    # Asked for all the same, so it can be deleted.
    assert tpu(cloud, "delete", "--name=ema").returncode == 0


def test_a_wait_ends(cloud):
    cloud.rules(describe=[(0, "WAITING_FOR_RESOURCES")])
    assert refused(tpu(cloud, "up", "--name=ema", "--timeout=0.05", *UP), "still WAITING")


def test_what_gcloud_refuses_is_said(cloud):
    cloud.rules(create=[(1, "quota")])
    assert refused(tpu(cloud, "up", "--name=ema", *UP), "creating the slice failed")


def test_nothing_is_deleted_that_was_not_created_here(cloud):
    assert refused(tpu(cloud, "delete", "--name=other"), "was not created from this folder")
    assert cloud.calls == []


@pytest.mark.parametrize(
    "argument", ["--name=Ema", "--name=a;b", "--name=-x", "--zone=$(x)", "--project=a b"]
)
def test_names_are_checked(cloud, argument):
    assert refused(tpu(cloud, "up", "--name=ema", *UP, argument), "not valid here")
    assert cloud.calls == []


def test_a_secret_goes_by_its_name(cloud):
    cloud.rules(describe=[(0, "ACTIVE")])
    tpu(cloud, "up", "--name=ema", *UP, "--hf_token_secret=hf-token")
    done = cloud.run(
        sys.executable, str(LAUNCH / "tpu_vm.py"), "run", "--name=ema", *RUN, HF_TOKEN="hf_XYZ"
    )
    assert done.returncode == 0
    words = json.dumps(cloud.calls)
    assert "hf_XYZ" not in words
    assert "secrets versions access latest --secret=hf-token" in words


def test_a_dry_run_prints_and_calls_nothing(cloud):
    done = tpu(cloud, "up", "--name=ema", "--dry_run", *UP)
    assert done.returncode == 0
    assert "gcloud compute tpus queued-resources create ema --zone=us-west4-a" in done.stdout
    assert cloud.calls == []
    assert not (cloud.folder / ".launch").exists()


def slurm(cluster: Cluster, *arguments: str, **environment: str):
    return cluster.run("bash", str(LAUNCH / "slurm.sbatch"), *arguments, **environment)


PYTHON = ["--", "-m", "ema_jax.main", "--config=a b.py", "--workdir=/shared/x"]


def test_slurm_submits_itself_and_runs_one_process_a_gpu(tmp_path):
    cluster = Cluster(tmp_path, "sbatch", "srun")
    assert slurm(cluster, "--nodes=2", "--gpus=8", *PYTHON).returncode == 0
    (submitted,) = cluster.calls
    assert submitted[:4] == ["sbatch", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"]
    script = submitted.index(str(LAUNCH / "slurm.sbatch"))
    # What SLURM then runs, with the arguments that it was given.
    assert slurm(cluster, *submitted[script + 1 :], SLURM_JOB_ID="7").returncode == 0
    step = cluster.calls[-1]
    # JAX takes the GPU of a process's number, so that each has to see all of them.
    assert step[:4] == ["srun", "--ntasks-per-node=8", "--gpus-per-node=8", "--gpu-bind=none"]
    assert step[-4:] == PYTHON[1:]


def test_slurm_failures(tmp_path):
    cluster = Cluster(tmp_path, "sbatch")
    assert refused(slurm(cluster, "--nodes=two", *PYTHON), "'two'")
    assert refused(slurm(cluster, "--node=2", *PYTHON), "--node=2")
    assert refused(slurm(cluster, "--nodes=2"), "no command")
    assert cluster.calls == []
    cluster.rules(nodes=[(1, "")])
    assert slurm(cluster, *PYTHON).returncode == 1
    (cluster.bin / "sbatch").unlink()
    assert refused(slurm(cluster, *PYTHON), "sbatch: not found")


def test_slurm_dry_run(tmp_path):
    cluster = Cluster(tmp_path, "sbatch", "srun")
    done = slurm(cluster, "--dry_run", "--nodes=2", *PYTHON)
    submit, step = map(shlex.split, done.stdout.splitlines())
    assert (submit[0], step[0], step[-4:]) == ("sbatch", "srun", PYTHON[1:])
    assert cluster.calls == []


def test_shell_scripts_pass_shellcheck():
    check = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [check, LAUNCH / "slurm.sbatch"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def jobset(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.run(sys.executable, str(LAUNCH / "k8s/jobset.py"), *arguments)


APPLY = ["apply", "--name=ema", "--image=reg.io/ema_jax:1", "--claim=runs", "--hosts=4"]
TPU = "--tpu=tpu-v5-lite-podslice:4x4:4"


def test_a_jobset_is_rendered(tmp_path):
    cluster = Cluster(tmp_path, "kubectl")
    command = ["--", "python", "-m", "ema_jax.main", '--config=a"b: {c}.py']
    done = jobset(cluster, *APPLY, TPU, "--dry_run", *command)
    assert done.returncode == 0, done.stderr
    assert cluster.calls == []
    text = done.stdout.partition("apply --filename=-\n")[2]
    made = yaml.safe_load(text)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["command"] == command[1:]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    env = {item["name"]: item for item in container["env"]}
    assert env["EMA_JAX_NUM_PROCESSES"]["value"] == "4"
    assert env["EMA_JAX_COORDINATOR"]["value"] == "ema-worker-0-0.ema:8476"
    assert "secretKeyRef" in env["HF_TOKEN"]["valueFrom"]


def test_only_own_jobsets_are_replaced_or_deleted(tmp_path):
    cluster = Cluster(tmp_path, "kubectl")
    cluster.rules(get=[(0, "ema somebody")])
    assert refused(jobset(cluster, *APPLY, "--gpus=8", *RUN), "not made by this launcher")
    assert refused(jobset(cluster, "delete", "--name=ema"), "not made by this launcher")
    cluster.rules(get=[(0, "")])
    assert refused(jobset(cluster, "delete", "--name=ema"), "none in namespace")
    assert {call[2] for call in cluster.calls} == {"get"}
    cluster.rules(get=[(0, "ema ema-jax-launch")])
    assert jobset(cluster, "delete", "--name=ema").returncode == 0
    assert cluster.calls[-1][2:] == ["delete", "jobset", "ema"]


def test_jobset_failures(tmp_path):
    cluster = Cluster(tmp_path, "kubectl")
    assert refused(jobset(cluster, *APPLY, *RUN), "one of --gpus and --tpu")
    assert refused(jobset(cluster, *APPLY, TPU), "no command")
    assert refused(jobset(cluster, *APPLY, "--image=$(x)", TPU, *RUN), "not valid here")
    cluster.rules(get=[(1, "")])
    assert refused(jobset(cluster, *APPLY, TPU, *RUN), "does not answer")
    cluster.rules(get=[(0, "")], apply=[(1, "")])
    assert refused(jobset(cluster, *APPLY, TPU, *RUN), "applying the JobSet failed")


def local(*arguments: str) -> list[str]:
    return [sys.executable, str(LAUNCH / "local.py"), *arguments]


SHOW = (
    "import os; print(os.environ['EMA_JAX_PROCESS_ID'], os.environ['EMA_JAX_NUM_PROCESSES'], "
    "os.environ['EMA_JAX_COORDINATOR'])"
)


def test_local_processes_know_each_other():
    done = subprocess.run(
        local("--processes=3", "--", sys.executable, "-c", SHOW),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = sorted(done.stdout.splitlines())
    assert [line.split()[:3] for line in lines] == [[f"[{i}]", str(i), "3"] for i in range(3)]
    assert len({line.split()[3] for line in lines}) == 1


def test_when_one_local_process_fails_the_others_end():
    program = (
        "import os, sys, time\n"
        "sys.exit(5) if os.environ['EMA_JAX_PROCESS_ID'] == '1' else time.sleep(60)"
    )
    start = time.monotonic()
    done = subprocess.run(
        local("--grace=1", "--", sys.executable, "-c", program),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, time.monotonic() - start < 20) == (5, True)
    assert "[1] ended with 5" in done.stderr


def test_a_signal_goes_to_every_local_process():
    program = (
        # No print in the handler: the signal may come while the one below is still at it.
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), os._exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        local("--", sys.executable, "-c", program), stdout=subprocess.PIPE, text=True
    )
    assert {process.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 0


def test_local_dry_run_and_failures():
    done = subprocess.run(
        local("--dry_run", "--", "study", "a b"), capture_output=True, text=True, check=True
    )
    first, second = map(shlex.split, done.stdout.splitlines())
    assert first[-2:] == second[-2:] == ["study", "a b"]
    assert "EMA_JAX_PROCESS_ID=1" in second
    for arguments, said in (
        ([], "no command"),
        (["--processes=0", "--", "x"], "at least 1"),
        (["--", "no-such-program"], "no-such-program"),
    ):
        done = subprocess.run(local(*arguments), capture_output=True, text=True, check=False)
        assert refused(done, said)
