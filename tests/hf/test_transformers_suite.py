"""transformers' own common tests of models and backbones, on these classes.

They are not in its wheel but in its source archive: unpack that of the installed version and name the folder,

    pip download --no-deps --no-binary transformers transformers==<version>
    TRANSFORMERS_SOURCE=transformers-<version> python -m pytest tests/hf/test_transformers_suite.py

docs/transformers.md lists what is skipped, and why.
"""

from __future__ import annotations

import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'nat_dense[hf]'")
SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "nowhere")) / "tests"
if not SOURCE.is_dir():
    pytest.skip("TRANSFORMERS_SOURCE names no unpacked source archive of transformers", allow_module_level=True)

import torch  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from nat_dense import hf  # noqa: E402

LACKING = (
    ("generation.test_utils", "GenerationTesterMixin", type("GenerationTesterMixin", (), {})),
    ("exporters.test_export", "ExportTesterMixin", type("ExportTesterMixin", (), {})),
    ("utils.test_configuration_utils", "config_common_kwargs", dict(return_dict=False, output_hidden_states=True)),
)
"""By module: what the common tests import and the archive has not got. The first two are of no use to vision models."""


def _published_suite() -> dict[str, type]:
    """The mixins, imported from the archive as a package of a name of its own; what it lacks is in `LACKING`."""
    package = ModuleType("transformers_suite")
    package.__path__ = [str(SOURCE)]
    sys.modules["transformers_suite"] = package
    for path, name, value in LACKING:
        parent = ModuleType(f"transformers_suite.{path.split('.')[0]}")
        module = ModuleType(f"transformers_suite.{path}")
        setattr(module, name, value)
        sys.modules |= {parent.__name__: parent, module.__name__: module}
    # The suite imports transformers by the path of a checkout that it stands in.
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        from transformers_suite.test_backbone_common import BackboneTesterMixin
        from transformers_suite.test_configuration_common import ConfigTester
        from transformers_suite.test_modeling_common import ModelTesterMixin
    return dict(model=ModelTesterMixin, backbone=BackboneTesterMixin, config=ConfigTester)


SUITE = _published_suite()


class Tester:
    """The small model and inputs that the suite asks for."""

    is_training = True
    batch_size, image_size, num_labels = 3, 64, 10

    def __init__(self, family: str):
        self.family = family

    def get_config(self):
        fields = dict(embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 4], kernel_size=3, mlp_ratio=2.0)
        if self.family == "Dinat":
            fields["dilations"] = [[3], [1, 2], [1]]
        fields |= dict(layer_scale_init_value=0.1, drop_path_rate=0.1, out_features=["stage1", "stage2"])
        return getattr(hf, f"{self.family}Config")(num_labels=self.num_labels, **fields)

    def prepare_config_and_inputs(self):
        image = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), image, torch.randint(self.num_labels, (self.batch_size,))

    def prepare_config_and_inputs_for_common(self):
        config, image, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": image}


class _Models(SUITE["model"]):
    """Settings that every NAT shares."""

    family = ""
    # Maps instead of sequences: one attention map a stage, of another shape than the suite expects.
    has_attentions = False
    test_resize_embeddings = False
    test_torch_exportable = False
    test_head_masking = False
    test_pruning = False
    fx_compatible = False

    def setUp(self):  # noqa: N802 (unittest names it)
        self.model_tester = Tester(self.family)
        self.config_tester = SUITE["config"](
            self,
            config_class=getattr(hf, f"{self.family}Config"),
            has_text_modality=False,
            common_properties=["patch_size", "num_channels"],
            embed_dim=32,
        )
        # The suite tells by static lists of names, which 5.0 took NAT off, whether a class has a loss.
        for mapping, suffix in (
            (modeling_auto.MODEL_MAPPING_NAMES, "Model"),
            (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "ForImageClassification"),
            (modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, "Backbone"),
        ):
            patch = mock.patch.dict(mapping, {self.family.lower(): f"{self.family}{suffix}"})
            patch.start()
            self.addCleanup(patch.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_hidden_states_output(self):
        self.skipTest("expects [batch, tokens, channels]; these are maps, compared in test_parity.py")

    def test_model_get_set_embeddings(self):
        self.skipTest("the input embeddings are convolutions")

    def test_inputs_embeds(self):
        self.skipTest("images have no inputs_embeds")


class _Backbones(SUITE["backbone"]):
    family = ""

    def setUp(self):  # noqa: N802 (unittest names it)
        self.model_tester = Tester(self.family)


class NatModelTest(_Models, unittest.TestCase):
    family = "Nat"
    all_model_classes = (hf.NatModel, hf.NatForImageClassification, hf.NatBackbone)


class DinatModelTest(_Models, unittest.TestCase):
    family = "Dinat"
    all_model_classes = (hf.DinatModel, hf.DinatForImageClassification, hf.DinatBackbone)


class NatBackboneTest(_Backbones, unittest.TestCase):
    family = "Nat"
    config_class = hf.NatConfig
    all_model_classes = (hf.NatBackbone,)


class DinatBackboneTest(_Backbones, unittest.TestCase):
    family = "Dinat"
    config_class = hf.DinatConfig
    all_model_classes = (hf.DinatBackbone,)
