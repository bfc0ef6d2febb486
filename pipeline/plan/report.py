"""A forecast as text of 80 columns: the answer in three lines, then how it comes about."""

import textwrap
from collections.abc import Callable
from dataclasses import asdict

from pipeline.plan.estimate import Estimate
from pipeline.plan.forecast import Forecast, format_bytes, format_epochs, format_seconds
from pipeline.report.markdown import format_table

WIDTH = 80
_LABELS = {
    "stored": "images stored",
    "views": "views of them: VAE passes",
    "pairs": "pairs of view and phrase",
    "prompts": "distinct prompts of a task",
    "draws": "UNet passes",
    "damaged tasks": "tasks lost to damaged tars",
}


def format_forecast(forecast: Forecast) -> str:
    """Return what a plan says, as Markdown: bytes, time and whether caching pays come first."""
    parts = [
        "\n".join(_wrap(line) for line in _summarise(forecast)),
        _describe_facts(forecast),
        "What the corpus gives:\n\n" + format_table(_count_rows(forecast)),
        "What is stored:\n\n" + format_table(_byte_rows(forecast)),
        "What encoding takes:\n\n" + format_table(_time_rows(forecast)),
    ]
    if forecast.heads:
        parts.append("An epoch of each head:\n\n" + format_table(_head_rows(forecast)))
        verdicts = (f"{head.head}: {head.verdict}." for head in forecast.heads)
        parts.append("\n".join(_wrap(verdict) for verdict in verdicts))
    if forecast.left_out:
        parts.append(_wrap(_describe_left_out(forecast)))
    parts.append(_wrap(_NOTES))
    return "\n\n".join(parts)


_NOTES = (
    "Ranges hold the figure with 95 %, as far as sampling and the timed passes can tell; another "
    "machine, a disk slower than the one timed, and neighbours on it are not in them. Recomputing "
    "is VAE, text encoder and one UNet pass up to the last block, for each pair in each epoch, as "
    "far as the head reads them; reading from the cache was timed from memory."
)


def _summarise(forecast: Forecast) -> list[str]:
    """What is stored, what it takes, and whether caching pays: a line each."""
    facts, times, counts = forecast.facts, forecast.times, forecast.counts
    stored = _span(forecast.num_bytes, format_bytes)
    takes = _span(times["wall_s"], format_seconds)
    takes += f" on {_count_workers(forecast)}"
    if facts["kind"] == "GPU":  # else the wall time is paid
        takes += f"; GPU time to pay {format_seconds(times['machine_s'].value)}"
    if forecast.dollars is not None:
        takes += f"; {_span(forecast.dollars, _format_dollars)}"
    return [
        f"stores: {stored}; {counts['stored'].value:,.0f} images, "
        f"{counts['pairs'].value:,.0f} pairs",
        f"takes:  {takes}",
        f"cache:  {_summarise_heads(forecast)}",
    ]


def _summarise_heads(forecast: Forecast) -> str:
    """Which heads the cache pays for; not the sum of several, which the table has."""
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


def _describe_left_out(forecast: Forecast) -> str:
    names = ", ".join(forecast.left_out)
    return f"Not timed, for the spec stores less than they read: {names} (--json says what)."


def _count_workers(forecast: Forecast) -> str:
    num = int(forecast.facts["actors"])
    return f"{num:,} worker{'' if num == 1 else 's'}"


def _span(found: Estimate, say: Callable[[float], str]) -> str:
    return f"{say(found.value)} ({say(found.low)} to {say(found.high)})"


def _format_dollars(number: float) -> str:
    return f"${number:,.2f}"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False)


def _describe_facts(forecast: Forecast) -> str:
    facts = forecast.facts
    corpus = (
        f"corpus: {facts['tars']:,} tars of {format_bytes(float(facts['corpus_bytes']))} in all, "
        f"{facts['tasks']:,} tasks; {facts['sampled_tasks']:,} looked into "
        f"({format_bytes(float(facts['read_bytes']))} read), {facts['timed_images']:,} of their "
        f"images encoded; seed {facts['seed']}"
    )
    device = (
        f"device: {facts['device']}, {facts['cores']} cores, torch {facts['torch']}, commit "
        f"{facts['commit']}; a worker: {facts['threads_an_actor']} threads, "
        f"{facts['decoders_an_actor']} decoders, {facts['gpus_an_actor']:g} GPUs, "
        f"batch {facts['batch']}; the pace is set by {facts['pace_set_by']}; "
        f"storage timed: {facts['storage']}"
    )
    return "\n".join(_wrap(line) for line in (f"model: {facts['model']}", device, corpus))


def _count_rows(forecast: Forecast) -> list[dict[str, object]]:
    counts = {name: found for name, found in forecast.counts.items() if name != "bytes"}
    counts["prompts"] = counts["prompts"].scaled(1 / float(forecast.facts["tasks"]))
    rows = [_row(_LABELS.get(name, name), found) for name, found in counts.items()]
    return rows + [_row(f"rejected: {reason}", found) for reason, found in forecast.rejects.items()]


def _row(what: str, found: Estimate) -> dict[str, object]:
    return {"what": what} | {
        name: round_figure(value)
        for name, value in (("expected", found.value), ("from", found.low), ("to", found.high))
    }


def round_figure(value: float) -> int | float:
    """Return a figure without decimals where it is large or whole."""
    return round(value) if value >= 100 or value == round(value) else value


def _byte_rows(forecast: Forecast) -> list[dict[str, object]]:
    kinds = {
        forecast.facts[kind]: kind for kind in ("latents", "features") if kind in forecast.facts
    }
    rows = [_sized(str(kinds[file.layer]), file.name, file.num_bytes) for file in forecast.files]
    rows += [
        _sized(str(kinds[layer]), "in all", found) for layer, found in forecast.by_layer().items()
    ]
    return [*rows, _sized("both", "in all", forecast.num_bytes)]


def _sized(layer: str, name: str, found: Estimate) -> dict[str, object]:
    return {
        "layer": layer,
        "array or file": name,
        "expected": format_bytes(found.value),
        "from": format_bytes(found.low),
        "to": format_bytes(found.high),
    }


def _time_rows(forecast: Forecast) -> list[dict[str, object]]:
    times, facts = forecast.times, forecast.facts
    steady = times["steady_s"]
    rates = Estimate(
        *(forecast.num_bytes.value / s for s in (steady.value, steady.high, steady.low))
    )
    rows: list[dict[str, object]] = [
        _timed("wall time, start included", times["wall_s"]),
        _timed("start of a worker: imports, models", times["start_s"]),
        _timed(f"work of {_count_workers(forecast)}, added up", steady),
        _timed(f"{facts['kind']} time to pay", times["machine_s"]),
        {
            "what": "stored by one worker",
            **{
                name: format_bytes(value) + "/s"
                for name, value in zip(_RANGE, asdict(rates).values(), strict=True)
            },
        },
    ]
    if forecast.dollars is not None:
        dollars = asdict(forecast.dollars).values()
        rows.append(
            {
                "what": "cost",
                **{n: _format_dollars(v) for n, v in zip(_RANGE, dollars, strict=True)},
            }
        )
    return rows


_RANGE = ("expected", "from", "to")


def _timed(what: str, found: Estimate) -> dict[str, object]:
    values = asdict(found).values()
    return {"what": what, **{n: format_seconds(v) for n, v in zip(_RANGE, values, strict=True)}}


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
