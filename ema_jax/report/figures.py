"""Charts of a study, drawn with matplotlib's object interface: no global state, no clock.

Every function takes (parts of) `results.json`, schema 1, and returns a matplotlib `Figure`, or None
where the study has nothing to draw; `drawing.save` writes it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ema_jax.report import drawing
from ema_jax.report.drawing import COLOURS, INK, SHADE, label
from ema_jax.report.maps import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA = 0.05  # level at which a Holm-adjusted p is significant


def significant(p: float | None, bounds: Sequence[float | None] | None) -> bool:
    """True where a change's Holm-adjusted p is below `ALPHA` and its interval is without zero.

    The p-value is of these runs on other prompts; the interval is over other seeds as well.
    """
    if p is None or p >= ALPHA:
        return False
    low, high = bounds or (None, None)
    return low is None or high is None or low > 0 or high < 0


def titled(domain: str, results: Mapping[str, Any]) -> str:
    """A domain's label, with the target marked as such."""
    return label(domain) + (" (target)" if domain == results["target"] else "")


def ordered_domains(results: Mapping[str, Any]) -> list[str]:
    """The study's domains, the target first."""
    target = results["target"]
    return [target, *(d for d in results["domains"] if d != target)]


def arm_look(results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Arm to `(colour, marker)`: the untouched model in ink, the others in palette order."""
    look = {"base": (INK, "o")} if "base" in results["arms"] else {}
    return look | drawing.looks(arm for arm in results["arms"] if arm != "base")


def refusal(results: Mapping[str, Any]) -> "Figure | None":
    """Refusal rate per domain and arm: a marker, its 95 % interval, and a dot for every seed.

    Narrow, as it stands beside the findings on the first screen and is read on a phone.
    """
    domains, look = ordered_domains(results), arm_look(results)
    height = (0.12 * max(len(look), 2) + 0.18) * len(domains) + 1.1
    figure = drawing.blank(height, drawing.NARROW_INCHES)
    axes = figure.subplots()
    for arm, y in drawing.rows(axes, [titled(d, results) for d in domains], look):
        colour, marker = look[arm]
        entry = results["arms"][arm]
        for i, domain in enumerate(domains):
            rate = entry["refusal"].get(domain)
            text = f"{label(domain)}, {arm}: {_rate_text(rate)}"
            drawing.interval(axes, rate, "rate", y[i], colour, marker, text=text)
            for name, seed in entry.get("seeds", {}).items():
                found = seed["refusal"].get(domain, {})
                if found.get("rate") is not None:
                    tick = axes.plot(
                        100 * found["rate"], y[i], "|", color=colour, markersize=7, alpha=0.55
                    )
                    text = f"{label(domain)}, {arm}, seed {name}: {_rate_text(found)}"
                    drawing.tip(tick[0], text)
    axes.set(xlim=(-1.5, 101.5), xlabel="refusal rate (% of valid responses), 95 % interval")
    axes.get_yticklabels()[0].set_fontweight("bold")
    drawing.legend(figure, look, columns=3)
    return figure


def _rate_text(rate: Mapping[str, Any] | None) -> str:
    """A refusal score in words, for the text over its mark."""
    if not rate or rate.get("rate") is None:
        return ""
    return (
        f"{_percent(rate['rate'])} {_bounds(rate.get('ci95'))} refused "
        f"({rate['refused']} of {rate['valid']} valid)"
    )


def _percent(x: float) -> str:
    return f"{100 * x:z.1f} %".replace("-", "−")


def _bounds(ends: Sequence[Any] | None, scale: float = 100, digits: int = 1) -> str:
    if not ends or None in ends:
        return ""
    low, high = (f"{scale * x:z.{digits}f}".replace("-", "−") for x in ends)
    return f"[{low}, {high}]"


def ema(results: Mapping[str, Any]) -> "Figure | None":
    """Off-target changes in points with 95 % intervals; filled where significant.

    A panel by refusal, and one by compliance where the results have it.
    """
    arms = {arm: look for arm, look in arm_look(results).items() if results["ema"].get(arm)}
    domains = [d for d in ordered_domains(results) if d != results["target"]]
    if not arms or not domains:
        return None
    both = any("compliance_rise" in e for arm in arms for e in results["ema"][arm].values())
    measures = [("drop in refusal rate", "drop", "ci95", "p_holm")]
    if both:
        measures.append(
            ("rise in compliance", "compliance_rise", "compliance_ci95", "compliance_p_holm")
        )
    figure = drawing.blank(0.27 * len(domains) * len(arms) * 0.9 + 1.2)
    grid = figure.subplots(1, len(measures), sharex=True, squeeze=False)[0]
    for i, (axes, (title, key, bounds, p)) in enumerate(zip(grid, measures, strict=True)):
        axes.axvline(0, color=INK, linewidth=0.9)
        for arm, y in drawing.rows(axes, [label(d) for d in domains], arms):
            for j, domain in enumerate(domains):
                entry = results["ema"][arm].get(domain) or {}
                if entry.get(key) is None:
                    continue
                clear = significant(entry.get(p), entry.get(bounds))
                shown = {"change": entry[key], "ci95": entry.get(bounds)}
                size = f"{100 * entry[key]:+z.1f}".replace("-", "−")
                text = f"{label(domain)}, {arm}: {title} {size} points {_bounds(shown['ci95'])}"
                if entry.get(p) is not None:
                    text += f", Holm p {entry[p]:.3f}"
                if entry.get("n"):
                    text += f", n = {entry['n']}"
                drawing.interval(axes, shown, "change", y[j], *arms[arm], filled=clear, text=text)
        axes.tick_params(axis="y", labelleft=i == 0)
        axes.set(title=title if both else "")
    figure.supxlabel("against base (points), 95 % interval; right = worse", fontsize=9.5)
    drawing.legend(figure, arms)
    return figure


def trajectory(
    results: Mapping[str, Any], trajectories: Sequence[Mapping[str, Any]]
) -> "Figure | None":
    """Refusal, answers and invalid rate over steps: a panel per domain, a line per arm and seed."""
    runs = [run for run in trajectories if run["points"]]
    if not runs:
        return None
    look = arm_look(results)
    seen = {d for run in runs for point in run["points"] for d in point.get("refusal", {})}
    panels: list[tuple[str, Callable]] = [
        (titled(d, results), _domain_rate(d)) for d in ordered_domains(results) if d in seen
    ]
    if any("shares" in point for run in runs for point in run["points"]):
        panels.insert(1, ("Target answered", _target_answered(results["target"])))
    panels.append(("Invalid, worst domain", lambda point: point.get("invalid_rate")))
    columns = 3 if len(panels) % 3 == 0 else 4
    figure, grid = drawing.panels(len(panels), columns, height_inches=1.75)
    for axes, (title, value) in zip(grid, panels, strict=True):
        for run in runs:
            points = [(p["step"], value(p)) for p in run["points"] if value(p) is not None]
            if points:
                steps = [step for step, _ in points]
                rates = [100 * rate for _, rate in points]
                colour, marker = look.get(run["arm"], (INK, "o"))
                axes.plot(steps, rates, color=colour, linewidth=1, alpha=0.8)
                measured = axes.plot(steps, rates, marker, color=colour, markersize=2.4)
                where = f"{title}, {run['arm']}, seed {run['seed']}, step"
                drawing.tip(
                    measured[0],
                    *(f"{where} {n}: {rate:.1f} %" for n, rate in zip(steps, rates, strict=True)),
                )
                axes.plot(steps[-1], rates[-1], marker, color=colour, markersize=5)
        axes.set(title=title, ylim=(-4, 104), yticks=(0, 50, 100))
        axes.grid(axis="y")
    figure.supxlabel("optimiser step", fontsize=9.5)
    figure.supylabel("% of responses", fontsize=9.5)
    drawing.legend(
        figure, {arm: look.get(arm, (INK, "o")) for arm in dict.fromkeys(r["arm"] for r in runs)}
    )
    return figure


def entanglement(results: Mapping[str, Any], centred: bool) -> "Figure | None":
    """Cosine with the target's concept by layer, with its null and its ceiling."""
    from matplotlib.ticker import MaxNLocator

    table, suffix = results["entanglement"], "_centred" if centred else ""
    cosine = table.get("cosine" + suffix)
    domains = [
        d for d in ordered_domains(results) if d in (cosine or {}) and d != results["target"]
    ]
    if not domains:
        return None
    first = min(_first_known(cosine[d]) for d in domains)
    layers = table["layers"][first:]
    figure, grid = drawing.panels(len(domains), columns=3, height_inches=1.9)
    for axes, domain in zip(grid, domains, strict=True):
        found = {
            name: table.get(name + suffix, {}).get(domain, [])[first:]
            for name in ("cosine", "ci95", "null_interval", "null95", "ceiling")
        }
        _early(axes, results)
        _similarity(axes, label(domain), layers, found)
        axes.set(title=label(domain), xlim=(layers[0] - 0.4, layers[-1] + 0.4))
        axes.grid(axis="y")
    drawing.share_y(grid)
    low, high = grid[0].get_ylim()
    for axes in grid:
        axes.set_ylim(max(-1.05, low), min(1.05, high))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    figure.supxlabel("layer (0 = embeddings)", fontsize=9.5)
    figure.supylabel("centred cosine" if centred else "cosine", fontsize=9.5)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _similarity(
    axes: "Axes", name: str, layers: Sequence[int], found: Mapping[str, Sequence[Any]]
) -> None:
    """One domain's curve with its interval, null and ceiling."""
    colour = COLOURS[1]
    null: dict[str, Any] = {"color": INK, "alpha": 0.12, "linewidth": 0}
    band: dict[str, Any] = {"color": colour, "alpha": 0.2, "linewidth": 0}
    line: dict[str, Any] = {"color": INK, "linewidth": 1}
    if found["null_interval"]:
        low, high = (_gaps([x and x[i] for x in found["null_interval"]]) for i in (0, 1))
        axes.fill_between(layers, low, high, **null, label="permutation null, central 95 %")
    elif found["null95"]:
        # Results of before have its upper end alone.
        axes.plot(layers, _gaps(found["null95"]), ":", **line, label="null, 95th percentile")
    if found["ceiling"]:
        axes.plot(layers, _gaps(found["ceiling"]), "--", **line, label="split-half ceiling")
    if found["ci95"]:
        low, high = (_gaps([x and x[i] for x in found["ci95"]]) for i in (0, 1))
        axes.fill_between(layers, low, high, **band, label="95 % interval")
    axes.plot(layers, _gaps(found["cosine"]), color=colour, linewidth=1.8, label="observed")
    known = [i for i, x in enumerate(found["cosine"]) if x is not None]
    values = [found["cosine"][i] for i in known]
    (marks,) = axes.plot([layers[i] for i in known], values, ".", color=colour, markersize=5)
    texts = []
    for i, value in zip(known, values, strict=True):
        text = f"{name}, layer {layers[i]}: {value:z.2f}".replace("-", "−")
        texts.append(f"{text} {_bounds(found['ci95'][i], 1, 2) if found['ci95'] else ''}".strip())
    drawing.tip(marks, *texts)


def _first_known(values: Sequence[float | None]) -> int:
    """The first layer that has a value: there is none at layer 0 of the last token."""
    return next((i for i, x in enumerate(values) if x is not None), 0)


def _gaps(values: Sequence[float | None]) -> list[float]:
    """None as NaN, drawn as a gap: a vector may be zero, as at layer 0 of the last token."""
    return [math.nan if x is None else x for x in values]


def entanglement_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map, layer by domain, of the cosine with the target (centred where available)."""
    table = results["entanglement"]
    name = "cosine_centred" if table.get("cosine_centred") else "cosine"
    values = {d: v for d, v in table.get(name, {}).items() if d != results["target"]}
    if not values:
        return None
    score = results.get("forecast", {}).get("score", {})
    order = sorted(values, key=lambda d: -(score.get(d) or 0))
    intervals = table.get(name.replace("cosine", "ci95"), {})
    notes = {d: [_bounds(x, 1, 2) for x in intervals[d]] for d in order if d in intervals}
    return heat_map({"": {d: values[d] for d in order}}, name.replace("_", ", "), notes={"": notes})


def erasure_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map, layer by domain, of erasure: a panel per arm, one scale."""
    return _arm_maps(results, "erasure", "erasure")


def angle_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map, layer by domain, of the angle from base to unlearned concept, a panel per arm."""
    return _arm_maps(results, "angle_degrees", "angle (degrees)", digits=0)


def patching_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map of refusal log-odds restored by the base's residual stream, a panel per arm."""
    arms = results.get("patching") or {}
    restored = {
        arm: {d: [x - row[0] for x in row] for d, row in rows.items()} for arm, rows in arms.items()
    }
    return _arm_maps({**results, "patching": restored}, "patching", "log-odds restored (nats)")


def sweep_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map of the change in refusal log-odds when a direction is ablated at one layer."""
    sweep = results.get("sweep")
    if not sweep:
        return None
    ablated, target = sweep["change"]["ablated"], results["target"]
    order = [d for d in ordered_domains(results) if d in sweep["clean"]]
    directions = {
        "own direction ablated": {d: d for d in order},
        f"{label(target)} direction ablated": dict.fromkeys(order, target),
        "random direction ablated": dict.fromkeys(order, "random"),
    }
    spread = sweep.get("ablated_ci95", {})
    counted = f"n = {sweep['prompts_per_domain']} prompts"
    notes = {
        title: {
            d: [
                f"{_bounds(x, 1, 2)} {counted}".strip()
                for x in spread.get(of[d], {}).get(d, [None] * len(ablated[of[d]][d]))
            ]
            for d in order
        }
        for title, of in directions.items()
    }
    shown = {title: {d: ablated[of[d]][d] for d in order} for title, of in directions.items()}
    return heat_map(shown, "change of log-odds (nats)", notes=notes)


def _arm_maps(
    results: Mapping[str, Any], field: str, quantity: str, digits: int = 2
) -> "Figure | None":
    arms = {arm: rows for arm, rows in (results.get(field) or {}).items() if rows}
    order = ordered_domains(results)
    panels = {arm: {d: rows[d] for d in order if d in rows} for arm, rows in arms.items()}
    return heat_map(panels, quantity, digits=digits) if panels else None


def forecast(results: Mapping[str, Any], arm: str) -> "Figure | None":
    """Forecast against the measured drop of `arm`, and the rank correlation by layer."""
    from matplotlib.gridspec import GridSpec

    measured, score = results["ema"].get(arm, {}), results["forecast"].get("score", {})
    domains = [d for d in score if (measured.get(d) or {}).get("drop") is not None]
    domains = [d for d in domains if d != results["target"] and score[d] is not None]
    if not domains:
        return None
    by_layer = results["forecast"].get("layer_spearman")
    figure = drawing.blank(3.6)
    grid = GridSpec(1, 2, figure, width_ratios=(1.5, 1))
    axes = figure.add_subplot(grid[0, 0] if by_layer else grid[0, :])
    if min(measured[d]["ci95"][0] for d in domains) < 0.1:  # else zero would squeeze them together
        axes.axhline(0, color=INK, linewidth=0.7)
    for domain in domains:
        entry, x = measured[domain], score[domain]
        low, high = entry["ci95"]
        text = (
            f"{label(domain)}: forecast {x:z.3f}, measured drop {100 * entry['drop']:z.1f} points "
            f"{_bounds(entry['ci95'])}"
        ).replace("-", "−")
        bar = axes.plot((x, x), (100 * low, 100 * high), color=COLOURS[1], linewidth=1, alpha=0.5)
        dot = axes.plot(x, 100 * entry["drop"], "o", color=COLOURS[1], markersize=6)
        for artist in (*bar, *dot):
            drawing.tip(artist, text)
    axes.margins(x=0.3)
    places = {d: (score[d], 100 * measured[d]["drop"]) for d in domains}
    bars = [(score[d], *(100 * x for x in measured[d]["ci95"])) for d in domains]
    drawing.name_points(axes, places, (4.6, 2.9) if by_layer else (8, 2.9), bars)
    axes.grid()
    axes.set(
        xlabel="forecast from the base model's early layers",
        ylabel=f"measured drop, {arm} (points)",
    )
    if by_layer:
        right = figure.add_subplot(grid[0, 1])
        _early(right, results)
        values = [float("nan") if v is None else v for v in by_layer]
        right.axhline(0, color=INK, linewidth=0.7)
        right.plot(range(len(values)), values, color=COLOURS[1], linewidth=1.2)
        known = {i: v for i, v in enumerate(values) if not math.isnan(v)}
        (dots,) = right.plot(list(known), list(known.values()), ".", color=COLOURS[1])
        texts = (f"layer {i}: ρ = {v:z.2f}".replace("-", "−") for i, v in known.items())
        drawing.tip(dots, *texts)
        right.set(ylim=(-1.05, 1.05), xlabel="layer", ylabel="Spearman ρ (exploratory)")
        right.grid(axis="y")
    return figure


def _domain_rate(domain: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda point: point.get("refusal", {}).get(domain)


def _target_answered(target: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda point: point.get("shares", {}).get(target, {}).get("complied")


def _early(axes: "Axes", results: Mapping[str, Any]) -> None:
    """Shades the layers that the forecast reads."""
    layers = results.get("forecast", {}).get("early_layers")
    if layers:
        axes.axvspan(min(layers) - 0.5, max(layers) + 0.5, color=SHADE, linewidth=0, zorder=0)
