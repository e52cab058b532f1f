# The generated shapes with index maps in ADE20K's form; `python -m nat_dense.datasets.shapes data/shapes` makes them.
data_root = 'data/shapes/'
metainfo = dict(
    classes=('ground', 'disc', 'square', 'triangle', 'star', 'cross', 'ring'),
    palette=[(60, 60, 60), (230, 75, 60), (60, 120, 220), (245, 190, 40), (150, 90, 200), (50, 170, 110),
             (240, 130, 180)])

load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
test_pipeline = [*load, dict(type='PackSegInputs')]  # by this name MMSegmentation's inference_model looks for it
flip = dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal'])

# Decoding a picture of 128 x 128 takes less than handing it from one process to another: no workers.
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=[*load, flip, dict(type='PackSegInputs')]))
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
