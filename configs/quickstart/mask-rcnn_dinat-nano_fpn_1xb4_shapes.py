_base_ = ['./mask-rcnn_nat-nano_fpn_1xb4_shapes.py', './_base_/dinat-nano.py']

model = dict(backbone={{_base_.dinat}})
