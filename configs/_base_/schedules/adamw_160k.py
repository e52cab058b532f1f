# 160,000 iterations of 8 GPUs x 2 images; the published segmentation schedule.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]

# Neither the relative position biases nor the norms decay.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))))

auto_scale_lr = dict(enable=False, base_batch_size=16)
