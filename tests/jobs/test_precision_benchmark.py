"""bf16 beside float32 on trained weights, on scenes drawn for the test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.precision_benchmark import measure_precision, precision_ratios, precision_table
from pipeline.scenes import write_archive


def test_bf16_keeps_what_trained_weights_find(tmp_path: Path) -> None:
    annotations = write_archive(tmp_path, num_images=12, num_in_tar=0, seed=1010)
    rows = measure_precision("demo", str(annotations), str(tmp_path), torch.device("cpu"))
    full, half = rows
    assert (full.precision, half.precision, full.images, half.images) == ("fp32", "bf16", 12, 12)
    assert full.mask_ap > 0.6
    assert full.kept == 1.0
    assert half.kept > 0.95
    assert half.mask_ap == pytest.approx(full.mask_ap, abs=0.01)
    ratios = precision_ratios(rows)
    assert ratios["bf16_mask_ap_points"] == 100 * (half.mask_ap - full.mask_ap)
    assert ratios["bf16_kept"] == half.kept
    assert precision_table(rows).row_count == 2
    assert precision_ratios([]) == {}
