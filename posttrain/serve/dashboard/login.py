"""The page for a browser that has no token yet."""

from fastapi.responses import HTMLResponse

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>posttrain</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 24rem; margin: 18vh auto 0; padding: 0 1rem; }
h1 { font-size: 1.4rem; } input, button { font: inherit; padding: .4rem .7rem; box-sizing: border-box; }
input { width: 100%; margin: .3rem 0 .8rem; }
</style></head><body><main><h1>posttrain</h1>
<p>The token is absent or wrong. It stands in the address that <code>posttrain serve</code> printed.</p>
<form method="get" action="/"><label>Token <input type="password" name="token" autocomplete="off" autofocus required>
</label><button>Open</button></form></main></body></html>"""


def login_page() -> HTMLResponse:
    return HTMLResponse(PAGE, 401, {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})
