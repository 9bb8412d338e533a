"""`GET /`: the jobs and their states on one plain page. No script, nothing from elsewhere, everything escaped."""

from collections import Counter
from datetime import UTC, datetime
from html import escape
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi.responses import HTMLResponse

from mock_api.context import Parts
from mock_api.record import violations

SHOWN = 200

router = APIRouter()

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="5"><title>mock API</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --quiet: #777; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p {{ color: var(--quiet); margin: .3rem 0 1.4rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); }}
th {{ font-weight: 600; }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
td.details {{ white-space: pre-wrap; font-size: .85rem; }}
.state {{ white-space: nowrap; }}
.state::before {{ content: "\\25cf\\00a0"; color: #b8860b; }}
.finished::before {{ color: #2e8b57; }} .error::before {{ color: #c0392b; }} .queued::before {{ color: var(--quiet); }}
.bad {{ color: #c0392b; }}
</style></head><body>
<h1>mock API</h1>
<p>{summary}</p>
{table}
</body></html>
"""
_HEAD = "<tr><th>Job</th><th>State</th><th>Submitted (UTC)</th><th>Last word</th><th>Worker</th><th>Details</th></tr>"


@router.get("/", response_model=dict[str, str])
def page(parts: Parts, accept: Annotated[str, Header()] = "") -> dict[str, str] | HTMLResponse:
    """The newest jobs on a page, for a browser. Anybody else is greeted in JSON, as by deployed servers (S23)."""
    if "text/html" not in accept:
        return {"message": "Welcome to a mock of the worker-facing API"}
    jobs = parts.store.jobs(SHOWN)
    broken = len(violations(parts.store.record()))
    rows = "".join(_row(job, parts.clock.now()) for job in jobs)
    table = f"<table>{_HEAD}{rows}</table>" if jobs else "<p>No job yet: submit one by POST /user/jobs.</p>"
    return HTMLResponse(_PAGE.format(summary=_summary(jobs, broken), table=table))


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
    state = escape(job["state"])
    cells = [
        f"<td>{job['job_id']}</td>",
        f'<td class="state {state}">{state}</td>',
        f"<td>{datetime.fromtimestamp(job['created'], UTC):%Y-%m-%d %H:%M:%S}</td>",
        f"<td>{_ago(now - job['updated'])}</td>",
        f"<td>{escape(job['holder'] or '')}</td>",
        f'<td class="details">{escape(job["details"])}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"
