"""Draws docs/data-flow.svg: what every command reads and writes, from the table of commands and their configurations.

    python docs/data_flow.py

FLOW says which artefact a flag names; that every command of the command line and every flag exists, and that no flag
that names a checkpoint or an output is left out, is checked before anything is drawn. Layout: each artefact and command
has the row of its longest way from the beginning, the order within a row follows the neighbours' mean, and lines that
pass rows have a place of their own in each. The same table gives the same bytes.
"""

from dataclasses import fields
from html import escape
from pathlib import Path

from medmax_fast.cli import COMMANDS

PICTURE = Path(__file__).resolve().parent / "data-flow.svg"
BASE, TUNED = "base checkpoint", "checkpoint"
# command -> flags that name what it reads, flags that name what it writes. A command that only reads BASE gets a mark.
FLOW = {
    "init": ({}, {"dir": BASE}),
    "tokenize": ({"input": "images", "ckpt": BASE}, {"output": "codes"}),
    "decode": ({"input": "codes", "ckpt": BASE}, {"output": "PNG files"}),
    "build": ({"input": "rows of text", "codes": "codes", "ckpt": BASE}, {"output": "token store"}),
    "inspect": ({"path": "token store"}, {"output": "histogram"}),
    "train": ({"data": "token store", "ckpt": BASE}, {"output": "run"}),
    "score": ({"input": "token store", "ckpt": BASE}, {"output": "cross-entropy"}),
    "merge": ({"adapter": "run", "ckpt": BASE}, {"output": TUNED}),
    "convert": ({"input": TUNED}, {"output": "other layout"}),
    "generate": ({"prompts": "prompts", "ckpt": TUNED}, {"output": "answers"}),
    "eval": ({"data": "questions", "ckpt": TUNED}, {"output": "scores"}),
    "serve": ({"ckpt": TUNED}, {"port": "HTTP"}),
    "demo": ({"ckpt": TUNED}, {"port": "web page"}),
    "bench": ({}, {"output": "benchmark"}),
    "report": (
        {"runs": ("token store", "run", "answers", "scores", "benchmark")},
        {"output": "report"},
    ),
}
# What reads and writes no file.
APART = {"doctor"}
STEP_X, STEP_Y, HALF_W, HALF_H, MARGIN = 112, 62, 50, 15, 12


def check() -> None:
    """AssertionError where FLOW is not what the command line has."""
    assert set(FLOW) | APART == set(COMMANDS), set(FLOW) ^ set(COMMANDS)
    for command, (read, written) in FLOW.items():
        flags = {field.name for field in fields(COMMANDS[command][0])}
        assert flags >= {*read, *written}, (command, flags)
        assert flags & {"ckpt", "output"} <= {*read, *written}, f"{command}: {flags & {'ckpt', 'output'}} not drawn"


def edges() -> list[tuple[str, str]]:
    """From artefact to command and from command to artefact; commands as `medmax NAME`."""
    found = []
    for command, (read, written) in FLOW.items():
        name = f"medmax {command}"
        for artefact in read.values():
            found += [(one, name) for one in ((artefact,) if isinstance(artefact, str) else artefact) if one != BASE]
        found += [(name, artefact) for artefact in written.values()]
    return found


