"""The style sheet of the page."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1b1e24; --soft: #5a616d; --faint: #69707c;
  --edge: #e4e4df; --grid: #ecece8; --train: #69717f; --eval: #1b1e24;
  --chosen: #0868b4; --rejected: #c65102; --alert: #a15c00; --alert-paper: #fff7e8;
  --good: #1a7f5a; --shade: 0 4px 18px rgb(20 24 32 / 0.14);
  --run0: #0868b4; --run1: #c65102; --run2: #1a7f5a; --run3: #a0358e; --run4: #8a6d00;
  --run5: #5b4fc7; --run6: #b3263a; --run7: #0f7c8a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1b1e23; --ink: #e9ebee; --soft: #a7adb8; --faint: #8b929e;
  --edge: #2c3037; --grid: #282c33; --train: #8b94a4; --eval: #f2f4f7;
  --chosen: #5fb0f0; --rejected: #f3924a; --alert: #f0b35a; --alert-paper: #29231a;
  --good: #5cc79c; --shade: 0 4px 18px rgb(0 0 0 / 0.5);
  --run0: #5fb0f0; --run1: #f3924a; --run2: #5cc79c; --run3: #e083d0; --run4: #d8bb4a;
  --run5: #a79bff; --run6: #f07f8c; --run7: #5cc8d6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  }
main { max-width: 1400px; margin: 0 auto; padding: 36px 28px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 44px 0 12px; }
h3 { font-size: 14px; margin: 0; }
p { margin: 0; }
h1, h2, h3, h4, p, li, summary { overflow-wrap: anywhere; }
.sub, .legend, .notes, footer { color: var(--soft); }
.sub { overflow-wrap: anywhere; }
.grid-of { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); }
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
figure { display: flex; flex-direction: column; justify-content: space-between; gap: 6px; }
figcaption p { font-size: 12.5px; line-height: 1.45; color: var(--soft); }
figure svg { display: block; width: 100%; height: auto; touch-action: pan-y; border-radius: 4px; }
figure svg:focus { outline: none; } figure svg:focus-visible { outline: 2px solid var(--chosen); }
svg text { font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .hint { font-size: 9.5px; fill: var(--faint); }
svg .unit { font-size: 10px; }
svg .label { font-size: 11px; font-weight: 600; }
@media (max-width: 540px) { svg text { font-size: 12px; } svg .hint, svg .unit { font-size: 11px; }
  svg .label { font-size: 12.5px; } }
.grid { stroke: var(--grid); } .axis { stroke: var(--faint); stroke-width: 0.8; }
.epoch { stroke: var(--edge); } .resumed { stroke: var(--alert); stroke-width: 0.8; opacity: 0.6; }
.rule { stroke: var(--faint); stroke-width: 0.8; stroke-dasharray: 1.5 2.5; }
.cursor { stroke: var(--soft); stroke-width: 0.8; }
.plain { --tone: var(--train); } .plain.eval { --tone: var(--eval); }
.chosen { --tone: var(--chosen); } .rejected { --tone: var(--rejected); }
.run-0 { --tone: var(--run0); } .run-1 { --tone: var(--run1); } .run-2 { --tone: var(--run2); }
.run-3 { --tone: var(--run3); } .run-4 { --tone: var(--run4); } .run-5 { --tone: var(--run5); }
.run-6 { --tone: var(--run6); } .run-7 { --tone: var(--run7); }
svg .label { fill: var(--tone); }
.curve polyline { fill: none; stroke: var(--tone); stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round; }
.curve .raw { stroke-width: 0.8; opacity: 0.38; }
.curve .mean { stroke-width: 2; }
.curve .dash { stroke-width: 1.2; stroke-dasharray: 3 4; }
.curve circle { fill: var(--tone); stroke: var(--card); stroke-width: 1.2; }
.dashed-1 .line, .dashed-1 .mean { stroke-dasharray: 7 3; }
.dashed-2 .line, .dashed-2 .mean { stroke-dasharray: 2 3; }
[class*="run-"].train polyline { stroke-width: 1.5; opacity: 0.6; }
.area polygon { fill: var(--tone); fill-opacity: 0.16; stroke: var(--tone); stroke-width: 1.4;
  stroke-linejoin: round; }
[class*="run-"].area polygon { fill-opacity: 0.05; }
.off { display: none; }
#tip { position: fixed; z-index: 3; pointer-events: none; max-width: min(320px, 92vw);
  background: var(--card); color: var(--ink); border: 1px solid var(--edge); border-radius: 8px;
  box-shadow: var(--shade); padding: 7px 11px; font-size: 12.5px; line-height: 1.5;
  font-variant-numeric: tabular-nums; }
#tip[hidden] { display: none; }
#tip .row { display: flex; gap: 7px; align-items: center; }
#tip .row span { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; color: var(--soft); }
.swatch { display: inline-block; flex: none; width: 10px; height: 10px; border-radius: 3px;
  background: var(--tone); margin-right: 7px; }
#tip .swatch { margin: 0; } #tip .swatch.eval { border-radius: 50%; }
.swatch.dashed-1, .swatch.dashed-2 { background: none; border: 2px dashed var(--tone); }
.swatch.dashed-2 { border-style: dotted; }
.chips { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 6px;
  align-items: center; margin: 36px -8px -24px; padding: 8px; background: var(--paper);
  max-height: 40vh; overflow-y: auto; }
.chips .gap { flex: 1; }
.chips button { font: inherit; font-size: 13px; color: var(--ink); background: var(--card);
  border: 1px solid var(--edge); border-radius: 999px; padding: 3px 12px; cursor: pointer;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.chips button[aria-pressed=false] { opacity: 0.45; text-decoration: line-through; }
.chips svg { width: 30px; height: 11px; vertical-align: -1px; margin-right: 5px; }
.scroll { overflow-x: auto; } .wide th, .wide td { min-width: 92px; }
table { border-collapse: collapse; font-size: 13.5px; width: 100%; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--edge);
  vertical-align: top; max-width: 60ch; overflow-wrap: break-word; }
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
.sample .answers > .chosen { border-color: var(--chosen); }
.sample .answers > .rejected { border-color: var(--rejected); }
.sample .facts { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; margin-bottom: 4px; }
.sample .facts b { color: var(--ink); font-variant-numeric: tabular-nums; }
.sample .prompt { max-height: 14em; }
.side { display: grid; gap: 12px; min-width: 0; } .side .legend { margin: -8px 0 0; }
.side .more { margin-top: 0; } .side .more summary { font-size: 13.5px; color: var(--soft); }
.side .more .card { margin-top: 12px; }
.note { color: var(--soft); border-left: 3px solid var(--alert); padding: 2px 0 2px 12px;
  margin: 10px 0; max-width: 110ch; }
.once { margin-top: 16px; max-width: 640px; }
.each h3 { margin: 18px 0 8px; }
.versions { color: var(--soft); font-size: 13px; margin-top: 12px; overflow-wrap: anywhere; }
code { font: 12.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
section > .grid-of + .grid-of { margin-top: 16px; }
details section:first-of-type { margin-top: 16px; }
.none { color: var(--faint); font-style: italic; }
details { margin-top: 44px; } summary { cursor: pointer; font-weight: 600; font-size: 17px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  margin: 12px 0 0; }
footer { margin-top: 40px; font-size: 12.5px; }
@media print { .card { break-inside: avoid; } }
"""
