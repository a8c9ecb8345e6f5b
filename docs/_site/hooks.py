"""What the site does beyond its plugins: the notebook comes from examples/, and mathematics becomes MathML.

MathML is drawn by the browser, so that no page loads a script or a font from elsewhere.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOK, CACHE = ROOT / "examples" / "colab.ipynb", ROOT / ".cache"
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: Any) -> Files:
    """Adds the notebook; its cell that installs is shown and, where notebooks are executed, left out."""
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        if "install" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"].append("skip-execution")
    CACHE.mkdir(exist_ok=True)
    (CACHE / "notebook.ipynb").write_text(json.dumps(notebook))
    files.append(File("notebook.ipynb", str(CACHE), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, **kwargs: Any) -> str:
    """Formulas in the page's HTML as MathML."""
    return MATH.sub(mathml, html)


def mathml(found: re.Match[str]) -> str:
    """One formula."""
    return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")
