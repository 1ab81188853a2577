"""Verbs on datasets: look at one, as a model will see it, before a job starts."""

from collections.abc import Mapping
from typing import Any

from app.freezing.errors import InvalidDocument
from app.service.documents import Document, check_members, collecting, read_id
from app.service.ground import Ground
from app.sources.spec import parse_dataset_spec, spec_document
from app.training.recipe import parse_recipe

PREVIEWS_KEPT = 50


class Datasets(Ground):
    """Verbs on datasets."""

    def preview_dataset(self, doc: Mapping[str, Any]) -> Document:
        """Have a worker read a dataset for a model; the task that does is answered.

        Args:
            doc: `model_id` and `dataset` as in a job, and optionally `training` with its `seed`,
                which decides what is held out.
        """
        errors: list[tuple[str, str]] = []
        with collecting(errors):
            check_members(doc, ("model_id", "dataset", "training"))
        with collecting(errors):
            dataset = spec_document(parse_dataset_spec(doc.get("dataset"), **self._dirs()))
        with collecting(errors):
            seed = parse_recipe(doc.get("training") or {}).seed
        with collecting(errors):
            model_id = read_id(doc, "model_id")
        if errors:
            raise InvalidDocument(errors)

        spec = {"kind": "preview", "dataset": dataset, "training": {"seed": seed}}
        surroundings = {"kernels": self._runner.kernels(), **self._surroundings()}
        return self._add_task(model_id, {**spec, **surroundings}, PREVIEWS_KEPT)
