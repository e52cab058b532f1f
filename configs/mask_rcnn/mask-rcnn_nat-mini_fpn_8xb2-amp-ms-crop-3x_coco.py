_base_ = './mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='mini',
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth')))
