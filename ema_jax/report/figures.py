"""Charts of a study, drawn with matplotlib's object interface: no global state, no clock.

Every function takes (parts of) `results.json`, schema 1, and returns a matplotlib `Figure`, or None
where the study has nothing to draw; `drawing.save` writes it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ema_jax.report import drawing
from ema_jax.report.drawing import COLOURS, INK, PAGE, SHADE, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALPHA = 0.05  # level at which a Holm-adjusted p is significant


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
    """Refusal rate per domain and arm: a marker, its 95 % interval, and a dot for every seed."""
    domains, look = ordered_domains(results), arm_look(results)
    figure = drawing.blank(0.27 * len(domains) * len(look) * 0.75 + 1.2)
    axes = figure.subplots()
    for arm, y in drawing.rows(axes, [titled(d, results) for d in domains], look):
        colour, marker = look[arm]
        entry = results["arms"][arm]
        for i, domain in enumerate(domains):
            drawing.interval(axes, entry["refusal"].get(domain), "rate", y[i], colour, marker)
            for seed in entry.get("seeds", {}).values():
                rate = seed["refusal"].get(domain, {}).get("rate")
                if rate is not None:
                    axes.plot(100 * rate, y[i], "|", color=colour, markersize=7, alpha=0.55)
    axes.set(xlim=(-1, 101), xlabel="refusal rate (% of valid responses), 95 % interval")
    axes.get_yticklabels()[0].set_fontweight("bold")
    drawing.legend(figure, look)
    return figure


def ema(results: Mapping[str, Any]) -> "Figure | None":
    """Off-target changes in points with 95 % intervals; filled where Holm p < 0.05.

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
                clear = entry.get(p) is not None and entry[p] < ALPHA
                shown = {"change": entry.get(key), "ci95": entry.get(bounds)}
                drawing.interval(axes, shown, "change", y[j], *arms[arm], filled=clear)
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
                steps, rates = zip(*points, strict=True)
                colour, marker = look.get(run["arm"], (INK, "o"))
                axes.plot(steps, [100 * r for r in rates], color=colour, linewidth=1, alpha=0.8)
                axes.plot(steps[-1], 100 * rates[-1], marker, color=colour, markersize=4)
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
    table, suffix = results["entanglement"], "_centred" if centred else ""
    cosine = table.get("cosine" + suffix)
    domains = [
        d for d in ordered_domains(results) if d in (cosine or {}) and d != results["target"]
    ]
    if not domains:
        return None
    layers = table["layers"]
    figure, grid = drawing.panels(len(domains), columns=3, height_inches=1.9)
    colour = COLOURS[1]
    for axes, domain in zip(grid, domains, strict=True):
        _early(axes, results)
        band = table.get("ci95" + suffix, {}).get(domain)
        if band:
            low, high = (_gaps([x and x[i] for x in band]) for i in (0, 1))
            axes.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        null = _gaps(table.get("null95" + suffix, {}).get(domain, []))
        if null:
            axes.fill_between(layers, -1, null, color=INK, alpha=0.1, linewidth=0)
            axes.plot(
                layers, null, ":", color=INK, linewidth=1, label="95 % of the permutation null"
            )
        ceiling = _gaps(table.get("ceiling" + suffix, {}).get(domain, []))
        if ceiling:
            axes.plot(layers, ceiling, "--", color=INK, linewidth=1, label="split-half ceiling")
        observed = _gaps(cosine[domain])
        axes.plot(layers, observed, color=colour, linewidth=1.8, label="observed")
        lowest = min([0.0, *(x for x in (*observed, *null) if not math.isnan(x))])
        axes.set(title=label(domain), ylim=(max(-1, lowest - 0.1), 1.05))
        axes.grid(axis="y")
    drawing.share_y(grid)
    figure.supxlabel("layer (0 = embeddings)", fontsize=9.5)
    figure.supylabel("centred cosine" if centred else "cosine", fontsize=9.5)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


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
    return drawing.heat_map({"": {d: values[d] for d in order}}, name.replace("_", ", "))


def erasure_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map, layer by domain, of erasure: a panel per arm, one scale."""
    return _arm_maps(results, "erasure", "erasure")


def angle_map(results: Mapping[str, Any]) -> "Figure | None":
    """Heat map, layer by domain, of the angle from base to unlearned concept, a panel per arm."""
    return _arm_maps(results, "angle_degrees", "angle (degrees)")


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
    panels = {
        "own direction ablated": {d: ablated[d][d] for d in order},
        f"{label(target)} direction ablated": {d: ablated[target][d] for d in order},
        "random direction ablated": {d: ablated["random"][d] for d in order},
    }
    return drawing.heat_map(panels, "change of log-odds (nats)")


def _arm_maps(results: Mapping[str, Any], field: str, quantity: str) -> "Figure | None":
    arms = {arm: rows for arm, rows in (results.get(field) or {}).items() if rows}
    order = ordered_domains(results)
    panels = {arm: {d: rows[d] for d in order if d in rows} for arm, rows in arms.items()}
    return drawing.heat_map(panels, quantity) if panels else None


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
    axes.axhline(0, color=INK, linewidth=0.7)
    for domain in domains:
        entry, x = measured[domain], score[domain]
        low, high = entry["ci95"]
        axes.plot((x, x), (100 * low, 100 * high), color=COLOURS[1], linewidth=1, alpha=0.5)
        axes.plot(x, 100 * entry["drop"], "o", color=COLOURS[1], markersize=6)
    axes.margins(x=0.3)
    drawing.name_points(axes, {d: (score[d], 100 * measured[d]["drop"]) for d in domains})
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
        right.plot(range(len(values)), values, color=COLOURS[1], marker=".", linewidth=1.2)
        right.set(ylim=(-1.05, 1.05), xlabel="layer", ylabel="Spearman ρ (exploratory)")
        right.grid(axis="y")
    return figure


def replication(report: Mapping[str, Any]) -> "Figure | None":
    """Mean (filled) and worst (hollow) off-target drop per target and arm, a panel per family."""
    rows = [r for r in report.get("rows", []) if r.get("mean_off_target_drop") is not None]
    if not rows:
        return None
    families = list(dict.fromkeys(r["family"] for r in rows))
    targets = list(dict.fromkeys(r["target"] for r in rows))
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    look = drawing.looks(targets)
    figure, grid = drawing.panels(
        len(families), columns=2, height_inches=0.3 * len(arms) * len(targets) + 0.7
    )
    for axes, family in zip(grid, families, strict=True):
        axes.axvline(0, color=INK, linewidth=0.9)
        for target, y in drawing.rows(axes, arms, look):
            colour, marker = look[target]
            for row in rows:
                if (row["family"], row["target"]) != (family, target):
                    continue
                if row.get("mean_off_target_drop") is None:
                    continue
                height, mean = y[arms.index(row["arm"])], 100 * row["mean_off_target_drop"]
                if row.get("worst_drop") is not None:
                    worst = 100 * row["worst_drop"]
                    axes.plot((mean, worst), (height, height), color=colour, linewidth=1.2)
                    axes.plot(worst, height, marker, color=colour, markerfacecolor=PAGE)
                axes.plot(mean, height, marker, color=colour)
        axes.set(title=family)
    low = min(axes.get_xlim()[0] for axes in grid)
    high = max(axes.get_xlim()[1] for axes in grid)
    for axes in grid:
        axes.set_xlim(low, high)
    figure.supxlabel(
        "off-target drop in refusal rate (points): filled = mean, hollow = worst", size=9.5
    )
    drawing.legend(figure, {f"target {t}": look[t] for t in targets})
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
