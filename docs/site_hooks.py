"""Hooks of mkdocs: a navigation of the pages that are there, the notebook as a page, and links that leave docs/."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
NOTEBOOK = "ten-minutes.ipynb"

# Pages in order; one that is not there is left out, and one that is not named here comes under "More".
SECTIONS: dict[str, list[tuple[str, str]]] = {
    "Start": [("In five minutes", "index.md"), ("In ten minutes", "ten-minutes.md")],
    "Use": [
        ("Choose", "choose.md"),
        ("Plug into your network", "plug-in.md"),
        ("What is understood", "support.md"),
        ("Data", "data.md"),
        ("Train", "train.md"),
        ("Tune", "sweeps.md"),
        ("Scale", "scaling.md"),
        ("Detect", "detect.md"),
        ("Explain", "explain.md"),
        ("The page", "demo.md"),
        ("Deploy", "deploy.md"),
    ],
    "Understand": [
        ("From the paper to the code", "paper-map.md"),
        ("The unified view", "summation.md"),
        ("How it is fast", "speed.md"),
        ("What public code does", "what-public-code-does.md"),
    ],
    "Results": [
        ("Results", "results.md"),
        ("Ablations", "ablations.md"),
        ("Benchmarks", "benchmarks/RESULTS.md"),
        ("How benchmarks are made", "benchmarks/README.md"),
    ],
    "API": [
        ("Plugging in", "api/plug.md"),
        ("The operator", "api/operator.md"),
        ("A backbone", "api/backbone.md"),
        ("Training", "api/train.md"),
        ("Deploying", "api/deploy.md"),
        ("The unified view", "api/summation.md"),
    ],
}


def on_files(files: Files, config: Any) -> Files:
    """Add what stands outside docs/ or is no Markdown, then set the navigation."""
    for path in sorted((ROOT / "benchmarks").glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{path.name}", content=path.read_text(encoding="utf-8")))
    notebook = Path(config.docs_dir) / NOTEBOOK
    if notebook.is_file():
        page = as_markdown(json.loads(notebook.read_text(encoding="utf-8")))
        files.append(File.generated(config, "ten-minutes.md", content=page))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def navigation(pages: list[str]) -> list[Any]:
    """mkdocs' nav of the pages that are there."""
    named = {path for section in SECTIONS.values() for _, path in section}
    nav: list[Any] = []
    for section, entries in SECTIONS.items():
        there = [{title: path} for title, path in entries if path in pages]
        if there:
            nav.append({section: there})
    more = sorted(path for path in pages if path not in named)
    return [*nav, {"More": more}] if more else nav


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Point links at the site's own pages; of a link to a file that is no page the text stays."""

    def resolved(match: re.Match[str]) -> str:
        text, target = match.groups()
        target = target.replace(NOTEBOOK, "ten-minutes.md").replace("../benchmarks/", "benchmarks/")
        path = target.split("#")[0]
        if "://" in target or not path or (Path(page.file.src_uri).parent / path).as_posix() in files.src_uris:
            return f"[{text}]({target})"
        inside = not path.startswith("..")
        return match.group() if inside else text  # a page that is missing is an error, a source file is not

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", resolved, markdown)


def on_post_page(output: str, page: Page, config: Any) -> str:
    """Refuse a page that would load anything from another server: the site is complete without a network."""
    foreign = re.findall(
        r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'> ]+|"""
        r"""<link\b[^>]*\brel=["']?(?:stylesheet|preconnect)[^>]*\bhref=["']?(?:https?:)?//[^"'> ]+""",
        output,
    )
    if foreign:
        raise PluginError(f"{page.file.src_uri} loads from another server: {foreign[0]}")
    return output


def as_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook as Markdown."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        cells.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain") or []
            cells.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(cells) + "\n"
