_base_ = [
    '../_base_/models/upernet_nat-tiny.py',
    '../_base_/datasets/ade20k_640x640.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        type='DiNAT_s',
        arch='large',
        dilations='segmentation-640',
        init_cfg=dict(checkpoint='https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_s_large_in22k_224.pth')),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768))
