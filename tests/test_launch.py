"The launch lines and files of docs/launch, as far as they can be seen without a cluster."

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from egcnn_nb.commands.train import LAUNCH, arguments

FOLDER = Path(__file__).parents[1] / "docs/launch"


def understood(words):
    "Parse a launch line by torchrun's flags and ours"
    command, *words = words
    if command == "torchrun":
        parser = get_args_parser()
        args = parser.parse_args(words)
        assert args.module
        assert args.training_script == "egcnn_nb.train"
        words = args.training_script_args
    parser = arguments()
    return parser.parse_args(words)


def launch_lines():
    "The launch lines of the page and of the help"
    text = (FOLDER / "README.md").read_text()
    of_page = re.findall(r"^(?:torchrun|egcnn_train).*", text, re.M)
    assert len(of_page) == 6
    of_help = re.findall(r"^    (.*)", LAUNCH, re.M)
    assert of_help
    return of_page + of_help


@pytest.mark.parametrize("line", launch_lines())
def test_every_line_is_understood(line):
    words = shlex.split(line)
    args = understood(words)
    assert args.data == "DATA"


def test_the_slurm_file():
    path = FOLDER / "slurm.sbatch"
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    flags = re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue"} <= set(flags)
    joined = text.replace("\\\n", " ")
    _, _, rest = joined.partition("srun ")
    line, _, _ = rest.partition("\n")
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
    words = shlex.split(line)
    args = understood(words)
    assert args.resume == "if_there"


def test_the_slurm_file_knows_when_a_run_is_finished(tmp_path):
    text = (FOLDER / "slurm.sbatch").read_text()
    found = re.search(r"python -c '(.*?)' \"", text)
    assert found
    line = ["python3", "-c", found[1], tmp_path]
    config, metrics = tmp_path / "config.json", tmp_path / "metrics.csv"
    config.write_text('{"settings": {"epochs": 2}}')
    for rows, finished in (("0\n", "False"), ("0\n0\n", "True")):
        metrics.write_text(f"epoch\n{rows}")
        done = subprocess.run(line, capture_output=True, text=True)
        printed = done.stdout.strip()
        assert printed == finished


def test_the_manifest():
    text = (FOLDER / "kubernetes.yaml").read_text()
    job = yaml.safe_load(text)
    assert job["apiVersion"] == "kubeflow.org/v1"
    assert job["kind"] == "PyTorchJob"
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    policy = spec["elasticPolicy"]
    fewest, most = policy["minReplicas"], policy["maxReplicas"]
    assert fewest <= worker["replicas"] <= most
    assert policy["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    gpus = int(spec["nprocPerNode"])
    pod = worker["template"]["spec"]
    expect_container(pod, gpus)


def names_of(things):
    "The names of some parts of a manifest"
    return {thing["name"] for thing in things}


def expect_container(pod, gpus):
    "A pod has one container, which mounts its volumes and trains on so many GPUs"
    (box,) = pod["containers"]
    assert box["name"] == "pytorch"
    mounted = names_of(box["volumeMounts"])
    assert mounted == names_of(pod["volumes"])
    limits = box["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == gpus
    args = understood(box["command"])
    assert args.out == "/runs/one"
