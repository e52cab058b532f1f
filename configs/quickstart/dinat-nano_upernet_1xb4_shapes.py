_base_ = ['./nat-nano_upernet_1xb4_shapes.py', './_base_/dinat-nano.py']

model = dict(backbone={{_base_.dinat}})
