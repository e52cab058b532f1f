_base_ = [
    '../_base_/models/cascade-mask-rcnn_nat-tiny_fpn.py',
    '../_base_/datasets/coco_instance_ms-crop.py',
    '../_base_/schedules/adamw_3x.py',
    '../_base_/detection_runtime.py',
]
