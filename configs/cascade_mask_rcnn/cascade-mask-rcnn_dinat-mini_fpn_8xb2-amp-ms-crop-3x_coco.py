_base_ = './cascade-mask-rcnn_nat-tiny_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        type='DiNAT',
        arch='mini',
        dilations='detection',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth')))
