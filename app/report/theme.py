"""Colours and style sheet of the report.

Figures name their colours by the hex values of the light theme. In the page each becomes a variable of the style sheet,
so that pictures follow the reader's light or dark setting as the text does.
"""

LIGHT = {
    "ink": "#1c2430",
    "soft": "#667085",
    "line": "#dfe3e9",
    "page": "#f5f6f8",
    "card": "#ffffff",
    "mark": "#98a1b0",
    "c0": "#2563b8",
    "c1": "#d1761b",
    "c2": "#1f8f6b",
    "c3": "#b83f5c",
    "c4": "#7552b5",
    "c5": "#178a9e",
    "c6": "#8a6a3c",
    "c7": "#5f7a1f",
}
DARK = {
    "ink": "#e5e9f0",
    "soft": "#98a2b3",
    "line": "#313947",
    "page": "#12161d",
    "card": "#1a202a",
    "mark": "#6c7789",
    "c0": "#6ea8f2",
    "c1": "#f0a45a",
    "c2": "#52c79d",
    "c3": "#f07f99",
    "c4": "#ad8ef0",
    "c5": "#55c3d6",
    "c6": "#cba876",
    "c7": "#a9c75a",
}

INK, SOFT, LINE, CARD, MARK = (LIGHT[name] for name in ("ink", "soft", "line", "card", "mark"))
SERIES = tuple(LIGHT[f"c{i}"] for i in range(8))
"""colours of lines that share a panel"""

LOAD_COLORS = (
    "#143c8b", "#2d67be", "#5d97df", "#a0c5ee", "#eff0f2", "#e6b691", "#d47a41", "#af4203", "#7b1800",
)  # fmt: skip
"""expert load from a quarter of an even share over an even one to four times: equal steps of OKLab lightness on both
sides, blue against orange, which every kind of colour vision tells apart"""
DEAD_COLOR = "#000001"
"""an expert without a token"""
LOAD_TEXT = ("#101418", "#fdfdfd")
"""on light and on dark cells, in every theme (no value of a theme, which would become a variable)"""


def _variables(colors: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colors.items())


STYLE = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
@media print{{:root{{{_variables(LIGHT)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}}
main{{max-width:1180px;margin:0 auto;padding:2.2rem 1.1rem 4rem}}
h1{{font-size:1.75rem;line-height:1.2;margin:0;letter-spacing:-.015em;overflow-wrap:anywhere}}
h2{{font-size:1.12rem;margin:2.4rem 0 .8rem;letter-spacing:-.005em}}
p{{margin:.3rem 0}}
.soft,figcaption{{color:var(--soft)}}
.badge{{display:inline-block;margin:.9rem 0 0;padding:.35rem .7rem;border:1px solid var(--c1);border-radius:.5rem;
font-size:.86rem}}
.badge b{{color:var(--c1);letter-spacing:.06em}}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:.8rem;margin:1.5rem 0 0}}
.card,figure,.table,details{{background:var(--card);border:1px solid var(--line);border-radius:.7rem}}
.card{{padding:.8rem .95rem .85rem}}
.card h3{{font-size:.8rem;font-weight:500;color:var(--soft);margin:0}}
.card strong{{display:block;font-size:1.5rem;line-height:1.35;font-weight:650;letter-spacing:-.015em;
font-variant-numeric:tabular-nums;white-space:nowrap}}
.card span{{font-size:.8rem;color:var(--soft);line-height:1.35;display:block}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:.8rem}}
figure{{margin:0;padding:.75rem .8rem .5rem;min-width:0}}
figcaption{{font-size:.82rem;line-height:1.4;margin:0 .1rem .35rem}}
figcaption b{{display:block;font-size:.95rem;font-weight:600;color:var(--ink)}}
figure svg{{display:block;width:100%;height:auto}}
svg text{{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}}
.scroll{{overflow-x:auto}}
.note{{color:var(--soft);font-size:.82rem;margin:0;padding:.5rem .75rem .6rem;border-top:1px solid var(--line)}}
table{{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.5rem .7rem;text-align:right;white-space:nowrap}}
th{{font-weight:500;color:var(--soft);border-bottom:1px solid var(--line);vertical-align:bottom;white-space:normal}}
tbody tr+tr td{{border-top:1px solid var(--line)}}
.l{{text-align:left}}
.wrap{{white-space:normal;min-width:14rem;max-width:24rem}}
.pill{{display:inline-block;padding:.05rem .5rem;border-radius:1rem;border:1px solid var(--line);color:var(--ink)}}
.bar{{position:relative;width:9rem;height:.55rem;border-radius:.3rem;background:var(--line);display:inline-block}}
.bar i{{position:absolute;left:0;top:0;bottom:0;border-radius:.3rem;background:var(--c0)}}
.bar u{{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:var(--ink)}}
details{{margin:.8rem 0 0}}
details>*:not(summary){{margin:0 .95rem .9rem}}
details>.table{{border-radius:.4rem}}
details>.plots{{margin-top:.2rem}}
summary{{padding:.65rem .95rem;cursor:pointer;font-weight:500}}
pre{{overflow-x:auto;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;margin:0}}
footer{{margin-top:2.5rem;font-size:.82rem;color:var(--soft)}}
@media (max-width:520px){{main{{padding:1.4rem .8rem 3rem}}h1{{font-size:1.45rem}}
.cards{{grid-template-columns:repeat(2,minmax(0,1fr));gap:.6rem}}.card strong{{font-size:1.25rem}}}}
"""
