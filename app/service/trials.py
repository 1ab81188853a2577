"""Verbs that try things on a model before a job: mechanisms side by side, and how long it takes."""

from collections.abc import Mapping
from typing import Any

from app.freezing.config import config_document, parse_config
from app.freezing.errors import InvalidDocument
from app.service.documents import CONFIG_ROW_MEMBERS, Conflict, Document, collecting, members
from app.service.plans import Plans
from app.sources.spec import parse_dataset_spec, spec_document
from app.training.recipe import parse_recipe, recipe_document

TRIALS_KEPT = 50
MAX_STEPS = 100
MAX_TIMED_BYTES = 2 * 2**30


class Trials(Plans):
    """Verbs that try things on a model."""

    def calibrate(self, model_id: int) -> Document:
        """Have a worker time the operations of a model; the task that does is answered.

        Its plans have a `predicted_step_ms` from then on.
        """
        graph = self.read_graph(model_id)
        if not graph.nodes:
            raise Conflict(
                f"Model {model_id} could not be traced, so its operations are not known one by one."
            )
        if graph.resting_bytes > MAX_TIMED_BYTES:
            raise Conflict(
                f"Model {model_id} takes {graph.resting_bytes / 2**30:.1f} GiB; models of at most "
                f"{MAX_TIMED_BYTES // 2**30} GiB are timed beside the jobs."
            )
        spec: Document = {"kind": "calibrate", "kernels": graph.kernels, **self._surroundings()}
        return self._add_task(model_id, spec, TRIALS_KEPT)

    def compare_mechanisms(self, model_id: int, doc: Mapping[str, Any]) -> Document:
        """Have a worker train a few steps under each mechanism; the task that does is answered.

        Args:
            doc: a freeze config, and optionally `dataset` (otherwise the model's own example is
                trained on) and `training`: optimizer, rate, decay, momentum, clipping, batch size,
                seed, and `max_steps`, 5 where it is not given.
        """
        graph = self.read_graph(model_id)
        errors: list[tuple[str, str]] = []
        given = members(doc, drop=("dataset", "training", *CONFIG_ROW_MEMBERS))
        spec: Document = {"kind": "mechanisms", **self._surroundings()}
        with collecting(errors):
            spec["config"] = config_document(parse_config(given), graph)
            if not spec["config"]["trainable"]:
                message = "Nothing is trainable under this freeze config. Unfreeze something."
                raise InvalidDocument([("rules", message)])
        with collecting(errors):
            recipe = parse_recipe(doc.get("training") or {})
            spec["training"] = {**recipe_document(recipe), "max_steps": recipe.max_steps or 5}
            if not 2 <= spec["training"]["max_steps"] <= MAX_STEPS:
                message = f"'max_steps' must be from 2 to {MAX_STEPS} here: a few steps tell."
                raise InvalidDocument([("training.max_steps", message)])
        with collecting(errors):
            if doc.get("dataset") is not None:
                spec["dataset"] = spec_document(parse_dataset_spec(doc["dataset"], **self._dirs()))
        if errors:
            raise InvalidDocument(errors)
        return self._add_task(model_id, spec, TRIALS_KEPT)