def rows_of(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """Row of every node: one below the lowest that leads to it; what nothing leads to stands above its first user."""
    nodes = list(dict.fromkeys(node for pair in pairs for node in pair))
    row = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for above, below in pairs:
            row[below] = max(row[below], row[above] + 1)
    led_to = {below for _, below in pairs}
    for _ in range(2):
        for node in nodes:
            after = [row[below] for above, below in pairs if above == node]
            before = [above for above, below in pairs if below == node]
            if after and (node not in led_to or before == ["medmax bench"]):
                row[node] = min(after) - 1
    return row


def with_bends(pairs: list[tuple[str, str]], row: dict) -> tuple[dict, list[list]]:
    """Rows with a place in every row that a line passes, and the lines as lists of places."""
    row, lines = dict(row), []
    for above, below in pairs:
        bends = [(above, below, at) for at in range(row[above] + 1, row[below])]
        row |= {bend: bend[2] for bend in bends}
        lines.append([above, *bends, below])
    return row, lines


def columns(row: dict, lines: list[list]) -> dict:
    """x of every place: sweeps towards the mean of the neighbours, then apart until nothing overlaps."""
    beside: dict = {node: [] for node in row}
    for line in lines:
        for a, b in zip(line, line[1:], strict=False):
            beside[a].append(b)
            beside[b].append(a)
    levels = [[node for node in row if row[node] == at] for at in range(max(row.values()) + 1)]
    x = {node: float(i * STEP_X) for level in levels for i, node in enumerate(level)}
    for sweep in range(60):
        down = sweep % 2 == 0
        for level in levels if down else levels[::-1]:
            if sweep < 40:
                one_side = {n: [b for b in beside[n] if (row[b] < row[n]) == down] or beside[n] for n in level}
                level.sort(key=lambda node: sum(x[b] for b in one_side[node]) / len(one_side[node]))
            wish = {node: sum(x[b] for b in beside[node]) / len(beside[node]) for node in level}
            placed = []
            for node in level:
                gap = STEP_X if isinstance(node, str) else 0.6 * STEP_X
                placed.append(max(wish[node], placed[-1] + gap) if placed else wish[node])
            shift = sum(placed[i] - wish[node] for i, node in enumerate(level)) / len(level)
            x |= {node: at - shift for node, at in zip(level, placed, strict=True)}
    left = min(x.values())
    return {node: round(at - left + HALF_W + MARGIN) for node, at in x.items()}


def box(name: str, x: int, y: int) -> str:
    """A command dark and square, an artefact light and round; a mark where the base checkpoint is read."""
    command = name.removeprefix("medmax ") if name.startswith("medmax ") else ""
    style = 'fill="#2b2b2b" stroke="#2b2b2b"' if command else 'fill="#ffffff" stroke="#2b2b2b" rx="13"'
    parts = [f'<rect x="{x - HALF_W}" y="{y - HALF_H}" width="{2 * HALF_W}" height="{2 * HALF_H}" {style}/>']
    mark = " *" if command and BASE in FLOW[command][0].values() else ""
    fill = "#ffffff" if command else "#111111"
    parts.append(f'<text x="{x}" y="{y + 5}" fill="{fill}">{escape((command or name) + mark)}</text>')
    return "".join(parts)


def path(points: list[tuple[int, int]]) -> str:
    """A line that passes the rows at its bends straight down, with a head at its end."""
    (x, y), *rest = points
    d = f"M{x} {y}"
    for to_x, to_y in rest:
        middle = (y + to_y) // 2
        d += f"C{x} {middle} {to_x} {middle} {to_x} {to_y}"
        x, y = to_x, to_y
        if (x, y) != points[-1]:
            y += 2 * HALF_H
            d += f"V{y}"
    return f'<path d="{d}" marker-end="url(#head)"/>'


def draw() -> str:
    """The picture as SVG."""
    check()
    pairs = edges()
    row, lines = with_bends(pairs, rows_of(pairs))
    x = columns(row, lines)
    y = {node: at * STEP_Y + HALF_H + MARGIN for node, at in row.items()}
    width, height = max(x.values()) + HALF_W + MARGIN, max(y.values()) + HALF_H + MARGIN + 24
    drawn = []
    for line in lines:
        (first, *bends, last) = line
        start, end = (x[first], y[first] + HALF_H), (x[last], y[last] - HALF_H - 2)
        drawn.append(path([start, *((x[bend], y[bend] - HALF_H) for bend in bends), end]))
    boxes = [box(node, x[node], y[node]) for node in row if isinstance(node, str)]
    note = f'<text x="{MARGIN}" y="{height - 10}" style="text-anchor:start">* reads the {BASE} too</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" role="img" '
        'aria-label="What every command reads and writes">\n'
        "<style>text{text-anchor:middle}path{fill:none;stroke:#666;stroke-width:1.3}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" style="fill:#666;stroke:none"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join([*drawn, *boxes, note]) + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="ascii")
    print(PICTURE)
