"""The roofline as a picture: an SVG file, which needs no library."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from math import ceil, floor, log10

from shoal.server.planner.plan import Plan
from shoal.terminal import in_words

_WIDTH, _HEIGHT, _MARGIN = 800, 480, 80
_COLOURS = {"decode": "#0072b2", "prefill": "#d55e00"}  # which colour-blind people can tell apart


def draw(plan: Plan) -> str:
    """The attainable FLOP/s by arithmetic intensity, both axes logarithmic, with the plan's steps on it."""
    rate, bandwidth = plan.facts["computed_in_a_second_flops"], plan.machine.bandwidth
    steps = [step for step in plan.steps if step["length"] == plan.context]
    shown = [rate / bandwidth, *(step["flops_per_byte"] for step in steps)]
    left, right = floor(log10(min(shown))), ceil(log10(max(shown)) + 0.3)
    top = ceil(log10(rate))
    bottom = floor(log10(10.0**left * bandwidth))

    def place(intensity: float, flops: float) -> tuple[float, float]:
        across = (log10(intensity) - left) / (right - left)
        up = (log10(flops) - bottom) / (top - bottom)
        return _MARGIN + across * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN)

    def parts() -> Iterator[str]:
        for power in range(left, right + 1):
            x, y = place(10.0**power, 10.0**bottom)
            yield f'<path class="grid" d="M{x:.1f} {y:.1f}V{_MARGIN}"/>'
            yield f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{10.0**power:g}</text>'
        for power in range(bottom, top + 1):
            x, y = place(10.0**left, 10.0**power)
            yield f'<path class="grid" d="M{x:.1f} {y:.1f}H{_WIDTH - _MARGIN}"/>'
            yield f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{in_words(10.0**power)}</text>'
        corners = [place(10.0**left, 10.0**left * bandwidth), place(rate / bandwidth, rate), place(10.0**right, rate)]
        yield '<path class="roof" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + '"/>'
        for step in steps:
            x, y = place(step["flops_per_byte"], step["flops"] / step["seconds"])
            label = str(step["sequences"]) if step["step"] == "decode" else "prefill"
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{_COLOURS[step["step"]]}">'
            yield f"<title>{label}: {in_words(step['tokens_per_second'])} tokens/s</title></circle>"
            yield f'<text x="{x + 8:.1f}" y="{y + 20:.1f}">{label}</text>'

    title = escape(f"{plan.model} on {plan.machine.name}: decode by sequences, {plan.context:,} tokens each")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">
<style>
text {{ font: 13px sans-serif; fill: #333 }}
.grid {{ stroke: #ddd }}
.roof {{ stroke: #333; stroke-width: 2; fill: none }}
</style>
<rect width="100%" height="100%" fill="white"/>
<text x="{_WIDTH / 2}" y="40" text-anchor="middle">{title}</text>
<text x="{_WIDTH / 2}" y="{_HEIGHT - 24}" text-anchor="middle">FLOP/byte</text>
<text x="20" y="{_HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 20 {_HEIGHT / 2})">FLOP/s</text>
{chr(10).join(parts())}
</svg>
"""
