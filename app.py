"""A web page for a trained run: search by photo, and see what the run has learned.

    python app.py RUN --gallery photos/     search a folder of photos
    python app.py RUN                       search the run's test images

The page is at http://127.0.0.1:7860, for this machine only. It sends nothing to
other hosts. Needs: pip install gradio
"""

import argparse
import functools
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageOps

from dreml.cli import InputError, Parser, check_ranges, require, run_main
from dreml.confusions import class_table
from dreml.figures import FRAMES, MARKS
from dreml.learned import MAP_METHODS, Learned
from dreml.search import Query, add_search_options, searcher_of, threshold_at

NO_QUERY = "Drop a photo, or pick a test image."
STYLE = """
.caption-label { white-space: normal !important; max-width: 100% !important; }
#grid .thumbnail-lg { aspect-ratio: 19 / 23; }
"""
# Browsers ask no other host.
POLICY = """<meta http-equiv="Content-Security-Policy"
content="default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:">"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="app.py", description=__doc__)
    add_search_options(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    args = parser.parse_args(argv)
    check_ranges(args, port=(1, 65535))
    return args


def framed(image: Image.Image, color: str | None) -> Image.Image:
    """A thumbnail with a frame of this colour. None: grey, and the image with little contrast."""
    if color is None:
        image = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.6)
    image = ImageOps.expand(image, 5, color or "lightgrey")
    return ImageOps.expand(image, (0, 0, 0, 40), "white")  # where the caption will be


def find(learned: Learned, query: Query | None, top: int, far: float) -> tuple[list, str, list]:
    """The neighbours' pictures with captions, a sentence, and the neighbours. `far`: false-accept rate in percent."""
    if query is None:
        return [], NO_QUERY, []
    threshold = threshold_at(learned.queries, far / 100)
    try:
        answer = learned.searcher.find(query, top=top, threshold=threshold)
    except InputError as error:
        return [], str(error).replace(str(query), "the photo"), []
    pictures = []
    for neighbour in answer:
        mark = MARKS[neighbour.right] if neighbour.found else "not found:"
        caption = f"{mark} {neighbour.similarity:.3f} {neighbour.class_name or neighbour.file.name}"
        color = FRAMES[neighbour.right]["edgecolor"] if neighbour.found else None
        pictures.append((framed(learned.photo(neighbour), color), caption))
    text = f"The run has too few test images for a threshold at {far:g} %."
    if threshold is not None:
        num_found = sum(neighbour.found for neighbour in answer)
        text = f"{num_found} of {len(pictures)} reach the threshold, {threshold:.3f}."
    if answer.query.class_name:
        text = f"Class of the query: {answer.query.class_name}. {text}"
    return pictures, text, answer.neighbours


def open_page(learned: Learned, title: str, host: str, port: int):
    """Start to serve the page, a `gradio.Blocks`: only Gradio's own files, and the pictures that it was given."""
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"### {title}")
        with gr.Tab("Search"):
            fill_search_tab(learned)
        with gr.Tab("What the run has learned"):
            fill_learned_tab(learned)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size="20mb",
            footer_links=[],
            css=STYLE,
            run_history=False,
            theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
            head=POLICY,
            app_kwargs={"openapi_url": None},
        )
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}); --port takes another port") from None
    return page


