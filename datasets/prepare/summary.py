"""A page (HTML and PNG) that shows a benchmark folder, to look at before using it.

It shows the counts, image sizes, samples of every class and oddities of datasets.prepare.statistics. The HTML is one
file without scripts. The same folder gives the same bytes.
"""

import base64
import io
import textwrap
from collections import Counter
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.lists import LIST_DESCRIPTIONS
from datasets.prepare.statistics import KIND_PLURALS, THUMBNAIL_PX, collect_statistics, evenly_sampled
from utils.files import atomic_write, check_output
from utils.pictures import OWN_PNG, draw_or_note, save_png

_OWN_PAGE = rb"(?s)\A<!doctype html>.*<h2 id=odd>What is odd</h2>"
SPLITS = {"train": "training", "test": "validation", "zero": "unseen"}


def write_summary(benchmark, lists, folder, odd=()):
    """Write summary.html and summary.png into `folder`; returns the paths of the files written.

    lists: {(kind, split): FileList}; some may be left out. odd: lines of other checks, shown first under "What is odd".
    Images that cannot be read are named. Without matplotlib no summary.png is written, and an old one is removed.
    Raises InputError if the folder cannot be written, or has files of these names that this function did not write.
    """
    page = check_output(Path(folder) / "summary.html", "", _OWN_PAGE)
    picture = check_output(Path(folder) / "summary.png", "", OWN_PNG)
    statistics = collect_statistics(benchmark, lists)
    odd = list(dict.fromkeys(_printable(line) for line in [*odd, *statistics.odd]))
    with atomic_write(page) as file:
        file.write(_page_html(statistics, odd).encode())
    if draw_or_note(_draw_png, picture, statistics, odd):
        return [page, picture]
    picture.unlink(missing_ok=True)
    return [page]


def _page_title(statistics):
    return f"{statistics.benchmark.title}: {_printable(statistics.benchmark.root)}"


def _printable(text):
    """Text with "?" in place of the bytes of a folder's name that are not UTF-8."""
    return str(text).encode(errors="replace").decode()


def _classes_line(statistics):
    return f"{len(statistics.benchmark.seen_names)} seen and {len(statistics.benchmark.unseen_names)} unseen classes"


def _shares(values, count=5):
    """The shares of the `count` most frequent values and of all others, as lines such as "227 × 227: 84 %"."""
    ranked = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    total = sum(number for _, number in ranked)
    lines = [f"{value}: {_percent(number / total)}" for value, number in ranked[:count]]
    if rest := ranked[count:]:
        lines.append(f"{len(rest)} others: {_percent(sum(number for _, number in rest) / total)}")
    return lines


def _percent(share):
    return "under 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _read_samples(statistics, kind):
    """The samples of a kind that could be read."""
    return [sample for row in statistics.classes for sample in row.samples[kind] if sample.thumbnail]


def _ranks(statistics):
    """For each list: (what it holds, a line with range and median, the images of each class from most to fewest)."""
    for key, files in statistics.lists.items():
        rows = sorted((row for row in statistics.classes if key in row.counts), key=lambda row: -row.counts[key])
        counts = [row.counts[key] for row in rows]
        spread = f"{counts[-1]:,} ({rows[-1].name}) to {counts[0]:,} a class, median {np.median(counts):,.0f}"
        if counts[0] == counts[-1]:
            spread = f"{counts[0]:,} a class"
        yield f"{len(files):,} {LIST_DESCRIPTIONS[key]}", spread, counts


# The HTML: one file without scripts that loads nothing from elsewhere.


