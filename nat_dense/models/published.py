"""The published dense results as data: the 34 detectors and segmentors of the NAT and DiNAT papers.

The figures are the authors'; this project has trained none of these models. Configs, their model cards, tests and the
documentation read this table or are tested against it.

Source: the model cards and configs of SHI-Labs/Neighborhood-Attention-Transformer at d334f5b (papers: arXiv:2204.07143,
arXiv:2209.15001). The checkpoints follow that repository's licence, MIT.
"""

from __future__ import annotations

from dataclasses import dataclass

from nat_dense.models.variants import Variant, variant

NAT_DENSE_ROOT = "https://shi-labs.com/projects/nat/checkpoints/"
DINAT_DENSE_ROOT = "https://shi-labs.com/projects/dinat/checkpoints/"

METHODS = ("mask_rcnn", "cascade_mask_rcnn", "upernet")
"""Named like the folders of their configs. The first two detect (COCO 2017), the last segments (ADE20K)."""


@dataclass(frozen=True)
class Published:
    """One published detector or segmentor.

    Attributes:
        method: One of `METHODS`.
        family, arch: A row of `variants.VARIANTS`.
        params_m: Parameters of the whole model as published, in 10^6, rounded to an integer.
        gmacs: Published cost of one image of `image_size` in 10^9 multiply-adds (the papers say FLOPs) with fvcore's
            rough counts of norms and resizes (see `nat_dense.mm.flops`), rounded to an integer.
        drop_path_rate: Stochastic depth of the training.
        box_ap, mask_ap: COCO val2017 in percent; None for segmentors.
        miou, miou_ms: ADE20K val in percent, one scale and six scales with flips; None for detectors.
        dilations: The preset of `variants.DILATIONS`; None for NAT.
        learning_rate: Of AdamW, for 16 images a step.
        amp: Whether it was trained in mixed precision.
    """

    method: str
    family: str
    arch: str
    params_m: int
    gmacs: int
    drop_path_rate: float
    box_ap: float | None = None
    mask_ap: float | None = None
    miou: float | None = None
    miou_ms: float | None = None
    dilations: str | None = None
    learning_rate: float = 1e-4
    amp: bool = True

    @property
    def name(self) -> str:
        """As the papers write the backbone: "DiNAT_s-Tiny"."""
        return f"{self.family}-{self.arch.capitalize()}"

    @property
    def task(self) -> str:
        """What the method does: detection (with masks) or segmentation."""
        return "segmentation" if self.method == "upernet" else "detection"

    @property
    def variant(self) -> Variant:
        """The architecture."""
        return variant(self.family, self.arch)

    @property
    def crop_size(self) -> int:
        """Side in pixels of a segmentor's training crops."""
        return 640 if self.dilations == "segmentation-640" else 512

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that `gmacs` holds for.

        The cards don't say it; at these sizes all 34 figures come out as published.
        """
        return (800, 1280) if self.task == "detection" else (self.crop_size, 4 * self.crop_size)

    @property
    def config(self) -> str:
        """The config that trains it, from the root of the repository."""
        backbone = f"{self.family}-{self.arch}".lower().replace("_", "-")
        amp = "amp-" if self.amp else ""
        if self.task == "detection":
            return f"configs/{self.method}/{self.method.replace('_', '-')}_{backbone}_fpn_8xb2-{amp}ms-crop-3x_coco.py"
        crop = f"{self.crop_size}x{self.crop_size}"
        return f"configs/{self.method}/{backbone}_{self.method}_8xb2-{amp}160k_ade20k-{crop}.py"

    @property
    def checkpoint(self) -> str:
        """Where the released weights of the whole model are."""
        model, method = f"{self.family}_{self.arch}".lower(), self.method.replace("_", "")
        detects = self.task == "detection"
        if self.family == "NAT":
            return f"{NAT_DENSE_ROOT}{'DET' if detects else 'SEG'}/{model}_{method}.pth"
        # The released files of DiNAT's cascades say "cascaded".
        method = method.replace("cascade", "cascaded")
        return f"{DINAT_DENSE_ROOT}{'coco' if detects else 'ade20k'}/{method}_{model}.pth"

    @property
    def pretrained(self) -> str:
        """The released classification weights that the training started from."""
        row = self.variant
        return row.checkpoint_22k or row.checkpoint or ""


def _published(
    method: str, model: str, params_m: int, gmacs: int, drop_path_rate: float, dilations: str, **fields
) -> Published:
    family, arch = model.split("-")
    fields["dilations"] = None if family == "NAT" else dilations
    return Published(method, family, arch, params_m, gmacs, drop_path_rate, **fields)


def _detector(
    method: str,
    model: str,
    params_m: int,
    gmacs: int,
    box_ap: float,
    mask_ap: float,
    drop_path_rate: float,
    learning_rate: float = 1e-4,
    amp: bool = True,
) -> Published:
    fields = dict(box_ap=box_ap, mask_ap=mask_ap, learning_rate=learning_rate, amp=amp)
    return _published(method, model, params_m, gmacs, drop_path_rate, "detection", **fields)


def _segmentor(
    model: str,
    params_m: int,
    gmacs: int,
    miou: float,
    miou_ms: float,
    drop_path_rate: float,
    dilations: str = "segmentation",
    amp: bool = True,
) -> Published:
    fields = dict(miou=miou, miou_ms=miou_ms, learning_rate=6e-5, amp=amp)
    return _published("upernet", model, params_m, gmacs, drop_path_rate, dilations, **fields)


MASK_RCNN = tuple(
    _detector("mask_rcnn", *row)
    # model, parameters (M), GMACs, box AP, mask AP, drop path
    for row in (
        ("NAT-mini", 40, 225, 46.5, 41.7, 0.2),
        ("NAT-tiny", 48, 258, 47.7, 42.6, 0.2),
        ("NAT-small", 70, 330, 48.4, 43.2, 0.35),
        ("DiNAT-mini", 40, 225, 47.2, 42.5, 0.2),
        ("DiNAT-tiny", 48, 258, 48.6, 43.5, 0.2),
        ("DiNAT-small", 70, 330, 49.3, 44.0, 0.35),
        ("DiNAT_s-tiny", 48, 263, 46.6, 42.1, 0.2),
        ("DiNAT_s-small", 69, 350, 48.6, 43.5, 0.35),
    )
)

CASCADE_MASK_RCNN = tuple(
    _detector("cascade_mask_rcnn", *row)
    # model, parameters (M), GMACs, box AP, mask AP, drop path, learning rate, mixed precision
    for row in (
        ("NAT-mini", 77, 704, 50.3, 43.6, 0.2),
        ("NAT-tiny", 85, 737, 51.4, 44.5, 0.3),
        ("NAT-small", 108, 809, 52.0, 44.9, 0.3),
        ("NAT-base", 147, 931, 52.3, 45.1, 0.5),
        ("DiNAT-mini", 77, 704, 51.2, 44.4, 0.2),
        ("DiNAT-tiny", 85, 737, 52.2, 45.1, 0.3),
        ("DiNAT-small", 108, 809, 52.9, 45.8, 0.5),
        ("DiNAT-base", 147, 931, 53.4, 46.2, 0.6, 7.5e-5),
        ("DiNAT-large", 258, 1276, 55.3, 47.8, 0.6, 7.5e-5, False),
        ("DiNAT_s-tiny", 86, 742, 51.0, 44.1, 0.3),
        ("DiNAT_s-small", 107, 829, 52.3, 45.2, 0.5),
        ("DiNAT_s-base", 145, 966, 52.6, 45.3, 0.6, 7.5e-5),
        ("DiNAT_s-large", 253, 1357, 54.8, 47.2, 0.6, 5e-5),
    )
)

UPERNET = tuple(
    _segmentor(*row)
    # model, parameters (M), GMACs, mIoU at one scale, at six, drop path, dilations, mixed precision
    for row in (
        ("NAT-mini", 50, 900, 45.1, 46.4, 0.2),
        ("NAT-tiny", 58, 934, 47.1, 48.4, 0.3),
        ("NAT-small", 82, 1010, 48.0, 49.5, 0.5),
        ("NAT-base", 123, 1137, 48.5, 49.7, 0.5),
        ("DiNAT-mini", 50, 900, 45.8, 47.2, 0.2),
        ("DiNAT-tiny", 58, 934, 47.8, 48.8, 0.3),
        ("DiNAT-small", 82, 1010, 48.9, 49.9, 0.5),
        ("DiNAT-base", 123, 1137, 49.6, 50.4, 0.5),
        # Earlier versions of the model card say 53.5 and 54.6.
        ("DiNAT-large", 238, 2335, 54.0, 54.9, 0.3, "segmentation-640", False),
        ("DiNAT_s-tiny", 60, 941, 46.0, 47.4, 0.3),
        ("DiNAT_s-small", 81, 1030, 48.6, 49.9, 0.3),
        ("DiNAT_s-base", 121, 1173, 49.4, 50.2, 0.3),
        ("DiNAT_s-large", 234, 2466, 53.4, 54.6, 0.3, "segmentation-640"),
    )
)

PUBLISHED = MASK_RCNN + CASCADE_MASK_RCNN + UPERNET
