# A ResNet-18 of half the width: about the parameters and exactly the channels of NAT-Nano.
resnet = dict(
    _delete_=True,
    type='ResNet',
    depth=18,
    stem_channels=32,
    base_channels=32,
    out_indices=(0, 1, 2, 3),
    norm_cfg=dict(type='BN', requires_grad=True),
    norm_eval=False)
