"""Draws negatives: phrases of a task's other samples, for views whose image does not have them."""

from collections.abc import Mapping

from models.ldm.draws import draw_integer
from pipeline.corpus.text import SampleText, fold_phrase
from pipeline.decode.pairs import Pair, PairBuilder
from pipeline.spec.fields import LatentsSpec


class NegativePool:
    """The phrases of a task's samples that have views, by key, and the negatives drawn from them.

    A phrase counts once, whatever its case and blanks, in the spelling that sorts first. An image
    without phrases gets no negatives, since nothing is known of what it shows.
    """

    def __init__(self, texts: Mapping[str, SampleText], spec: LatentsSpec) -> None:
        self._texts, self._spec = texts, spec
        phrases = sorted({phrase for text in texts.values() for phrase in text.phrases})
        self._pool = list({fold_phrase(phrase): phrase for phrase in reversed(phrases)}.values())
        self._pool.sort()

    def build_pairs(self, key: str, view: int) -> list[Pair]:
        """Return the negative pairs drawn for a view: ``negatives`` of them, or all that there are.

        Each draw by (seed, key, view) falls on a place of the sorted pool, and the next phrase from
        there that is neither the image's own nor drawn already is taken.
        """
        text = self._texts[key]
        taken = {fold_phrase(phrase) for phrase in (*text.phrases, *text.negatives)}
        drawn: list[str] = []
        num = self._spec.negatives if text.phrases else 0
        for number in range(num):
            phrase = self._find_free(key, view, number, taken)
            if phrase is None:
                break
            taken.add(fold_phrase(phrase))
            drawn.append(phrase)
        builder = PairBuilder(key, text, self._spec)
        return builder.build_negatives(drawn, view, first=len(text.negatives))

    def _find_free(self, key: str, view: int, number: int, taken: set[str]) -> str | None:
        pool = self._pool
        purpose, seed = "negative", self._spec.seed
        start = draw_integer(
            0, len(pool), purpose=purpose, seed=seed, key=key, view=view, draw=number
        )
        # At most as many places as are taken are looked at before a free one.
        for step in range(min(len(pool), len(taken) + 1)):
            phrase = pool[(start + step) % len(pool)]
            if fold_phrase(phrase) not in taken:
                return phrase
        return None
