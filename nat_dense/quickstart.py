"""The quickstart: from nothing to a trained NAT detector, a trained NAT segmentor, and a page that shows what they see.

`prepare` reads the configs and generates the shapes; `run` trains each task through the same `build_runner` as
tools/train.py, evaluates on the validation split and writes curves, pictures and report.html. `train` is one training;
the benchmark that compares backbones calls it as well.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console

from nat_dense.datasets.shapes import ShapesOptions, generate
from nat_dense.mm.config import load_config
from nat_dense.mm.runner import build_runner
from nat_dense.progress import ProgressLine
from nat_dense.report.pictures import draw_examples, predict_examples
from nat_dense.report.quickstart import EXAMPLES, PICTURES, Outcome, results_table, write_report

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "quickstart"
RESULT = "result.json"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Task:
    """What the quickstart trains.

    Attributes:
        name: Folder below the work-dir.
        title: For people.
        config: File in configs/quickstart.
    """

    name: str
    title: str
    config: str


TASKS = (
    Task("detection", "NAT Mask R-CNN", "mask-rcnn_nat-nano_fpn_1xb8_shapes.py"),
    Task("segmentation", "NAT UPerNet", "nat-nano_upernet_1xb8_shapes.py"),
)


def prepare(data: Path, options: ShapesOptions, seed: int = 0, budget: float = 1.0) -> dict[Task, Config]:
    """Reads the configs and makes sure that the data is there.

    Args:
        data: Where the shapes are, or where to generate them.
        options: What shapes.
        seed: Of the weights and of the order of the pictures.
        budget: Length of the trainings, relative to their configs.

    Raises:
        FileExistsError: `data` holds something else than these shapes.
        ValueError: `budget` leaves nothing to train.
    """
    configs = {task: task_config(task.config, data, seed, budget) for task in TASKS}
    generate(data, options)
    return configs


def run(work_dir: Path, configs: dict[Task, Config], options: ShapesOptions) -> Path:
    """Trains, evaluates and reports; what an earlier run with the same settings finished is used again.

    Args:
        work_dir: Where checkpoints, logs, pictures and report.html go, one folder a task.
        configs: As `prepare` returns.
        options: The shapes that the configs were prepared for.

    Returns:
        The report.
    """
    console = Console()
    outcomes = []
    for task, cfg in configs.items():
        folder = work_dir / task.name
        outcomes.append(Outcome(task.title, folder, train(cfg, folder, f"{task.title}: training", console), cfg))
        console.print(results_table(outcomes[-1]))
    report = write_report(work_dir / "report.html", outcomes, options)
    console.print(f"Everything on one page: [bold]{report}[/bold]")
    return report


def task_config(name: str, data: Path, seed: int = 0, budget: float = 1.0) -> Config:
    """A config of configs/quickstart, for data in another folder and a training of another length.

    Raises:
        ValueError: `budget` leaves fewer than 10 iterations.
    """
    cfg = load_config(str(CONFIGS / name))
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = f"{data}/"
    for split in ("val", "test"):
        if "ann_file" in cfg[f"{split}_evaluator"]:
            cfg[f"{split}_evaluator"].ann_file = str(data / "annotations" / "instances_validation.json")
    cfg.randomness = dict(seed=seed)
    iterations = round(cfg.train_cfg.max_iters * budget)
    if iterations < 10:
        raise ValueError(f"budget={budget} leaves {iterations} of {cfg.train_cfg.max_iters} iterations: expected >= 10")
    lengths = [
        (cfg.train_cfg, "max_iters"),
        (cfg.train_cfg, "val_interval"),
        (cfg.default_hooks.checkpoint, "interval"),
    ]
    lengths += [(scheduler, key) for scheduler in cfg.param_scheduler for key in ("begin", "end")]
    for node, key in lengths:
        node[key] = round(node[key] * budget)
    return cfg


def train(cfg: Config, folder: Path, what: str, console: Console) -> dict[str, Any]:
    """Trains and evaluates one config in a folder of its own, unless that was done before.

    A run that was interrupted goes on from its last checkpoint. A folder with another config's run is renamed, not
    overwritten. MMEngine's own output goes to console.txt in the folder.

    Args:
        cfg: As `task_config` returns.
        folder: The work-dir.
        what: What the progress line says.
        console: Where to say what is reused.

    Returns:
        `metrics` (name -> number, of the last evaluation), `iterations`, `seconds` of training and evaluating (in the
        last start, where it was interrupted), `parameters` and `backbone_parameters`.
    """
    settings = _fingerprint(cfg)
    if folder.exists() and _read(folder / SETTINGS) != settings:
        kept = folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(kept)
        console.print(f"{folder} held a run with other settings: kept as {kept}")
    if (result := _read(folder / RESULT)) is not None:
        console.print(f"{folder} holds this very run, finished: used as it is")
        return result
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SETTINGS, settings)
    cfg.work_dir = str(folder)
    cfg.resume = (folder / "last_checkpoint").is_file()
    if cfg.resume:
        console.print(f"{folder} holds a part of this run: going on from its last checkpoint")
    watch = _Watch(what)
    console.print(f"{what.split(':')[0]}: loading (full log: {folder / 'console.txt'})")
    with (folder / "console.txt").open("a") as output, redirect_stdout(output), redirect_stderr(output):
        runner = build_runner(cfg)
        runner.register_hook(watch, priority="LOWEST")
        started = time.monotonic()
        runner.train()
        if not watch.metrics:  # interrupted between the last checkpoint and its evaluation
            runner.val()
        seconds = time.monotonic() - started
        dataset = runner.val_dataloader.dataset
        examples = predict_examples(runner.model, dataset, range(min(EXAMPLES, len(dataset))))
        for handler in [handler for handler in runner.logger.handlers if getattr(handler, "stream", None) is output]:
            runner.logger.removeHandler(handler)  # the logger outlives the file
    draw_examples(examples, dataset.metainfo["classes"], dataset.metainfo["palette"], folder / PICTURES)
    result = dict(
        metrics={name: float(value) for name, value in watch.metrics.items()},
        iterations=runner.iter,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in runner.model.parameters()),
        backbone_parameters=sum(parameter.numel() for parameter in runner.model.backbone.parameters()),
    )
    _write(folder / RESULT, result)
    return result


class _Watch(Hook):
    """Shows how far training and evaluating are, and keeps the last evaluation's numbers."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.stream = sys.stderr  # of now: while the Runner works, the name stands for its log
        self.metrics: dict[str, float] = {}
        self.line: ProgressLine | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advances the line of the training."""
        if self.line is None:
            self.line = ProgressLine(self.what, runner.max_iters, runner.iter, self.stream)
        loss = float(outputs["loss"].detach())
        self.line.advance(f"loss {loss:.3f}")

    def before_val_epoch(self, runner: Runner) -> None:
        """Ends the line of the training: evaluating has its own."""
        self._close()
        what = self.what.replace("training", f"evaluating after {runner.iter} iterations")
        self.line = ProgressLine(what, len(runner.val_dataloader), stream=self.stream)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advances the line of the evaluation."""
        if self.line is not None:
            self.line.advance()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Keeps the numbers."""
        self.metrics = dict(metrics or {})
        self._close()

    def _close(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None


def _fingerprint(cfg: Config) -> dict[str, str]:
    """What tells one run from another: all of the config but where it writes."""
    text = Config({key: value for key, value in cfg.items() if key not in ("work_dir", "resume")}).pretty_text
    return {"config": Path(cfg.filename).name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1))
    unfinished.replace(path)
