"""tools/train.py and tools/test.py through their command lines, in this process, on small data."""

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config, ConfigDict
from mmseg.apis import inference_model, init_model
from PIL import Image

from nat_dense.checkpoints import read
from nat_dense.checkpoints.runner_files import load_from_nat_dense
from nat_dense.mm.config import load_config
from nat_dense.mm.options import set_out, set_show_dir
from tests.mm.small import (
    DETECTOR,
    REPOSITORY,
    SEGMENTOR,
    ade_options,
    coco_options,
    load_tool,
    parse_options,
    scalars,
    write_ade,
    write_coco,
)

train = load_tool("train").main
evaluate = load_tool("test").main


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector trained for one epoch: its options and its work-dir."""
    root = tmp_path_factory.mktemp("detector")
    options = coco_options(write_coco(root / "coco"))
    train([DETECTOR, "--work-dir", str(root / "run"), "--seed", "3", "--cfg-options", *options])
    return options, root / "run"


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A segmentor trained for two iterations: its options and its work-dir."""
    root = tmp_path_factory.mktemp("segmentor")
    options = ade_options(write_ade(root / "ade", train=2, val=1))
    train([SEGMENTOR, "--work-dir", str(root / "run"), "--seed", "3", "--cfg-options", *options])
    return options, root / "run"


