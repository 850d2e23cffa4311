"""The page of `examples/space`: what it shows is what the model does, in Python and in a real browser."""

import importlib.util
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from blt_hf import BltTokenizer
from helpers.models import make_model, tiny_config


SPACE = Path(__file__).parents[1] / "examples" / "space"
PRETRAINED = Path(__file__).parents[1] / "pretrained" / "blt-5m"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("space") / "blt"
    make_model().save_pretrained(path)
    BltTokenizer().save_pretrained(path)
    return str(path)


def test_metadata_of_the_space():
    content = (SPACE / "README.md").read_text()
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.S)[1])
    assert data["sdk"] == "gradio" and (SPACE / data["app_file"]).is_file()
    assert {"title", "emoji", "license", "python_version", "sdk_version"} <= set(data)
    assert len(data["short_description"]) <= 60  # the Hub refuses longer ones
    requirements = (SPACE / "requirements.txt").read_text()
    assert "blt-hf" in requirements and "gradio" in requirements


def test_bundled_model_is_found(app, monkeypatch):
    monkeypatch.delenv("BLT_HF_MODEL", raising=False)
    assert app.default_model() == str(PRETRAINED)
    monkeypatch.setenv("BLT_HF_MODEL", "me/blt")
    assert app.default_model() == "me/blt"


def test_pictures_are_those_of_the_model(app, folder):
    model, _ = app.load(folder)
    shown = app.show_patches(folder, "naïve", None)
    assert model.get_patches("naïve").summary in shown
    assert model.get_patches("naïve").recut(threshold=1.0).summary in app.show_patches(folder, "naïve", 1.0)
    first, second, told = app.compare(folder, "naïve", 0.0, 9.0)
    assert "threshold 0.000" in first and "threshold 9.000" in second
    assert "**6** patches" in told and "**1**" in told
    assert "2000 bytes" in app.show_patches(folder, "a" * 3000, None)


def test_what_cannot_be_loaded_is_told(app, folder, tmp_path):
    for name, message in (("", "Name a model"), (str(tmp_path), "cannot be loaded")):
        with pytest.raises(app.gr.Error, match=message):
            app.load(name)
    app.load(folder)[0].model.patcher.save_pretrained(tmp_path / "entropy")
    BltTokenizer().save_pretrained(tmp_path / "entropy")
    with pytest.raises(app.gr.Error, match="a BLT is needed"):
        app.load(str(tmp_path / "entropy"))


def test_a_trace_tells_who_wrote_each_byte(app):
    """A prompt, a byte of the model, a pass that accepts two of three drafts, one that accepts all, one cut by the end."""
    trace = app.Trace(queue.Queue())
    trace.put(torch.tensor([[1, 100]]))

    def verified(ids, drafts, accepted):
        for i in ids:
            trace.put(torch.tensor([i]))
        trace.put_drafts(torch.tensor([drafts]), [len(drafts)], [accepted])

    trace.put(torch.tensor([101]))
    verified([102, 103, 104], [102, 103, 90], 2)
    verified([105, 106, 107], [105, 106], 2)
    assert trace.ids == [101, 102, 103, 104, 105, 106, 107]
    assert trace.is_draft == [False, True, True, False, True, True, False]
    assert trace.refused == {3: [90]} and (trace.drafted, trace.accepted) == (5, 4)
    cut = app.Trace(queue.Queue())
    for ids in ([[1, 100]], [101], [2]):  # the first of three accepted drafts ended the text
        cut.put(torch.tensor(ids))
    cut.put_drafts(torch.tensor([[2, 103, 104]]), [3], [3])
    assert cut.is_draft == [False, True] and cut.accepted == 1 and cut.refused == {}
    model = make_model(tiny_config(patching_mode="byte", patch_in_forward=False))
    shown = app.trace_html(model, trace)
    assert re.findall(r'class="c (\w)"><span class="l(?: small)?">(.*?)<', shown) == [
        ("p", "&lt;s&gt;"), ("p", "`"), ("m", "a"), ("d", "b"), ("d", "c"), ("x", "V"), ("m", "d"),
        ("d", "e"), ("d", "f"), ("m", "g"),
    ]  # fmt: skip
    assert shown.count("▲") == 9 + 1  # every byte ends a patch; one more in the legend
    assert '"c x"' not in app.trace_html(model, trace, show_refused=False)


