"""The report's page around its sections, and how it looks by day and by night."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #63636b; --line: #dcdce0;
  --page: #ffffff; --panel: #f6f6f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --soft: #9c9ca6; --line: #38383e;
  --page: #17171a; --panel: #202024; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 28px; line-height: 1.25; font-weight: 600; margin: 0 0 8px; }
h2 { font-size: 18px; font-weight: 600; margin: 44px 0 12px; }
p { margin: 0 0 12px; max-width: 46em; overflow-wrap: anywhere; }
.summary { font-size: 18px; color: var(--soft); }
.note { font-size: 14px; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th { font-weight: 600; text-align: left; }
.results { margin-bottom: 14px; font-variant-numeric: tabular-nums; }
.results th, .results td { padding: 6px 22px 6px 0; vertical-align: baseline; }
.results thead th { border-bottom: 1px solid var(--ink); white-space: nowrap; }
.results tbody { border-bottom: 1px solid var(--line); }
.results tbody th { font-weight: 400; min-width: 14em; max-width: 34em; overflow-wrap: anywhere; }
.results .number { text-align: right; padding-left: 18px; white-space: nowrap; }
.results .number:not(:last-child) { padding-right: 4px; }
.results .spread { display: inline-block; min-width: 3.6em; text-align: left; white-space: pre;
  color: var(--soft); font-size: 14px; }
.results .remark, .results .compared { color: var(--soft); font-size: 14px; }
.results .remark { margin-left: 8px; }
.results .compared { display: block; }
.results .verdict { min-width: 6em; padding-left: 22px; overflow-wrap: anywhere; }
.results .baseline th, .results .baseline td { color: var(--soft); }
.results tbody .group th { font-weight: 600; padding-top: 18px; }
.results .kind th { font-size: 13px; padding: 10px 0 0; }
.examples th { font-size: 14px; padding: 0 10px 6px 0; }
.examples td { padding: 0 10px 14px 0; vertical-align: top; font-size: 14px; }
.examples img { display: block; max-width: 168px; max-height: 168px; border-radius: 3px; }
.examples .phrase { width: 124px; max-height: 168px; overflow: auto; overflow-wrap: anywhere; }
.examples .score { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.picture { display: block; max-width: 100%; height: auto; margin-bottom: 8px; border-radius: 6px;
  background: #ffffff; }
@media (prefers-color-scheme: dark) { .picture { padding: 8px; } }
.curves { display: block; width: 100%; max-width: 860px; height: auto; }
.legend { list-style: none; margin: 0 0 6px; padding: 0; font-size: 14px; }
.legend li { display: inline-block; margin-right: 20px; overflow-wrap: anywhere; }
.legend span { display: inline-block; width: 18px; height: 3px; margin-right: 7px;
  vertical-align: middle; }
.facts { width: 100%; background: var(--panel); border-radius: 6px; font-size: 14px; }
.facts th, .facts td { padding: 5px 16px; vertical-align: baseline; }
.facts tr:first-child > * { padding-top: 12px; }
.facts tr:last-child > * { padding-bottom: 12px; }
.facts th { font-weight: 400; color: var(--soft); width: 1%; min-width: 16em; }
.facts td { font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.notes { padding-left: 20px; max-width: 46em; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 28px 16px 48px; }
  .results { width: 100%; font-size: 15px; }
  .results th, .results td { padding-right: 6px; }
  .results tbody th { min-width: 6em; }
  .results .number { padding-left: 6px; }
  .results .number:not(:last-child) { padding-right: 0; }
  .results .spread { display: block; min-width: 0; text-align: right; font-size: 12px; }
  .results .remark { display: block; margin-left: 0; }
  .results .verdict { min-width: 5em; padding-left: 10px; }
  .examples img, .examples .phrase { max-width: 112px; max-height: 112px; }
  .facts th { min-width: 8em; }
  .facts th, .facts td { padding-left: 12px; padding-right: 6px; }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
{sections}
</main>
</body>
</html>
"""
