"""Headers of axial CT slices without files behind them, for what is decided by headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workers.headers import InstanceHeader

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def image(z: float, number: int = 1, **changes: object) -> InstanceHeader:
    """A faultless slice at `z` mm with Instance Number `number`, its fields replaced by `changes`."""
    header = InstanceHeader(
        Path(f"{number}.dcm"),
        sop_instance_uid=f"1.2.{number}",
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        series_uid="1.2.3",
        modality="CT",
        instance_number=number,
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
        rows=64,
        columns=64,
        samples_per_pixel=1,
        rescale_slope=1.0,
        rescale_intercept=-1024.0,
        orientation=AXIAL,
        position=(0.0, 0.0, z),
        pixel_spacing=(1.0, 1.0),
        frame_of_reference_uid="1.2.4",
    )
    return replace(header, **changes)  # type: ignore[arg-type]


def stack_of(count: int, step: float = 5.0) -> list[InstanceHeader]:
    """`count` slices from z = 0 upwards, numbered from 1."""
    return [image(step * index, index + 1) for index in range(count)]
