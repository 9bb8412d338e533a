"""The pages for people: `GET /` lists the jobs, `/page/jobs/<id>` tells one whole, with its files to fetch.

No script, nothing from elsewhere, everything escaped, and nothing wider than a phone.
"""

from collections import Counter
from datetime import UTC, datetime
from html import escape
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Header, HTTPException
from fastapi.responses import HTMLResponse

from mock_api.context import Parts
from mock_api.record import Entry, violations
from mock_api.storage import OUTPUTS

SHOWN = 200

router = APIRouter()

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="5"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --quiet: #777; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
h2 {{ font-size: 1rem; margin: 1.6rem 0 .3rem; }}
p {{ color: var(--quiet); margin: .3rem 0 1.4rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; }}
tbody, thead {{ border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; }}
td {{ font-variant-numeric: tabular-nums; }}
.details {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; color: var(--quiet); }}
td.details {{ padding-top: 0; }}
ul {{ margin: 0; padding-left: 1.2rem; overflow-wrap: anywhere; }}
.state {{ white-space: nowrap; }}
.state::before {{ content: "\\25cf\\00a0"; color: #b8860b; }}
.finished::before {{ color: #2e8b57; }} .error::before {{ color: #c0392b; }} .queued::before {{ color: var(--quiet); }}
.bad {{ color: #c0392b; }}
@media (max-width: 40rem) {{ .wide {{ display: none; }} }}
</style></head><body>
{body}
</body></html>
"""
_HEAD = (
    '<thead><tr><th>Job</th><th>State</th><th class="wide">Submitted (UTC)</th><th>Last word</th>'
    '<th class="wide">Worker</th><th>Files</th></tr></thead>'
)


@router.get("/", response_model=dict[str, str])
def page(parts: Parts, accept: Annotated[str, Header()] = "") -> dict[str, str] | HTMLResponse:
    """The newest jobs on a page, for a browser. Anybody else is greeted in JSON, as by deployed servers (S23)."""
    if "text/html" not in accept:
        return {"message": "Welcome to a mock of the worker-facing API"}
    jobs = parts.store.jobs(SHOWN)
    broken = len(violations(parts.store.record()))
    rows = "".join(_row(job, parts.clock.now()) for job in jobs)
    table = f"<table>{_HEAD}{rows}</table>" if jobs else "<p>No job yet: submit one by POST /user/jobs.</p>"
    return _html("mock API", f"<h1>mock API</h1>\n<p>{_summary(jobs, broken)}</p>\n{table}")


@router.get("/page/jobs/{job_id}", response_class=HTMLResponse, include_in_schema=False)
def job_page(parts: Parts, job_id: int) -> HTMLResponse:
    """One job: what its user was told of it, its files, and what happened."""
    job = parts.store.job(job_id)
    if job is None:
        raise HTTPException(404, "Not Found")
    names = parts.storage.names(f"{OUTPUTS}/{job_id}/")
    title = f"Job {job_id}"
    body = [
        f'<h1>{title} <span class="state {escape(job["state"])}">{escape(job["state"])}</span></h1>',
        f'<p>The user\'s number of it: {job["user_job_id"]}. <a href="/">All jobs</a>, '
        f'<a href="/user/jobs/{job_id}">this one as JSON</a></p>',
        f'<div class="details">{escape(job["details"].strip()) or "No details."}</div>',
        f"<h2>Files</h2>{_files(job_id, names)}",
        f"<h2>What happened</h2>{_history(parts.store.record(job_id=job_id))}",
    ]
    return _html(title, "\n".join(body))


def _html(title: str, body: str) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, body=body))


def _summary(jobs: list[dict[str, Any]], broken: int) -> str:
    counts = Counter(job["state"] for job in jobs)
    shown = ", ".join(f"{count} {escape(state)}" for state, count in sorted(counts.items())) or "no jobs"
    limited = f" (newest {SHOWN})" if len(jobs) == SHOWN else ""
    rules = (
        f'<span class="bad">{broken} breach{"es" if broken > 1 else ""} of the protocol</span>'
        if broken
        else "no breach of the protocol"
    )
    return f"{shown}{limited}; {rules}. A test server: it asks no password for this page."


def _row(job: dict[str, Any], now: float) -> str:
    state, link = escape(job["state"]), f"/page/jobs/{job['job_id']}"
    cells = [
        f'<td><a href="{link}">{job["job_id"]}</a></td>',
        f'<td class="state {state}">{state}</td>',
        f'<td class="wide">{_date(job["created"])}</td>',
        f"<td>{_ago(now - job['updated'])}</td>",
        f'<td class="wide">{escape(job["holder"] or "")}</td>',
        f'<td><a href="{link}#files">files</a></td>',
    ]
    details = escape(job["details"].strip())
    below = f'<tr><td class="details" colspan="6">{details}</td></tr>' if details else ""
    return f"<tbody><tr>{''.join(cells)}</tr>{below}</tbody>"


def _files(job_id: int, names: list[str]) -> str:
    links = "".join(f'<li><a href="/user/jobs/{job_id}/files/{quote(name)}">{escape(name)}</a></li>' for name in names)
    return f'<ul id="files">{links}</ul>' if links else '<p id="files">None yet.</p>'


def _history(entries: list[Entry]) -> str:
    told = [entry for entry in entries if entry.kind in ("submit", "pull", "update", "requeue", "delete", "mail")]
    rows = "".join(
        f'<tr><td><span class="wide">{_date(entry.time)[:10]} </span>{_date(entry.time)[11:]}</td>'
        f"<td>{escape(entry.kind)}</td><td>{escape(entry.state or '')}</td>"
        f'<td class="wide">{escape(entry.account or "")}</td><td>{entry.code or ""}</td></tr>'
        for entry in told
    )
    head = '<th>When (UTC)</th><th>What</th><th>State</th><th class="wide">Worker</th><th>Answer</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _date(time: float) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"
