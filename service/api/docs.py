"""GET /docs: the API for people, one page without scripts, so that it works offline and under any CSP."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

from service.problems import NotFound, all_problems

router = APIRouter(include_in_schema=False)

_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'"}
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1c2330;background:#fff}
code,pre{font:14px/1.45 ui-monospace,monospace}pre{background:#f3f5f8;padding:.8rem;overflow:auto;border-radius:6px}
h2{margin-top:2.2rem;font-size:1.15rem}h2 code{background:#e6edf7;padding:.15rem .4rem;border-radius:4px}
td,th{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}form{background:#f3f5f8;padding:1rem;
border-radius:6px}@media(prefers-color-scheme:dark){body{color:#dde3ec;background:#14181f}pre,form{background:#1f2530}
h2 code{background:#283347}a{color:#8ab4f8}}
"""


@router.get("/")
async def root() -> RedirectResponse:
    """A browser that comes to the bare address wants to read."""
    return RedirectResponse("/docs")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The API, rendered from /openapi.json, and a form to try it with a picture."""
    return HTMLResponse(_page(request.app.openapi(), str(request.base_url).rstrip("/")), headers=_HEADERS)


@router.get("/problems/{name}")
async def problem(name: str) -> PlainTextResponse:
    """What the `type` of a problem document leads to."""
    for kind in all_problems():
        if kind.name == name:
            return PlainTextResponse(f"{kind.name} ({kind.status}): {kind.title}\n\n{kind.__doc__}\n")
    raise NotFound(f"there is no problem type {name[:50]!r}")


def _page(spec: dict[str, Any], address: str) -> str:
    operations = [
        _operation(path, method, operation)
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    ]
    problems = "".join(
        f'<tr><td>{kind.status}</td><td><a href="/problems/{kind.name}">{kind.name}</a></td>'
        f"<td>{escape(kind.__doc__ or '')}</td></tr>"
        for kind in all_problems()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(spec["info"]["title"])}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>
<h1>{escape(spec["info"]["title"])}</h1><p>{escape(spec["info"].get("description", ""))}</p>
<p>For programs: <a href="/openapi.json">/openapi.json</a>. Also: <a href="/v1/models">/v1/models</a>,
<a href="/v1/limits">/v1/limits</a>, <a href="/health/ready">/health/ready</a>, <a href="/metrics">/metrics</a>.</p>
<form method="post" action="/v1/scan" enctype="multipart/form-data"><label>Try it with a picture (JPEG, PNG, WebP):
<input type="file" name="file" accept="image/jpeg,image/png,image/webp" multiple required></label>
<button>Scan</button> <button formaction="/v1/embeddings">Embed</button></form>
<pre>curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg {escape(address)}/v1/embeddings
curl -F file=@photo.jpg -F file=@other.png {escape(address)}/v1/scan</pre>
{"".join(operations)}
<h2>Problems (RFC 9457)</h2><table>{problems}</table></html>"""


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one['in'])}</td>"
        f"<td>{escape(one.get('description', ''))}</td></tr>"
        for one in operation.get("parameters", [])
    )
    forms = "".join(
        f"<p>Body <code>{escape(media_type)}</code> {escape(content['schema'].get('description', ''))}</p>"
        + "".join(
            f"<p>{escape(example['summary'])}:</p><pre>{escape(json.dumps(example['value'], indent=1))}</pre>"
            for example in content.get("examples", {}).values()
        )
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items()
    )
    answers = ", ".join(f"{status} {escape(response['description'])}" for status, response in operation["responses"].items())
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code> {escape(operation.get('summary', ''))}</h2>"
        f"<p>{escape(operation.get('description', ''))}</p>"
        + (f"<table>{rows}</table>" if rows else "")
        + forms
        + f"<p>Answers: {answers}</p>"
    )
