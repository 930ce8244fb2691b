"""How the page looks: one column on a phone, two on a desk, light or dark as the reader's system is."""

CSS = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #ffffff; --ink: #1b1f24; --soft: #4d5661;
  --line: #d5d9df; --link: #0b57c2; --note: #fff6dc; --note-line: #c99a1a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0f1216; --card: #181c22; --ink: #e8ebef; --soft: #aeb6c0; --line: #343b45; --link: #8ab8ff;
    --note: #2b2512; --note-line: #c99a1a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
.lead { margin: 0 0 1rem; color: var(--soft); }
a { color: var(--link); }
a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; }
nav a { display: inline-block; padding: .4rem 0; }
.notes { background: var(--note); border-left: 4px solid var(--note-line); padding: .5rem 1rem; margin: 0 0 1rem; }
.notes p { margin: 0; font-weight: 600; }
.notes ul { margin: .25rem 0; padding-left: 1.25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 0;
  min-width: 0; }
.card.wide { grid-column: 1 / -1; }
section > .card.table { margin-top: 1rem; }
.card p, figcaption { margin: .5rem 0 0; font-size: .9rem; color: var(--soft); }
figure svg { display: block; width: 100%; height: auto; max-width: 36rem; margin: 0 auto; fill: currentColor; }
figure text { fill: currentColor; }
.card.wide svg { max-width: 60rem; min-width: 30rem; }
.missing { margin: 0 0 1rem; color: var(--soft); }
.numbers { white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 600; min-width: 5rem; }
tbody th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
footer { margin: 2rem 0 1rem; color: var(--soft); font-size: .9rem; }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""
