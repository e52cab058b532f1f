"""The README.md and metafile.yml of each published method's configs, written from the table of published results."""

from pathlib import Path

import yaml

from nat_dense.models.published import METHODS, PUBLISHED, Published

TITLES = {"mask_rcnn": "Mask R-CNN", "cascade_mask_rcnn": "Cascade Mask R-CNN", "upernet": "UPerNet"}
PAPERS = {
    "mask_rcnn": ("Mask R-CNN", "https://arxiv.org/abs/1703.06870"),
    "cascade_mask_rcnn": ("Cascade R-CNN: High Quality Object Detection", "https://arxiv.org/abs/1906.09756"),
    "upernet": ("Unified Perceptual Parsing for Scene Understanding", "https://arxiv.org/abs/1807.10221"),
}
"""Of the methods; those of the backbones are in `BACKBONE_PAPERS`."""

BACKBONE_PAPERS = {
    "NAT": ("Neighborhood Attention Transformer", "https://arxiv.org/abs/2204.07143"),
    "DiNAT": ("Dilated Neighborhood Attention Transformer", "https://arxiv.org/abs/2209.15001"),
    "DiNAT_s": ("Dilated Neighborhood Attention Transformer", "https://arxiv.org/abs/2209.15001"),
}
ORIGIN = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
NOTE = (
    "The figures are the authors', from the NAT and DiNAT papers and their model cards. **None of these models was "
    "re-trained here.**"
)
SCHEDULES = {
    "detection": "COCO 2017, 36 epochs of 8 x 2 images, AdamW, the learning rate a tenth after epochs 27 and 33. The "
    "short side of an image is scaled to 480 - 800 pixels, half of the time after a random crop.",
    "segmentation": "ADE20K, 160,000 iterations of 8 x 2 images, AdamW, the learning rate falling linearly to 0. Crops "
    "of 512 x 512 pixels, for the large models 640 x 640.",
}
EXTRAS = {
    "mask_rcnn": "The `1x` configs are ours: 12 epochs at one scale, to compare backbones at a third of the cost. "
    "Nobody has published results for them.",
    "cascade_mask_rcnn": "Three box heads of four convolutions and one linear layer each, with SyncBN, a GIoU loss on "
    "decoded boxes and class-specific regression.",
    "upernet": "`tools/test.py ... --tta` averages six scales (0.5 to 1.75 of the test size) with flips: the column "
    "*ms + flip*. The authors' configs for the large models are called 640x640, too, but leave the crops at 512; the "
    "published cost is that of 640 x 2560 pixels, and these configs follow it.",
}


def write_cards(root: Path) -> None:
    """Writes every file of `render_cards` below the repository's root."""
    for name, text in render_cards().items():
        (root / name).write_text(text, encoding="utf-8")


def render_cards() -> dict[str, str]:
    """The files, as paths from the repository's root and their texts."""
    files = {"model-index.yml": _yaml({"Import": [f"configs/{method}/metafile.yml" for method in METHODS]})}
    for method in METHODS:
        rows = [row for row in PUBLISHED if row.method == method]
        files[f"configs/{method}/metafile.yml"] = _metafile(method, rows)
        files[f"configs/{method}/README.md"] = _readme(method, rows)
    return files


def reproduce(row: Published) -> str:
    """The command that evaluates the released weights of a row."""
    name = Path(row.checkpoint).stem
    convert = f"python tools/convert_checkpoint.py {name} {name}.pth --to mm"
    return f"{convert} && python tools/test.py {row.config} {name}.pth"


def _yaml(content: dict) -> str:
    header = "# Written by tools/write_model_cards.py from nat_dense/models/published.py.\n"
    return header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _metafile(method: str, rows: list[Published]) -> str:
    title, url = PAPERS[method]
    models = [_model(row) for row in rows]
    collection = {
        "Name": TITLES[method],
        "Paper": {"Title": title, "URL": url},
        "README": f"configs/{method}/README.md",
    }
    return _yaml({"Collections": [collection], "Models": models})


