_base_ = ["_base_/upernet-32.py", "_base_/shapes_segmentation.py", "_base_/runtime.py"]
default_scope = "mmseg"
model = dict(backbone=dict(type="NAT", arch="nano", drop_path_rate=0.0))
