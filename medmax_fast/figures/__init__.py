"""One function per figure; each takes plain data and a path, writes a PNG there and returns the path.

    loss_curve           training and validation loss over steps          train, report
    packing              how full packs are, beside padded batches        inspect, report
    token_histogram      rows of a store by their number of ids           inspect, report
    code_usage           image codes by how often they occur              inspect, report
    reconstruction_grid  pictures beside what their codes decode to       decode, report
    evaluation_bars, accuracy_dots, similarity_dots, relative_dots        report
    roofline             performance beside what the machine can do       bench, report

Commands, reports and notebooks draw through these alone, so that a figure looks the same wherever it stands. Each can
be read in greyscale and by the colour-blind (drawing.py); files are written atomically.
"""

from medmax_fast.figures.data import code_usage, packing, token_histogram
from medmax_fast.figures.evaluation import accuracy_dots, evaluation_bars, relative_dots, similarity_dots
from medmax_fast.figures.pictures import reconstruction_grid
from medmax_fast.figures.speed import roofline
from medmax_fast.figures.training import loss_curve

__all__ = [
    "accuracy_dots",
    "code_usage",
    "evaluation_bars",
    "loss_curve",
    "packing",
    "reconstruction_grid",
    "relative_dots",
    "roofline",
    "similarity_dots",
    "token_histogram",
]
