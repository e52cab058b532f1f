_base_ = ['./mask-rcnn_nat-nano_fpn_1xb4_shapes.py', './_base_/resnet18-w32.py']

model = dict(backbone={{_base_.resnet}})

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True)))
