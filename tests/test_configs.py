"""Every config parses, agrees with the published table, builds, trains a step and predicts."""

import gc
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, init_default_scope

from nat_dense.checkpoints.names import URLS
from nat_dense.mm.config import load_config
from nat_dense.mm.machine import fit_to_machine
from nat_dense.mm.model_cards import render_cards, reproduce
from nat_dense.mm.model_checks import check_model
from nat_dense.models.published import PUBLISHED
from tests.mm.small import REPOSITORY, SIZE, shrink, write_ade, write_coco

CONFIGS = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").glob("[!_]*/*.py"))
ONE_OF_EACH_FAMILY = [
    "configs/mask_rcnn/mask-rcnn_nat-mini_fpn_8xb2-amp-ms-crop-3x_coco.py",
    "configs/cascade_mask_rcnn/cascade-mask-rcnn_dinat-mini_fpn_8xb2-amp-ms-crop-3x_coco.py",
    "configs/upernet/dinat-s-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py",
]


def test_every_published_result_has_a_config_and_nothing_else_is_there():
    folders = {Path(row.config).parent.name for row in PUBLISHED}
    found = {name for name in CONFIGS if Path(name).parent.name in folders}
    ours = {name for name in found if "-1x_" in name}
    assert found - ours == {row.config for row in PUBLISHED}
    assert ours == {
        f"configs/mask_rcnn/mask-rcnn_{b}-tiny_fpn_8xb2-amp-1x_coco.py" for b in ("nat", "dinat", "dinat-s")
    }


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: Path(row.config).stem)
def test_config_is_the_published_recipe(row):
    cfg = load_config(str(REPOSITORY / row.config))
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch, backbone.get("dilations")) == (row.family, row.arch, row.dilations)
    assert backbone.drop_path_rate == row.drop_path_rate
    assert backbone.init_cfg == dict(type="Pretrained", checkpoint=row.pretrained)
    widths = [row.variant.embed_dim * 2**i for i in range(4)]
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas) == ("AdamW", row.learning_rate, (0.9, 0.999))
    assert cfg.optim_wrapper.type == ("AmpOptimWrapper" if row.amp else "OptimWrapper")
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    warm_up, schedule = cfg.param_scheduler
    if row.task == "detection":
        assert cfg.model.neck.in_channels == widths
        assert optimizer.weight_decay == 0.05
        assert (cfg.train_cfg.max_epochs, schedule.end, schedule.milestones) == (36, 36, [27, 33])
        assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    else:
        assert cfg.model.decode_head.in_channels == widths
        assert cfg.model.auxiliary_head.in_channels == widths[2]
        assert optimizer.weight_decay == 0.01
        assert (cfg.train_cfg.max_iters, schedule.end, schedule.power, schedule.eta_min) == (160000, 160000, 1.0, 0.0)
        assert (warm_up.start_factor, warm_up.end, schedule.begin) == (1e-6, 1500, 1500)
        crop = (row.crop_size, row.crop_size)
        test_size = (4 * row.crop_size, row.crop_size)
        pipeline = cfg.train_dataloader.dataset.pipeline
        assert cfg.model.data_preprocessor.size == crop
        assert (pipeline[2].scale, pipeline[3].crop_size) == (test_size, crop)
        for loader in (cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.pipeline[1].scale == test_size
        views = [resize.scale for resize in cfg.tta_pipeline[1].transforms[0]]
        assert views == [tuple(int(side * r) for side in test_size) for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
        assert [flip.prob for flip in cfg.tta_pipeline[1].transforms[1]] == [0.0, 1.0]


def test_detection_scales_and_crops():
    cfg = load_config(str(REPOSITORY / ONE_OF_EACH_FAMILY[0]))
    (resize,), (before, crop, after) = cfg.train_dataloader.dataset.pipeline[3].transforms
    scales = [(side, 1333) for side in (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
    assert resize.scales == after.scales == scales
    assert before.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert (crop.crop_type, crop.crop_size, crop.allow_negative_crop) == ("absolute_range", (384, 600), True)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1333, 800)


def test_one_epoch_schedule_of_12_epochs():
    cfg = load_config(str(REPOSITORY / "configs/mask_rcnn/mask-rcnn_dinat-s-tiny_fpn_8xb2-amp-1x_coco.py"))
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].milestones, cfg.param_scheduler[1].end) == (
        12,
        [8, 11],
        12,
    )
    assert cfg.train_dataloader.dataset.pipeline[2] == dict(type="Resize", scale=(1333, 800), keep_ratio=True)


def test_model_cards_are_those_of_the_table():
    for name, text in render_cards().items():
        assert (REPOSITORY / name).read_text(encoding="utf-8") == text, f"run tools/write_model_cards.py: {name}"


def test_model_index_leads_to_every_config_and_number():
    index = yaml.safe_load((REPOSITORY / "model-index.yml").read_text())
    models = [m for file in index["Import"] for m in yaml.safe_load((REPOSITORY / file).read_text())["Models"]]
    metrics = {m["Config"]: {k: v for result in m["Results"] for k, v in result["Metrics"].items()} for m in models}
    for row in PUBLISHED:
        expected = {"box AP": row.box_ap, "mask AP": row.mask_ap, "mIoU": row.miou, "mIoU(ms+flip)": row.miou_ms}
        assert metrics[row.config] == {name: value for name, value in expected.items() if value is not None}
    assert all("not re-trained here" in model["Metadata"]["Results From"] for model in models)


def test_commands_name_published_checkpoints():
    for row in PUBLISHED:
        _, _, source, target = reproduce(row).split()[:4]
        assert URLS[source] == row.checkpoint
        assert target == f"{source}.pth"


def step_and_predict(path: str, folder: Path) -> None:
    """One training step of two images and one prediction, through the config's own pipelines at a small size."""
    cfg = load_config(str(REPOSITORY / path), {"model.backbone.init_cfg": None})
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == "mmdet":
        classes = (cfg.train_dataloader.dataset.get("metainfo") or {}).get("classes")
        shrink(cfg, write_coco(folder / "data", train=2, val=1, classes=classes))
    else:
        shrink(cfg, write_ade(folder / "data", train=2, val=1))
    fit_to_machine(cfg)
    torch.manual_seed(0)
    model, warnings = check_model(cfg)
    assert warnings == []
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "rpb" in name}
    train, val = DATASETS.build(cfg.train_dataloader.dataset), DATASETS.build(cfg.val_dataloader.dataset)
    losses = model.train().train_step(pseudo_collate([train[0], train[1]]), wrapper)
    assert torch.isfinite(losses["loss"])
    assert losses["loss"] > 0
    after = dict(model.named_parameters())
    # Stochastic depth may leave out a block for both images, but hardly a stage.
    stages = {".".join(name.split(".")[:3]) for name in before}
    learned = {".".join(name.split(".")[:3]) for name, value in before.items() if not torch.equal(value, after[name])}
    assert learned == stages
    with torch.no_grad():
        (prediction,) = model.eval().test_step(pseudo_collate([val[0]]))
    if cfg.default_scope == "mmdet":
        instances = prediction.pred_instances
        assert instances.bboxes.shape == (len(instances), 4)
        assert instances.masks.shape == (len(instances), SIZE[1], SIZE[0])
    else:
        assert prediction.pred_sem_seg.data.shape == (1, SIZE[1], SIZE[0])
    gc.collect()


@pytest.mark.parametrize("path", ONE_OF_EACH_FAMILY, ids=lambda path: Path(path).stem)
def test_one_config_of_each_family_trains_and_predicts(path, tmp_path):
    step_and_predict(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(set(CONFIGS) - set(ONE_OF_EACH_FAMILY)), ids=lambda path: Path(path).stem)
def test_every_config_trains_and_predicts(path, tmp_path):
    step_and_predict(path, tmp_path)
