"""The page: what is on it, and the server behind it."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ... import shipped
from ...errors import DenseShortcutError
from ...extras import need
from ...surgery.plug import unplug
from ..command import dsnet
from ..explain.cam import METHODS, cam_maps, find_layer
from ..explain.networks import Network, probabilities, read_network, top, view
from ..explain.picture import overlay
from ..explain.shortcuts import read_shortcuts
from . import charts, sources

QUICK = tuple(name for name in METHODS if name not in ("scorecam", "ablationcam", "randomcam"))
ONE_AT_A_TIME = {"concurrency_id": "network", "concurrency_limit": 1}  # a map hooks into a network that all share
# Nothing on the page may ask any other server for anything.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
)

INTRODUCTION = """
# Dense Shortcuts
A ResNet adds each block's input to its output; a DSNet gives each block a weighted sum of **all** earlier feature maps
of its stage. Here you see what both look at, what the DSNet learned to look back at, and what it costs.
"""


def serve(runs: Path, port: int | None, *, browser: bool = False, wait: bool = True) -> tuple[Any, str]:
    """Serve the page on this machine alone, until interrupted where `wait`.

    Returns:
        the gradio app, whose `close` ends the server, and its address.

    Raises:
        DenseShortcutError: gradio or grad-cam is not installed, or the port is taken.
    """
    need("the page", "demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read as gradio is imported
    import gradio
    from starlette.middleware import Middleware

    page = build(gradio, runs)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=f"{sources.MAX_MEGABYTES}mb",
            enable_monitoring=False,
            ssr_mode=False,
            footer_links=[],
            css=charts.CSS,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": [Middleware(OwnOriginOnly)]},
        )
    except OSError as error:
        raise DenseShortcutError(f"port {port} is taken: choose another --port, or leave it out.") from error
    print(f"the page is at {address} (networks and runs from {runs}); Ctrl-C ends it.", flush=True)
    if wait:
        page.block_thread()
    return page, address


class OwnOriginOnly:
    """Middleware that has browsers load nothing from elsewhere."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, add)