def test_train_detector_logs_losses_and_map(detector):
    _, work_dir = detector
    steps = [line for line in scalars(work_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]  # 4 images in batches of 2
    assert all(math.isfinite(line["loss"]) and line["loss_mask"] > 0 for line in steps)
    (metrics,) = [line for line in scalars(work_dir) if "coco/bbox_mAP" in line]
    assert -1 <= metrics["coco/segm_mAP"] <= 1
    assert (work_dir / "epoch_1.pth").is_file()


def test_train_segmentor_logs_losses_and_miou(segmentor):
    _, work_dir = segmentor
    steps = [line for line in scalars(work_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["decode.loss_ce"]) and line["aux.loss_ce"] > 0 for line in steps)
    (metrics,) = [line for line in scalars(work_dir) if "mIoU" in line]
    assert 0 <= metrics["mIoU"] <= 100
    (log,) = work_dir.glob("*/*.log")
    text = log.read_text()
    groups = re.findall(r"parameter group \d: (\d+) tensors, lr=6e-05, weight_decay=([0-9.]+)", text)
    assert [decay for _, decay in groups] == ["0.01", "0.0"]
    assert "paramwise_options" not in text


def test_test_detector_repeats_the_validation_and_writes_pictures_and_predictions(detector, tmp_path, capsys):
    options, run = detector
    out, pictures = tmp_path / "below" / "predictions.pkl", tmp_path / "pictures"
    arguments = ["--work-dir", str(tmp_path / "test"), "--out", str(out), "--show-dir", str(pictures)]
    metrics = evaluate([DETECTOR, str(run / "epoch_1.pth"), *arguments, "--cfg-options", *options])
    (logged,) = [line for line in scalars(run) if "coco/bbox_mAP" in line]
    assert metrics["coco/bbox_mAP"] == logged["coco/bbox_mAP"]
    assert metrics["coco/segm_mAP"] == logged["coco/segm_mAP"]
    predictions = pickle.loads(out.read_bytes())  # written by this test
    assert [p["img_id"] for p in predictions] == [0, 1]
    assert {"bboxes", "scores", "labels", "masks"} <= set(predictions[0]["pred_instances"])
    cfg = load_config(DETECTOR, parse_options(options))
    model = init_detector(cfg, str(run / "epoch_1.pth"), device="cpu")
    for i, prediction in enumerate(predictions):
        image = Path(cfg.val_dataloader.dataset.data_root) / "val2017" / f"{i}.jpg"
        expected = inference_detector(model, str(image)).pred_instances
        torch.testing.assert_close(prediction["pred_instances"]["scores"], expected.scores)
        torch.testing.assert_close(prediction["pred_instances"]["bboxes"], expected.bboxes)
    assert sorted(path.name for path in pictures.iterdir()) == ["0.jpg", "1.jpg"]
    before = {path: path.read_bytes() for path in (out, *pictures.iterdir())}
    for argument in (arguments[2:4], arguments[4:6], ["--show-dir", str(out)], ["--show-dir", str(out / "below")]):
        with pytest.raises(SystemExit):
            evaluate([DETECTOR, str(run / "epoch_1.pth"), *argument, "--cfg-options", *options])
        assert capsys.readouterr().err.startswith(f"test.py: error: {argument[0]}")
    assert {path: path.read_bytes() for path in (out, *pictures.iterdir())} == before
    new = [tmp_path / "new" / name for name in ("pictures", "predictions.pkl")]
    with pytest.raises(SystemExit):  # nothing is made before the checks
        evaluate([DETECTOR, "missing.pth", "--show-dir", str(new[0]), "--out", str(new[1]), "--cfg-options", *options])
    assert not new[0].parent.exists()


def test_test_segmentor_repeats_the_validation_and_writes_pictures_and_predictions(segmentor, tmp_path):
    options, run = segmentor
    out, pictures = tmp_path / "new" / "predictions", tmp_path / "pictures"
    arguments = ["--work-dir", str(tmp_path / "test"), "--out", str(out), "--show-dir", str(pictures)]
    metrics = evaluate([SEGMENTOR, str(run / "iter_2.pth"), *arguments, "--cfg-options", *options])
    (logged,) = [line for line in scalars(run) if "mIoU" in line]
    assert metrics["mIoU"] == pytest.approx(logged["mIoU"], abs=1e-9)
    labels = np.asarray(Image.open(out / "0.png"))
    assert labels.shape == (64, 96)
    cfg = load_config(SEGMENTOR, parse_options(options))
    image = Path(cfg.val_dataloader.dataset.data_root) / "images/validation/0.jpg"
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # MMSegmentation's API reads the variable
    expected = inference_model(init_model(cfg, str(run / "iter_2.pth"), device="cpu"), str(image)).pred_sem_seg.data[0]
    assert np.array_equal(labels, expected.numpy() + 1)  # 0 is void
    assert len(np.unique(labels)) > 1
    assert len(list(pictures.iterdir())) == 1


def test_predictions_beside_a_metric_for_each_dataset(tmp_path):
    """One that is added would be left out, as there are as many metrics as datasets."""
    metrics = [dict(type="CocoMetric", ann_file="a.json"), dict(type="CocoMetric", ann_file="b.json")]
    evaluator = dict(type="MultiDatasetsEvaluator", metrics=metrics, dataset_prefixes=["a", "b"])
    cfg = Config(dict(default_scope="mmdet", test_evaluator=evaluator))
    with pytest.raises(ValueError, match=r"MultiDatasetsEvaluator has one metric per dataset, .* separately"):
        set_out(cfg, str(tmp_path / "x.pkl"))
    assert cfg.test_evaluator == ConfigDict(evaluator)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_process_alone_writes_the_metrics(segmentor, first, tmp_path, monkeypatch):
    """All of them writing one file at once leaves no JSON, now and then."""
    options, run = segmentor
    monkeypatch.setattr("mmengine.dist.utils.is_main_process", lambda group=None: first)
    work_dir = tmp_path / "test"
    evaluate([SEGMENTOR, str(run / "iter_2.pth"), "--work-dir", str(work_dir), "--cfg-options", *options])
    assert len(list(work_dir.glob("*/*.json"))) == first


def test_images_without_annotations_are_tested_for_a_server(detector, tmp_path, capsys):
    """As COCO's test-dev: the file lists images, and the results are files to send in."""
    options, run = detector
    (root,) = (option.split("=", 1)[1] for option in options if option.startswith("test_dataloader.dataset.data_root"))
    content = json.loads((Path(root) / "annotations" / "instances_val2017.json").read_text())
    images = tmp_path / "images.json"
    images.write_text(json.dumps({key: value for key, value in content.items() if key != "annotations"}))
    files = [f"test_dataloader.dataset.ann_file={images}", f"test_evaluator.ann_file={images}"]
    arguments = [DETECTOR, str(run / "epoch_1.pth"), "--work-dir", str(tmp_path), "--cfg-options", *options, *files]
    with pytest.raises(SystemExit):
        evaluate(arguments)
    assert "has no list 'annotations'" in capsys.readouterr().err
    evaluate([*arguments, "test_evaluator.format_only=True", f"test_evaluator.outfile_prefix={tmp_path / 'sent'}"])
    boxes = json.loads((tmp_path / "sent.bbox.json").read_text())
    assert {box["image_id"] for box in boxes} == {0, 1}
    assert len(json.loads((tmp_path / "sent.segm.json").read_text())) == len(boxes)


def test_test_time_augmentation_of_a_detector_evaluates_boxes(detector, tmp_path, capsys):
    options, run = detector
    arguments = ["--tta", "--work-dir", str(tmp_path)]
    metrics = evaluate([DETECTOR, str(run / "epoch_1.pth"), *arguments, "--cfg-options", *options])
    assert "coco/bbox_mAP" in metrics
    assert not any("segm" in name for name in metrics)
    assert "merges boxes only" in capsys.readouterr().out


def test_test_time_augmentation_of_a_detector_of_boxes(detector, tmp_path, capsys):
    options, run = detector
    boxes = ["model.roi_head.mask_head=None", "model.roi_head.mask_roi_extractor=None", "test_evaluator.metric=bbox"]
    arguments = ["--tta", "--work-dir", str(tmp_path)]
    metrics = evaluate([DETECTOR, str(run / "epoch_1.pth"), *arguments, "--cfg-options", *options, *boxes])
    assert "coco/bbox_mAP" in metrics
    assert "merges boxes only" not in capsys.readouterr().out


def test_test_time_augmentation_without_a_broken_image(detector, tmp_path, capsys):
    options, run = detector
    (root,) = (option.split("=", 1)[1] for option in options if option.startswith("test_dataloader.dataset.data_root"))
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data" / "val2017" / "0.jpg").write_bytes(b"")
    changed = [f"test_dataloader.dataset.data_root={tmp_path / 'data'}", "data_checks.bad_images=skip"]
    arguments = ["--tta", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options, *changed]
    assert "coco/bbox_mAP" in evaluate([DETECTOR, str(run / "epoch_1.pth"), *arguments])
    assert "1 of 2 images" in capsys.readouterr().out


def test_misspelt_test_time_augmentation(segmentor, tmp_path, capsys):
    options, run = segmentor
    arguments = ["--tta", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options]
    with pytest.raises(SystemExit):
        evaluate([SEGMENTOR, str(run / "iter_2.pth"), *arguments, "tta_pipeline.1.transforms.0.2.type=Resiz"])
    assert "tta_pipeline[1].transforms[0][2]: there is no transform 'Resiz'. Did you" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate([SEGMENTOR, str(run / "iter_2.pth"), *arguments, "tta_model.tta_cgf=1"])
    assert "tta_model: SegTTAModel has no field 'tta_cgf'." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_test_time_augmentation_of_a_segmentor(segmentor, tmp_path):
    options, run = segmentor
    scales = [f"tta_pipeline.1.transforms.0.{i}.scale=({24 * (i + 1)},{16 * (i + 1)})" for i in range(6)]
    arguments = ["--tta", "--work-dir", str(tmp_path)]
    metrics = evaluate([SEGMENTOR, str(run / "iter_2.pth"), *arguments, "--cfg-options", *options, *scales])
    assert 0 <= metrics["mIoU"] <= 100


def test_testing_asks_for_nothing_that_only_training_needs(segmentor, tmp_path):
    """And leaves the config of the training as it was, where both share a work-dir."""
    options, run = segmentor
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = folder / Path(SEGMENTOR).name
    before = config.read_bytes()
    (tmp_path / "gone.py").write_text(
        f"_base_ = {SEGMENTOR!r}\n"
        "train_dataloader = dict(batch_size=1)\n"
        "model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='gone.pth')))\n"
    )
    mine = [option for option in options if "init_cfg" not in option and "train_dataloader.batch_size" not in option]
    arguments = [str(tmp_path / "gone.py"), str(folder / "iter_2.pth"), "--work-dir", str(folder)]
    metrics = evaluate([*arguments, "--cfg-options", *mine])
    assert 0 <= metrics["mIoU"] <= 100
    evaluate([SEGMENTOR, str(folder / "iter_2.pth"), "--work-dir", str(folder), "--cfg-options", *options])
    assert config.read_bytes() == before


def test_resume_goes_on_where_the_run_stopped(segmentor, tmp_path):
    options, run = segmentor
    more = ["train_cfg.max_iters=3", "train_cfg.val_interval=3", "default_hooks.checkpoint.interval=3"]
    arguments = ["--resume", str(run / "iter_2.pth"), "--work-dir", str(tmp_path)]
    train([SEGMENTOR, *arguments, "--cfg-options", *options, *more])
    assert [line["step"] for line in scalars(tmp_path) if "loss" in line] == [3]
    files = (run / "iter_2.pth", tmp_path / "iter_3.pth")
    assert [read(file).extras["optimizer"]["state"][0]["step"] for file in files] == [2, 3]


def test_a_resumed_copy_keeps_to_its_own_best_checkpoint(segmentor, tmp_path):
    """MMEngine notes the best one by its absolute path, and deletes what it notes."""
    options, _ = segmentor
    options = [*options, "default_hooks.checkpoint.save_best=mIoU"]
    first, copy, other = tmp_path / "first", tmp_path / "copy", tmp_path / "other"
    train([SEGMENTOR, "--work-dir", str(first), "--cfg-options", *options])
    state = load_from_nat_dense(str(first / "iter_2.pth"))
    state["message_hub"]["runtime_info"]["best_score"] = -1.0  # so that what comes is better
    torch.save(state, first / "iter_2.pth")
    shutil.copytree(first, copy)
    more = ["train_cfg.max_iters=3", "train_cfg.val_interval=3", "default_hooks.checkpoint.interval=3"]
    train([SEGMENTOR, "--work-dir", str(copy), "--resume", "--cfg-options", *options, *more])
    resume = ["--resume", str(first / "iter_2.pth")]
    train([SEGMENTOR, "--work-dir", str(other), *resume, "--cfg-options", *options, *more])
    best = {folder.name: [path.name for path in folder.glob("best_*.pth")] for folder in (first, copy, other)}
    assert best == dict(first=["best_mIoU_iter_2.pth"], copy=["best_mIoU_iter_3.pth"], other=["best_mIoU_iter_3.pth"])


def test_pictures_of_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cfg = load_config(SEGMENTOR)
    set_show_dir(cfg, str(tmp_path / "pictures"))
    cfg.launcher = "pytorch"
    with pytest.raises(ValueError, match="only the first process draws"):
        set_show_dir(cfg, str(tmp_path / "pictures"))


def test_a_finished_run_says_so(segmentor, capsys):
    options, run = segmentor
    train([SEGMENTOR, "--resume", "--work-dir", str(run), "--cfg-options", *options])
    told = capsys.readouterr().out
    assert "is the end of its run (iter 2 of 2): nothing is left to train. With a larger train_cfg.max_iters" in told
    assert "the resumed run keeps" not in told


def test_predictions_of_a_segmentor_are_not_overwritten(segmentor, tmp_path, capsys):
    options, run = segmentor
    out = tmp_path / "out"
    out.mkdir()
    (out / "0.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        evaluate([SEGMENTOR, str(run / "iter_2.pth"), "--out", str(out), "--cfg-options", *options])
    assert "is not empty, and nothing is overwritten" in capsys.readouterr().err
    assert (out / "0.png").read_bytes() == b"mine"


def test_an_option_without_a_value(capsys):
    with pytest.raises(SystemExit):
        train([DETECTOR, "--cfg-options", "foo"])
    assert "argument --cfg-options: 'foo': expected KEY=VALUE" in capsys.readouterr().err


def test_a_config_in_its_work_dir_is_not_overwritten(segmentor, tmp_path):
    options, _ = segmentor
    once = ["train_cfg.max_iters=1", "default_hooks.checkpoint.interval=1"]
    text = f"# mine\n_base_ = {SEGMENTOR!r}\n"
    (tmp_path / "mine.py").write_text(text)
    train([str(tmp_path / "mine.py"), "--work-dir", str(tmp_path), "--cfg-options", *options, *once])
    assert (tmp_path / "mine.py").read_text() == text
    (checkpoint,) = tmp_path.glob("*.pth")
    assert read(checkpoint).extras["meta"]["experiment_name"].startswith("mine_")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", ["train_cfg.max_epochs=1"]),
        (
            "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
            ["train_cfg.max_iters=1", "train_cfg.val_interval=1"],
        ),
    ],
)
def test_configs_of_the_libraries_train_unchanged(config, options, tmp_path):
    loaders = ("train_dataloader", "val_dataloader", "test_dataloader")
    root = (write_coco if "mmdet" in config else write_ade)(tmp_path / "data", train=2, val=1)
    options = [*options, "model.backbone.init_cfg=None", *(f"{loader}.dataset.data_root={root}" for loader in loaders)]
    options += [f"{loader}.num_workers=0" for loader in loaders]
    if "mmdet" in config:
        annotations = root / "annotations" / "instances_val2017.json"
        options += [f"{evaluator}.ann_file={annotations}" for evaluator in ("val_evaluator", "test_evaluator")]
        # After one step from random weights no box may score 0.05, and without a box there is no metric.
        options += ["model.test_cfg.rcnn.score_thr=0.0"]
        options += ["train_dataloader.dataset.pipeline.2.scale=(96,64)"]
        options += [f"{loader}.dataset.pipeline.1.scale=(96,64)" for loader in loaders[1:]]
    else:
        options += ["train_dataloader.dataset.pipeline.2.scale=(96,64)", "model.data_preprocessor.size=(64,64)"]
        options += ["train_dataloader.dataset.pipeline.3.crop_size=(64,64)"]
        options += [f"{loader}.dataset.pipeline.1.scale=(96,64)" for loader in loaders[1:]]
    train([config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *options])
    (metrics,) = [line for line in scalars(tmp_path / "run") if "coco/bbox_mAP" in line or "mIoU" in line]
    assert metrics["step"] == 1


