"""The files for other places: their text, and what they do where Slurm, gcloud and the trainer are small scripts."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from train.config import ConfigError
from train.launch.__main__ import main
from train.launch.render import PLACES, render

CONFIG = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
NEEDED = {
    "slurm": {"nodes": "4", "workdir": "/work"},
    "jobset": {"nodes": "4", "image": "registry.example/longctx:1", "claim": "runs"},
    "tpu_vm": {"name": "slice", "zone": "us-east5-a", "workdir": "/work"},
}
TRAINER = """#!/bin/bash
echo "$@" >> "$LOG"
trap 'echo saved >> "$LOG"; exit 0' TERM
echo > "$LOG.ready"
for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
exit "${CODE:-0}"
"""


def filled(place, arguments=("CONFIG",), python="python", **values):
    return render(place, NEEDED[place] | values, python=python, arguments=arguments)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(text, *arguments, **commands): the process of a rendered script that finds these commands in its PATH."""
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def start(text, *arguments, **commands):
        for name, code in {"trainer": TRAINER, "script": text, **commands}.items():
            (tmp_path / name).write_text(code)
            (tmp_path / name).chmod(0o755)
        return subprocess.Popen(["bash", str(tmp_path / "script"), *arguments], start_new_session=True)

    return start


def wait_for(path):
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("place", ["slurm", "tpu_vm"])
def test_shell_files_are_well_formed(place):
    text = filled(place, ["a b.yaml", "run_dir=it's"])
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "%%" not in text and "python -m train 'a b.yaml' 'run_dir=it'\"'\"'s'" in text


def test_the_head_of_a_slurm_job():
    text = filled("slurm", nodes="16", time="2-00:00:00", grace="120")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    assert options["nodes"] == "16" and options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"
    assert options["time"] == "2-00:00:00" and options["signal"] == "B:USR1@120"
    assert options["open-mode"] == "append" and "#SBATCH --requeue\n" in text


SLURM = {
    "srun": '#!/bin/bash\necho $$ > "$LOG.pid"\nexec "${@:2}"\n',
    "scancel": '#!/bin/bash\necho "scancel $@" >> "$LOG"\nkill -TERM "$(cat "$LOG.pid")"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $@" >> "$LOG"\n',
}


@pytest.mark.parametrize(
    ("code", "restarts_so_far", "requeued"),
    [("0", "0", False), ("1", "0", True), ("1", "2", True), ("1", "3", False), ("2", "0", False)],
)
def test_a_slurm_job_that_fails_is_queued_again(start, tmp_path, monkeypatch, code, restarts_so_far, requeued):
    for name, value in {"CODE": code, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts_so_far}.items():
        monkeypatch.setenv(name, value)
    text = filled("slurm", ["CONFIG", "a.b=1 2"], python="trainer", workdir=str(tmp_path))
    assert start(text, **SLURM).wait(timeout=20) == int(code)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["-m train CONFIG a.b=1 2"] + ["scontrol requeue 7"] * requeued


@pytest.mark.parametrize("restarts_so_far", ["0", "9"])
def test_a_slurm_job_saves_before_its_time_limit_and_is_queued_again(start, tmp_path, monkeypatch, restarts_so_far):
    for name, value in {"TENTHS": "100", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts_so_far}.items():
        monkeypatch.setenv(name, value)
    job = start(filled("slurm", python="trainer", workdir=str(tmp_path)), **SLURM)
    wait_for(tmp_path / "log.ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["-m train CONFIG", "scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


def test_a_jobset():
    text = filled("jobset", ["CONFIG", "a.b=it's # 1"], restarts="5", grace="60", gpus_per_node="4")
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 60
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    [script] = container["args"]
    # As JobSet names pods: JOBSET-REPLICATED_JOB-JOB-POD.SUBDOMAIN.
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    assert f"distributed.coordinator_address={name}-{workers['name']}-0-0.{subdomain}:12321 " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def jobset_script(**values):
    jobset = yaml.safe_load(filled("jobset", ["CONFIG", "a.b=it's # 1"], python="trainer", **values))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]["args"][0]


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_pod_ends_as_the_trainer_does(start, tmp_path, monkeypatch, code):
    monkeypatch.setenv("CODE", code)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert start(jobset_script()).wait(timeout=20) == int(code)
    words = (tmp_path / "log").read_text()
    assert words.startswith("-m train CONFIG a.b=it's # 1 distributed.coordinator_address=longctx-workers-0-0.longctx")
    assert "distributed.num_processes=4 distributed.process_id=3 " in words


