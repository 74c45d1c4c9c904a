"""What the documentation is given while it is built: equations as MathML, and the list of all public names.

Equations are written in the way that GitHub shows, too: a block fenced as `math`, or $`W`$ within a line. Browsers
show MathML by themselves: no script and no font is fetched.
"""

import html
import importlib
import inspect
import re
from typing import Any

BLOCK = re.compile(r'<pre class="math"><code>(.*?)</code></pre>', re.DOTALL)
INLINE = re.compile(r"\$<code>(.*?)</code>\$")
NAMES = "<!-- all public names -->"


def equation(tex: str, display: str) -> str:
    """One equation as MathML. A command that is not known would be shown as it was written: that is an error."""
    from latex2mathml.converter import convert

    found = convert(tex, display=display)
    if left := re.findall(r"\\\w*|&(?!#)", found):
        raise ValueError(f"latex2mathml does not know {left} in {tex!r}")
    return found


def mathml(page: str) -> str:
    """The HTML of a page with its equations as MathML."""

    def block(found: re.Match[str]) -> str:
        return f'<div class="math">{equation(html.unescape(found[1]), "block")}</div>'

    return INLINE.sub(lambda found: equation(html.unescape(found[1]), "inline"), BLOCK.sub(block, page))


def summary(module: str, name: str) -> str:
    """The first sentence of what is written about a name, as a cell of a table."""
    thing = getattr(importlib.import_module(module), name)
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Z])", paragraph)[0].replace("``", "`").replace("|", "\\|")


def all_names() -> str:
    """A table for every module that names are imported from: a link to the reference, and one line."""
    tables, shown = [], {"__version__", "testing"}
    for module in ("dualview", "dualview.models", "dualview.train", "dualview.testing"):
        names = sorted(set(importlib.import_module(module).__all__) - shown, key=str.lower)
        shown.update(names)
        rows = [f"| [`{name}`][{module}.{name}] | {summary(module, name)} |" for name in names]
        tables.append("\n".join([f"## {module}\n", "| name | what it is |", "| --- | --- |", *rows]))
    return "\n\n".join(tables)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs with every page before it becomes HTML."""
    return markdown.replace(NAMES, all_names()) if NAMES in markdown else markdown


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by mkdocs with every page after it has become HTML."""
    return mathml(html)
