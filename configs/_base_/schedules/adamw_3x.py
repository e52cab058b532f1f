# 36 epochs of 8 GPUs x 2 images; the published detection schedule.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]

# Neither the relative position biases nor the norms decay.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))))

auto_scale_lr = dict(enable=False, base_batch_size=16)
