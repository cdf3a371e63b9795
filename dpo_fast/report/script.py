"""The script of the page: the read-out of charts, and the buttons that show and hide.

It sets text by textContent alone, so that names of runs stay text.
"""

SCRIPT = """
'use strict';
const tip = document.getElementById('tip');
const split = (text, sep) => text ? text.split(sep) : [];
const written = (value, percent) => {
  if (percent) return Number((100 * value).toFixed(1)) + ' %';
  const size = Math.abs(value);
  const short = size !== 0 && (size < 1e-3 || size >= 1e9) ? value.toExponential(3)
    : size >= 1000 ? Math.round(value * 10) / 10 + '' : Number(value.toPrecision(4)) + '';
  return short.replaceAll('-', '\\u2212');
};
const charts = [...document.querySelectorAll('figure svg[role=img]')].map(svg => ({
  svg, left: +svg.dataset.left, right: +svg.dataset.right,
  first: +svg.dataset.first, last: +svg.dataset.last, cursor: svg.querySelector('.cursor'),
  curves: [...svg.querySelectorAll('.curve')].map(mark => ({ mark, name: mark.dataset.name,
    points: split(mark.dataset.values, ' ').map(pair => pair.split(',').map(Number)) })),
  areas: [...svg.querySelectorAll('.area')].map(mark => ({ mark, name: mark.dataset.name,
    bins: split(mark.dataset.bins, '|'), ranges: split(mark.dataset.ranges, '|') })) }));
const curveCharts = charts.filter(chart => chart.curves.length);

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step)
    ? points[low] : points[high];
}
function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
const toned = mark => [...mark.classList].filter(
  name => name !== 'curve' && name !== 'area').join(' ');

function lines(chart, at) {
  if (chart.areas.length) {
    const bins = chart.areas[0].ranges.length;
    const share = (at - chart.first) / (chart.last - chart.first);
    const bin = Math.min(bins - 1, Math.floor(share * bins));
    return { head: chart.areas[0].ranges[bin], rows: chart.areas
      .filter(area => !area.mark.classList.contains('off'))
      .map(area => [area.mark, area.name, area.bins[bin]]) };
  }
  const rows = chart.curves.filter(curve => !curve.mark.classList.contains('off'))
    .map(curve => [curve, ...nearest(curve.points, at)]);
  if (!rows.length) return { head: '', rows: [] };
  const step = rows.reduce((a, b) => Math.abs(b[1] - at) < Math.abs(a[1] - at) ? b : a)[1];
  return { head: 'step ' + step.toLocaleString('en'), rows: rows.map(([curve, where, value]) =>
    [curve.mark, curve.name + (where === step ? '' : ' at ' + where.toLocaleString('en')),
      written(value, 'percent' in chart.svg.dataset)]) };
}
function fill(chart, at) {
  const { head, rows } = lines(chart, at);
  tip.replaceChildren(element('b', '', head));
  for (const [mark, name, value] of rows) {
    const row = element('div', 'row');
    row.append(element('i', 'swatch ' + toned(mark)), element('span', '', name),
      element('b', '', value));
    tip.append(row);
  }
}
function place(chart, at) {
  const box = chart.svg.getBoundingClientRect();
  const scale = box.width / chart.svg.viewBox.baseVal.width;
  const share = (at - chart.first) / (chart.last - chart.first || 1);
  const x = box.left + scale * (chart.left + (chart.right - chart.left) * share);
  tip.hidden = false;
  const wide = tip.offsetWidth, page = document.documentElement.clientWidth;
  const left = x + 12 + wide > page - 6 ? x - 12 - wide : x + 12;
  tip.style.left = Math.max(6, Math.min(left, page - 6 - wide)) + 'px';
  tip.style.top = Math.max(6, box.top + 18) + 'px';
}
function show(chart, at) {
  chart.at = at = Math.min(chart.last, Math.max(chart.first, at));
  for (const other of chart.curves.length ? curveCharts : [chart]) {
    const share = (at - other.first) / (other.last - other.first || 1);
    const x = other.left + (other.right - other.left) * share;
    other.cursor.setAttribute('x1', x); other.cursor.setAttribute('x2', x);
  }
  fill(chart, at);
  place(chart, at);
}
function hide() {
  tip.hidden = true;
  for (const chart of charts) {
    chart.cursor.setAttribute('x1', -9); chart.cursor.setAttribute('x2', -9);
  }
}
for (const chart of charts) {
  const step = (chart.last - chart.first) / (chart.areas.length ? chart.areas[0].ranges.length : 50);
  chart.svg.addEventListener('pointermove', event => {
    const box = chart.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.svg.viewBox.baseVal.width / box.width;
    show(chart, chart.first
      + (x - chart.left) / (chart.right - chart.left) * (chart.last - chart.first));
  });
  chart.svg.addEventListener('pointerleave', hide);
  chart.svg.addEventListener('blur', hide);
  chart.svg.addEventListener('keydown', event => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') hide();
    if (!way) return;
    event.preventDefault();
    show(chart, (chart.at ?? (way > 0 ? chart.first - step / 2 : chart.last + step / 2)) + way * step);
  });
}
addEventListener('scroll', hide, { passive: true });
for (const button of document.querySelectorAll('.chips button')) {
  button.addEventListener('click', () => {
    button.setAttribute('aria-pressed', button.getAttribute('aria-pressed') !== 'true');
    const off = [...document.querySelectorAll('.chips button[aria-pressed=false]')];
    const runs = off.map(each => each.dataset.run), kinds = off.map(each => each.dataset.kind);
    for (const { mark, name } of charts.flatMap(chart => [...chart.curves, ...chart.areas])) {
      const kind = mark.classList.contains('eval') ? 'eval'
        : mark.classList.contains('train') ? 'train' : 'none';
      mark.classList.toggle('off', runs.includes(name) || kinds.includes(kind));
    }
  });
}
"""
