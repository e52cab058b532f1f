_base_ = ["_base_/mask-rcnn_fpn-48.py", "_base_/shapes_detection.py", "_base_/runtime.py"]
default_scope = "mmdet"
model = dict(backbone=dict(type="NAT", arch="nano", drop_path_rate=0.0))
