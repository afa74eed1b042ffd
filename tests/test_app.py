"""app.py: the page in a real browser, what its server gives away, several people at once."""

import importlib.util
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import build_small_model, copy_run, refused, save_image
from PIL import Image

import app
import model
from dreml import learned, search
from dreml.search import Searcher

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def site(_small_run, tiny_data, tmp_path_factory):
    """The page of `small_run` with a gallery of the tiny test photos, whose folder has a link out of it."""
    pytest.importorskip("lancedb", reason="LanceDB is an extra: pip install lancedb")
    import httpx

    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(tiny_data / "tiny" / "test", folder / "photos")
    save_image(folder / "secret.png", 77)
    (folder / "secret.txt").write_text("the secret")
    (folder / "photos" / "link.txt").symlink_to(folder / "secret.txt")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "build_model", build_small_model)
        patch.setattr(search, "FEWEST_ABOVE", 1)
        run = shutil.copytree(_small_run, folder / "tiny_run")  # it gets an index
        searcher = Searcher(run, gallery=folder / "photos", device="cpu", data_path=tiny_data)
        found = learned.Learned(searcher)
        page = app.open_page(found, "tiny", "127.0.0.1", port)
        client = httpx.Client(base_url=url, timeout=60)
        functions = {each["api_name"]: each["id"] for each in client.get("/config").json()["dependencies"]}
        page_parts = {"searcher": searcher, "learned": found, "folder": folder}
        yield SimpleNamespace(url=url, client=client, functions=functions, **page_parts)
        page.close(verbose=False)


def call_function(site, name: str, data: list, session: str = "somebody", event: dict | None = None) -> dict:
    """What the page does when somebody acts: asks for a function, and waits for its last message."""
    body = {"data": data, "fn_index": site.functions[name], "session_hash": session, "event_data": event}
    assert site.client.post("/gradio_api/queue/join", json=body).status_code == 200
    with site.client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def upload(site, file: Path):
    return site.client.post("/gradio_api/upload", files={"files": (file.name, file.read_bytes())})


def drop(site, photo: dict | Path) -> tuple[list[str], str]:
    """The captions and the sentence for a photo that is dropped, which is then the query. A file is uploaded first."""
    if isinstance(photo, Path):
        (path,) = upload(site, photo).json()
        photo = {"path": path, "orig_name": photo.name, "meta": {"_type": "gradio.FileData"}}
    session = f"session{np.random.default_rng().integers(10**9)}"
    call_function(site, "dropped", [photo], session)
    message = call_function(site, "search", [None, 4, 1], session)
    assert message["success"], message
    grid, text, _ = message["output"]["data"]
    return [each["caption"] for each in grid], text


@needs_gradio
def test_eight_people_at_once_get_their_own_answers(site, tmp_path):
    """Twice each; compared with the searcher, whose answers they are."""
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for number, file in enumerate(files):
        save_image(file, 100 + number)
    expected = [[each.similarity for each in site.searcher.find(file, top=4)] for file in files]
    with ThreadPoolExecutor(8) as people:
        answers = list(people.map(lambda file: drop(site, file), files * 2))
    for (captions, _), similarities in zip(answers, expected * 2, strict=True):
        assert [float(caption.split()[-2]) for caption in captions] == pytest.approx(similarities, abs=6e-4)