def _page_html(statistics, odd):
    benchmark = statistics.benchmark
    rows = {seen: [row for row in statistics.classes if row.seen == seen] for seen in (False, True)}
    tiles = max(len(samples) for row in statistics.classes for samples in row.samples.values())
    lines = "".join(f"<li>{escape(line)}</li>" for line in odd)
    body = [
        f"<header><h1>{escape(benchmark.title)}</h1><p><code>{escape(_printable(benchmark.root))}</code>, lists in ",
        f"<code>{escape(_printable(benchmark.lists.name))}</code><br>{escape(_classes_line(statistics))}</p>",
        '<nav><a href="#odd">What is odd</a> <a href="#counts">Counts</a> <a href="#images">Images</a> ',
        '<a href="#unseen">Unseen classes</a> <a href="#seen">Seen classes</a> <a href="#table">Table</a>',
        "</nav></header>",
        f"<main>{_totals(statistics)}<h2 id=odd>What is odd</h2>",
        f"<ul class=odd>{lines}</ul>" if odd else "<p>Nothing that these checks look for.</p>",
        "<h2 id=counts>Counts</h2><p>Images in each class, from the class with most to the one with fewest.</p>",
        f"<div class=charts>{''.join(_chart(*rank) for rank in _ranks(statistics))}</div>",
        "<h2 id=images>Images</h2>",
        f"<div class=charts>{''.join(_sizes(statistics, kind) for kind in KIND_PLURALS)}</div>",
        f"<h2 id=unseen>Unseen classes</h2>{_cards(rows[False], tiles)}",
        f"<h2 id=seen>Seen classes</h2>{_cards(rows[True], tiles)}",
        f"<h2 id=table>Table</h2>{_table(statistics)}</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f'{escape(_page_title(statistics))}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _format_count(value):
    return "–" if value is None else f"{value:,}"


def _totals(statistics):
    sizes = {key: len(files) for key, files in statistics.lists.items()}
    lines = [f"<tr><th><th>{'<th>'.join(SPLITS.values())}<th>all</tr>"]
    for kind, plural in KIND_PLURALS.items():
        cells = [_format_count(sizes.get((kind, split))) for split in SPLITS]
        cells.append(f"{sum(size for (of, _), size in sizes.items() if of == kind):,}")
        lines.append(f"<tr><th>{plural}<td>{'<td>'.join(cells)}</tr>")
    return f"<div class=wide><table class=totals>{''.join(lines)}</table></div>"


def _chart(what, spread, counts):
    """A bar chart of counts: an inline SVG that fills its box."""
    top, spread = max(counts), escape(spread)
    width = 0.8 if len(counts) <= 100 else 1  # with more bars, there is no room for gaps
    bars = "".join(f"M{n} 50v-{50 * count / top:.3g}h{width}V50z" for n, count in enumerate(counts) if count)
    return (
        f'<figure><svg viewBox="0 0 {len(counts)} 50" preserveAspectRatio="none" role="img" aria-label="'
        f'{what}, {spread}"><path d="{bars}"/></svg><figcaption><b>{what}</b><br>{spread}</figcaption></figure>'
    )


def _sizes(statistics, kind):
    samples = _read_samples(statistics, kind)
    sizes = "<br>".join(_shares([f"{sample.size[0]} × {sample.size[1]}" for sample in samples]))
    forms = "<br>".join(escape(line) for line in _shares([sample.form for sample in samples]))
    heading = f"{KIND_PLURALS[kind].capitalize()}, {len(samples):,} read"
    return f"<figure><b>{heading}</b><div class=pair><p>{sizes}</p><p>{forms}</p></div></figure>"


def _cards(rows, tiles):
    return f'<div class=cards style="--tiles:{tiles}">' + "\n".join(_card(row) for row in rows) + "</div>"


def _card(row):
    parts = [f'<section id="{row.anchor}"><h3>{escape(row.name)} <small>label {row.label}</small></h3>']
    for kind, plural in KIND_PLURALS.items():
        tiles = "".join(_tile(sample, f"{plural} of {row.name}") for sample in row.samples[kind])
        parts.append(f"<p>{row.count(kind):,} {plural}</p><div class=tiles>{tiles}</div>")
    return "".join([*parts, "</section>"])


def _tile(sample, what):
    path, what = escape(sample.path), escape(what)
    if sample.thumbnail is None:
        (why,) = sample.oddities
        return f'<span class=gone role=img title="{path}" aria-label="{what}, {why}: {path}">{why}</span>'
    data = base64.b64encode(sample.thumbnail).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{what}" title="{path}">'


def _table(statistics):
    shown = [key for key in LIST_DESCRIPTIONS if key in statistics.lists]
    top = {key: max([1, *(row.counts.get(key, 0) for row in statistics.classes)]) for key in shown}
    heads = "".join(f"<th>{LIST_DESCRIPTIONS[key]}" for key in shown)
    lines = [f"<tr><th>label<th>class<th>{heads}</tr>"]
    for row in statistics.classes:
        cells = [f"<td>{row.label}", f'<th><a href="#{row.anchor}">{escape(row.name)}</a>', f"<td>{_seen(row)}"]
        for key in shown:
            share = 100 * row.counts.get(key, 0) / top[key]
            cells.append(f'<td style="--share:{share:.3g}%">{_format_count(row.counts.get(key))}')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = "\n".join(lines)
    return f"<div class=wide><table class=classes>{table}</table></div>"


def _seen(row):
    return "seen" if row.seen else "unseen"


_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f4f5f7; --text: #1c2024; --quiet: #5d636b; --line: #dcdfe4;
  --bar: #2f6fc4; --part: #2f6fc42e; --odd: #fff5da; --edge: #d99a00 }
@media (prefers-color-scheme: dark) { :root { --ground: #15171a; --card: #1f2226; --text: #e8eaed; --quiet: #a0a7b0;
  --line: #363b42; --bar: #79aef5; --part: #79aef53d; --odd: #322a12 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 4rem; background: var(--ground);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h3, p { margin: 0 } h1 { font-size: 2rem; line-height: 1.3 } h3 { font-size: 1rem }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.35rem } p, small, figcaption, .pair { color: var(--quiet); font-size: .9rem }
small { font-weight: normal } a { color: var(--bar) } code { color: var(--text) }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0 }
.odd { margin: 0; padding: .75rem 1rem .75rem 2rem; background: var(--odd); border-left: 4px solid var(--edge) }
.odd li + li { margin-top: .4rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: 1rem }
figure { margin: .75rem 0 0 } figure svg { width: 100%; height: 6rem; border-bottom: 1px solid var(--line) }
path { fill: var(--bar) } b { color: var(--text) } .pair { display: flex; flex-wrap: wrap; gap: 0 2.5rem }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--tiles) * 5.05rem + 1.8rem)), 1fr)) }
section { padding: .75rem 1rem 1rem; background: var(--card); border-radius: .5rem }
section:target { outline: 2px solid var(--bar) }
.tiles { display: grid; grid-template-columns: repeat(var(--tiles), minmax(0, 6rem)); gap: .25rem }
.tiles + p { margin-top: .35rem }
.tiles > * { width: 100%; aspect-ratio: 1; border: 1px solid var(--line); object-fit: contain;
  background: var(--ground) }
