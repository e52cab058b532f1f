"""Marks of transformers' own test-suite, for `test_transformers_suite.py`."""

import os

MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


def pytest_configure(config):
    if "TRANSFORMERS_SOURCE" in os.environ:
        for name in (*MARKS, "torch_export_test", "order"):
            config.addinivalue_line("markers", f"{name}: of transformers' own tests")