@pytest.mark.parametrize("window", [0, 4])
def test_writing_shows_what_generate_gives(app, folder, window):
    model, tokenizer = app.load(folder)
    inputs = tokenizer("some text", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    *_, (shown, told) = app.write(folder, "some text", 30, window, 0, 0, True)
    kinds = re.findall(r'class="c (\w)"><span', shown)
    assert kinds.count("p") == len("some text") + 1
    assert f"**{len(expected)}** bytes in" in told
    assert f"global transformer: **{told.split('global transformer: **')[1].split('*')[0]}** patches" in told
    if window:
        drafted, accepted = map(int, re.search(r"drafted \*\*(\d+)\*\*, accepted \*\*(\d+)\*\*", told).groups())
        own = int(re.search(r"whole model: \*\*(\d+)", told)[1])
        assert 0 <= accepted <= drafted and drafted > 0 and accepted + own == len(expected)
    else:
        assert "drafted" not in told and f"whole model: **{len(expected)}** bytes" in told


def test_leaving_stops_the_writing(app, folder):
    writing = app.write(folder, "some text", 500, 0, 0, 0, True)
    next(writing)
    started = time.monotonic()
    writing.close()
    assert time.monotonic() - started < 10  # its thread has ended


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page as its README starts it, on the bundled model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("space-log") / "log"
    environment = {name: value for name, value in os.environ.items() if name != "BLT_HF_MODEL"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, SPACE / "app.py", "--port", str(port)], stdout=file, stderr=file, env=environment
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            if "Running on local URL" in log.read_text():
                break
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "this test needs Chromium (on Debian: apt install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser(address, browser, folder, width, height):
    """Types, drags, clicks; asserts what is seen; nothing overflows and nothing is asked of another host."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(60_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    summary = page.locator("#patches .blt-summary")

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")

    def seen(locator) -> str:
        """What a row of characters says, spaces included."""
        return "".join(locator.locator(".blt-l").all_text_contents())

    page.wait_for_function("document.querySelector('#patches .blt-summary')?.textContent.includes('88 bytes')")
    assert "blt-5m: 5.7 million weights" in page.inner_text("#about") and fits()

    box = page.locator("#text textarea")
    box.fill("")
    box.press_sequentially("naïve 速い", delay=15)
    page.wait_for_function("document.querySelector('#patches .blt-summary')?.textContent.includes('13 bytes')")
    assert seen(page.locator("#patches")) == "<s>naïve 速い"
    before = summary.inner_text()
    number = page.locator("#threshold input[type=number]")
    number.fill("0.1")
    number.press("Enter")
    page.wait_for_function("document.querySelector('#patches .blt-summary')?.textContent.includes('threshold 0.100')")
    assert summary.inner_text() != before and fits()

    page.get_by_role("tab", name="Two thresholds").click()
    page.locator("#both textarea").fill("to be or not to be")
    page.wait_for_function("document.querySelector('#first .blt-summary')?.textContent.includes('18 bytes')")
    page.wait_for_function("document.querySelector('#second .blt-summary')?.textContent.includes('18 bytes')")
    first, second = (page.locator(f"#{name} .blt-summary").inner_text() for name in ("first", "second"))
    counted = [int(re.search(r"in (\d+) patch", line)[1]) for line in (first, second)]
    assert counted[0] > counted[1] and f"{counted[0]}" in page.inner_text("#difference") and fits()

    page.get_by_role("tab", name="Generate").click()
    page.locator("#prompt textarea").fill("A function call always ")
    page.click("#write")
    page.wait_for_function("document.querySelector('#counts')?.textContent.trim().startsWith('150 bytes')")
    told = page.inner_text("#counts")
    drafted, accepted, own = map(int, re.search(r"drafted (\d+), accepted (\d+) .* whole model: (\d+)", told).groups())
    assert drafted >= accepted > 0 and accepted + own == 150
    assert page.locator("#written .c.d").count() == accepted and page.locator("#written .c.m").count() == own
    assert page.locator("#written .c.x").count() == drafted - accepted
    assert page.get_by_text("▲", exact=True).count() > 5 and fits()

    page.locator("#bytes input[type=number]").fill("500")
    page.locator("#bytes input[type=number]").press("Enter")
    page.click("#write")
    page.wait_for_function("document.querySelectorAll('#written .c.m').length < 30")
    page.click("#stop")
    page.wait_for_timeout(1500)
    stopped = page.inner_text("#counts")
    page.wait_for_timeout(1500)
    assert page.inner_text("#counts") == stopped and not stopped.startswith("500")

    page.locator("#model button").first.click()
    page.locator("#name textarea, #name input").first.fill(folder)
    page.click("#load")
    page.wait_for_function("document.querySelector('#about').textContent.trim().startsWith('blt: ')")
    assert not errors and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    page.close()
