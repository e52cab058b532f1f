# Mask R-CNN for small pictures on a CPU: a fifth of the channels, one anchor a place for things of 16 to 128 px,
# a hundred proposals where COCO's model takes a thousand, group norm because four pictures are too few for statistics.
_base_ = [
    '../_base_/models/mask-rcnn_nat-tiny_fpn.py',
    '../_base_/detection_runtime.py',
    './_base_/shapes_detection.py',
    './_base_/schedule.py',
]

norm_cfg = dict(type='GN', num_groups=8)
roi_layer = dict(sampling_ratio=1)
assigner = dict(ignore_iof_thr=0.5)  # what lies in a crowd is neither a thing nor ground

model = dict(
    # Linear layers this narrow start too weak with the 0.02 that suits the published widths.
    backbone=dict(
        arch='nano', drop_path_rate=0.0, init_cfg=dict(_delete_=True, type='Xavier', layer='Linear',
                                                       distribution='uniform')),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48, num_outs=4, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=48,
        feat_channels=48,
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=roi_layer, out_channels=48, finest_scale=28),
        bbox_head=dict(in_channels=48, fc_out_channels=256, num_classes=6, reg_class_agnostic=True),
        mask_roi_extractor=dict(roi_layer=roi_layer, out_channels=48, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=48, conv_out_channels=32, num_classes=6, norm_cfg=norm_cfg)),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.6, **assigner), sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(assigner=assigner, sampler=dict(num=32, pos_fraction=0.5))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)))

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(interval=300, by_epoch=False, max_keep_ckpts=2))
log_processor = dict(window_size=20, by_epoch=False)
