# The generated shapes with COCO labels; `python -m nat_dense.datasets.shapes data/shapes` makes them.
data_root = 'data/shapes/'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'star', 'cross', 'ring'),
    palette=[(230, 75, 60), (60, 120, 220), (245, 190, 40), (150, 90, 200), (50, 170, 110), (240, 130, 180)])

load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
flip = dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal'])
test_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')

# Decoding a picture of 128 x 128 takes less than handing it from one process to another: no workers.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_training.json',
        data_prefix=dict(img='images/training/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[*load, flip, dict(type='PackDetInputs')]))
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/instances_validation.json',
        data_prefix=dict(img='images/validation/'),
        test_mode=True,
        # The factor 1 changes nothing, but MMDetection asks for it afterwards.
        pipeline=[*load, dict(type='Resize', scale_factor=1.0), dict(type='PackDetInputs', meta_keys=test_keys)]))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/instances_validation.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator
