import base64
import html.parser
import io
import math
import re
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report.curves import Curve
from pipeline.report.page import Report, render_report, write_report
from pipeline.report.pictures import Example, Picture
from pipeline.report.tables import EffectRow, ResultRow

HOSTILE = "</title></style><script>alert(1)</script><img src=http://evil.example/x onerror='x'>\"&"


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its tags with attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return "\n".join(word.strip() for word in self.words if word.strip())


def make_example(phrase="a red square", heads=("ZNet", "LD-ZNet"), side=32):
    rng = np.random.default_rng(0)
    truth = np.zeros((side, side), dtype=bool)
    truth[8:16, 8:16] = True
    probability = np.where(truth, 0.9, 0.1).astype(np.float32)
    probability[8:12] = 0.2
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Example(
        image, phrase, truth, dict.fromkeys(heads, probability), dict.fromkeys(heads, 0.5)
    )


def make_png(size=(1600, 400)):
    file = io.BytesIO()
    Image.new("RGB", size, "white").save(file, "png")
    return file.getvalue()


def make_report(**parts):
    return Report(**{"title": "Demo", "summary": "Three heads.", **parts})


def make_hostile_report():
    return Report(
        title=HOSTILE,
        summary=HOSTILE,
        facts={HOSTILE: HOSTILE},
        results=[ResultRow(HOSTILE, (0.1, 0.2, 0.3), group=HOSTILE)],
        curves=[Curve(HOSTILE, {1: 0.5, 2: 0.4}), Curve(r"$\frac$", {1: 0.5})],
        examples=[make_example(HOSTILE, heads=(HOSTILE,))],
        notes=[HOSTILE],
        effects=[EffectRow(HOSTILE, HOSTILE, (0.1, 0.2), (0.01, None), HOSTILE)],
        pictures=[Picture(HOSTILE, make_png(), HOSTILE, note=HOSTILE)],
        savings={HOSTILE: HOSTILE},
        results_note=HOSTILE,
    )


def test_hostile_text_is_shown_and_never_becomes_a_tag():
    page = Page(render_report(make_hostile_report()))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("title") == tags.count("style") == 1
    assert tags.count("img") == 5
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Title twice, summary, fact and label, result, curve, phrase, head, page note; the result's
    # group and the note below, three of an effect, two of a picture, a saving and its label.
    assert page.text.count(HOSTILE) == 10 + 9
    assert [image["alt"] for image in page.attributes("img")].count(HOSTILE) == 1


def test_page_asks_for_nothing_outside():
    text = render_report(make_hostile_report())
    page = Page(text)
    sources = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta for meta in page.attributes("meta") if "http-equiv" in meta)["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_decode():
    examples = [make_example(side=32), make_example(side=640)]
    text = render_report(make_report(examples=examples, curves=[Curve("ZNet", {1: 0.7, 2: 0.6})]))
    sizes = []
    for attributes in Page(text).attributes("img"):
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", attributes["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert picture.format == kind.upper()
            sizes.append(picture.size)
        assert attributes["alt"]
    # A 32 px scene is enlarged by whole pixels, a 640 px one reduced; then the curves.
    assert sizes[:8] == [(320, 320)] * 4 + [(336, 336)] * 4
    assert len(sizes) == 9


def test_example_shows_its_iou_at_half():
    assert "IoU 50.0 over 0.50" in Page(render_report(make_report(examples=[make_example()]))).text


def test_example_shows_its_iou_over_its_heads_threshold():
    example = replace(make_example(), thresholds={"ZNet": 0.14, "LD-ZNet": 0.5})
    assert example.compute_iou("ZNet") == 64 / 160  # with the band of 0.2, across the picture
    assert example.compute_iou("LD-ZNet") == 0.5
    text = Page(render_report(make_report(examples=[example]))).text
    assert "IoU 40.0 over 0.14" in text
    assert "IoU 50.0 over 0.50" in text
    assert example.draw_prediction("ZNet") != example.draw_prediction("LD-ZNet")


@pytest.mark.parametrize(
    "curve",
    [
        Curve("empty", {}),
        Curve("nothing finite", {1: math.nan, 2: math.inf}),
        Curve("gap and spike", dict(enumerate([0.5] * 50 + [math.nan] * 9 + [1e30] + [0.4] * 40))),
        Curve("zero", {1: 0.0, 2: 0.0}),
        Curve("NumPy", dict(enumerate(np.ones(5, dtype=np.float32)))),
    ],
    ids=lambda curve: curve.name,
)
def test_curves_of_any_kind_are_drawn_without_a_warning(curve):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render_report(make_report(curves=[curve])))
    assert len(page.attributes("img")) == 1
    assert curve.name in page.text


