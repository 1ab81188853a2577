"""Reports: a job or a sweep as one HTML file to send to somebody."""

from fastapi import APIRouter, Depends
from starlette.responses import HTMLResponse, Response

from app.web.api.body import Id, Verbs, gives
from app.web.api.configs import attachment
from app.web.guard import signed_in
from app.web.report import write_job_report, write_sweep_report

router = APIRouter(tags=["reports"], dependencies=[Depends(signed_in)])


@router.get("/jobs/{job_id}/report", responses=gives("text/html"))
def read_job_report(service: Verbs, job_id: Id) -> Response:
    """One job as a self-contained HTML file."""
    name = f"job-{job_id}-report.html"
    return HTMLResponse(write_job_report(service, job_id), headers=attachment(name))


@router.get("/sweeps/{sweep_id}/report", responses=gives("text/html"))
def read_sweep_report(service: Verbs, sweep_id: Id) -> Response:
    """One sweep as a self-contained HTML file."""
    name = f"sweep-{sweep_id}-report.html"
    return HTMLResponse(write_sweep_report(service, sweep_id), headers=attachment(name))
