# UPerNet for small pictures on a CPU: a sixteenth of the channels, group norm because four pictures are too few for
# statistics, and no pooling finer than the last map, which has 4 x 4 places.
_base_ = [
    '../_base_/models/upernet_nat-tiny.py',
    '../_base_/segmentation_runtime.py',
    './_base_/shapes_segmentation.py',
    './_base_/schedule.py',
]

norm_cfg = dict(_delete_=True, type='GN', num_groups=8)

model = dict(
    data_preprocessor=dict(size=None, size_divisor=32, test_cfg=dict(size_divisor=32)),
    # Linear layers this narrow start too weak with the 0.02 that suits the published widths.
    backbone=dict(
        arch='nano', drop_path_rate=0.0, init_cfg=dict(_delete_=True, type='Xavier', layer='Linear',
                                                       distribution='uniform')),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], pool_scales=(1, 2), channels=32, num_classes=7, dropout_ratio=0.0, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=7, dropout_ratio=0.0, norm_cfg=norm_cfg))

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(interval=1300, by_epoch=False, max_keep_ckpts=2))
log_processor = dict(window_size=20, by_epoch=False)

# Outlines take a segmentor longer than a detector. An iteration takes less, too, and when the detector has finished
# it has all cores.
train_cfg = dict(max_iters=5200, val_interval=1300)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=50, end=5200),
]
