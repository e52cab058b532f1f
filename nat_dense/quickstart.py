"""The quickstart: from nothing to a trained NAT detector, a trained DiNAT segmentor, and a page of what they see.

`prepare` reads the configs and generates the shapes; `run` trains the tasks side by side through the `build_runner` of
tools/train.py, evaluates on the validation split and writes curves, pictures and report.html. The benchmark that
compares backbones calls `train` as well.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing.managers import SyncManager
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from filelock import FileLock, Timeout  # a dependency of torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console

from nat_dense.datasets.shapes import ShapesOptions, generate
from nat_dense.files import atomic
from nat_dense.mm.config import load_config
from nat_dense.mm.resuming import latest_checkpoint
from nat_dense.mm.runner import build_runner
from nat_dense.progress import Board, ProgressLine
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
    Task("detection", "NAT Mask R-CNN", "mask-rcnn_nat-nano_fpn_1xb4_shapes.py"),
    Task("segmentation", "DiNAT UPerNet", "dinat-nano_upernet_1xb4_shapes.py"),
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
        ValueError: `seed` or `budget` is out of range, or the budget leaves nothing to train.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected a whole number from 0 to {2**32 - 1}")
    configs = {task: task_config(task.config, data, seed, budget) for task in TASKS}
    generate(data, options)
    return configs


def run(work_dir: Path, configs: dict[Task, Config], options: ShapesOptions) -> Path:
    """Trains, evaluates and reports; what an earlier run with the same settings finished is reused.

    Args:
        work_dir: Where checkpoints, logs, pictures and report.html go, one folder per task.
        configs: As `prepare` returns.
        options: The shapes that the configs were prepared for.

    Returns:
        The report.
    """
    console = Console()
    trainings = [Training(task.title, cfg, work_dir / task.name, options) for task, cfg in configs.items()]
    results = train(trainings, console)
    outcomes = [Outcome(t.title, t.folder, result, t.cfg) for t, result in zip(trainings, results, strict=True)]
    for outcome in outcomes:
        console.print(results_table(outcome))
    report = write_report(work_dir / "report.html", outcomes, options)
    console.print(f"Everything on one page: [bold]{report}[/bold]")
    return report


def task_config(name: str, data: Path, seed: int = 0, budget: float = 1.0) -> Config:
    """A config of configs/quickstart, for data in another folder and a training of another length.

    Raises:
        ValueError: `budget` is not a finite number or leaves fewer than 10 iterations.
    """
    if not math.isfinite(budget):
        raise ValueError(f"budget={budget}: expected a number, such as 0.5 for half as many iterations")
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
    cfg.train_cfg.max_iters = iterations
    for scheduler in cfg.param_scheduler:
        for key in ("begin", "end"):
            scheduler[key] = max(1, round(scheduler[key] * budget)) if scheduler[key] else 0
    for node, key in ((cfg.train_cfg, "val_interval"), (cfg.default_hooks.checkpoint, "interval")):
        node[key] = math.ceil(node[key] * budget)  # up: a shorter last interval, not one of a few iterations more
    return cfg


@dataclass(frozen=True)
class Training:
    """One config to train and evaluate.

    Attributes:
        title: For people.
        cfg: As `task_config` returns.
        folder: The work-dir, only for this training.
        data: The shapes that the config was made for.
    """

    title: str
    cfg: Config
    folder: Path
    data: ShapesOptions

    def settings(self) -> dict[str, Any]:
        """What tells one run from another: the data, and all of the config except where it writes."""
        text = Config({key: value for key, value in self.cfg.items() if key not in ("work_dir", "resume")}).pretty_text
        name, digest = Path(self.cfg.filename).name, hashlib.sha256(text.encode()).hexdigest()
        return {"config": name, "sha256": digest, "data": asdict(self.data)}


def train(trainings: Sequence[Training], console: Console) -> list[dict[str, Any]]:
    """Trains and evaluates side by side, one process and a share of the cores each, unless that was done before.

    Models this small can't keep many cores busy: two trainings of one thread each get further than one after the
    other on two. A training that outlasts the others takes their cores. The number of threads that add up a sum
    changes its last digits, so the same seed gives the same numbers only roughly.

    An interrupted run resumes from its last checkpoint. A folder with another config's run is renamed, not
    overwritten. MMEngine's own output goes to console.txt in the folder.

    Args:
        trainings: What to train.
        console: Where to say what is reused.

    Returns:
        For each training `metrics` (name -> number, of the last evaluation), `iterations`, `seconds` of training and
        evaluating (since the last start, where it was `interrupted`), `parameters` and `backbone_parameters`.

    Raises:
        BlockingIOError: another process is training in one of the folders.
    """
    with ExitStack() as locks:
        for training in trainings:
            locks.callback(_lock(training.folder).release)
        unfinished = [training for training in trainings if _open_folder(training, console)]
        if unfinished:
            _train_in_processes(unfinished)
    return [json.loads((training.folder / RESULT).read_text(encoding="utf-8")) for training in trainings]


def _lock(folder: Path) -> FileLock:
    """Held by the process that trains in the folder; the system releases it when the process ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another process is training in {folder}: wait for it to end, or choose another --work-dir"
        ) from None
    return lock


