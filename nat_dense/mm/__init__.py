"""What touches MMEngine, MMDetection and MMSegmentation: the way from a config file to a Runner that may start.

Start with `runner.py` (`build_runner`: every check, then the Runner), then `config.py` (`mmdet::` and `mmseg::` paths),
`swap/` (another backbone under any model), `machine.py` (what this machine can't do is replaced and reported),
`model_checks.py`, `data_checks.py` and `checkpoints.py`.
"""