.gone { display: grid; place-items: center; border: 2px dashed var(--edge) !important; font-size: .7rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, .classes th:nth-child(2), .classes td:nth-child(3) { text-align: left }
tr:first-child th { font-weight: 600 }
.totals { margin-top: 1rem } .classes { width: 100% }
.classes th { font-weight: normal; white-space: normal; min-width: 5rem }
td[style] { background: linear-gradient(to left, var(--part) var(--share), transparent 0) }
"""


# The PNG: as much as one picture can show legibly.


def _draw_png(path, statistics, odd, unseen=30, seen=10, each=4):
    """Draw the picture: at most `unseen` unseen and `seen` seen classes, each with at most `each` sketches and photos.

    Raises ImportError if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    lines_shown = _wrapped(odd, 6)
    each = min(each, max(len(samples) for row in statistics.classes for samples in row.samples.values()))
    shown = []
    for name, is_seen, most in (("Unseen", False, unseen), ("Seen", True, seen)):
        rows = [row for row in statistics.classes if row.seen == is_seen]
        some = "" if len(rows) <= most else f", {most} of {len(rows)}: summary.html shows all"
        shown.append((f"{name} classes{some}", evenly_sampled(rows, most)))
    heights = [1 + 0.21 * len(lines_shown), 2.1, *(0.4 + 1.02 * -(-len(rows) // 2) for _, rows in shown)]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.03, hspace=0, wspace=0)
    head, charts, *parts = figure.subfigures(len(heights), 1, height_ratios=heights)
    head.text(
        0.01, 1 - 0.15 / heights[0], _page_title(statistics), fontsize=15, weight="bold", va="top", parse_math=False
    )
    text = "\n".join(
        [
            _classes_line(statistics),
            "What is odd:" if lines_shown else "Nothing odd that the checks look for.",
            *lines_shown,
        ]
    )
    head.text(0.01, 1 - 0.5 / heights[0], text, fontsize=9.5, va="top", linespacing=1.4, parse_math=False)
    _draw_counts(charts, list(_ranks(statistics)))
    for part, (heading, rows) in zip(parts, shown, strict=True):
        _draw_classes(part, heading, rows, each)
    save_png(figure, path, dpi=110)


def _wrapped(odd, lines):
    """The first `lines` of `odd`, wrapped to fit the picture, and the number of the others."""
    lines_shown = [textwrap.shorten(line, 280, placeholder=" …") for line in odd[:lines]]
    lines_shown += [f"{len(odd) - lines} more in summary.html"] if len(odd) > lines else []
    return [
        part
        for line in lines_shown
        for part in textwrap.wrap(line, 170, initial_indent="•  ", subsequent_indent="    ")
    ]


def _draw_counts(part, ranks):
    for axis, (what, spread, counts) in zip(part.subplots(1, len(ranks), squeeze=False)[0], ranks, strict=True):
        axis.bar(range(len(counts)), counts, color="tab:blue", width=0.8 if len(counts) <= 100 else 1)
        spread = textwrap.fill(spread, 36, max_lines=2, placeholder=" …")
        axis.set_title(f"{what}\n{spread}", fontsize=8.5, parse_math=False)
        axis.set_xticks([])
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_classes(part, heading, rows, each):
    """Draw two classes beside each other: name and counts, then a strip of sketches and photos."""
    part.suptitle(heading, fontsize=12, weight="bold", x=0.01, ha="left")
    axes = part.subplots(-(-len(rows) // 2), 2, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, rows, strict=False):
        axis.imshow(_strip(row, each))
        counts = "\n".join(f"{row.count(kind):,} {plural}" for kind, plural in KIND_PLURALS.items())
        name = textwrap.fill(textwrap.shorten(row.name, 30, placeholder="…"), 16)
        axis.text(-12, 48, name, fontsize=10, weight="bold", ha="right", va="bottom", parse_math=False)
        axis.text(-12, 52, counts, fontsize=8, ha="right", va="top")


def _strip(row, each):
    """PIL image of a class: its sketches, a gap, its photos. A grey tile stands for an image that cannot be read."""
    step, gap = THUMBNAIL_PX + 6, 14
    strip = Image.new("RGB", (2 * each * step + gap, THUMBNAIL_PX), "white")
    for number, kind in enumerate(KIND_PLURALS):
        for place, sample in enumerate(evenly_sampled(row.samples[kind], each)):
            tile = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), "silver")
            if sample.thumbnail:
                tile = Image.open(io.BytesIO(sample.thumbnail))
            left = (number * each + place) * step + number * gap
            strip.paste(tile, (left + (THUMBNAIL_PX - tile.width) // 2, (THUMBNAIL_PX - tile.height) // 2))
    return strip
