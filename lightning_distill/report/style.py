"""The look of the page: one column on a phone, cards beside each other where there is room, light and dark."""

from __future__ import annotations

from lightning_distill.report.svg import COLOURS

__all__ = ["STYLE"]

STYLE = (
    COLOURS
    + """
:root{color-scheme:light dark;--line:#dde2e7;--tint:#eef4fd;--alert:#fff4e0;--alert-line:#e8a33d}
@media (prefers-color-scheme:dark){:root{--line:#2c343d;--tint:#1d2b40;--alert:#33291a;--alert-line:#b9822e}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);-webkit-text-size-adjust:100%;
 font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:19px;margin:38px 0 10px;letter-spacing:-.005em}
h3{font-size:15px;margin:22px 0 8px;color:var(--muted);font-weight:600}
p{margin:6px 0}
.quiet,.caption{color:var(--muted)}
.caption{font-size:13px;margin:8px 2px 0}
.lead{color:var(--muted);margin:4px 0 0;font-size:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:20px 0 0}
.tile{padding:12px 14px}
.tile b{display:block;font-size:25px;line-height:1.2;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,190px),1fr));gap:10px 18px;margin:18px 0 0;
 padding:14px 16px}
.facts dt{color:var(--muted);font-size:13px}
.facts dd{margin:0;overflow-wrap:anywhere}
.notes{margin:18px 0 0;padding:10px 16px;background:var(--alert);border:1px solid var(--alert-line);border-radius:10px}
.notes ul{margin:4px 0;padding-left:18px}
.notes li{overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:7px 10px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead th{border-top:0;font-weight:600;white-space:nowrap}
thead th.n{white-space:normal}
thead th small,td small{display:block;color:var(--muted);font-weight:400;font-size:12px;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.student td{background:var(--tint)}
tr.teacher td{color:var(--muted)}
tr.teacher td.best{color:var(--ink)}
.best{font-weight:700}
td{white-space:nowrap}
.scroll .first{position:sticky;left:0;background:var(--card)}
tr.student .first{background:var(--tint)}
.text td{white-space:normal;overflow-wrap:anywhere;min-width:110px}
.text .first{max-width:38vw}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,350px),1fr));gap:12px;align-items:start}
.charts .card{padding:10px 8px 6px}
svg.chart{width:100%;height:auto}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:12px}
.runs h3{margin-top:0}
.runs>*{min-width:0;padding:14px}
.gallery{display:flex;flex-wrap:wrap;gap:10px}
.shot{cursor:pointer;flex:0 1 148px;min-width:96px}
.shot input{position:absolute;opacity:0;width:0;height:0}
.shot img,.picture img{display:block;width:100%;height:auto;border-radius:6px;
 border:1px solid var(--line);background:#fff}
.picture img{max-height:460px}
.picture+.picture{margin-top:14px}
.shot span,.picture span{display:block;font-size:13px;color:var(--muted);padding:3px 2px 0}
.shot:has(:focus-visible){outline:2px solid var(--c0);border-radius:6px}
.shot:has(:checked){order:-1;flex:1 0 100%;cursor:default}
.shot:has(:checked) img,.picture img{width:auto;max-width:100%;margin:0 auto}
.picture span{text-align:center}
.shot:has(:checked) span{color:var(--ink);font-weight:600;text-align:center}
@supports not selector(:has(*)){.shot.last{order:-1;flex:1 0 100%}}
details{margin:10px 0;padding:0 16px}
summary{cursor:pointer;padding:12px 0;font-weight:600}
details[open]{padding-bottom:14px}
pre{margin:0;overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:44px;color:var(--muted);font-size:13px}
@media (max-width:560px){main{padding:18px 12px 40px}h1{font-size:22px}.tile b{font-size:21px}
 .tiles{grid-template-columns:repeat(auto-fit,minmax(96px,1fr))}.tile{padding:9px 11px}th,td{padding:6px 9px}
 .scroll .first{white-space:normal;max-width:34vw;overflow-wrap:anywhere}
 .shot{flex-basis:92px}.runs>*{padding:10px}}
@media print{body{background:#fff}.card,.notes{break-inside:avoid}}
"""
)
