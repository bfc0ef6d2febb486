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
        folded = {fold_phrase(phrase): phrase for phrase in reversed(phrases)}
        self._pool = sorted((phrase, form) for form, phrase in folded.items())

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
            found = self._find_free(key, view, number, taken)
            if found is None:
                break
            drawn.append(found[0])
            taken.add(found[1])
        builder = PairBuilder(key, text, self._spec)
        return builder.build_negatives(drawn, view, first=len(text.negatives))

    def _find_free(
        self, key: str, view: int, number: int, taken: set[str]
    ) -> tuple[str, str] | None:
        """Return a phrase that is not taken, and its folded form."""
        pool = self._pool
        purpose, seed = "negative", self._spec.seed
        start = draw_integer(
            0, len(pool), purpose=purpose, seed=seed, key=key, view=view, draw=number
        )
        # At most as many places as are taken are looked at before a free one.
        for step in range(min(len(pool), len(taken) + 1)):
            found = pool[(start + step) % len(pool)]
            if found[1] not in taken:
                return found
        return None
