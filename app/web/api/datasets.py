"""Datasets: a look at one before a job starts."""

from fastapi import APIRouter, Depends

from app.web.api.body import Answer, Body, Verbs, takes
from app.web.guard import signed_in

router = APIRouter(prefix="/datasets", tags=["datasets"], dependencies=[Depends(signed_in)])


@router.post(
    "/preview",
    status_code=202,
    openapi_extra=takes(model_id=1, dataset={"uri": "csv:/data/reviews.csv"}),
)
def preview_dataset(service: Verbs, body: Body) -> Answer:
    """Have a worker read a dataset for a model.

    The task's `result` tells the columns and what each is to the model, the classes with their
    counts, the split, and a few examples.
    """
    return Answer(service.preview_dataset(body), 202)
