"""The quickstart from its command line, in miniature: what it leaves, what it reuses, what it refuses."""

import base64
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from rich.console import Console

from nat_dense.datasets import scene, shapes
from nat_dense.mm.config import load_config
from nat_dense.mm.resuming import latest_checkpoint
from nat_dense.quickstart import CONFIGS, TASKS, Training, task_config, train
from tests.mm.small import REPOSITORY, load_tool

FULL = task_config(TASKS[0].config, Path("data")).train_cfg.max_iters
BUDGET = 12 / FULL
ITERATIONS = {task.name: task_config(task.config, Path("data"), budget=BUDGET).train_cfg.max_iters for task in TASKS}
MINIATURE = ["--train", "24", "--val", "6", "--size", "64", "--budget", str(BUDGET)]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quickstart")
    run(root)
    return root


def run(root: Path, *options: str) -> None:
    arguments = ["--work-dir", str(root / "work"), "--data", str(root / "data"), *MINIATURE, *options]
    load_tool("quickstart").main(arguments)


def result(root: Path, task: str) -> dict:
    return json.loads((root / "work" / task / "result.json").read_text())


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_a_training_leaves_everything(root, task):
    folder = root / "work" / task
    assert (folder / f"iter_{ITERATIONS[task]}.pth").is_file()
    assert list(folder.glob("*/*.log")), "MMEngine's log"
    assert "Iter(val)" in (folder / "console.txt").read_text()
    outcome = result(root, task)
    assert outcome["iterations"] == ITERATIONS[task]
    assert outcome["backbone_parameters"] == 2_483_574
    for name in ("curves.png", "predictions.png"):
        assert Image.open(folder / name).size[0] > 1000


def test_the_numbers_are_the_evaluators(root):
    detection, segmentation = result(root, "detection")["metrics"], result(root, "segmentation")["metrics"]
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= set(detection)
    assert all(0 <= detection[name] <= 1 for name in ("coco/bbox_mAP", "coco/segm_mAP"))
    assert 0 < segmentation["mIoU"] <= 100
    last = (root / "work" / "segmentation").glob("*/vis_data/scalars.json")
    logged = [json.loads(line) for line in next(last).read_text().splitlines()]
    assert [entry["mIoU"] for entry in logged if "mIoU" in entry][-1] == segmentation["mIoU"]


@pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
def test_the_libraries_own_inference_takes_what_it_leaves(root, task):
    folder = root / "work" / task.name
    files = str(folder / task.config), str(folder / f"iter_{ITERATIONS[task.name]}.pth")
    image = str(next((root / "data" / "images" / "validation").glob("*.jpg")))
    if task.name == "detection":
        from mmdet.apis import inference_detector, init_detector

        found = inference_detector(init_detector(*files, device="cpu"), image).pred_instances
        assert found.masks.shape[1:] == (64, 64)
    else:
        from mmseg.apis import inference_model, init_model

        assert inference_model(init_model(*files, device="cpu"), image).pred_sem_seg.data.shape == (1, 64, 64)


def test_the_report_stands_alone_and_shows_all(root):
    text = (root / "work" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text), "something is fetched"
    assert "<script" not in text
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert [Image.open(io.BytesIO(data)).format for data in pictures] == ["PNG"] * 4
    for task in TASKS:
        folder = root / "work" / task.name
        assert pictures[:2] == [(folder / name).read_bytes() for name in ("curves.png", "predictions.png")]
        pictures = pictures[2:]
        assert f"<h2>{task.title}</h2>" in text
        assert task.config in text
    commands = [line for line in html.unescape(text).splitlines() if "python tools/" in line]
    assert len(commands) == 4
    test = shlex.split(commands[1][commands[1].index("python tools/") :])
    metrics = load_tool("test").main([*test[2:4], "--work-dir", str(root / "tested")])
    assert metrics["coco/bbox_mAP"] == result(root, "detection")["metrics"]["coco/bbox_mAP"]
    assert f"<b>{result(root, 'detection')['metrics']['coco/bbox_mAP']:.3f}</b><span>NAT Mask R-CNN: box mAP" in text
    assert f"<b>{result(root, 'segmentation')['metrics']['mIoU'] / 100:.3f}</b><span>DiNAT UPerNet: mIoU" in text


