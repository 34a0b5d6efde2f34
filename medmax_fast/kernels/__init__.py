"""The Triton kernels, one module per operation.

Their sources lie in `kernels/` at the root of a checkout and are installed into this package. In a checkout the
root folder is added to the package path, so that `medmax_fast.kernels.vq` is the same module either way.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parents[1] / "kernels"

# Installed, the files lie beside this one, and `kernels` in site-packages may be somebody else's package: that has
# an __init__.py, ours has none.
if not (_HERE / "vq.py").exists() and (_SOURCES / "vq.py").exists() and not (_SOURCES / "__init__.py").exists():
    __path__.append(str(_SOURCES))