def fill_search_tab(learned: Learned) -> None:
    """A photo or a test image, two sliders, and the neighbours."""
    import gradio as gr

    last = len(learned.run.test) - 1
    query = gr.State()
    neighbours = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=260, elem_id="photo")
            row_label = f"or the number of a test image, 0 to {last}"
            row = gr.Number(label=row_label, minimum=0, maximum=last, precision=0, elem_id="row")
            top = gr.Slider(1, 48, value=12, step=1, label="neighbours", elem_id="top")
            far_label = "false-accept rate (%): below its threshold, neighbours are not found"
            far = gr.Slider(0.1, 20, value=10, step=0.1, label=far_label, elem_id="far")
        with gr.Column(scale=3):
            text = gr.Markdown(NO_QUERY, elem_id="text")
            grid = gr.Gallery(
                format="jpeg", show_label=False, columns=6, allow_preview=False, elem_id="grid", buttons=[]
            )

    def dropped(path: str | None):
        # Gradio itself looks only at what calls itself a file: a request may name any path.
        if path and os.path.isfile(path) and Path(path).resolve().is_relative_to(Path(photo.GRADIO_CACHE).resolve()):
            return Path(path)
        return None

    def picked(number: int | None):
        return None if number is None else learned.photo(number), number

    def clicked(neighbours: list, event: gr.SelectData):
        neighbour = neighbours[event.index]
        return learned.photo(neighbour), neighbour.file

    photo.preprocess = lambda payload: payload and payload.path  # Gradio would open the photo, and refuse some
    photo.input(dropped, photo, query)
    row.submit(picked, row, [photo, query])
    grid.select(clicked, neighbours, [photo, query])
    changes = [query.change, top.release, far.release]
    gr.on(changes, functools.partial(find, learned), [query, top, far], [grid, text, neighbours], api_name="search")


def fill_learned_tab(learned: Learned) -> None:
    """Figures, pairs of photos, the map and tables."""
    import gradio as gr

    pictures = functools.partial(gr.Gallery, columns=4, height=320, interactive=False, object_fit="contain", buttons=[])
    with gr.Row():
        gr.Plot(learned.histograms(), show_label=False, elem_id="histograms")
        gr.LinePlot(learned.recalls(), "ensemble_size", "recall (%)", color="K", title="Recall@K", elem_id="recalls")
    label = "The most confident errors: a query and its first neighbour, of another class"
    pictures(learned.pairs(learned.errors), label=label, elem_id="errors")
    label = "Classes that are most often taken for another one: two photos of both"
    pictures(learned.confusions(), label=label, elem_id="confusions")
    label = "Test images that look the same and have two class names (none if empty)"
    pictures(learned.copies(), label=label, elem_id="copies")
    method = gr.Radio(MAP_METHODS, value="PCA", label="Map of the test images: a click shows the photo")
    with gr.Row():
        plane = gr.Image(learned.map("PCA"), show_label=False, interactive=False, buttons=[], elem_id="map")
        with gr.Column():
            point = gr.Image(show_label=False, height=300, buttons=[], elem_id="point")
            caption = gr.Markdown(elem_id="point_text")
    with gr.Row():
        classes = class_table(learned.queries).round(2)
        gr.Dataframe(classes, label="R@1 of each class in percent, worst first", max_height=400)
        settings = [[name, str(value)] for name, value in asdict(learned.run.settings).items()]
        gr.Dataframe(settings, headers=["setting", "value"], label="Settings", max_height=400)

    def on_map(method: str, event: gr.SelectData):
        return learned.at(method, *event.index)

    method.change(learned.map, method, plane)
    plane.select(on_map, method, [point, caption])


def run(args: argparse.Namespace) -> None:
    require("the page", "gradio")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # 1. The run, its embedding of the test images, and the gallery
    searcher = searcher_of(args)
    if not len(searcher.run.test):
        raise InputError(f"{args.folder}: its data set has no test images")
    print(f"images to search: {len(searcher.searched.vectors):,}")  # new photos are embedded now, not at a question
    searcher.ensemble.eval()  # and the network is loaded
    learned = Learned(searcher)

    # 2. The page, until Ctrl-C
    title = f"{learned.run.name}: L = {learned.run.num_members}, {args.embedding}, {args.gallery or 'test images'}"
    page = open_page(learned, title, args.host, args.port)
    print(f"the page is at http://{args.host}:{args.port}; Ctrl-C ends it")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    return run_main("app.py", lambda: run(parse_args(argv)), "fewer --num_members", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