def test_a_second_run_uses_what_is_finished(root, capsys):
    files = [root / "work" / task.name / f"iter_{ITERATIONS[task.name]}.pth" for task in TASKS]
    before = [file.stat().st_mtime_ns for file in files]
    run(root)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert capsys.readouterr().out.count("finished: reused") == 2


def test_an_interrupted_run_is_finished(root, capsys):
    """Without its result, a training goes on from its last checkpoint, here the final one: it is only evaluated."""
    before = result(root, "segmentation")
    (root / "work" / "segmentation" / "result.json").unlink()
    run(root)
    after = result(root, "segmentation")
    assert "resuming from its last checkpoint" in capsys.readouterr().out
    assert after["metrics"] == pytest.approx(before["metrics"])
    assert after["iterations"] == ITERATIONS["segmentation"]


def test_a_run_killed_around_a_checkpoint_goes_on(root, capsys):
    """MMEngine deletes the older checkpoint, writes the newer one, then notes its name: each can be the last."""
    folder = root / "work" / "segmentation"
    for note in (None, str(folder / "iter_3.pth")):
        (folder / "result.json").unlink()
        (folder / "last_checkpoint").unlink()
        if note:
            (folder / "last_checkpoint").write_text(note)
        run(root)
        assert "resuming from its last checkpoint" in capsys.readouterr().out
        assert result(root, "segmentation")["interrupted"]


def test_other_data_keep_the_earlier_run(root, tmp_path, capsys, monkeypatch):
    """The config has the path of the data, not what was generated there."""
    monkeypatch.setattr("nat_dense.quickstart.TASKS", TASKS[1:])
    shutil.copytree(root / "work" / "segmentation", tmp_path / "work" / "segmentation")
    shutil.move(root / "data", root / "data-of-24")
    try:
        arguments = ["--work-dir", str(tmp_path / "work"), "--data", str(root / "data"), *MINIATURE]
        load_tool("quickstart").main([*arguments, "--train", "20"])
    finally:
        shutil.rmtree(root / "data")
        shutil.move(root / "data-of-24", root / "data")
    assert "held a run with different settings: kept as" in " ".join(capsys.readouterr().out.split())
    (kept,) = (tmp_path / "work").glob("segmentation-before-*")
    last = kept / f"iter_{ITERATIONS['segmentation']}.pth"
    assert latest_checkpoint(kept) == last
    assert Path((kept / "last_checkpoint").read_text()) == last


def test_two_runs_do_not_share_a_folder(root, capsys):
    with FileLock(root / "work" / ".segmentation.lock"), pytest.raises(SystemExit) as stop:
        run(root)
    assert stop.value.code == 2
    assert "quickstart.py: error: another process is training in" in capsys.readouterr().err
    run(root)  # the first has ended


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_trainings_end_with_the_process_that_started_them(root, tmp_path):
    """Killed, it has no time to tell them."""
    command = [sys.executable, str(REPOSITORY / "tools" / "quickstart.py"), "--work-dir", str(tmp_path / "work")]
    options = ["--data", str(root / "data"), *MINIATURE[:-2], "--budget", "1"]
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as parent:
        log = tmp_path / "work" / "segmentation" / "console.txt"
        wait_for(lambda: log.is_file() and "Iter(train)" in log.read_text())
        children = [
            Path("/proc", pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        ]
        assert len(children) >= 3, "two trainings and a manager"
        parent.kill()
    wait_for(lambda: not any(child.exists() for child in children), 20)


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_the_longer_training_takes_the_cores_of_the_shorter(root, tmp_path):
    """Of two with half of the cores each; the longer one is under way when the shorter one has finished."""
    options = shapes.ShapesOptions(24, 6, 64)
    short, long = (
        Training(f"{budget}", task_config(TASKS[1].config, root / "data", 0, budget), tmp_path / f"{budget}", options)
        for budget in (0.002, 0.04)
    )
    before, cores = torch.get_num_threads(), os.cpu_count()
    torch.set_num_threads(cores)  # the tests run with OMP_NUM_THREADS=1
    try:
        results = train([short, long], Console(file=io.StringIO()))
    finally:
        torch.set_num_threads(before)
    assert [r["iterations"] for r in results] == [t.cfg.train_cfg.max_iters for t in (short, long)]
    logs = [(t.folder / "console.txt").read_text() for t in (short, long)]
    assert ["Going on with" in log for log in logs] == [False, True]
    assert f"Going on with {cores} threads" in logs[1]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.2)