def _open_folder(training: Training, console: Console) -> bool:
    """Prepares the folder and says what is reused; returns whether anything is left to train."""
    cfg, folder = training.cfg, training.folder
    settings = training.settings()
    if folder.exists() and _read(folder / SETTINGS) != settings:
        kept = folder.with_name(f"{folder.name}-before-{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(kept)
        _note_checkpoint(kept)
        console.print(f"{folder} held a run with different settings: kept as {kept}")
    if (folder / RESULT).is_file():
        console.print(f"{folder} holds this very run, finished: reused")
        return False
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SETTINGS, settings)
    cfg.work_dir = str(folder)
    cfg.resume = _note_checkpoint(folder)
    if cfg.resume:
        console.print(f"{folder} holds part of this run: resuming from its last checkpoint")
    console.print(f"{training.title}: loading (full log: {folder / 'console.txt'})")
    return True


def _note_checkpoint(folder: Path) -> bool:
    """Whether the folder has a checkpoint to resume from; fixes MMEngine's note of it, which is an absolute path."""
    latest = latest_checkpoint(folder)
    if latest is not None:
        (folder / "last_checkpoint").write_text(str(latest.absolute()))  # as MMEngine does
    return latest is not None


Message = tuple[str, str, int, int, str]
"""Title of the training, what it is doing, steps done of it, steps in all, a note."""


def _train_in_processes(trainings: Sequence[Training]) -> None:
    cores = os.cpu_count() or 1
    workers = min(len(trainings), cores)
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch can hang
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent)
    with manager:
        messages = manager.Queue()
        threads = context.Value("i", _share(cores, workers), lock=False)  # a lock would outlive a killed worker
        with ProcessPoolExecutor(workers, context, _start_worker, (threads,)) as pool:
            running = {pool.submit(_train_one, training, messages): training.title for training in trainings}
            board, pending = Board(), set(running)
            lines: dict[str, ProgressLine] = {}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    while not messages.empty():
                        _show(messages.get(), board, lines)
                    for future in finished:
                        future.result()
                        if running[future] in lines:
                            lines.pop(running[future]).close()
                    threads.value = _share(cores, min(workers, len(pending)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def _show(message: Message, board: Board, lines: dict[str, ProgressLine]) -> None:
    """Brings the line of a training up to date."""
    title, doing, done, total, note = message
    what = f"{title}: {doing}"
    if title not in lines or lines[title].what != what:
        if title in lines:
            lines[title].close()
        lines[title] = ProgressLine(what, total, done - 1, board)
    lines[title].advance(note, done - lines[title].done)


def _share(cores: int, workers: int) -> int:
    """Threads for each of some workers, no more than torch takes by itself, which respects OMP_NUM_THREADS."""
    return min(torch.get_num_threads(), cores // max(1, workers))


_threads: ctypes.c_int
"""In a process that trains: how many threads it may use now."""


def _start_worker(threads: ctypes.c_int) -> None:
    global _threads
    _end_with_parent()
    _threads = threads
    torch.set_num_threads(threads.value)


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, however it did."""

    def wait_and_end() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _train_one(training: Training, messages: Queue[Message]) -> None:
    """Trains, evaluates, draws; leaves `RESULT` when all is done. Runs in a process of its own."""
    folder = training.folder
    watch = _Watch(training.title, messages, _threads)
    console = (folder / "console.txt").open("a", encoding="utf-8")
    with console as output, redirect_stdout(output), redirect_stderr(output):
        runner = build_runner(training.cfg)
        runner.register_hook(watch, priority="LOWEST")
        started = time.monotonic()
        runner.train()
        if not watch.metrics:  # interrupted between the last checkpoint and its evaluation
            runner.val()
        seconds = time.monotonic() - started
        dataset = runner.val_dataloader.dataset
        examples = predict_examples(runner.model, dataset, range(min(EXAMPLES, len(dataset))))
        draw_examples(examples, dataset.metainfo["classes"], dataset.metainfo["palette"], folder / PICTURES)
        for handler in [handler for handler in runner.logger.handlers if getattr(handler, "stream", None) is output]:
            runner.logger.removeHandler(handler)  # the logger outlives the file
    result = dict(
        metrics={name: float(value) for name, value in watch.metrics.items()},
        iterations=runner.iter,
        interrupted=bool(training.cfg.resume),
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in runner.model.parameters()),
        backbone_parameters=sum(parameter.numel() for parameter in runner.model.backbone.parameters()),
    )
    _write(folder / RESULT, result)


class _Watch(Hook):
    """Reports to the parent process how far training and evaluating are, and keeps the last evaluation's numbers.

    Between iterations it takes the cores that other trainings have left.
    """

    def __init__(self, title: str, messages: Queue[Message], threads: ctypes.c_int) -> None:
        self.title, self.messages, self.threads = title, messages, threads
        self.used = torch.get_num_threads()
        self.metrics: dict[str, float] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Changes the number of threads."""
        if (threads := self.threads.value) != self.used:
            torch.set_num_threads(threads)
            self.used = threads
            runner.logger.info("Going on with %d threads", threads)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Reports one iteration."""
        note = f"loss {float(outputs['loss'].detach()):.3f}"
        self.messages.put((self.title, "training", runner.iter + 1, runner.max_iters, note))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Reports one batch of the evaluation."""
        doing = f"evaluating after {runner.iter} iterations"
        self.messages.put((self.title, doing, batch_idx + 1, len(runner.val_dataloader), ""))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Keeps the numbers."""
        self.metrics = dict(metrics or {})


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
