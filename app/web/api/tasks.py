"""Tasks: inspections of models, which run beside the jobs."""

from fastapi import APIRouter, Depends

from app.web.api.body import Answer, Id, Verbs
from app.web.guard import signed_in

router = APIRouter(prefix="/tasks", tags=["tasks"], dependencies=[Depends(signed_in)])


@router.get("/{task_id}")
def get_task(service: Verbs, task_id: Id) -> Answer:
    """One task: its kind, state and error."""
    return Answer(service.get_task(task_id))