def test_other_settings_keep_the_earlier_run(root, capsys, monkeypatch):
    monkeypatch.setattr("nat_dense.quickstart.TASKS", TASKS[1:])  # the faster one
    before = result(root, "segmentation")
    run(root, "--seed", "1")
    (kept,) = (root / "work").glob("segmentation-before-*")
    assert json.loads((kept / "result.json").read_text()) == before
    assert (kept / f"iter_{ITERATIONS['segmentation']}.pth").is_file()
    assert "held a run with different settings: kept as" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(root / "work" / "segmentation")  # for the tests that go on with it
    kept.rename(root / "work" / "segmentation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0.001"], f"budget=0.001 leaves {round(FULL / 1000)} of {FULL} iterations: expected >= 10"),
        (["--budget", "nan"], "budget=nan: expected a number"),
        (["--seed", "-1"], "seed=-1: expected a whole number from 0 to 4294967295"),
        (["--work-dir", __file__], "this is a file; choose a directory"),
        (["--work-dir", f"{__file__}/below"], "Not a directory"),
        (["--train", "0"], "train=0: expected a whole number of at least 1"),
        (["--val", "7"], "holds a shapes set made with"),
    ],
)
def test_bad_options_end_before_training(root, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        run(root, *options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_configs_name_the_classes_and_colours_of_the_data():
    palette = list(shapes.PALETTE)
    for file in sorted(CONFIGS.glob("*.py")):
        metainfo = load_config(str(file)).metainfo
        expected = scene.CLASSES if "mask-rcnn" in file.name else shapes.SEMANTIC_CLASSES
        assert tuple(metainfo.classes) == expected, file
        assert [tuple(colour) for colour in metainfo.palette] == palette[-len(expected) :], file


@pytest.mark.parametrize(
    ("config", "biases"),
    [(TASKS[1].config, "rpb"), ("swin-nano_upernet_1xb4_shapes.py", "relative_position_bias_table")],
)
def test_position_biases_learn_at_a_rate_of_their_own(config, biases):
    cfg = task_config(config, Path("data"))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    rate = cfg.optim_wrapper.optimizer.lr
    found = {name for name, settings in rates.items() if settings == (10 * rate, 0)}
    assert found == {name for name, _ in model.named_parameters() if name.endswith(biases)}
    assert len(found) == 10, "one a block"
    assert {lr for name, (lr, _) in rates.items() if name not in found} == {rate}


@pytest.mark.parametrize("budget", [0.5, 0.3, 0.123])
def test_a_budget_scales_every_length(budget):
    cfg, full = (task_config(TASKS[0].config, Path("data"), budget=b) for b in (budget, 1.0))
    iterations = cfg.train_cfg.max_iters
    assert iterations == round(FULL * budget)
    warmup = full.param_scheduler[0].end
    assert [(s.begin, s.end) for s in cfg.param_scheduler] == [
        (0, round(warmup * budget)),
        (round(warmup * budget), iterations),
    ]
    for interval in (cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval):
        assert 3 * interval < iterations <= 4 * interval, "four evaluations, the last one at the end"