@pytest.mark.slow
def test_a_seed_repeats_a_run(segmentor, tmp_path):
    options, run = segmentor
    train([SEGMENTOR, "--work-dir", str(tmp_path), "--seed", "3", "--cfg-options", *options])
    losses = [[line["loss"] for line in scalars(folder) if "loss" in line] for folder in (run, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_options_reach_the_config(tmp_path, capsys):
    options = ade_options(write_ade(tmp_path / "ade"), iterations=1)
    arguments = ["--amp", "--auto-scale-lr", "--work-dir", str(tmp_path / "run")]
    train([SEGMENTOR, *arguments, "--cfg-options", *options, "auto_scale_lr.base_batch_size=4"])
    assert "AmpOptimWrapper is replaced by OptimWrapper" in capsys.readouterr().out
    last = [line for line in scalars(tmp_path / "run") if "loss" in line][-1]
    # Two images a step where the learning rate is for four: half of it, times the first factor of the warm-up.
    assert last["lr"] == pytest.approx(6e-5 / 2 * 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/config.py"], "no config 'no/such/config.py'"),
        ([DETECTOR, "--resume", "no/such.pth"], "no checkpoint 'no/such.pth': neither a file"),
        (["mmdet::mask_rcnn/mask-rcnn_r51_fpn_1x_coco.py"], "mask-rcnn_r50_fpn_1x_coco.py"),
        ([str(REPOSITORY / "README.md")], "README.md' is not a config: expected a name that ends in .py, .yml, .yaml,"),
        (["mmpose::x/y.py"], "unknown library 'mmpose'"),
        ([DETECTOR, "--cfg-options", "train_dataloder.batch_size=1"], "Did you mean 'train_dataloader'?"),
        ([DETECTOR, "--cfg-options", "model.backbone.arch=tinny"], "arch='tinny'"),
        (
            [DETECTOR, "--cfg-options", "model.neck=None", "model.neck.in_channels=3"],
            "--cfg-options model.neck.in_channels: model.neck is None, which has no fields to set.",
        ),
        ([DETECTOR, "--launcher", "pytorch"], "start the processes with tools/dist_train.sh"),
        ([DETECTOR, "--launcher", "slurm"], "one process per GPU"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    if torch.cuda.is_available() and "--launcher" in arguments:
        pytest.skip("this machine has a GPU to launch on")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train(arguments)
    printed = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert printed[-2].startswith("train.py: error: ")
    assert message in printed[-2]
    assert list(tmp_path.iterdir()) == []  # nothing is written before the checks have passed


def test_the_traceback_is_there_on_demand(monkeypatch):
    monkeypatch.setenv("NAT_DENSE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        train(["no/such/config.py"])