@needs_gradio
def test_bad_photos_are_answered_with_one_sentence(site, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (tmp_path / "words.png").write_text("no picture")
    for name in ("torn.jpg", "words.png"):
        captions, text = drop(site, tmp_path / name)
        assert captions == [] and "the photo: unreadable" in text and "\n" not in text and "/" not in text
    assert not call_function(site, "picked", [36])["success"]
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    assert upload(site, tmp_path / "large.png").status_code == 413


@needs_gradio
def test_no_other_file_is_served(site):
    """By its path in any spelling, as the query of a forged call, or as a neighbour that was never shown."""
    inside = site.folder / "photos"
    for secret in (site.folder / "secret.txt", inside / "link.txt", site.folder / "secret.png", Path("/etc/passwd")):
        content = secret.read_bytes()
        path = str(secret)
        ways = [path, path[1:], f"..{path}", f"../../../../../../../..{path}", f"{inside}/../{secret.name}"]
        ways += [path.replace("/", "%2F"), path.replace("/", "%252F"), f"%2e%2e{path}", f"file://{path}"]
        for way in [*ways, f"{path}%00.png"]:
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/"):
                answer = site.client.get(site.url + route + way)
                assert content not in answer.content, answer.url
    secret = str(site.folder / "secret.png")
    forged = [{"path": secret, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}]
    forged += [{"path": path} for path in (secret, str(site.folder), "/", "test:3")]  # without saying: it is a file
    forged += [{"path": None, "url": f"file://{secret}", "meta": {"_type": "gradio.FileData"}}]
    for photo in forged:
        assert drop(site, photo) == ([], app.NO_QUERY)
    event = {"index": 0, "value": None, "_data": {"index": 0, "value": None}}
    assert not call_function(site, "clicked", [[secret]], event=event)["success"]
    call_function(site, "search", [secret, 4, 1], "thief")
    assert call_function(site, "search", [secret, 4, 1], "thief")["output"]["data"][1] == app.NO_QUERY


@needs_gradio
def test_the_page_in_a_browser(site, tmp_path):
    """A photo is dropped, its neighbours shown; sliders; a neighbour becomes the query; the second tab; one host."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    elsewhere = []
    photo = tmp_path / "photo.png"
    save_image(photo, 5)

    def similarities(query: object, top: int) -> list[str]:
        return [f"{each.similarity:.3f}" for each in site.searcher.find(query, top=top)]

    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.on("request", lambda each: elsewhere.append(each.url))
        page.goto(site.url)

        def wait_for_grid(expected: list[str]) -> None:
            captions = page.locator("#grid .caption-label")
            for place, each in enumerate(expected):
                playwright.expect(captions.nth(place)).to_contain_text(each, timeout=30_000)
            playwright.expect(captions).to_have_count(len(expected))

        page.set_input_files("#photo input[type=file]", photo)
        wait_for_grid(similarities(photo, 12))
        for slider, value in (("top", "3"), ("far", "20")):
            page.fill(f"#{slider} input[type=number]", value)
            page.locator(f"#{slider} input[type=number]").blur()
            wait_for_grid(similarities(photo, 3))
        threshold = search.threshold_at(site.learned.queries, 0.2)
        playwright.expect(page.locator("#text")).to_contain_text(f"reach the threshold, {threshold:.3f}")
        neighbour = list(site.searcher.find(photo, top=3))[1]
        page.locator("#grid button.thumbnail-item").nth(1).click()
        wait_for_grid(similarities(neighbour.file if neighbour.row is None else neighbour.row, 3))
        playwright.expect(page.locator("#text")).to_contain_text(f"Class of the query: {neighbour.class_name}")
        page.fill("#row input", "7")
        page.press("#row input", "Enter")
        wait_for_grid(similarities(7, 3))

        page.get_by_role("tab", name="What the run has learned").click()
        number = min(len(site.learned.errors), learned.NUM_SHOWN)
        playwright.expect(page.locator("#errors .caption-label")).to_have_count(number, timeout=30_000)
        for made in ("#histograms img", "#recalls canvas, #recalls svg.marks"):
            page.locator(made).first.wait_for(timeout=30_000)
        plane = page.locator("#map img")
        plane.wait_for()
        box = plane.bounding_box()
        _, places = site.learned.map_points("PCA")
        x, y = (places[7] * box["width"] / learned.MAP_SIZE).tolist()
        plane.click(position={"x": x, "y": y})
        playwright.expect(page.locator("#point_text")).to_contain_text("test image 7:")
        if os.environ.get("SCREENSHOTS"):
            page.screenshot(path=os.environ["SCREENSHOTS"] + "/app_test.png", full_page=True)
        assert elsewhere and all(each.startswith((site.url, "data:", "blob:")) for each in elsewhere)
        with page.expect_event("requestfailed") as refusal:
            page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://localhost:1/image.png'}))")
        assert refusal.value.failure == "csp"
        browser.close()


def test_a_neighbour_below_the_threshold_is_grey():
    image = Image.new("RGB", (180, 180), "red")
    assert app.framed(image, "green").getpixel((90, 90)) == (255, 0, 0)
    red, green, blue = app.framed(image, None).getpixel((90, 90))
    assert red == green == blue > 128


@needs_gradio
def test_what_is_refused(small_run, tmp_path, monkeypatch, capsys):
    assert "is not a run folder" in refused(capsys, app, tmp_path)
    assert "--port 0 has to be at least 1" in refused(capsys, app, small_run, "--port", "0")
    run, photos = copy_run(small_run, tmp_path / "run"), tmp_path / "photos"
    save_image(photos / "a.png")
    (run / "test.csv").write_text((run / "test.csv").read_text().splitlines()[0] + "\n")
    options = ["--gallery", photos, "--device", "cpu"]
    assert f"{run}: its data set has no test images" in refused(capsys, app, run, *options)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(capsys, app, small_run) == "app.py: the page needs: pip install gradio\n"


@needs_gradio
def test_a_port_that_is_taken_is_named(site, small_run, tiny_data, capsys):
    port = site.url.rpartition(":")[2]
    line = refused(capsys, app, small_run, "--port", port, "--device", "cpu", "--data_path", tiny_data)
    assert f"cannot listen on 127.0.0.1:{port}" in line and "--port takes another port" in line
