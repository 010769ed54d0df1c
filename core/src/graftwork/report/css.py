"""The style of report.html. Figures take their colours from the same variables: see ``canvas.VARIABLES``."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5f6874; --line: #dfe3e8; --paper: #ffffff;
  --panel: #f6f7f9; --good: #00694b; --good-bg: #e2f4ec; --bad: #9c3300; --bad-bg: #fdebe1;
  --open: #5c5200; --open-bg: #fbf5d6; --series-1: #0072b2; --series-2: #d55e00; --series-3: #009e73;
  --series-4: #cc79a7; --series-5: #e69f00; --series-6: #56b4e9; --series-7: #7f7f7f; --series-8: #2a2a2a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --faint: #a3abb6; --line: #343a42; --paper: #16191d; --panel: #1f2429;
    --good: #6fd3ab; --good-bg: #12352a; --bad: #ff9f73; --bad-bg: #3d2016;
    --open: #e5d36b; --open-bg: #35300f;
    --series-1: #3f97d9; --series-2: #f0792a; --series-3: #2cc096; --series-4: #dd94bb; --series-5: #f2b233;
    --series-6: #8fd0f7; --series-7: #9a9a9a; --series-8: #f0f0f0; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .7rem; max-width: 48rem; overflow-wrap: anywhere; }
.sub, figcaption, .note { color: var(--faint); font-size: .9rem; }
nav { margin: .9rem 0 0; font-size: .9rem; } nav a { display: inline-block; margin-right: 1rem; }
a { color: var(--series-1); text-underline-offset: .15em; }
.headline { font-size: 1.15rem; font-weight: 600; margin: 1.4rem 0 .6rem; }
.scroll { overflow-x: auto; margin: .4rem 0; } .scroll + .scroll { margin-top: 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .34rem .55rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; color: var(--faint); font-size: .84rem; }
td:first-child, th:first-child { text-align: left; padding-left: .2rem; }
td:first-child { font-weight: 600; }
.words td, .words th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.words td:first-child { font-weight: 400; }
.unit { display: block; font-weight: 400; }
.chip { display: inline-block; padding: .05rem .6rem; border-radius: 1rem; font-weight: 600;
  white-space: nowrap; }
.held { color: var(--good); background: var(--good-bg); }
.refuted { color: var(--bad); background: var(--bad-bg); }
.open { color: var(--open); background: var(--open-bg); }
figure { margin: .9rem 0 1.6rem; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .35rem; max-width: 48rem; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .9rem; margin: .6rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; } summary b { margin-right: .6rem; }
code, pre { font: .86rem/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
pre { background: var(--panel); border-radius: .4rem; padding: .7rem .9rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .4rem 0; }
@media (max-width: 44rem) { body { padding-top: 1.2rem; font-size: 15px; } figure svg { min-width: 40rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  figure, tr, pre { break-inside: avoid; } h2, h3, h4 { break-after: avoid; }
  .scroll, figure { overflow: visible; }
  .chip { border: 1px solid currentColor; } details::details-content { content-visibility: visible; } }
"""