def _model(row: Published) -> dict:
    title, url = BACKBONE_PAPERS[row.family]
    height, width = row.image_size
    detection = row.task == "detection"
    return {
        "Name": Path(row.config).stem,
        "In Collection": TITLES[row.method],
        "Config": row.config,
        "Metadata": {
            "Architecture": [row.name, TITLES[row.method]],
            "Training Data": "COCO 2017" if detection else "ADE20K",
            "Parameters (M)": row.params_m,
            "FLOPs (G multiply-adds)": row.gmacs,
            "Image size": f"{height}x{width}",
            "Batch Size": 16,
            **({"Epochs": 36} if detection else {"Iterations": 160000}),
            "Results From": "the authors; not re-trained here",
        },
        "Results": _results(row),
        "Converted From": {"Weights": row.checkpoint, "Code": ORIGIN},
        "Reproduce": reproduce(row),
        "Paper": {"Title": title, "URL": url},
    }


def _results(row: Published) -> list[dict]:
    if row.task == "detection":
        return [
            {"Task": "Object Detection", "Dataset": "COCO", "Metrics": {"box AP": row.box_ap}},
            {"Task": "Instance Segmentation", "Dataset": "COCO", "Metrics": {"mask AP": row.mask_ap}},
        ]
    metrics = {"mIoU": row.miou, "mIoU(ms+flip)": row.miou_ms}
    return [{"Task": "Semantic Segmentation", "Dataset": "ADE20K", "Metrics": metrics}]


def _readme(method: str, rows: list[Published]) -> str:
    task = rows[0].task
    title, url = PAPERS[method]
    config, name = rows[1].config, Path(rows[1].config).stem
    tta = " --tta" if task == "segmentation" else ""
    return f"""<!-- Written by tools/write_model_cards.py from nat_dense/models/published.py. -->
# {TITLES[method]}

[{title}]({url}) on NAT ([arXiv:2204.07143]({BACKBONE_PAPERS["NAT"][1]})), DiNAT and DiNAT_s
([arXiv:2209.15001]({BACKBONE_PAPERS["DiNAT"][1]})).

{NOTE}

{_table(rows)}

Costs are multiply-adds of one image of the stated size (height x width). "Initial weights" are ImageNet-1k's, for the
large models ImageNet-22k's. The released weights are under the licence of [their repository]({ORIGIN}).

## Recipe

{SCHEDULES[task]} {EXTRAS[method]}

```bash
python tools/train.py {config}
tools/dist_train.sh {config} 8
python tools/test.py {config} work_dirs/{name}/CHECKPOINT.pth{tta}
```

## Reproducing the published figures

The released weights, converted and evaluated: one command each, with the data set in place.

```bash
{_commands(rows)}
```
"""


def _commands(rows: list[Published]) -> str:
    return "\n".join(f"# {row.name}: {_figures(row)}\n{reproduce(row)}" for row in rows)


def _figures(row: Published) -> str:
    if row.task == "detection":
        return f"{row.box_ap} box AP, {row.mask_ap} mask AP"
    return f"{row.miou} mIoU; with --tta {row.miou_ms}"


def _table(rows: list[Published]) -> str:
    detection = rows[0].task == "detection"
    metrics = ("box AP", "mask AP") if detection else ("mIoU", "mIoU ms + flip")
    names = ["backbone", "parameters (M)", "cost (G)", "image", "drop path", "lr", "AMP", *metrics]
    names += ["config", "released weights", "initial weights"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        height, width = row.image_size
        values = (row.box_ap, row.mask_ap) if detection else (row.miou, row.miou_ms)
        links = [(Path(row.config).name, "config"), (row.checkpoint, "weights"), (row.pretrained, "ImageNet")]
        lines.append(
            [
                row.name,
                str(row.params_m),
                str(row.gmacs),
                f"{height} x {width}",
                f"{row.drop_path_rate:g}",
                f"{row.learning_rate:g}",
                "yes" if row.amp else "no",
                *(f"{value} (paper)" for value in values),
                *(f"[{text}]({url})" for url, text in links),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
