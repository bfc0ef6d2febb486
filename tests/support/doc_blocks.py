"""The fenced blocks of README and docs/, and what a reader has at hand who types them.

A block whose fence says ``needs=THING`` needs what this project does not bring, such as a cloud:
it is parsed and not run.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.scenes.scene import draw_scene, write_corpus

ROOT = Path(__file__).parents[2]
DOC_PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
SIZE_PX = 64
TIMEOUT_S = 900  # of a page
FENCE = re.compile(r"^```(\w*)[ ]*(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
# Configs of the recipes and pages: sizes that a test affords, and the model that is here.
SMALLER = (
    (r"model: CompVis/stable-diffusion-v1-4", "model: models/tiny_ldm_weights"),
    (r"size: \d+", f"size: {SIZE_PX}"),
    (r"num_steps: \d+", "num_steps: 2"),
    (r"batch_size: \d+", "batch_size: 4"),
    (r"validation_pairs: \d+", "validation_pairs: 8"),
    (r"seeds: \[0, 1, 2\]", "seeds: [0]"),
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, what it needs, its text."""

    page: str  # as seen from the root
    line: int  # of the fence
    language: str
    needs: str  # "" if it can be run here
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def list_blocks(page):
    """The blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    blocks = []
    for found in FENCE.finditer(text):
        assert re.fullmatch(r"(needs=[\w-]+)?", found[2]), f"{name}: ```{found[1]} {found[2]}"
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(name, line, found[1], found[2].removeprefix("needs="), found[3]))
    assert len(blocks) * 2 == len(re.findall("^ *```", text, re.MULTILINE)), name
    return blocks


ALL_BLOCKS = [block for page in DOC_PAGES for block in list_blocks(page)]


class Clone:
    """A folder like a clone of the project, with what the pages say that their reader has."""

    def __init__(self, folder):
        self.folder = folder
        self._said = {}  # of the pages that were walked
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "tiny_ldm_weights").symlink_to(ROOT / "models" / "tiny_ldm_weights")
        recipes = shutil.copytree(ROOT / "jobs" / "recipes", folder / "jobs" / "recipes")
        for recipe in recipes.glob("*.yaml"):
            recipe.write_text(_make_small(recipe.read_text()))

    def add_tars(self):
        """The corpus of docs/howto/encode.md."""
        drawn = self.folder / "drawn"
        write_corpus(drawn, split="train", num_images=8, images_per_tar=4, size_px=SIZE_PX)
        write_corpus(drawn, split="val", num_images=4, images_per_tar=4, size_px=SIZE_PX)
        (self.folder / "data").mkdir()
        for tar in drawn.glob("*.tar"):
            tar.rename(
                self.folder / "data" / tar.name.replace("scenes", "camvid").replace("-0", "-")
            )

    def add_pictures(self):
        """``street.jpg``, and ``photos`` with a caption beside each."""
        (self.folder / "photos").mkdir()
        for number in range(3):
            scene = draw_scene(seed=0, split="val", index=number, size_px=SIZE_PX)
            photo = self.folder / "photos" / f"{number}.jpg"
            Image.fromarray(scene.image).save(photo)
            photo.with_suffix(".txt").write_text("a red circle")
        shutil.copy(photo, self.folder / "street.jpg")

    def walk(self, page):
        """Run the blocks of a page in one shell, in order, once; return what they said."""
        if page not in self._said:
            self._said[page] = self._run(page)
        return self._said[page]

    def _run(self, page):
        lines = []
        for block in list_blocks(ROOT / page):
            if block.needs:
                continue
            if block.language == "sh":
                lines.append(_make_small(block.text))
            elif block.language == "python":
                script = f"block-{block.line}.py"
                (self.folder / script).write_text(block.text)
                lines.append(f"python {script}\n")
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        environment.pop("RAY_ADDRESS", None)
        run = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", "".join(lines)],
            cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert run.returncode == 0, f"{page}: status {run.returncode}\n{run.stdout[-4000:]}"
        return run.stdout


def _make_small(text):
    for pattern, small in SMALLER:
        text = re.sub(pattern, small, text)
    return text
