"The launch lines and files of docs/launch, as far as they can be seen without a cluster."

import re
import shlex
import subprocess
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from egcnn_nb.commands.train import LAUNCH, arguments

FOLDER = Path(__file__).parents[1] / "docs/launch"


def understood(words):
    "Parse a launch line by torchrun's flags and ours"
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        assert args.module and args.training_script == "egcnn_nb.train"
        words = args.training_script_args
    else:
        words = words[1:]
    return arguments().parse_args(words)


def test_every_line_is_understood():
    text = (FOLDER / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("torchrun", "egcnn_train"))]
    assert len(lines) == 6
    of_help = [line.strip() for line in LAUNCH.splitlines() if line.startswith("    ")]
    for line in lines + of_help:
        assert understood(shlex.split(line)).data == "DATA"


def test_the_slurm_file():
    path = FOLDER / "slurm.sbatch"
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    flags = set(re.findall(r"^#SBATCH --([a-z-]+)", text, re.M))
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue"} <= flags
    joined = re.sub(r"\\\n", " ", text)
    line = joined.split("srun ")[1].split("\n")[0]
    values = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_ID": "1",
        "first": "host",
        "DATA": "DATA",
        "RUN": "RUN",
    }
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    assert understood(shlex.split(line)).resume == "if_there"


def test_the_slurm_file_knows_when_a_run_is_finished(tmp_path):
    text = (FOLDER / "slurm.sbatch").read_text()
    code = re.search(r"python -c '(.*?)' \"", text)[1]
    (tmp_path / "config.json").write_text('{"settings": {"epochs": 2}}')
    for rows, finished in ((1, "False"), (2, "True")):
        (tmp_path / "metrics.csv").write_text("epoch\n" + "0\n" * rows)
        words = ["python3", "-c", code, tmp_path]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.stdout.strip() == finished


def test_the_manifest():
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    policy = spec["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert policy["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    gpus = int(spec["nprocPerNode"])
    expect_container(worker["template"]["spec"], gpus)


def expect_container(pod, gpus):
    "A pod has one container, which mounts its volumes and trains on so many GPUs"
    (box,) = pod["containers"]
    assert box["name"] == "pytorch"
    mounted = {mount["name"] for mount in box["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert box["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert understood(box["command"]).out == "/runs/one"
