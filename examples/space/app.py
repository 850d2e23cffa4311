"""A page that shows a Byte Latent Transformer at work: its patches while one types, and its drafts while it writes.

    pip install "blt-hf" "gradio>=6"
    python examples/space/app.py [--model NAME] [--port 7860]

NAME is a folder or a name on the Hub; by default the model that comes with the project, or what the environment
variable BLT_HF_MODEL says. The page loads nothing from other hosts.
"""

import argparse
import functools
import html
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, set_seed

from blt_hf import BltPatches
from blt_hf.patches.display import patches_html, split_glyphs


HERE = Path(__file__).resolve().parent
EXAMPLES = [
    "A function call always returns some value, possibly None, unless it raises an exception.",
    "for name in sorted(os.listdir(path)):\n    print(name)",
    "Größere Änderungen: Это пример текста, 日本語の文 🙂",
]
PROMPTS = ["A function call always ", "dog (noun): ", "Das Paket "]
MAX_BYTES = 2000  # of a text; longer ones are cut
REFRESH = 0.12  # seconds between two pictures of a text that is being written


def default_model() -> str:
    """BLT_HF_MODEL, else the model that comes with the project (beside this file in a Space)."""
    folders = [HERE / "blt-5m", *(parent / "pretrained" / "blt-5m" for parent in HERE.parents)]
    found = [str(folder) for folder in folders if (folder / "config.json").is_file()]
    return os.environ.get("BLT_HF_MODEL") or (found or [""])[0]


@functools.lru_cache(maxsize=2)
def load(name: str):
    """Model and tokenizer by name; two stay in memory."""
    if not name.strip():
        raise gr.Error("Name a model: a folder, or user/name on the Hub.")
    try:
        model = AutoModelForCausalLM.from_pretrained(name.strip()).eval()
        tokenizer = AutoTokenizer.from_pretrained(name.strip())
    except (OSError, ValueError) as error:
        raise gr.Error(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if getattr(model.config, "model_type", None) != "blt":
        raise gr.Error(f"{name} is of type {model.config.model_type}; a BLT is needed.")
    return model, tokenizer


@functools.lru_cache(maxsize=64)
def find_patches(name: str, text: str) -> BltPatches:
    return load(name)[0].get_patches(text.encode("utf-8", "replace")[:MAX_BYTES])


def cut(name: str, text: str, threshold: float | None) -> BltPatches:
    patches = find_patches(name, text or "")
    return patches if threshold is None or patches.rule.mode != "entropy" else patches.recut(threshold=threshold)


def show_patches(name: str, text: str, threshold: float) -> str:
    return patches_html(cut(name, text, threshold))


def compare(name: str, text: str, low: float, high: float) -> tuple[str, str, str]:
    first, second = cut(name, text, low), cut(name, text, high)
    shared = len(set(first.boundaries[1:]) & set(second.boundaries[1:]))
    told = (
        f"**{first.num_patches}** patches for the first threshold, **{second.num_patches}** for the second; {shared} of "
        f"them start at the same byte. The global transformer runs once for each."
    )
    return patches_html(first), patches_html(second), told


class Trace:
    """A streamer that remembers who wrote each byte. `generate` tells it bytes, and what became of drafts.

    Attributes:
        prompt_ids, ids: what was given, and what was written.
        is_draft: for each written id, whether the local models drafted it (and the whole model agreed).
        refused: by index in `ids`: drafts that the whole model did not agree to, and wrote that id instead.
        drafted: how many bytes were drafted.
    """

    def __init__(self, news: queue.Queue):
        self.news = news
        self.prompt_ids: list[int] | None = None
        self.ids: list[int] = []
        self.is_draft: list[bool] = []
        self.refused: dict[int, list[int]] = {}
        self.drafted = self.explained = 0

    def put(self, value) -> None:
        ids = value.reshape(-1).tolist()
        if self.prompt_ids is None:
            self.prompt_ids = ids
            return
        self.ids += ids
        self.is_draft += [False] * len(ids)
        self.news.put("bytes")

    def put_drafts(self, ids, drafted: list[int], accepted: list[int]) -> None:
        """Comes after the bytes of a pass were put: accepted drafts, then one byte of the whole model."""
        proposed, taken = ids[0, : drafted[0]].tolist(), accepted[0]
        start = max(self.explained, 1)  # the first byte follows from the prompt, without drafts
        stop = min(start + taken, len(self.ids))  # an end of text may come before all of them
        self.is_draft[start:stop] = [True] * (stop - start)
        if proposed[taken:] and stop < len(self.ids):
            self.refused[stop] = proposed[taken:]
        self.drafted += len(proposed)
        self.explained = len(self.ids)

    @property
    def accepted(self) -> int:
        return sum(self.is_draft)

    def end(self) -> None:
        return


class Stop(StoppingCriteria):
    def __init__(self):
        self.asked = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full((input_ids.shape[0],), self.asked.is_set(), dtype=bool)


def write(
    name: str, prompt: str, num_bytes: int, window: int, temperature: float, seed: int, show_refused: bool
) -> Iterator[tuple[str, str]]:
    """The text as it is written, and its counts, as HTML and Markdown."""
    model, tokenizer = load(name)
    inputs = tokenizer(prompt.encode("utf-8", "replace")[-MAX_BYTES:], return_tensors="pt")
    news: queue.Queue = queue.Queue()
    trace, stop = Trace(news), Stop()
    options = {"max_new_tokens": int(num_bytes), "do_sample": temperature > 0, "stopping_criteria": [stop]}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "min_p": 0.05}
    if window:
        options["self_speculation_window"] = int(window)
    failed: list[Exception] = []

    def generate() -> None:
        try:
            set_seed(int(seed))
            model.generate(**inputs, **options, streamer=trace)
        except Exception as error:  # told on the page
            failed.append(error)
        finally:
            news.put("end")

    started = time.perf_counter()
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        is_done = False
        while not is_done:
            is_done = news.get() == "end"
            waited = time.perf_counter()
            while not is_done and time.perf_counter() - waited < REFRESH:
                try:
                    is_done = news.get(timeout=REFRESH) == "end"
                except queue.Empty:
                    break
            seconds = time.perf_counter() - started
            if failed:
                raise gr.Error(str(failed[0]))
            yield trace_html(model, trace, show_refused), counts(model, trace, seconds)
    finally:  # also when the reader leaves, or presses Stop
        stop.asked.set()
        thread.join(timeout=10)


