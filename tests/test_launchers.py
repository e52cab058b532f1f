"""tools/dist_train.sh and tools/dist_test.sh with two processes on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nat_dense.checkpoints import read
from tests.mm.small import (
    DETECTOR,
    REPOSITORY,
    SEGMENTOR,
    ade_options,
    coco_options,
    load_tool,
    scalars,
    write_ade,
    write_coco,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the processes would want one each"),
]


ENVIRONMENT = os.environ | dict(
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    PYTHONPATH=str(REPOSITORY),
    OMP_NUM_THREADS="1",
)


def launch(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs one of the shell scripts in this environment, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.run(
        ["bash", str(REPOSITORY / "tools" / script), *arguments],
        env=ENVIRONMENT | dict(PORT=str(port)),
        capture_output=True,
        text=True,
        timeout=300,
    )


LEAVES = """
import torch
from pathlib import Path
from nat_dense.mm.processes import CPUDistributedDataParallel, leave_group

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

def train():
    torch.distributed.init_process_group("gloo")
    model = CPUDistributedDataParallel(torch.nn.Linear(4, 4))
    cycle = [model]  # as a Runner refers to itself through its hooks
    cycle.append(cycle)
    model(torch.ones(2, 4)).sum().backward()
    assert "pt_gloo_runloop" in threads(), threads()

train()
leave_group()
assert "pt_gloo_runloop" not in threads(), threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of threads from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    run = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def test_two_processes_train_and_evaluate_a_segmentor(tmp_path):
    options = ade_options(write_ade(tmp_path / "ade", train=4, val=3))
    run = launch("dist_train.sh", SEGMENTOR, "2", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("exchange gradients through gloo") == 1
    lines = scalars(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert len([line for line in lines if "mIoU" in line]) == 1

    checkpoint = str(tmp_path / "run" / "iter_2.pth")
    assert not any(name.startswith("module.") for name in read(checkpoint).tensors)
    arguments = ["--work-dir", str(tmp_path / "test"), "--cfg-options", *options]
    test = launch("dist_test.sh", SEGMENTOR, checkpoint, "2", *arguments)
    assert test.returncode == 0, test.stderr[-3000:]
    (file,) = (tmp_path / "test").glob("*/*.json")
    tested = json.loads(file.read_text())
    # Three pictures in two processes: one of the four is a repetition, which the metric leaves out.
    alone = load_tool("test").main([SEGMENTOR, checkpoint, "--work-dir", str(tmp_path / "alone"), *arguments[2:]])
    assert tested["mIoU"] == pytest.approx(alone["mIoU"])
    assert tested["aAcc"] == pytest.approx(alone["aAcc"])


def test_two_processes_share_the_pictures_of_a_detector(tmp_path):
    options = [*coco_options(write_coco(tmp_path / "coco", train=4, val=3)), "train_dataloader.batch_size=1"]
    run = launch("dist_train.sh", DETECTOR, "2", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = scalars(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]  # four pictures, two at a time
    assert [line["step"] for line in lines if "coco/bbox_mAP" in line] == [1]


def test_a_mistake_stops_all_processes(tmp_path):
    options = ["model.backbone.arch=tinny"]
    run = launch("dist_train.sh", SEGMENTOR, "2", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options)
    assert run.returncode != 0
    assert "arch='tinny'" in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("script", "more"), [("dist_train.sh", ["2"]), ("dist_test.sh", ["x.pth", "2"])])
def test_a_missing_config_is_one_line(script, more):
    done = launch(script, "nowhere.py", *more)
    assert done.returncode == 2
    assert done.stderr == f"{script}: error: there is no file nowhere.py\n"


def test_srun_gets_the_command_of_every_task(tmp_path):
    """A stand-in for srun says what it was given; Slurm itself is nowhere to be installed."""
    (tmp_path / "srun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "srun").chmod(0o755)
    script = str(REPOSITORY / "tools" / "slurm_train.sh")
    paths = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}"
    environment = ENVIRONMENT | dict(PATH=paths, GPUS="2", GPUS_PER_NODE="1", SRUN_ARGS="--time=10 --exclusive")
    command = ["bash", script, "part", "a job", SEGMENTOR, "--cfg-options", "model.backbone.arch=tiny"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    given = run.stdout.splitlines()
    assert {"--partition=part", "--job-name=a job", "--ntasks=2", "--ntasks-per-node=1", "--gres=gpu:1"} < set(given)
    assert {"--time=10", "--exclusive"} < set(given)
    task = given[given.index("python") :]
    assert task[:2] == ["python", "-u"]
    assert Path(task[2]).samefile(REPOSITORY / "tools" / "train.py")
    assert task[3:] == [SEGMENTOR, "--launcher", "slurm", "--cfg-options", "model.backbone.arch=tiny"]

    usage = subprocess.run(["bash", script, "part"], env=environment, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 2
    assert "PARTITION JOB_NAME CONFIG" in usage.stderr
