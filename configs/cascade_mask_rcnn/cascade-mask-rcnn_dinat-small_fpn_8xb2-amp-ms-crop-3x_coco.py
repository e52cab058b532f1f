_base_ = './cascade-mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        type='DiNAT',
        arch='small',
        dilations='detection',
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth')),
    neck=dict(in_channels=[96, 192, 384, 768]))
