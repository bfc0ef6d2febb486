"""A forecast as text of 80 columns: the answer in three lines, then the figures it comes from."""

import textwrap
from collections.abc import Callable

from pipeline.base.progress_text import count_noun
from pipeline.plan.estimate import Estimate
from pipeline.plan.forecast import Forecast, format_bytes, format_epochs, format_seconds
from pipeline.report.markdown import format_table

WIDTH = 80
_LABELS = {
    "stored": "images stored",
    "set_aside": "members set aside",
    "views": "views of them: VAE passes",
    "pairs": "pairs of view and phrase",
    "masks": "pairs with a mask",
    "prompts": "distinct prompts of a task",
    "draws": "UNet passes",
    "damaged tasks": "tasks lost to damaged tars",
}
_NOTES = (
    "Ranges hold the figure with 95 %, as far as the sample and the timed passes can tell. They do "
    "not cover another machine, a slower disk, or other work on either. Recomputing runs VAE, text "
    "encoder and one UNet pass up to the last block, for each pair in each epoch, as far as the "
    "head reads them. Reading from the cache was timed from memory."
)


def format_forecast(forecast: Forecast) -> str:
    """Return a plan as Markdown: bytes, time and whether caching pays come first."""
    parts = [
        "\n".join(_wrap(line) for line in _summarise(forecast)),
        "\n".join(_wrap(line) for line in _describe_facts(forecast)),
        "What the corpus gives:\n\n" + format_table(_count_rows(forecast)),
        "What is stored:\n\n" + format_table(_byte_rows(forecast)),
        "What encoding takes:\n\n" + format_table(_time_rows(forecast)),
    ]
    if forecast.heads:
        parts.append("An epoch of each head:\n\n" + format_table(_head_rows(forecast)))
        parts.append("\n".join(_wrap(f"{head.head}: {head.verdict}.") for head in forecast.heads))
    if forecast.left_out:
        names = ", ".join(forecast.left_out)
        parts.append(
            _wrap(
                f"Not timed, for the spec stores less than they read: {names} (--json says what)."
            )
        )
    return "\n\n".join([*parts, _wrap(_NOTES)])


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _summarise(forecast: Forecast) -> list[str]:
    """Say what is stored, what it takes, and whether caching pays: one line each."""
    facts, times, counts = forecast.facts, forecast.times, forecast.counts
    takes = (
        f"{_span(times['wall_s'], format_seconds)} on {count_noun(int(facts['actors']), 'worker')}"
    )
    if facts["kind"] == "GPU":  # else the wall time is paid
        takes += f"; GPU time to pay {format_seconds(times['machine_s'].value)}"
    if forecast.dollars is not None:
        takes += f"; {_span(forecast.dollars, _format_dollars)}"
    return [
        f"stores: {_span(forecast.num_bytes, format_bytes)}; {counts['stored'].value:,.0f} images, "
        f"{counts['pairs'].value:,.0f} pairs",
        f"takes:  {takes}",
        f"cache:  {_summarise_heads(forecast)}",
    ]


def _summarise_heads(forecast: Forecast) -> str:
    """Say for which heads the cache pays; their sum is in the table alone."""
    heads = [head for head in forecast.heads if head.batch]
    if not heads:
        return "whether it pays is not known: no head was timed"
    paid = [
        f"{head.head} from epoch {format_epochs(head.break_even)} on" for head in heads if head.pays
    ]
    unpaid = [head.head for head in heads if not head.pays]
    said = [f"pays for {', '.join(paid)}"] if paid else []
    said += [f"does not pay for {', '.join(unpaid)}: recompute"] if unpaid else []
    return "; ".join(said)


def _span(found: Estimate, say: Callable[[float], str]) -> str:
    return f"{say(found.value)} ({say(found.low)} to {say(found.high)})"


def _format_dollars(number: float) -> str:
    return f"${number:,.2f}"


def round_figure(value: float) -> int | float:
    """Return a figure without decimals where it is large or whole."""
    return round(value) if value >= 100 or value == round(value) else value


def _describe_facts(forecast: Forecast) -> list[str]:
    facts = forecast.facts
    return [
        f"model: {facts['model']}",
        f"device: {facts['device']}, {facts['cores']} cores, torch {facts['torch']}, commit "
        f"{facts['commit']}; a worker: {facts['threads_an_actor']} threads, "
        f"{facts['decoders_an_actor']} decoders, {facts['gpus_an_actor']:g} GPUs, "
        f"batch {facts['batch']}; the pace is set by {facts['pace_set_by']}; "
        f"storage timed: {facts['storage']}",
        f"corpus: {facts['tars']:,} tars of {format_bytes(float(facts['corpus_bytes']))} in all, "
        f"{facts['tasks']:,} tasks; {facts['sampled_tasks']:,} sampled "
        f"({format_bytes(float(facts['read_bytes']))} read), {facts['timed_images']:,} of their "
        f"images encoded; seed {facts['seed']}",
    ]


def _row(
    what: str, found: Estimate, say: Callable[[float], object] = round_figure
) -> dict[str, object]:
    return {
        "what": what,
        "expected": say(found.value),
        "from": say(found.low),
        "to": say(found.high),
    }


def _count_rows(forecast: Forecast) -> list[dict[str, object]]:
    counts = {name: found for name, found in forecast.counts.items() if name != "bytes"}
    counts["prompts"] = counts["prompts"].scaled(1 / float(forecast.facts["tasks"]))
    rows = [_row(_LABELS.get(name, name), found) for name, found in counts.items()]
    return rows + [_row(f"rejected: {reason}", found) for reason, found in forecast.rejects.items()]


def _byte_rows(forecast: Forecast) -> list[dict[str, object]]:
    kinds = {
        forecast.facts[kind]: kind for kind in ("latents", "features") if kind in forecast.facts
    }
    sizes = [(f"{kinds[file.layer]} {file.name}", file.num_bytes) for file in forecast.files]
    sizes += [(f"all {kinds[layer]}", size) for layer, size in forecast.by_layer().items()]
    sizes.append(("all", forecast.num_bytes))
    return [_row(what, size, format_bytes) for what, size in sizes]


def _time_rows(forecast: Forecast) -> list[dict[str, object]]:
    times, facts = forecast.times, forecast.facts
    labels = {
        "wall_s": "wall time, start included",
        "start_s": "start of a worker: imports, models",
        "steady_s": f"work of {count_noun(int(facts['actors']), 'worker')}, added up",
        "machine_s": f"{facts['kind']} time to pay",
    }
    rows = [_row(what, times[name], format_seconds) for name, what in labels.items()]
    if forecast.dollars is not None:
        rows.append(_row("cost", forecast.dollars, _format_dollars))
    return rows


def _head_rows(forecast: Forecast) -> list[dict[str, object]]:
    return [
        {
            "head": head.head,
            "batch": head.batch or None,
            "pairs": round(head.pairs.value),
            "from the cache": format_seconds(head.cache_epoch_s.value),
            "recomputed": format_seconds(head.recompute_epoch_s.value),
        }
        for head in forecast.heads
    ]
