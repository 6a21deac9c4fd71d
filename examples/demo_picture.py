"""Three pictures of the demo's page side by side, as one small SVG.

ntkit demo --out report
python examples/demo_picture.py report/index.html docs/pictures
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SHOWN = {
    "Bars: relative error of each reduced kernel": "What a cheaper kernel loses",
    "Relative error of the pNTK against width": "The pNTK gets better with width",
    "Test score of the network and of kernel regressions": "What each kernel predicts",
}
WIDTH, HEIGHT, TITLE = 340, 260, 28
# The pictures take the colour of their page: here that is dark on white, wherever they are shown.
HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'viewBox="0 0 {WIDTH * len(SHOWN)} {HEIGHT + TITLE}" font-family="sans-serif" color="#1f2328" role="img" '
    'aria-label="Three pictures of the demo">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
)


def main(page: str, folder: str) -> None:
    text = Path(page).read_text(encoding="utf-8")
    parts = []
    for number, (label, title) in enumerate(SHOWN.items()):
        found = re.search(rf'<svg[^>]*aria-label="{re.escape(label)}".*?</svg>', text, re.DOTALL)
        if found is None:
            raise SystemExit(f"{page} has no picture {label!r}")
        place = f'<svg x="{number * WIDTH + 8}" y="{TITLE}" width="{WIDTH - 16}" height="{HEIGHT - 8}"'
        # Names within a picture are its own: a number keeps those of the three apart.
        picture = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{number}", found[0].replace("<svg", place, 1))
        head = f'<text x="{(number + 0.5) * WIDTH}" y="20" text-anchor="middle" font-size="14" fill="currentColor">'
        parts.append(f"{head}{title}</text>\n{picture}")
    Path(folder, "demo.svg").write_text(HEAD + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
