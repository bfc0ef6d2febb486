import base64
import html.parser
import io
import math
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from pipeline.report import Curve, Example, Report, ResultRow, render_report, write_report

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
    return Example(image, phrase, truth, dict.fromkeys(heads, probability))


def make_report(**parts):
    empty = {"facts": {}, "results": (), "curves": (), "examples": (), "notes": ()}
    return Report(**{"title": "Demo", "summary": "Three heads.", **empty, **parts})


def make_hostile_report():
    return Report(
        title=HOSTILE,
        summary=HOSTILE,
        facts={HOSTILE: HOSTILE},
        results=[ResultRow(HOSTILE, 0.1, 0.2, 0.3, note=HOSTILE)],
        curves=[Curve(HOSTILE, [1, 2], [0.5, 0.4]), Curve(r"$\frac$", [1], [0.5])],
        examples=[make_example(HOSTILE, heads=(HOSTILE,))],
        notes=[HOSTILE],
    )


def render_row(text, name):
    row = re.search(rf"<tr>(?:(?!</tr>).)*<bdi>{name}</bdi>.*?</tr>", text)
    return re.findall(r'<td class="number">(.*?)</td>', row.group())


def test_hostile_text_is_shown_and_never_becomes_a_tag():
    page = Page(render_report(make_hostile_report()))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("title") == tags.count("style") == 1
    assert tags.count("img") == 4
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Title twice, summary, fact and label, result and note, curve, phrase, head, page note.
    assert page.text.count(HOSTILE) == 11


def test_page_asks_for_nothing_outside():
    text = render_report(make_hostile_report())
    page = Page(text)
    sources = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert len(sources) == 4
    assert all(source.startswith("data:image/") for source in sources)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta for meta in page.attributes("meta") if "http-equiv" in meta)["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_decode():
    examples = [make_example(side=32), make_example(side=640)]
    text = render_report(make_report(examples=examples, curves=[Curve("ZNet", [1, 2], [0.7, 0.6])]))
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


def test_scores_are_percentages_with_one_decimal():
    text = render_report(make_report(results=[ResultRow("LD-ZNet", 0.52749, 0.6, 1.0)]))
    assert render_row(text, "LD-ZNet") == ["<b>52.7</b>", "<b>60.0</b>", "<b>100.0</b>"]


def test_best_of_each_column_is_bold_and_ties_share():
    rows = [
        ResultRow("ZNet", 0.50, 0.59999, 0.3),
        ResultRow("LD-ZNet", 0.51, 0.60001, math.nan),
        ResultRow("all foreground", 0.10, 0.1, 0.4, baseline=True),
    ]
    text = render_report(make_report(results=rows))
    assert render_row(text, "ZNet") == ["50.0", "<b>60.0</b>", "30.0"]
    assert render_row(text, "LD-ZNet") == ["<b>51.0</b>", "<b>60.0</b>", "–"]
    assert render_row(text, "all foreground") == ["10.0", "10.0", "<b>40.0</b>"]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_is_a_dash(score):
    text = render_report(make_report(results=[ResultRow("ZNet", score, score, score)]))
    assert render_row(text, "ZNet") == ["–", "–", "–"]


def test_baselines_come_last_and_apart():
    rows = [ResultRow("all foreground", 0.1, 0.1, 0.1, baseline=True), ResultRow("ZNet", 0, 0, 0)]
    text = render_report(make_report(results=rows))
    heads, baselines = text.split('<tbody class="baseline">')
    assert "<bdi>ZNet</bdi>" in heads
    assert "<bdi>all foreground</bdi>" in baselines
    assert text.count("<bdi>") == 2
    assert "Trivial baselines" in Page(text).text


def test_example_shows_its_iou_at_half():
    assert "IoU 50.0" in Page(render_report(make_report(examples=[make_example()]))).text


def test_head_without_a_prediction_is_a_dash():
    examples = [make_example(heads=("ZNet",)), make_example(heads=("RGBNet",))]
    page = Page(render_report(make_report(examples=examples)))
    headers = [word for word in page.words if word in ("ZNet", "RGBNet")]
    assert headers == ["ZNet", "RGBNet"]
    assert page.words.count("–") == 2
    assert len(page.attributes("img")) == 6


@pytest.mark.parametrize(
    "curve",
    [
        Curve("empty", [], []),
        Curve("nothing finite", [1, 2], [math.nan, math.inf], [(1, math.nan)]),
        Curve("validation only", [1], [math.nan], [(1, 0.5), (2, math.inf)]),
        Curve("gap and spike", range(100), [0.5] * 50 + [math.nan] * 9 + [1e30] + [0.4] * 40),
        Curve("zero", [1, 2], [0.0, 0.0]),
        Curve("NumPy", np.arange(5), np.ones(5, dtype=np.float32)),
    ],
    ids=lambda curve: curve.name,
)
def test_curves_of_any_kind_are_drawn_without_a_warning(curve):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(render_report(make_report(curves=[curve])))
    assert len(page.attributes("img")) == 1
    assert curve.name in page.text


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


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"scores of 'ZNet' must be in \[0, 1\], but got 51.3; di"):
        ResultRow("ZNet", 51.3, 0.5, 0.5)
    with pytest.raises(ValueError, match="curve 'ZNet' must have one loss a step, but got 2 steps"):
        Curve("ZNet", [1, 2], [0.5])


def test_bad_examples_are_refused():
    image, truth = np.zeros((4, 6, 3), dtype=np.uint8), np.zeros((4, 6), dtype=bool)
    with pytest.raises(ValueError, match="truth of 'cat' must be bool, but got uint8"):
        Example(image, "cat", truth.astype(np.uint8), {})
    with pytest.raises(ValueError, match=r"image must be \(H, W, 3\) uint8 RGB, but got \(4, 6\)"):
        Example(image[..., 0], "cat", truth, {})
    with pytest.raises(ValueError, match=r"mask must be \(H, W\) = \(4, 6\), but got \(6, 4\)"):
        Example(image, "cat", truth, {"ZNet": np.zeros((6, 4))})
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], but got -4 to -4"):
        Example(image, "cat", truth, {"ZNet": np.full((4, 6), -4.0)})
