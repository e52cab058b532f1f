_base_ = './cascade-mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        type='DiNAT_s',
        arch='large',
        dilations='detection',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth')),
    neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(optimizer=dict(lr=5e-05))
