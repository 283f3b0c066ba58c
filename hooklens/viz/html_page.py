"""The frame of an offline page: its style, its content security policy, and the script that draws its figures."""

import base64
import hashlib
from collections.abc import Sequence

from plotly.offline import get_plotlyjs

from hooklens.viz.text import Html, escape, script_safe

_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8; --accent: #2166ac;
  --mark: #fde3cc; --mark-line: #d9701e; --bar: #d6e4f0; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9ba5b1; --page: #14171b; --card: #1d2126;
  --line: #343a42; --accent: #7ab3e0; --mark: #5a3413; --mark-line: #e39554; --bar: #244a6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.85rem; line-height: 1.25; letter-spacing: -.015em; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.35; margin: 2.75rem 0 .75rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0 0 1rem; white-space: pre-line; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem;
  margin: 0 0 1.25rem; }
.caption { color: var(--soft); font-size: .875rem; line-height: 1.5; margin: .6rem 0 0; }
.wide { overflow-x: auto; }
.plot { min-width: 560px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
th, td { padding: .38rem 1.5rem .38rem 0; white-space: pre-wrap; vertical-align: top; }
td { border-bottom: 1px solid color-mix(in srgb, var(--line) 55%, transparent); max-width: 32rem;
  overflow-wrap: break-word; }
tr:last-child td { border-bottom: 0; }
pre { font-size: .8125rem; line-height: 1.5; margin: 0 0 1.25rem; padding: .7rem 1rem; overflow-x: auto;
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.slider-container { outline: none; }
.slider-container:focus-visible .slider-grip-rect { stroke: var(--accent) !important; stroke-width: 3px !important; }
.number { text-align: right; white-space: nowrap; }
th { vertical-align: bottom; }
th.number { white-space: pre-wrap; }
td:not(.number) { min-width: 4.5rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.75rem, 1fr)); gap: 1rem 1.25rem;
  margin: 0; }
