"""Twenty-one real biomedical pictures from files that scikit-image and pydicom carry, as PNG and JPEG files.

Nothing is downloaded: files are opened where the two packages are installed, not through their fetching functions.
CT values are windowed as a radiologist would (centre and width in Hounsfield units), everything else is scaled from
its own range; DICOM files are chosen so that Pillow alone can decompress them.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# name: (file of skimage/data, crop box in pixels of that file or None)
PHOTOGRAPHS = {
    "ihc_overview.jpg": ("ihc.png", None),
    "ihc_glands.png": ("ihc.png", (10, 10, 230, 230)),
    "ihc_round_gland.png": ("ihc.png", (220, 290, 410, 480)),
    "ihc_stroma.png": ("ihc.png", (340, 240, 512, 412)),
    "fundus.jpg": ("retina.jpg", None),
    "fundus_disc.jpg": ("retina.jpg", (60, 440, 500, 880)),
    "fundus_macula.jpg": ("retina.jpg", (500, 500, 900, 900)),
    "fundus_periphery.jpg": ("retina.jpg", (820, 140, 1180, 500)),
    "cell.png": ("cell.png", (250, 250, 550, 550)),
    "cell_background.png": ("cell.png", (20, 330, 320, 630)),
    "microaneurysms.png": ("microaneurysms.png", None),
    "phantom.png": ("phantom.png", None),
}
# name: (file of pydicom/data/test_files, (centre, width) in the file's units or None for the values' own range)
SCANS = {
    "ct_spine_bone.png": ("CT_small.dcm", (300, 1500)),
    "ct_spine_soft.png": ("CT_small.dcm", (40, 350)),
    "ct_head_bone.png": ("693_J2KI.dcm", (500, 2000)),
    "ct_skull_base.png": ("J2K_pixelrep_mismatch.dcm", (500, 2500)),
    "mr_small.png": ("MR_small.dcm", None),
    "mr_abdomen.png": ("examples_overlay.dcm", None),
    "bone_scan.png": ("JPEG2000.dcm", None),
    "us_lymph_node.png": ("examples_rgb_color.dcm", None),
    "us_heart.png": ("examples_ybr_color.dcm", None),
}
NAMES = (*PHOTOGRAPHS, *SCANS)


def make_images(folder: Path) -> list[Path]:
    """Write all pictures into `folder`; returns their paths in the order of NAMES."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        picture = _photograph(*PHOTOGRAPHS[name]) if name in PHOTOGRAPHS else _scan(*SCANS[name])
        picture.save(folder / name, quality=92)
    return [folder / name for name in NAMES]


def _photograph(file: str, box: tuple | None) -> Image.Image:
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / file) as image:
        return image.convert("RGB").crop(box or (0, 0, *image.size))


def _scan(file: str, window: tuple | None) -> Image.Image:
    import pydicom
    from pydicom.pixels import apply_rescale

    with warnings.catch_warnings():
        # These files test a reader: some carry flaws on purpose.
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(Path(pydicom.__file__).parent / "data" / "test_files" / file)
        pixels = dataset.pixel_array
    if pixels.ndim == 4:
        pixels = pixels[0]
    if pixels.ndim == 3:
        return Image.fromarray(pixels)
    values = apply_rescale(pixels, dataset).astype(np.float64)
    low, high = _ends(values, window)
    return Image.fromarray(np.uint8(np.clip((values - low) / (high - low), 0, 1) * 255))


def _ends(values: np.ndarray, window: tuple | None) -> tuple[float, float]:
    """Values that become black and white; without a window the brightest 0.5 % saturate."""
    if window is None:
        return values.min(), np.percentile(values, 99.5)
    centre, width = window
    return centre - width / 2, centre + width / 2


if __name__ == "__main__":
    print(*make_images(Path(os.environ.get("OUTPUT", "images"))), sep="\n")
