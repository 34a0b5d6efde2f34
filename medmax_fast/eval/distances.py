"""How far two sets of pictures lie apart: FID and KID by torchmetrics, on a dual encoder's features or Inception's.

Features are computed once and then handed to both measures in float64. The features of a few hundred pictures do not
span their space, so FID is biased upwards and compares only with an FID of as many pictures; KID has no such bias.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from medmax_fast.eval.similarity import Encoder, Picture, read_pictures
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError

# KID: pictures per subset (as many as the published task has), and the seed that draws the subsets.
KID_SUBSET = 100
KID_SEED = 0


class Features:
    """From pictures to features, float32 [N, D] of those that can be read. kind: `clip` or `inception`."""

    def __init__(self, kind: str, compute: Callable[[Sequence[Picture]], np.ndarray]):
        self.kind, self._compute = kind, compute

    def __call__(self, pictures: Sequence[Picture]) -> np.ndarray:
        return self._compute(pictures)


def open_features(kind: str, encoder: Encoder | None, device) -> Features | None:
    """What FID and KID are measured on; None for `none`. InputError for what is not installed or cannot be fetched.

    kind: `clip`, the encoder's embeddings, normalised as `images` gives them (FID is then about 4 at most), or
    `inception`, the 2048 pooled features of the Inception v3 that published FIDs use, on a torch.device.
    """
    if kind == "none":
        return None
    _metrics()
    if kind == "inception":
        return Features(kind, functools.partial(_inception_features, _inception().to(device)))
    assert kind == "clip" and encoder, kind

    def embed(pictures: Sequence[Picture]) -> np.ndarray:
        rows, errors = encoder.images(pictures)
        return rows[[error is None for error in errors]]

    return Features(kind, embed)


def distances(real: Sequence[Picture], drawn: Sequence[Picture], features: Features) -> dict | None:
    """FID and KID between two sets of pictures, see `feature_distances`; None with fewer than 2 readable on a side."""
    found = feature_distances(features(real), features(drawn))
    return found and {"features": features.kind, **found}


def feature_distances(real_ND: np.ndarray, drawn_ND: np.ndarray) -> dict | None:
    """FID and KID by torchmetrics from features [N, D], in float64: fid, kid, kid_std, n_real, n_drawn.

    KID is the mean over 100 random subsets of min(100, N) a side, without repeats within a subset; where both sides
    have just that many the subsets are all the same and kid_std is 0. None with fewer than 2 rows on a side.
    """
    import torch

    fid_metric, kid_metric = _metrics()
    fewest = min(len(real_ND), len(drawn_ND))
    if fewest < 2:
        return None
    # To torchmetrics a "picture" is whatever its feature module takes: here the features, which pass through.
    through = torch.nn.Identity()
    through.num_features = real_ND.shape[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        metrics = fid_metric(feature=through), kid_metric(feature=through, subset_size=min(KID_SUBSET, fewest))
    for metric in metrics:
        metric.update(torch.from_numpy(np.asarray(real_ND, np.float64)), real=True)
        metric.update(torch.from_numpy(np.asarray(drawn_ND, np.float64)), real=False)
    # KID draws from the CPU's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(KID_SEED)
        fid, (kid, kid_std) = (metric.compute() for metric in metrics)
    scores = {"fid": fid.item(), "kid": kid.item(), "kid_std": kid_std.item()}
    return {**scores, "n_real": len(real_ND), "n_drawn": len(drawn_ND)}


def _metrics() -> tuple[type, type]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise InputError(f"FID needs torchmetrics ({error}): pip install 'medmax_fast[eval]'") from error
    return FrechetInceptionDistance, KernelInceptionDistance


def _inception():
    fid_metric = _metrics()[0]
    try:
        return fid_metric(feature=2048).inception
    except ImportError as error:
        what = f"FID on Inception features needs torch-fidelity ({error}): pip install torch-fidelity"
        raise InputError(what) from error
    except OSError as error:
        raise InputError(f"FID on Inception features: its weights cannot be fetched ({error})") from error


def _inception_features(network, pictures: Sequence[Picture]) -> np.ndarray:
    import torch

    from medmax_fast.model.arithmetic import repeatable

    device = next(network.parameters()).device
    rows = [np.zeros((0, 2048), np.float32)]
    # One at a time, for they differ in size; the network resizes them itself.
    for picture in progress(pictures, "Inception features"):
        for pixels in read_pictures([picture])[0]:
            with torch.inference_mode(), repeatable(device):
                images = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
                rows.append(network(images).float().cpu().numpy())
    return np.concatenate(rows)
