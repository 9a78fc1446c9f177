"""The report's style sheet: light and dark by the reader's setting, one column on a phone, no fonts to load."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d2126; --soft: #5d6570; --line: #dfe0dc; --track: #ecece7;
  --accent: #14735f; --up: 20 135 100; --down: 196 66 48;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1c1f25; --ink: #e6e8eb; --soft: #9aa2ae; --line: #2f343d; --track: #282c34;
    --accent: #4cc3a5; --up: 60 190 150; --down: 235 110 90;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 0 0 .2rem; letter-spacing: -.005em; }
h3 { font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; }
p { margin: 0 0 .8rem; max-width: 72ch; text-wrap: pretty; }
.kicker { color: var(--soft); font-size: .85rem; margin-bottom: .6rem; }
.lead { font-size: 1.12rem; }
.lead b { font-variant-numeric: tabular-nums; }
.hint { color: var(--soft); font-size: .9rem; }
section { margin-top: 44px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px; }
.facts {
  display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 14px 0 0; padding: 0; list-style: none;
  color: var(--soft); font-size: .9rem;
}
.facts b { color: var(--ink); font-weight: 600; }
.bars { margin-top: 24px; }
.bar { display: grid; grid-template-columns: 11rem 1fr 10.5rem; align-items: center; gap: 0 16px; padding: 7px 0; }
.bar svg { display: block; width: 100%; height: 26px; }
.bar .name { font-weight: 600; }
.bar .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar .value b { font-size: 1.3rem; }
.bar .gain { color: var(--soft); font-size: .88rem; margin-left: .5rem; }
.bar.last .gain { color: var(--accent); font-weight: 600; }
.track { fill: var(--track); }
.tick { stroke: var(--card); stroke-width: 1; }
.whisker { stroke: var(--ink); stroke-width: 2; }
.axis { display: grid; grid-template-columns: 11rem 1fr 10.5rem; gap: 0 16px; color: var(--soft); font-size: .78rem; }
.axis div { grid-column: 2; position: relative; height: 1.2em; }
.axis span { position: absolute; transform: translateX(-50%); }
.about { border-left: 3px solid var(--accent); padding: 2px 0 2px 16px; margin: 24px 0 0; }
.about p:last-child { margin: 0; }
figure { margin: 18px 0 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: 6px; }
.curves {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 18px; margin-top: 16px;
}
.curves img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td {
  padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap;
}
th { color: var(--soft); font-weight: 600; font-size: .84rem; }
th:first-child, td:first-child { text-align: left; }
tbody tr:last-child td { border-bottom: 0; }
tr.mean td { border-top: 2px solid var(--line); font-weight: 600; }
td.best { font-weight: 600; }
td.change { border-radius: 4px; }
.swatch {
  display: inline-block; width: .8em; height: .8em; margin-right: .6em;
  border: 1px solid var(--line); border-radius: 3px;
}
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
pre {
  background: var(--track); border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 10px 0 0;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
footer {
  margin-top: 48px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem;
}
@media (max-width: 640px) {
  main { padding: 24px 14px 48px; }
  .card { padding: 16px 14px; }
  .bar { grid-template-columns: 1fr auto; padding: 9px 0; }
  .bar .value { grid-column: 2; grid-row: 1; }
  .bar svg { grid-column: 1 / -1; height: 18px; margin-top: 4px; }
  .axis { grid-template-columns: 1fr; } .axis div { grid-column: 1; }
  figure { overflow-x: auto; }
  figure img { min-width: 620px; }
  th, td { padding: 6px 8px; }
  th { white-space: normal; vertical-align: bottom; }
}
"""
