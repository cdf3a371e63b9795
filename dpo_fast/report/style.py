"""The style sheet of the report, and the script of its hover read-out."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1b1e24; --soft: #5d6470; --faint: #8a909b;
  --edge: #e4e4df; --grid: #ecece8; --train: #7b8494; --eval: #1b1e24;
  --chosen: #0868b4; --rejected: #c65102; --alert: #a15c00; --alert-paper: #fff7e8;
  --good: #1a7f5a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1b1e23; --ink: #e9ebee; --soft: #a7adb8; --faint: #7d8490;
  --edge: #2c3037; --grid: #282c33; --train: #8b94a4; --eval: #f2f4f7;
  --chosen: #5fb0f0; --rejected: #f3924a; --alert: #f0b35a; --alert-paper: #29231a;
  --good: #5cc79c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  }
main { max-width: 1280px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 44px 0 12px; }
h3 { font-size: 14px; margin: 0; }
p { margin: 0; }
.sub, .legend, .notes, footer { color: var(--soft); }
.sub { overflow-wrap: anywhere; }
.grid-of { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(350px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 14px 16px; }
.stats { display: grid; gap: 16px; grid-template-columns: repeat(4, minmax(0, 1fr));
  margin-top: 26px; }
@media (max-width: 1080px) { .stats { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 540px) { .stats { grid-template-columns: 1fr; } main { padding: 24px 16px 48px;
  } }
.stats dt { color: var(--soft); font-size: 13px; }
.stats dd { margin: 0; }
.stats .big { font-size: 25px; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -0.01em; white-space: nowrap; }
.stats .from { color: var(--faint); font-weight: 400; }
.stats .more { color: var(--soft); font-size: 12.5px; }
.findings { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
.findings li { background: var(--alert-paper); border-left: 3px solid var(--alert);
  border-radius: 4px 8px 8px 4px; padding: 9px 14px; max-width: 110ch; }
.order { margin-top: 10px; font-size: 13.5px; color: var(--soft); }
.order b { color: var(--good); font-weight: 600; }
.legend { font-size: 13px; margin: -6px 0 12px; display: flex; flex-wrap: wrap; gap: 4px 20px;
  align-items: center; }
.legend svg { width: 34px; height: 12px; vertical-align: -1px; margin-right: 6px; }
figure { margin: 0; }
figcaption { position: relative; min-height: 59px; }
figcaption p, figcaption output { font-size: 12.5px; line-height: 1.45; color: var(--soft); }
figcaption output { position: absolute; inset: 21px 0 auto; background: var(--card);
  min-height: 38px; font-variant-numeric: tabular-nums; color: var(--ink); }
figcaption output:empty { display: none; }
figure svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .hint { font-size: 9.5px; fill: var(--faint); }
svg .label { font-size: 11px; font-weight: 600; }
.grid { stroke: var(--grid); } .axis { stroke: var(--faint); stroke-width: 0.8; }
.epoch { stroke: var(--edge); } .rule { stroke: var(--faint); stroke-width: 0.8;
  stroke-dasharray: 1.5 2.5; }
.cursor { stroke: var(--soft); stroke-width: 0.8; }
.plain.train { --tone: var(--train); } .plain.eval { --tone: var(--eval); }
.chosen { --tone: var(--chosen); } .rejected { --tone: var(--rejected); }
svg .label { fill: var(--tone); }
.curve polyline { fill: none; stroke: var(--tone); stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
.curve .raw { stroke-width: 0.8; opacity: 0.38; }
.curve .mean { stroke-width: 2; }
.curve .dash { stroke-width: 1.2; stroke-dasharray: 3 4; }
.curve circle { fill: var(--tone); stroke: var(--card); stroke-width: 1.2; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.why { overflow-wrap: anywhere; } .seen { color: var(--faint); font-size: 12.5px; }
th:last-child, td:last-child { padding-right: 0; } tr.total td { font-weight: 600; }
.bar { display: flex; height: 8px; gap: 2px; margin-bottom: 12px; }
.bar i { border-radius: 3px; min-width: 3px; }
.kept { background: var(--chosen); } .held { background: var(--chosen); opacity: 0.45; } .lost {
  background: var(--rejected); }
.notes { margin: 10px 0 0; padding-left: 18px; font-size: 13.5px; }
.two { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); align-items: start; }
.samples { display: grid; gap: 16px; }
.sample .prompt { font-weight: 600; }
.sample .answers { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); margin-top: 12px; }
.sample h4 { margin: 0 0 2px; font-size: 12.5px; font-weight: 500; color: var(--soft); }
.sample .text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; max-height: 22em;
  overflow-y: auto; }
.sample .answers > div { border-left: 3px solid var(--edge); padding-left: 12px; }
.sample .answers > .after { border-color: var(--eval); } .sample .answers > .right {
  border-color: var(--chosen); }
.none { color: var(--faint); font-style: italic; }
details { margin-top: 44px; } summary { cursor: pointer; font-weight: 600; font-size: 17px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  margin: 12px 0 0; }
footer { margin-top: 40px; font-size: 12.5px; }
@media print { .card { break-inside: avoid; } }
"""

SCRIPT = """
const charts = [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg');
  const curves = [...svg.querySelectorAll('.curve')].map(curve => ({
    name: curve.dataset.name,
    points: curve.dataset.values.split(' ').map(pair => pair.split(',').map(Number)) }));
  return { svg, curves, left: +svg.dataset.left, right: +svg.dataset.right, last: +svg.dataset.last,
    cursor: svg.querySelector('.cursor'), output: figure.querySelector('output') };
});
const nearest = (points, step) => points.reduce(
  (best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
function show(step) {
  for (const chart of charts) {
    const x = chart.left + (chart.right - chart.left) * step / chart.last;
    chart.cursor.setAttribute('x1', x); chart.cursor.setAttribute('x2', x);
    const texts = new Map();
    for (const curve of chart.curves) {
      const [at, value] = nearest(curve.points, step);
      const text = `${curve.name} ${value.toPrecision(4).replaceAll('-', '\\u2212')}`;
      texts.set(at, [...(texts.get(at) || []), text]);
    }
    chart.output.textContent = [...texts].map(
      ([at, parts]) => `step ${at}: ${parts.join(', ')}`).join(' \\u00b7 ');
  }
}
function hide() {
  for (const chart of charts) {
    chart.cursor.setAttribute('x1', -9); chart.cursor.setAttribute('x2', -9);
    chart.output.textContent = '';
  }
}
for (const chart of charts) {
  chart.svg.addEventListener('pointermove', event => {
    const box = chart.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.svg.viewBox.baseVal.width / box.width;
    const share = (x - chart.left) / (chart.right - chart.left);
    show(Math.min(1, Math.max(0, share)) * chart.last);
  });
  chart.svg.addEventListener('pointerleave', hide);
}
"""
