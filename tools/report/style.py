"""The style sheet of the report's page."""

from __future__ import annotations

STYLE = """
:root{
  color-scheme:light dark;--ink:#1f2328;--muted:#5c6670;--line:#d8dee4;--paper:#fff;--card:#f6f8fa;
  --first:#0072b2;--second:#d55e00;--pale:#9ecbe3;
  --mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace
}
@media (prefers-color-scheme:dark){
  :root{
    --ink:#e6edf3;--muted:#9aa5b1;--line:#30363d;--paper:#0d1117;--card:#161b22;
    --first:#56b4e9;--second:#e69f00;--pale:#2b5f80
  }
}
*{box-sizing:border-box}
body{
  margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif
}
main{max-width:980px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}
h2{font-size:21px;margin:52px 0 6px;padding-top:18px;border-top:1px solid var(--line)}
p{margin:6px 0 14px;max-width:74ch}
.muted,.note,figcaption{color:var(--muted)}
.note,figcaption{font-size:14px}
.tiles{
  display:grid;grid-template-columns:repeat(auto-fit,minmax(164px,1fr));gap:10px;margin:26px 0 0;padding:0
}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile dt{color:var(--muted);font-size:13px}
.tile dd{margin:2px 0 0;font-size:16.5px;font-weight:600;line-height:1.3}
.tile small{
  display:block;white-space:normal;font-size:12.5px;font-weight:400;color:var(--muted);line-height:1.35;
  margin-top:3px
}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(172px,1fr));gap:12px;margin-top:16px}
.sheet figure{margin:0;min-width:0}
.sheet .frame{
  display:flex;justify-content:center;align-items:center;height:108px;background:var(--card);
  border:1px solid var(--line);border-radius:6px;overflow:hidden
}
.sheet img{display:block;max-width:100%;max-height:108px}
.sheet figcaption{
  font-size:12px;line-height:1.35;margin-top:4px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap
}
figure{margin:16px 0}
figure img{max-width:100%;height:auto;display:block}
.plate img{width:100%}
.plate{background:#fff;border:1px solid var(--line);border-radius:8px;padding:12px}
svg{display:block;width:100%;height:auto;margin:10px 0;font-family:inherit;stroke-linejoin:round}
table{border-collapse:collapse;width:100%;font-size:14.5px;margin:14px 0}
th{text-align:left;font-weight:600;color:var(--muted);font-size:13px}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;padding-right:22px;font-variant-numeric:tabular-nums}
td ul{margin:0;padding:0;list-style:none}
td li{margin-bottom:5px;overflow-wrap:anywhere}
code,pre{font-family:var(--mono);font-size:13px}
pre{
  background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;overflow-x:auto;
  line-height:1.6
}
details summary{cursor:pointer;color:var(--muted);font-size:13.5px}
.detail{color:var(--muted);font-size:13px}
.scroll{overflow-x:auto}
.missing{background:var(--card);border-left:3px solid var(--second);padding:10px 14px;border-radius:4px}
.missing ul{margin:6px 0 0;padding-left:20px}
.counts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:4px 40px;align-items:start}
.counts table{font-size:14px}
.counts td,.counts th{padding:5px 0}
.counts td:first-child{overflow-wrap:anywhere}
.counts td.n,.counts th.n{padding:5px 12px 5px 8px;width:1%;white-space:nowrap}
.counts .bar{width:34%;vertical-align:middle}
.bar i{display:block;height:10px;min-width:2px;border-radius:2px;background:var(--first)}
@media (max-width:640px){
  .counts{grid-template-columns:minmax(0,1fr)}
}
@media (max-width:560px){
  main{padding:24px 14px}
  h1{font-size:25px}
}
"""
