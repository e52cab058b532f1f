_base_ = ['./nat-nano_upernet_1xb4_shapes.py', './_base_/swin-nano.py']

model = dict(backbone={{_base_.swin}})

position_bias = dict(decay_mult=0.0, lr_mult=10.0)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, relative_position_bias_table=position_bias)))
