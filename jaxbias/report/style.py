"""The look of the report page, light and dark; the inks are those of `figures`."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --muted: #5c6773; --grid: #d9dee3; --band: #eaf3ee; --paper: #ffffff;
  --tint: #f5f7f8; --best: #00664a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --muted: #9aa6b2; --grid: #37414b; --band: #1c2b25;
  --paper: #14191e; --tint: #1c2329; --best: #5fd3a8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.015em; text-wrap: balance; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; }
p, ul { max-width: 46rem; margin: 0 0 1rem; }
.found { max-width: none; font-size: 1.15rem; border-left: 4px solid var(--best); background: var(--tint);
  padding: 1rem 1.25rem; margin: 1.75rem 0; border-radius: 0 6px 6px 0; }
.small, figcaption { color: var(--muted); font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .4rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; min-width: 8.5rem; max-width: 17rem;
  overflow-wrap: anywhere; font-weight: 500; }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; line-height: 1.3; white-space: nowrap; }
thead small, td small { display: block; color: var(--muted); font-weight: 400; font-size: .75rem; white-space: nowrap; }
tr.base td { background: var(--tint); }
td b { color: var(--best); }
td.left, th.left { text-align: left; }
.none { color: var(--muted); }
figure { margin: 1.5rem 0; }
h2 + figure { margin-top: 0; }
.wide + ul { margin-top: .75rem; }
figcaption { max-width: 60rem; margin-top: .25rem; }
figure .wide > svg { display: block; width: 100%; min-width: 720px; height: auto; }
figure text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif !important; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: .75rem 1rem; border-radius: 6px; margin: 0 0 1rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 1.5rem 1rem; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
@media print { main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""