def counts(model, trace: Trace, seconds: float) -> str:
    patches = model.get_patches([*trace.prompt_ids, *trace.ids])
    runs = sum(start > len(trace.prompt_ids) for start in patches.boundaries) + patches.is_last_complete
    own = len(trace.ids) - sum(trace.is_draft)
    told = [
        f"**{len(trace.ids)}** bytes in {seconds:.1f} s",
        f"whole model: **{own}** bytes, one a pass",
        f"global transformer: **{runs}** patches",
    ]
    if trace.drafted:
        share = trace.accepted / trace.drafted
        told.insert(1, f"drafted **{trace.drafted}**, accepted **{trace.accepted}** ({share:.0%})")
    return " · ".join(told)


TRACE_STYLE = """<style>
.trace{background:#fff;color:#1c2430;border:1px solid #d8dee6;border-radius:8px;padding:12px 14px;
 font:15px/1.3 ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere;min-height:4.5em}
.trace .row{display:flex;flex-wrap:wrap;row-gap:4px;align-items:flex-start}
.trace .c{display:inline-flex;flex-direction:column;align-items:center;min-width:9px}
.trace .l{white-space:pre;padding:1px .5px;min-width:9px;text-align:center}
.trace .p .l{color:#66707d}
.trace .m .l{background:#cfe3f7}
.trace .d .l{background:#cdebd3}
.trace .x .l{background:#fff;color:#a3123a;text-decoration:line-through}
.trace .g{font-size:9px;line-height:10px;height:10px;color:#1c2430}
.trace .break{flex-basis:100%;height:0}
.trace .small{font-size:10px;line-height:19px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font:13px/1.5 system-ui,sans-serif;color:#4a5563;margin-top:10px}
.legend b{display:inline-block;padding:0 5px;margin-right:5px;border-radius:3px;font-weight:400;color:#1c2430}
</style>"""
LEGEND = """<div class="legend"><span><b style="background:#cdebd3">a</b>drafted and accepted</span>
<span><b style="background:#cfe3f7">a</b>written by the whole model</span>
<span><b style="color:#a3123a;text-decoration:line-through">a</b>drafted and refused</span>
<span><b>▲</b>a patch ended: the global transformer ran</span></div>"""


def trace_html(model, trace: Trace, show_refused: bool = True) -> str:
    """Every character in the colour of who wrote it, and a mark where the global transformer ran."""
    ids = [*trace.prompt_ids, *trace.ids]
    offset = len(trace.prompt_ids)
    patches = model.get_patches(ids)
    ends = {start - 1 for start in patches.boundaries} | ({len(ids) - 1} if patches.is_last_complete else set())
    cells = []
    for glyph in split_glyphs(ids):
        kinds = [
            "p" if position < offset else "d" if trace.is_draft[position - offset] else "m"
            for position in range(glyph.start, glyph.stop)
        ]
        for position in range(glyph.start, glyph.stop):
            if show_refused and (refused := trace.refused.get(position - offset)):
                cells += [_cell(bad.label, "x", False) for bad in split_glyphs(refused)]
        kind = "m" if "m" in kinds else kinds[-1]
        cells.append(_cell(glyph.label, kind, any(p in ends for p in range(glyph.start, glyph.stop))))
        if glyph.kind == "newline":
            cells.append('<span class="break"></span>')
    return f'{TRACE_STYLE}<div class="trace"><div class="row" dir="ltr">{"".join(cells)}</div>{LEGEND}</div>'


def _cell(label: str, kind: str, ran: bool) -> str:
    size = " small" if len(label) > 2 and kind != "x" else ""
    mark = "▲" if ran else ""
    return (
        f'<span class="c {kind}"><span class="l{size}">{html.escape(label)}</span><span class="g">{mark}</span></span>'
    )


