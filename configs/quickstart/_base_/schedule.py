# A short run from scratch on a CPU: Muon and AdamW, a short warm-up, then a cosine to zero; evaluated four times. The
# learning rate does as well as any that was tried in shorter runs: docs/quickstart.md has what came of the others.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1200, val_interval=300)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=50, end=1200),
]

# Position biases start next to zero and are alone in telling neighbors apart: they are to get away from there soon.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='GroupedOptimWrapperConstructor',
    optimizer=dict(type='MuonAdamW', lr=2e-3, betas=(0.9, 0.99), weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(rpb=dict(decay_mult=0.0, lr_mult=10.0))))

randomness = dict(seed=0)
