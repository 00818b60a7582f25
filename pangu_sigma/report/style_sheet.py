"""The report's style sheet, kept as a string so that the page needs no second file."""

STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--card:#fdfdfc;--ink:#141413;--soft:#52514e;--faint:#7d7b75;--grid:#e6e5df;
--rule:#c9c7bf;--edge:rgba(20,20,19,.1);--even:#eeede8;--over:#e34948;--under:#2a78d6;--heat:42 120 214;--good:#006300;
--bad:#c02d2c;--s0:#2a78d6;--s1:#eb6834;--s2:#1baf7a;--s3:#4a3aa7;--s4:#eda100;--s5:#e87ba4;--s6:#008300;--s7:#e34948}
@media (prefers-color-scheme:dark){:root{--page:#0f0f0e;--card:#1a1a19;--ink:#f5f4f0;--soft:#c3c2b7;--faint:#8f8d86;
--grid:#2c2c2a;--rule:#4a4945;--edge:rgba(255,255,255,.1);--even:#30302e;--over:#e66767;--under:#3987e5;
--heat:57 135 229;--good:#4cc38a;--bad:#f08080;--s0:#3987e5;--s1:#e0703a;--s2:#199e70;--s3:#9085e9;--s4:#c98500;
--s5:#d55181;--s6:#3fae3f;--s7:#e66767}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"Noto Sans","Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 4px;letter-spacing:-.005em}
h3{font-size:14px;font-weight:600;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:4px 0 12px;color:var(--soft);max-width:76ch}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:16px;font-size:14px}
a{color:var(--s0);text-decoration:none}a:hover,a:focus-visible{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:12px;margin:20px 0 0;padding:0}
.tiles div{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px 14px}
.tiles dt{font-size:12.5px;color:var(--soft)}
.tiles dd{margin:2px 0 0;font-size:22px;font-weight:600;line-height:1.25}
.tiles small{display:block;font-size:12.5px;font-weight:400;color:var(--faint)}
.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 14px 10px;min-width:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
.maps{display:flex;flex-wrap:wrap;gap:14px}.maps .card{max-width:100%;overflow-x:auto}
.next{margin-top:22px}header p{max-width:none}
.scroll{position:relative;overflow:auto;max-height:min(80vh,760px);
background:var(--card);border:1px solid var(--edge);border-radius:10px}
table{border-collapse:separate;border-spacing:0;font-variant-numeric:tabular-nums;font-size:14px;width:100%}
th,td{padding:7px 14px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
tbody tr:last-child>*{border-bottom:0}
thead th{position:sticky;top:0;background:var(--card);font-weight:500;font-size:13px;color:var(--soft);z-index:1}
th[scope=row],thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:600}
thead th:first-child{z-index:2}
.log th[scope=row]{font-weight:400}
th:has(.text),td.text{text-align:left;width:100%;white-space:normal;overflow-wrap:anywhere;min-width:180px}
.matrix td{background:rgb(var(--heat)/var(--a,0))}
.matrix td.best{font-weight:700;box-shadow:inset 0 0 0 2px rgb(var(--heat))}
.good{color:var(--good)}.bad{color:var(--bad)}
svg{display:block}.chart{width:100%;height:auto}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,"Noto Sans","PingFang SC",sans-serif;fill:var(--ink)}
svg .tick{fill:var(--faint);font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}.level{stroke:var(--faint);stroke-dasharray:5 4;stroke-width:1.5}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.line:hover{stroke-width:4}
.raw{stroke-width:1;opacity:.3}.lead{opacity:.6}
.mark{stroke:var(--card)!important;stroke-width:1.5}.cross{fill:var(--bad)!important;font-weight:700!important}
.end{font-size:12px!important}.even{fill:var(--even)}.over{fill:var(--over)}.under{fill:var(--under)}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}
.mark.s0{fill:var(--s0)}.mark.s1{fill:var(--s1)}.mark.s2{fill:var(--s2)}.mark.s3{fill:var(--s3)}.mark.s4{fill:var(--s4)}
.mark.s5{fill:var(--s5)}.mark.s6{fill:var(--s6)}.mark.s7{fill:var(--s7)}
.end{stroke:none!important}.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 4}.d3{stroke-dasharray:9 3 2 3}
.d4{stroke-dasharray:14 4}.mark,.lead{stroke-dasharray:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:4px 0 10px;padding:0;font-size:13px;
color:var(--soft);max-height:112px;overflow:auto}
.legend li{display:flex;align-items:center;gap:7px}.legend svg{flex:none}
.narrow{display:none}
details{margin-top:44px}summary{cursor:pointer;font-size:19px;font-weight:600}
pre{overflow:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.none{color:var(--faint)}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
@media (max-width:640px){main{padding:18px 14px 48px}h1{font-size:23px}.wide{display:none}.narrow{display:block}
.tiles{grid-template-columns:repeat(2,1fr)}th,td{padding:6px 10px}.card{padding:12px 8px 8px}.card h3{padding-left:6px}}
@media print{.scroll{max-height:none;overflow:visible}body{background:#fff}}
"""
