"""Write LICENSES-THIRD-PARTY.md: what is depended on, under which licence, from the metadata of what is installed.

    python tools/third_party_licenses.py > LICENSES-THIRD-PARTY.md

Every package of pyproject.toml but those for development alone; each has to be installed.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Its headers become part of the extension, so its notice has to come with the wheel.
COMPILED_IN = "pybind11"
# Longer texts (Apache's, and those that list what a wheel bundles) stay where the package has them.
MOST_BYTES = 4096
SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "Python Software Foundation License": "LicenseRef-matplotlib (PSF-based)",
}
HEADER = """# Licences of what medmax_fast depends on

medmax_fast ships none of these packages: pip installs each from its own distribution, whose licence files hold. The
exception is pybind11, whose headers are compiled into the extension. What these packages depend on themselves is not
listed. Written by tools/third_party_licenses.py from the metadata of the packages themselves.
"""


def packages() -> dict[str, str]:
    """Name of each package -> what it is needed for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    found = {COMPILED_IN: "the extension, compiled in"}
    for extra, requirements in groups.items():
        for requirement in () if extra == "dev" else requirements:
            name = re.match(r"[\w.-]+", requirement)[0]
            found.setdefault(name, f"extra `{extra}`" if extra else "everything")
    return found


def texts(package: metadata.Distribution) -> list[Path]:
    """The licence files of a distribution, not those of what it bundles."""
    named = re.compile(r"[^/]+\.dist-info/(licenses/)?(LICEN[CS]E|COPYING)[^/]*", re.IGNORECASE)
    return [Path(str(package.locate_file(file))) for file in package.files or () if named.fullmatch(str(file))]


def licence(package: metadata.Distribution) -> str:
    """An SPDX identifier as far as the package lets one tell, else its own words."""
    facts = package.metadata
    classes = [line.rpartition(" :: ")[2] for line in facts.get_all("Classifier", []) if line.startswith("License ::")]
    for stated in (facts.get("License-Expression"), facts.get("License"), *classes):
        # Some have the whole text in the field, and the classifier of BSD does not say which.
        if stated and len(stated) < 100 and "\n" not in stated and stated not in ("BSD License", "Apache"):
            return SPDX.get(stated, stated)
    text = " ".join(path.read_text(errors="replace") for path in texts(package))
    if "Redistribution and use in source and binary forms" in text:
        return "BSD-3-Clause" if re.search(r"neither\s+the\s+names?", text, re.IGNORECASE) else "BSD-2-Clause"
    raise SystemExit(f"{facts['Name']} {package.version}: no licence in its metadata")


def main() -> None:
    rows, appended = [], []
    for name, purpose in packages().items():
        package = metadata.distribution(name)
        short = [path for path in texts(package) if path.stat().st_size <= MOST_BYTES]
        where = "below" if short else "in its dist-info" if texts(package) else "not in its wheel"
        rows.append(f"| {name} | {purpose} | {licence(package)} | {where} |")
        for path in short:
            lines = "\n".join(f"    {line}".rstrip() for line in path.read_text().strip().splitlines())
            appended.append(f"## {name}: {path.name}\n\n{lines}")
    table = ["| package | needed for | licence | text |", "| --- | --- | --- | --- |", *rows]
    sys.stdout.write("\n\n".join([HEADER.strip(), "\n".join(table), *appended]) + "\n")


if __name__ == "__main__":
    main()
