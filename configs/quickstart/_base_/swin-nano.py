# A Swin of the depths, heads and channels of NAT-Nano; MMDetection gives it no other start than its own.
swin = dict(
    _delete_=True,
    type='SwinTransformer',
    embed_dims=32,
    depths=[2, 2, 4, 2],
    num_heads=[1, 2, 4, 8],
    window_size=7,
    mlp_ratio=4,
    drop_path_rate=0.0,
    out_indices=(0, 1, 2, 3),
    init_cfg=None)