.numbers div { display: flex; flex-direction: column; justify-content: space-between; }
.numbers dt { color: var(--soft); font-size: .8125rem; line-height: 1.35; }
.numbers dd { margin: .1rem 0 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.prompt + .prompt { border-top: 1px solid var(--line); margin-top: 1rem; padding-top: 1rem; }
.prompt h3 { color: var(--soft); font-size: .8125rem; font-weight: 600; }
.tokens { line-height: 2.1; }
.tokens span.token { white-space: pre-wrap; overflow-wrap: anywhere; padding: .18em .3em; margin-right: .12em;
  border-radius: 4px; background: color-mix(in srgb, var(--line) 45%, transparent); }
.tokens span.differs { background: var(--mark); box-shadow: inset 0 -2px 0 var(--mark-line); font-weight: 600; }
.guesses { display: grid; grid-template-columns: 10rem minmax(6rem, 22rem) 3.5rem;
  gap: .2rem .75rem; align-items: center; font-size: .875rem; margin-top: .6rem; font-variant-numeric: tabular-nums; }
.guesses i { display: block; height: .7em; border-radius: 3px; background: var(--bar); min-width: 1px; }
.guesses b { font-weight: 500; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.guesses span.share { color: var(--soft); text-align: right; }
details { margin: 0 0 1.25rem; }
summary { cursor: pointer; color: var(--accent); margin: 0 0 .75rem; }
footer { color: var(--soft); font-size: .8125rem; margin-top: 2.5rem; }
@media (max-width: 600px) { main { padding: 1.5rem .75rem 3rem; } section { padding: .9rem; }
  h1 { font-size: 1.5rem; } .guesses { grid-template-columns: 6rem 1fr 3.5rem; } }
@media print { section { break-inside: avoid; } body { background: none; } }
"""

# Figures with our transparent template follow the page's dark mode; others keep their own colours.
_SCRIPT = """
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
function dressed(layout) {
  const base = layout.template && layout.template.layout;
  if (base && base.paper_bgcolor === "rgba(0,0,0,0)") {
    base.font.color = dark.matches ? "#d5dae0" : "#24292f";
    base.hoverlabel.bgcolor = dark.matches ? "#2a3037" : "#ffffff";
    base.hoverlabel.bordercolor = "#8b949e";
    base.hoverlabel.font.color = base.font.color;
  }
  return layout;
}
const stored = "hooklens " + location.pathname;
let kept = {};  // what the reader had set before the page reloaded itself
try { kept = JSON.parse(sessionStorage.getItem(stored)) || {}; sessionStorage.removeItem(stored); } catch (error) {}
function sliderOf(place) { return ((place.layout || {}).sliders || [])[0]; }
const zoomed = kept.zoomed || {};  // of each figure, the axes that the reader chose a range for
function nearest(labels, label) {  // of a long run, not every step has a place on every page
  const number = (text) => Number(text.replaceAll(",", ""));
  const distances = labels.map((other) => other === label ? 0 : Math.abs(number(other) - number(label)) || Infinity);
  return distances.indexOf(Math.min(...distances));
}
function asBefore(figure, id) {
  const slider = (figure.layout.sliders || [])[0], label = (kept.sliders || {})[id];
  if (slider && label !== undefined) {
    const at = nearest(slider.steps.map((step) => step.label), label);
    slider.active = at;
    figure.data = figure.data.map((trace, i) => ({...trace, ...figure.frames[at].data[i]}));
  }
  for (const [axis, range] of Object.entries(zoomed[id] || {})) {
    figure.layout[axis] = {...figure.layout[axis], range, autorange: false};
  }
}
function noteZoom(place, changes) {
  for (const name of Object.keys(changes)) {
    const [, axis, what] = name.match(/^([xy]axis\\d*)\\.(range|autorange)/) || [];
    if (what === "range") (zoomed[place.id] ||= {})[axis] = place.layout[axis].range;
    if (what === "autorange") delete (zoomed[place.id] || {})[axis];
  }
}
function tellSlider(place) {  // the keyboard and screen readers see it as an HTML slider
  const knob = place.querySelector(".slider-container"), slider = sliderOf(place);
  if (!knob || !slider) return;
  const text = (slider.currentvalue.prefix || "") + slider.steps[slider.active].label;
  const says = {tabindex: 0, role: "slider", "aria-label": place.getAttribute("aria-label"), "aria-valuetext": text,
    "aria-valuemin": 0, "aria-valuemax": slider.steps.length - 1, "aria-valuenow": slider.active};
  for (const [name, value] of Object.entries(says)) knob.setAttribute(name, value);
}
const moves = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5,
  Home: -Infinity, End: Infinity};
document.addEventListener("keydown", (event) => {
  const knob = event.target.closest(".slider-container"), move = moves[event.key];
  if (!knob || !move || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const place = knob.closest(".plot"), slider = sliderOf(place);
  const at = Math.min(Math.max(slider.active + move, 0), slider.steps.length - 1);
  Plotly.animate(place, ...slider.steps[at].args).then(() => tellSlider(place));
});
async function drawIn(place) {
  const figure = JSON.parse(document.getElementById(place.id + "-data").textContent);
  // the buttons are named, because Plotly's own set has one that offers to send the figure to a server
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const config = {responsive: true, displaylogo: false, typesetMath: false, modeBarButtons: buttons};
  asBefore(figure, place.id);
  const first = !place.data;
  await Plotly.react(place, {data: figure.data, layout: dressed(figure.layout), config, frames: figure.frames});
  tellSlider(place);
  if (!first) return;
  place.on("plotly_sliderchange", () => tellSlider(place));
  place.on("plotly_relayout", (changes) => noteZoom(place, changes));
}
function draw(within) {
  const places = [...within.querySelectorAll(".plot")];
  const drawn = places.filter((place) => !place.closest("details:not([open])"));  // the others have no width yet
  return Promise.all(drawn.map(drawIn));
}
document.querySelectorAll("details").forEach((fold, i) => { fold.open = (kept.folds || [])[i] || fold.open; });
draw(document).then(() => {
  const focused = kept.focused && document.querySelector("#" + kept.focused + " .slider-container");
  if (focused) focused.focus({preventScroll: true});
  document.querySelectorAll(".wide").forEach((wide, i) => { wide.scrollLeft = (kept.wides || [])[i] || 0; });
});
if (kept.scroll) scrollTo(0, kept.scroll);
dark.addEventListener("change", () => draw(document));
document.addEventListener("toggle", (event) => draw(event.target), true);  // a fold was opened
"""

# A slider at its last step is not remembered: after the reload it shows the newest.
_RELOAD = """
"use strict";
setInterval(() => {
  if (document.hidden || document.querySelector("body :active")) return;  // nobody looks, or the mouse holds something
  const sliders = {};
  for (const place of document.querySelectorAll(".plot")) {
    const slider = sliderOf(place);
    if (slider && slider.active < slider.steps.length - 1) sliders[place.id] = slider.steps[slider.active].label;
  }
  const folds = [...document.querySelectorAll("details")].map((fold) => fold.open);
  const wides = [...document.querySelectorAll(".wide")].map((wide) => wide.scrollLeft);
  const focused = (document.activeElement.closest(".plot") || {}).id;
  const now = JSON.stringify({sliders, folds, wides, focused, zoomed, scroll: scrollY});
  try { sessionStorage.setItem("hooklens " + location.pathname, now); } catch (error) {}
  location.reload();
}, 1000 * %g);
"""


def page(title: str, parts: Sequence[Html], figures: Sequence[str], footer: str, reload: float | None = None) -> Html:
    """A complete HTML document that loads nothing: `figures` are Plotly figures as JSON, drawn into `#figure-N`.

    With `reload` it reads itself from disk again every so many seconds, and keeps the place and the sliders.

    >>> text = page("<b>", [Html("<p>one</p>")], [], "made here")
    >>> "<h1>&lt;b&gt;</h1>" in text, "connect-src" in text, len(text) < 10_000
    (True, False, True)

    The policy allows only the scripts written here, by their hashes: even if a token slipped through unescaped, the
    browser would refuse to run it.
    """
    scripts = [get_plotlyjs(), _SCRIPT] if figures else []
    scripts += [] if reload is None else [_RELOAD % reload]
    data = [
        f'<script type="application/json" id="figure-{number}-data">{script_safe(figure)}</script>'
        for number, figure in enumerate(figures)
    ]
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>',
        f"<body>\n<main>\n<h1>{escape(title)}</h1>",
        *parts,
        f"<footer>{escape(footer)}</footer>\n</main>",
        *data,
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    return Html("\n".join(lines))


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
