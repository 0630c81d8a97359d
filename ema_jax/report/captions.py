"""The text of each figure of a study's report: its description for screen readers, its caption."""

_EARLY = " Shaded layers are the early ones that the forecast reads."

CAPTIONS = {
    "shares": (
        "Shares of refused, complied, off-topic and degenerate responses per domain and arm",
        "Shares of all responses, in per cent; the top row is the target. An unlearned "
        "target should turn from refused to complied, and every other row should not change. "
        "Hatched is damage: no answer and no refusal.",
    ),
    "refusal": (
        "Refusal rate per domain and arm with 95 % intervals",
        "Refusal before and after. The top row is the target and should move left; every other row "
        "should not move. Ticks are single seeds. Point at a mark for its counts.",
    ),
    "trajectory": (
        "Refusal rate over optimiser steps, one panel per domain",
        "Refusal on the development prompts during training; each line is a seed, small "
        "marks are measurements, the large one is where it stopped. Invalid responses must stay "
        "near zero, the target's included, for the rest to count.",
    ),
    "ema": (
        "Off-target drop in refusal and rise in compliance per domain and arm, 95 % intervals",
        "Spill: how many points of refusal each untouched domain lost among valid responses "
        "(left), and of compliance it gained over all responses (right). Filled markers: Holm "
        "p < 0.05 and an interval without zero. Where only the left one moves, refusals turned "
        "into damage.",
    ),
    "entanglement_centred": (
        "centred cosine of each domain's concept with {target}, by layer",
        "Entanglement with {target}, centred cosine: read the line against the null (grey), not "
        "against 0, since centring on the domains' mean puts unrelated domains a little below 0."
        + _EARLY,
    ),
    "entanglement": (
        "raw cosine of each domain's concept with {target}, by layer",
        "Entanglement with {target}, raw cosine: read the line against the null (grey), not "
        "against 0, since a contrast set shared by both concepts lifts unrelated domains to about "
        "0.5." + _EARLY,
    ),
    "entanglement_map": (
        "Heat map of entanglement with {target}, domains by layers",
        "Entanglement with {target} at a glance; domains by descending forecast, red = similar, "
        "blue = opposed.",
    ),
    "erasure": (
        "Heat maps of erasure, domains by layers, one panel per arm",
        "Share of each domain's base concept that is lost: 0 = untouched, 1 = no component along "
        "the base vector left, below 0 = grown.",
    ),
    "angle": (
        "Heat maps of the angle between base and unlearned concepts, domains by layers",
        "How far each domain's concept turned, in degrees: 0 = same direction, 90 = unrelated.",
    ),
    "patching": (
        "Heat maps of refusal restored by the base's residual stream, domains by layers",
        "Where unlearning acts: log-odds of refusal restored when the base runs up to layer l and "
        "the unlearned model from there. The layers over which a row turns red are those whose "
        "change removed its refusal.",
    ),
    "sweep": (
        "Heat maps of refusal log-odds lost to ablation in the untouched model",
        "Directions that mediate refusal in the untouched model: change of its log-odds when one "
        "is ablated at one layer alone. Blue = refusal falls; the random direction is the control. "
        "Point at a cell for its number of prompts, and its interval where it was recorded.",
    ),
    "forecast": (
        "Forecast against measured drop per domain",
        "Forecast against measurement, bars 95 % intervals of the drop. A good forecast rises to "
        "the right. The profile by layer is exploratory: many layers, few domains." + _EARLY,
    ),
}
"""Figure → description and caption; `{target}` is the target's name."""
