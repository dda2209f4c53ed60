"""The look of all pages: light and dark, as wide as a laptop or a phone."""

import html
from collections.abc import Sequence
from string import Template

STYLE = """:root { color-scheme: light dark; --line: #8886; --right: #2da44e; --wrong: #d1572a; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.note { opacity: .75; font-size: .85rem; margin: .3rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
.plot { width: 34rem; max-width: 100%; border-radius: .3rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }
article { border: 1px solid var(--line); border-left-width: .3rem; border-radius: .3rem; padding: .5rem .7rem; }
article.right { border-left-color: var(--right); } article.wrong { border-left-color: var(--wrong); }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
.prompt img { height: 2.6rem; max-width: 6rem; vertical-align: middle; margin: .1rem .3rem .1rem 0; }
.query img { height: 6rem; max-width: 12rem; } .query { border-top: 1px dashed var(--line); padding-top: .3rem; }
ul { margin: .4rem 0; padding-left: 1.1rem; font-size: .85rem; } li { overflow-wrap: anywhere; }
details { margin: 2rem 0; } summary { cursor: pointer; font-weight: bold; }
li.right b { color: var(--right); } li.wrong b { color: var(--wrong); }"""


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style
</style></head><body>
<h1>$title</h1>
<p class="note">$description</p>
$body
</body></html>
""")


def document(body: str, *, title: str, description: str) -> str:
    """A page of its own: HTML of `body` below its title and a line of plain text about it."""
    return _PAGE.substitute(style=STYLE, title=html.escape(title), description=html.escape(description), body=body)


def table(rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table whose first row is its head; a wide one scrolls by itself."""
    body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows[1:]]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in body)}</table></div>'