def test_sections_stand_in_order():
    report = make_report(
        facts={"command": "ldznet demo"},
        results=[ResultRow("ZNet", (0.1, 0.2, 0.3))],
        curves=[Curve("ZNet", {1: 0.5})],
        examples=[make_example()],
        notes=["One note."],
        effects=[EffectRow("Does z help?", "ZNet − RGBNet", (0.1, 0.1), (None, None), "yes")],
        pictures=[Picture("Blocks", make_png(), "a plot"), Picture("Steps", make_png(), "a plot")],
        savings={"time": "10 s"},
    )
    assert re.findall("<h2>(.*)</h2>", render_report(report)) == [
        *("Results", "The paper's effects", "Blocks", "Steps", "Examples", "Training"),
        *("What caching saved", "The run", "Notes"),
    ]


def test_picture_is_inlined_whole_and_kept_within_the_column():
    text = render_report(make_report(pictures=[Picture("Blocks", make_png(), "a plot", "Wide.")]))
    page = Page(text)
    (image,) = page.attributes("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == make_png()
    assert image["alt"] == "a plot"
    rule = re.search(rf"\.{image['class']} {{(.*?)}}", text, re.DOTALL).group(1)
    assert "max-width: 100%" in rule
    assert "background: #ffffff" in rule  # ink of a plot without a ground, on the dark page
    assert page.text.endswith("Wide.")


def test_savings_are_a_table_like_the_facts():
    text = render_report(make_report(savings={"encoding": "38 s"}, facts={"command": "demo"}))
    assert text.count('<table class="facts">') == 2
    assert '<tr><th scope="row">encoding</th><td>38 s</td></tr>' in text


def test_empty_parts_are_left_out():
    page = Page(render_report(make_report(notes=["One note."])))
    assert [word for word in page.text.split("\n") if word in ("Results", "Training", "Notes")] == [
        "Notes"
    ]
    assert "One note." in page.text


def test_control_characters_and_surrogates_are_replaced(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, make_report(summary="a\x00b\ud800c\x1b[31m", notes=["ناقة 骆驼 🐫\u200d"]))
    text = path.read_text(encoding="utf-8")
    assert "a\ufffdb\ufffdc\ufffd[31m" in text
    assert "ناقة 骆驼 🐫\u200d" in text


def test_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "made" / "report.html"
    write_report(path, make_report(title="old"))
    write_report(path, make_report(title="new"))
    assert "<title>new</title>" in path.read_text()
    assert list(path.parent.iterdir()) == [path]


def test_reader_of_the_old_report_keeps_it_whole(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, make_report(title="old"))
    with path.open() as reader:
        write_report(path, make_report(title="new"))
        assert "<title>old</title>" in reader.read()


def test_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        write_report(path, make_report())
    assert list(tmp_path.iterdir()) == [path]


def test_bad_examples_are_refused():
    image, truth = np.zeros((4, 6, 3), dtype=np.uint8), np.zeros((4, 6), dtype=bool)
    with pytest.raises(ValueError, match="mask must be bool or float, but got uint8"):
        Example(image, "cat", truth.astype(np.uint8), {}, {})
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8 RGB, but got \(4, 6\)"):
        Example(image[..., 0], "cat", truth, {}, {})
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) = \(4, 6\), but got \(6, 4\)"):
        Example(image, "cat", truth, {"ZNet": np.zeros((6, 4))}, {})
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], but got -4 to -4"):
        Example(image, "cat", truth, {"ZNet": np.full((4, 6), -4.0)}, {})


def test_templates_are_part_of_the_installed_package():
    root = Path(__file__).parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    (pattern,) = settings["tool"]["setuptools"]["package-data"]["pipeline"]
    packed = set((root / "pipeline").glob(pattern))
    assert set((root / "pipeline/report/templates").iterdir()) <= packed
    assert set((root / "pipeline").rglob("*.j2")) <= packed
