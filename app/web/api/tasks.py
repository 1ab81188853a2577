"""Tasks: inspections of models and previews of datasets, which run beside the jobs."""

from fastapi import APIRouter, Depends

from app.web.api.body import Answer, Id, Verbs
from app.web.guard import signed_in

router = APIRouter(prefix="/tasks", tags=["tasks"], dependencies=[Depends(signed_in)])


@router.get("/{task_id}")
def get_task(service: Verbs, task_id: Id) -> Answer:
    """One task: its kind, state and error, and the result of one that has found something out."""
    return Answer(service.get_task(task_id))


@router.post("/{task_id}/stop", status_code=202)
def stop_task(service: Verbs, task_id: Id) -> Answer:
    """End a task; one that has ended stays as it is."""
    return Answer(service.stop_task(task_id), 202)