def describe(name: str) -> tuple:
    """What loading a model changes on the page: a line about it, and the three thresholds."""
    model, _ = load(name)
    config, num_weights = model.config, sum(weight.numel() for weight in model.parameters())
    reads_entropies = config.patching_mode == "entropy"
    rule = f"threshold {config.patching_threshold:.3f} nats" if reads_entropies else f"rule “{config.patching_mode}”"
    line = f"**{Path(name).name}**: {num_weights / 1e6:,.1f} million weights, {rule}."
    value = round(float(config.patching_threshold or 0), 3)
    sliders = [value, round(value * 0.7, 3), round(value * 1.2, 3)]
    return line, *(gr.update(value=nats, interactive=reads_entropies) for nats in sliders)


CSS = """
.gradio-container{max-width:1080px!important;margin:0 auto!important}
.blt-patches,.trace{min-width:0}
#title h1{margin:.2em 0 0;font-size:1.6em}
"""


def make_page(name: str) -> gr.Blocks:
    with gr.Blocks(title="Byte Latent Transformer", analytics_enabled=False) as page:
        gr.Markdown(
            "# Byte Latent Transformer\nIt reads bytes and thinks in patches. A patch starts where the next byte is hard "
            "to guess; the large, global transformer runs once for each patch.",
            elem_id="title",
        )
        with gr.Accordion("Model", open=not name, elem_id="model"), gr.Row():
            chosen = gr.Textbox(name, label="Folder, or name on the Hub", elem_id="name", scale=4)
            button = gr.Button("Load", elem_id="load", scale=1, min_width=90)
        current = gr.State(name)
        about = gr.Markdown(elem_id="about")
        with gr.Tab("Patches"):
            text = gr.Textbox(EXAMPLES[0], label="Type here", lines=3, max_lines=8, elem_id="text")
            threshold = gr.Slider(0, 5.5, 2.0, step=0.001, label="Threshold (nats)", elem_id="threshold")
            picture = gr.HTML(elem_id="patches")
            gr.Examples(EXAMPLES, text, label="Examples")
        with gr.Tab("Two thresholds"):
            both = gr.Textbox(EXAMPLES[0], label="Text", lines=2, max_lines=8, elem_id="both")
            with gr.Row():
                with gr.Column(min_width=300):
                    low = gr.Slider(0, 5.5, 1.5, step=0.001, label="First threshold (nats)", elem_id="low")
                    first = gr.HTML(elem_id="first")
                with gr.Column(min_width=300):
                    high = gr.Slider(0, 5.5, 2.5, step=0.001, label="Second threshold (nats)", elem_id="high")
                    second = gr.HTML(elem_id="second")
            difference = gr.Markdown(elem_id="difference")
        with gr.Tab("Generate"):
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, max_lines=6, elem_id="prompt")
            with gr.Row():
                start = gr.Button("Write", variant="primary", elem_id="write", min_width=120)
                stop = gr.Button("Stop", elem_id="stop", min_width=120)
            written = gr.HTML(elem_id="written")
            told = gr.Markdown(elem_id="counts")
            with gr.Row():
                num_bytes = gr.Slider(10, 500, 150, step=10, label="Bytes", elem_id="bytes", min_width=220)
                window = gr.Slider(
                    0,
                    16,
                    6,
                    step=1,
                    label="Bytes that the local models draft (0: none)",
                    elem_id="window",
                    min_width=220,
                )
            with gr.Accordion("More", open=False):
                temperature = gr.Slider(0, 1.5, 0.5, step=0.05, label="Temperature (0: the likeliest byte)")
                seed = gr.Number(1, label="Seed", precision=0)
                show_refused = gr.Checkbox(True, label="Show refused drafts")
            gr.Examples(PROMPTS, prompt, label="Examples")

        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        one, two = [current, text, threshold], [current, both, low, high]
        gr.on([text.change, threshold.change], show_patches, one, picture, **quiet)
        gr.on([both.change, low.change, high.change], compare, two, [first, second, difference], **quiet)
        sliders = [threshold, low, high]
        loaded = gr.on([button.click, chosen.submit], lambda name: (load(name), name)[1], chosen, current)
        loaded = loaded.success(describe, current, [about, *sliders])
        if name:
            loaded = [loaded, page.load(describe, current, [about, *sliders])]
        for event in loaded if isinstance(loaded, list) else [loaded]:
            event.success(show_patches, one, picture).success(compare, two, [first, second, difference])
        options = [current, prompt, num_bytes, window, temperature, seed, show_refused]
        running = gr.on([start.click, prompt.submit], write, options, [written, told], show_progress="hidden")
        stop.click(None, cancels=[running])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model(), help="folder or name on the Hub")
    parser.add_argument("--host", default=None, help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=None)
    arguments = parser.parse_args()
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "sans-serif"]
    theme = gr.themes.Base(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"])
    make_page(arguments.model).launch(
        server_name=arguments.host, server_port=arguments.port, theme=theme, css=CSS, footer_links=[], share=False
    )


if __name__ == "__main__":
    main()