def build(gradio: Any, runs: Path) -> Any:
    """The page as gradio's Blocks."""
    with gradio.Blocks(title="Dense Shortcuts", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Tab("Look"):
            look_tab(gradio, runs)
        with gradio.Tab("Shortcuts"):
            shortcuts_tab(gradio, runs)
        with gradio.Tab("Curves"):
            curves_tab(gradio, runs)
        with gradio.Tab("Speed"):
            speed_tab(gradio, runs)
    return page


def look_tab(gradio: Any, runs: Path) -> None:
    """An image and two networks: top-5 and a map each."""
    images = sources.samples()
    choices = [(choice.label, choice.name) for choice in sources.networks(runs)]
    begin = sources.first_pair(runs)
    with gradio.Row():
        with gradio.Column(min_width=280):
            image = gradio.Image(
                label=f"Image, up to {sources.MAX_MEGABYTES} MB",
                sources=["upload", "clipboard"],
                height=300,
                elem_classes="pixels",
            )
            # Gradio would open the file, but a broken one is ours to explain. A subclass would write a .pyi file here.
            image.preprocess = lambda payload: None if payload is None else payload.path
            sample = gradio.Dropdown([*images], value=None, label="Or pick a sample")
        with gradio.Column(min_width=280):
            first = gradio.Dropdown(choices, value=begin[0], label="First network")
            second = gradio.Dropdown(choices, value=begin[1], label="Second network")
            method = gradio.Dropdown(list(QUICK), value="gradcam", label="Method")
            button = gradio.Button("Compare", variant="primary")
    message = gradio.HTML()
    with gradio.Row():
        outputs: list[Any] = []
        for place in ("First", "Second"):
            with gradio.Column(min_width=280):
                outputs += [
                    gradio.Markdown(),
                    gradio.Image(label=f"{place} map", height=360, elem_classes="pixels", buttons=["download"]),
                    gradio.Label(label=f"{place} top-5", num_top_classes=5),
                ]
    sample.input(lambda name: images.get(name), sample, image, api_name=False)
    button.click(compare, [image, first, second, method], [message, *outputs], api_name="compare", **ONE_AT_A_TIME)


def compare(path: str | None, first: str, second: str, method: str) -> list[Any]:
    """An error or nothing, then for each network: its name, its map over the image, and its top-5."""
    try:
        image = sources.read_upload(path)
        found: list[Any] = []
        for name in (first, second):
            found += seen_by(network_of(name), image, method)
    except DenseShortcutError as error:
        return [charts.error(str(error)), *([None] * 6)]
    return ["", *found]


def seen_by(network: Network, image: Image.Image, method: str) -> list[Any]:
    """A heading, the map of the likeliest class over the picture, and the probabilities of the likeliest five."""
    seen = view(network, image)
    chances = probabilities(network, seen)
    cam = cam_maps(network.model, seen.tensor, [int(chances.argmax())], method)[0]
    likeliest = top(network, chances)
    layer, _ = find_layer(network.model)
    start = "" if network.trained else " **Not trained: this is a random start.**"
    told = f"**{short(network.label)}** looks at **{likeliest[0][0]}** ({layer}, {network.size} pixels).{start}"
    return [told, overlay(seen.picture, cam), dict(likeliest)]


def short(name: str) -> str:
    """A network of a run by run and network, another by its name."""
    return ": ".join(Path(name).parts[-2:])


@functools.lru_cache(maxsize=4)
def network_of(name: str) -> Network:
    """A network that stays in memory for the next image."""
    if name != sources.HOST_FORM:
        return read_network(name)
    dense = read_network(shipped.NAME)
    return dataclasses.replace(dense, label=name, model=unplug(dense.model))


def shortcuts_tab(gradio: Any, runs: Path) -> None:
    """The shortcut weights of a network."""
    hosts = (*sources.HOSTS, "identity", "densenet", sources.HOST_FORM)
    found = [choice for choice in sources.networks(runs) if Path(choice.name).name not in hosts]
    network = gradio.Dropdown([(c.label, c.name) for c in found], value=found[0].name, label="Network")
    button = gradio.Button("Show its shortcuts", variant="primary")
    gradio.Markdown(
        "Block *l* adds the normalised map *X_i* with one weight *w* for each channel. Point at a cell for its numbers."
    )
    maps = gradio.HTML()
    button.click(told(lambda name: charts.shortcut_maps(read_shortcuts(name))), network, maps, api_name="shortcuts")


def curves_tab(gradio: Any, runs: Path) -> None:
    """Accuracy and loss by epoch of two runs."""
    names = sources.curves(runs)
    if not names:
        gradio.Markdown(f"No run in `{runs}` yet: `{dsnet('compare', '--output', runs)}` makes one.")
        return
    with gradio.Row():
        first = gradio.Dropdown(names, value=names[0], label="First run")
        second = gradio.Dropdown([("none", ""), *names], value=names[1] if len(names) > 1 else "", label="Second run")
    button = gradio.Button("Show curves", variant="primary")
    figures = gradio.HTML()

    def show(*chosen: str) -> str:
        names = [name for name in dict.fromkeys(chosen) if name]
        histories = {
            f"{name}: {label}": rows for name in names for label, rows in sources.histories(runs / name).items() if rows
        }
        return charts.run_curves(histories)

    button.click(told(show), [first, second], figures, api_name="curves")


def speed_tab(gradio: Any, runs: Path) -> None:
    """The comparisons of a benchmark."""
    names = sources.benchmarks(runs)
    if not names:
        gradio.Markdown(f"No benchmark in `{runs}` yet: `{dsnet('bench', '--output', runs / 'bench')}` makes one.")
        return
    chosen = gradio.Dropdown(names, value=names[0], label="Benchmark")
    button = gradio.Button("Show figures", variant="primary")
    figures = gradio.HTML()
    button.click(
        told(lambda name: "".join(map(charts.benchmark, sources.comparisons(runs / name)))),
        chosen,
        figures,
        api_name="speed",
    )


def told(make: Callable[..., str]) -> Callable[..., str]:
    """The same function with errors of ours as a message on the page."""

    def shown(*chosen: str) -> str:
        try:
            return make(*chosen)
        except DenseShortcutError as error:
            return charts.error(str(error))

    return shown