def test_a_pod_that_has_to_go_saves_and_counts_as_failed(start, tmp_path, monkeypatch):
    monkeypatch.setenv("TENTHS", "100")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    pod = start(jobset_script())
    wait_for(tmp_path / "log.ready")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=20) == 143
    assert (tmp_path / "log").read_text().endswith("\nsaved\n")


GCLOUD = """#!/bin/bash
echo "$1 $2 $3 $4 $5 $6 $7" >> "$LOG.calls"
command=${@: -1}
exec bash -c "${command#--command=}"
"""


@pytest.mark.parametrize(("code", "attempts"), [("0", 1), ("1", 3), ("2", 1)])
def test_hosts_of_a_tpu(start, tmp_path, monkeypatch, code, attempts):
    monkeypatch.setenv("CODE", code)
    text = filled("tpu_vm", python="trainer", workdir=str(tmp_path), restarts="2")
    assert start(text, gcloud=GCLOUD, curl="#!/bin/bash\nexit 1\n", sleep="").wait(timeout=20) == int(code)
    assert (tmp_path / "log").read_text().splitlines() == ["-m train CONFIG"] * attempts
    calls = set((tmp_path / "log.calls").read_text().splitlines())
    assert calls == {"compute tpus tpu-vm ssh slice --zone=us-east5-a --worker=all"}


@pytest.mark.parametrize("how", ["stop", "preempted"])
def test_a_tpu_that_is_stopped_or_taken_saves(start, tmp_path, monkeypatch, how):
    monkeypatch.setenv("TENTHS", "100")
    text = filled("tpu_vm", python="trainer", workdir=str(tmp_path), name=f"slice-{os.getpid()}")
    curl = f'#!/bin/bash\n[ -e "{tmp_path}/taken" ] && echo TRUE\n'
    script = start(text.replace("sleep 5", "sleep 0.1"), gcloud=GCLOUD, curl=curl)
    wait_for(tmp_path / "log.ready")
    if how == "stop":
        subprocess.run(["bash", str(tmp_path / "script"), "stop"], check=True)
    else:
        (tmp_path / "taken").touch()
    assert script.wait(timeout=20) == 0
    Path(f"/tmp/longctx-slice-{os.getpid()}.pid").unlink()
    assert (tmp_path / "log").read_text().splitlines() == ["-m train CONFIG", "saved"]


@pytest.mark.parametrize("place", PLACES)
def test_placeholders_are_those_of_the_template(place):
    text = (Path(__file__).parents[2] / "train/launch" / PLACES[place][0]).read_text()
    assert set(re.findall(r"%%\{(\w+)\}", text)) == {*PLACES[place][1], "command"} and not re.search(r"%%[^{]", text)
    with pytest.raises(ConfigError, match="colour: unknown placeholder of .*; it has n"):
        filled(place, colour="red")
    name = next(iter(NEEDED[place]))
    with pytest.raises(ConfigError, match=rf"{name}: got nothing, but .* needs it: .*; pass --{name}"):
        render(place, {}, python="python", arguments=["CONFIG"])
    with pytest.raises(ConfigError, match=rf"{name}: got '1; ls', wanted text that matches"):
        filled(place, **{name: "1; ls"})
    with pytest.raises(ConfigError, match="arguments: got a line break in"):
        filled(place, ["CONFIG", "a=\n"])


def test_the_command_line(tmp_path, capfd):
    output = tmp_path / "run.sbatch"
    command = ["render", "slurm", "--nodes", "2", "--workdir", "/w", "--config", CONFIG, "training.steps=300"]
    assert main([*command, "--output", str(output), "--gpus-per-node", "4"]) == 0
    assert f"python -m train {CONFIG} training.steps=300 &" in output.read_text()
    assert "--gpus-per-node=4\n" in output.read_text()
    assert main(command) == 0 and capfd.readouterr().out.startswith("#!/bin/bash\n")
    assert main([*command, "training.stepz=1"]) == 2
    assert "training.stepz: unknown key" in capfd.readouterr().err
    heads = [f"model.mixers.global.{name}=3" for name in ("num_heads", "num_kv_heads")]
    assert main([*command, *heads]) == 2  # layers that cannot be built
    assert capfd.readouterr().err.startswith("model: ")
    assert main([*command, "context_parallel.strategy=auto"]) == 0  # chosen on the hosts
    capfd.readouterr()
    for wrong, message in (
        (command[:2] + command[4:], "the following arguments are required: --nodes"),
        ([*command, "--zone", "z"], "unrecognized arguments: --zone"),
        (["render", "pbs"], "invalid choice: 'pbs'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert message in capfd.readouterr().err
    assert main([*command, "--nodes", "0"]) == 2
    assert "nodes: got '0', wanted text that matches" in capfd.readouterr().err
