_base_ = './cascade-mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        type='DiNAT',
        arch='base',
        dilations='detection',
        drop_path_rate=0.6,
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth')),
    neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-05))
