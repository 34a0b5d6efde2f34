"""Whether installed libraries can be imported: `python -m medmax_fast.doctor.imports NAME...`, a line of JSON each.

In a process of its own, since a library built for another torch may end the process that imports it.
"""

import importlib
import json
import sys

from medmax_fast.doctor.child import answers


def main() -> None:
    """Import each module that is named, in order; {"module", "error"}, the error empty if it works."""
    out = answers()
    for name in sys.argv[1:]:
        error = ""
        try:
            importlib.import_module(name)
        # What a library made for another torch, or another CUDA, raises.
        except (AttributeError, ImportError, OSError, RuntimeError) as problem:
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        print(json.dumps({"module": name, "error": error}), file=out)


if __name__ == "__main__":
    main()
