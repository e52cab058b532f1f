_base_ = './mask-rcnn_nat-tiny_fpn_8xb2-amp-1x_coco.py'

model = dict(
    backbone=dict(
        type='DiNAT',
        dilations='detection',
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth')))
