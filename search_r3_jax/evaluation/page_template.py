"""HTML template of the report; no scripts, no external resources, all values escaped."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1c1e21; --soft: #62666d; --page: #ffffff; --box: #f5f6f8; --line: #dcdfe4; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6ea; --soft: #9aa0a8; --page: #15171a; --box: #1e2125; --line: #363a40;
  --good: #56d364; }
  /* Drawn in dark on nothing: turned round, hues kept. */
  .pictures img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
nav a { color: inherit; padding: 0.25rem 0; }
.note, footer { color: var(--soft); font-size: 0.875rem; margin: 0.5rem 0; }
footer { margin-top: 3rem; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.pictures img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: 0.375rem 0.75rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 500; }
th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; min-width: 8rem;
  max-width: 40vw;
  padding-left: 0; overflow-wrap: anywhere; }
td .small { display: block; color: var(--soft); font-size: 0.75rem; white-space: nowrap; }
.texts th, .texts td { text-align: left; }
.texts td { min-width: 9rem; }
summary { font-weight: 600; padding: 0.5rem 0; cursor: pointer; }
.samples { display: grid; gap: 0.75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
article { background: var(--box); border-radius: 0.5rem; padding: 0.75rem 1rem; min-width: 0; }
article header { display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--soft); font-size: 0.875rem; }
article header b { color: var(--text); }
.query { font-weight: 600; margin: 0.5rem 0; unicode-bidi: isolate; }
.reply { white-space: pre-wrap; margin: 0.5rem 0; unicode-bidi: isolate; }
.top { margin: 0.5rem 0 0; padding-left: 1.5rem; font-size: 0.875rem; }
.relevant { color: var(--good); font-weight: 600; }
.document { display: block; color: var(--soft); font-weight: 400; unicode-bidi: isolate; }
.made code { font-family: ui-monospace, monospace; font-size: 0.8125rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note made">{{ date }}. Made by <code>{{ command }}</code></p>
<nav>{% for section in sections %}<a href="#{{ section.anchor }}">{{ section.title }}</a>{% endfor %}</nav>
{% for section in sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
{% if section.pictures %}
<div class="pictures">
{% for picture in section.pictures %}<img alt="{{ picture.alt_text }}" src="{{ picture.svg | data_uri }}">
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<h3>{{ table.title }}</h3>
<div class="scroll" role="region" aria-label="{{ table.title }}" tabindex="0">
<table{% if table.texts %} class="texts"{% endif %}>
<thead><tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr><th scope="row">{{ row[0].text }}</th>
{%- for cell in row[1:] %}<td>{{ cell.text }}{#-
#}{% if cell.small %}<span class="small">{{ cell.small }}</span>{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
{% endfor %}
{% for group in section.samples %}
<details{% if loop.first %} open{% endif %}>
<summary>{{ group.title }}</summary>
<div class="samples">
{% for sample in group.samples %}
<article>
<header>{% for entry in sample.head %}{#-
#}<span>{% if loop.first %}<b>{{ entry }}</b>{% else %}{{ entry }}{% endif %}</span>{#-
#}{% endfor %}</header>
<p class="query" dir="auto">{{ sample.query }}</p>
{% if sample.text %}<p class="reply" dir="auto">{{ sample.text }}</p>{% endif %}
{% if sample.top %}<p class="note">found:</p>
<ol class="top">{% for found in sample.top %}
<li{% if found.relevant %} class="relevant"{% endif %}><bdi>{{ found.document }}</bdi>{#-
#}{% if found.relevant %} ✓ relevant{% endif %}{#-
#}{% if found.text %}<span class="document" dir="auto">{{ found.text }}</span>{% endif %}</li>
{%- endfor %}</ol>{% endif %}
</article>
{% endfor %}
</div>
</details>
{% endfor %}
</section>
{% endfor %}
<footer>{{ versions }}</footer>
</body>
</html>
"""
