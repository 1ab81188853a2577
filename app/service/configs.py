"""Verbs on saved freeze configs: keep, change, import, download."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlmodel import Session

from app.freezing.config import (
    FreezeConfig,
    config_document,
    differing_names,
    parse_config,
)
from app.freezing.errors import InvalidDocument, show_value
from app.freezing.export import config_as_python
from app.freezing.presets import adopt_names
from app.service.documents import (
    CONFIG_ROW_MEMBERS,
    Conflict,
    Document,
    NotFound,
    config_row_document,
    find_row,
    members,
    read_id,
    shorten_config,
)
from app.service.plans import Plans
from app.store import catalog
from app.store.tables import FreezeConfigRow, Model, utc_now


class Configs(Plans):
    """Verbs on saved freeze configs."""

    def save_config(self, doc: Mapping[str, Any]) -> Document:
        """Save a freeze config; its member `model_id` says for which model."""
        model_id = read_id(members(doc), "model_id")
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        return self._store_config(model_id, config)

    def _store_config(self, model_id: int, config: FreezeConfig) -> Document:
        document = self._expand(model_id, config)

        def save(session: Session) -> Document:
            find_row(session, Model, model_id)
            row = FreezeConfigRow(model_id=model_id, document=document)
            session.add(row)
            session.flush()
            return config_row_document(row)

        return self._db.write(save)

    def list_configs(
        self, model_id: int | None = None, limit: int = 100, before: int | None = None
    ) -> list[Document]:
        with self._db.read() as session:
            if model_id is None:
                rows = catalog.list_newest(session, FreezeConfigRow, limit, before)
            else:
                rows = catalog.list_configs(session, model_id, limit, before)
            return [shorten_config(config_row_document(row)) for row in rows]

    def get_config(self, config_id: int) -> Document:
        with self._db.read() as session:
            return config_row_document(find_row(session, FreezeConfigRow, config_id))

    def replace_config(self, config_id: int, doc: Mapping[str, Any]) -> Document:
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        model_id = read_id({"model_id": self.get_config(config_id)["model_id"], **doc}, "model_id")
        document = self._expand(model_id, config)

        def change(session: Session) -> Document:
            row = find_row(session, FreezeConfigRow, config_id)
            row.model_id, row.document, row.updated_at = model_id, document, utc_now()
            session.add(row)
            session.flush()
            return config_row_document(row)

        return self._db.write(change)

    def delete_config(self, config_id: int) -> None:
        self._db.write(lambda s: s.delete(find_row(s, FreezeConfigRow, config_id)))

    def download_config(self, config_id: int, as_: str = "json") -> tuple[str, str, str]:
        """(filename, media type, text) of a saved config as a JSON document or a Python module."""
        row = self.get_config(config_id)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", row["name"]).strip("-.") or "freeze-config"
        if as_ == "json":
            document = members(row, drop=CONFIG_ROW_MEMBERS)
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            return f"{stem}.json", "application/json", text
        if as_ == "python":
            config = parse_config(members(row, drop=CONFIG_ROW_MEMBERS))
            text = config_as_python(config, self.read_graph(row["model_id"]))
            return f"{re.sub(r'[^A-Za-z0-9_]', '_', stem)}.py", "text/x-python", text
        raise InvalidDocument([("as", f"{show_value(as_)} may be 'json' or 'python'.")])

    def import_config(
        self, model_id: int, doc: Mapping[str, Any], accept: str | None = None
    ) -> Document:
        """Save a config that was made elsewhere.

        Args:
            accept: what counts where its lists of names and its rules differ on this model:
                ``rules`` or ``names``; None raises a Conflict that has the names as `differing`.
        """
        if accept not in (None, "rules", "names"):
            raise InvalidDocument([("accept", f"{show_value(accept)} may be 'rules' or 'names'.")])
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        graph = self.read_graph(model_id)
        differing = differing_names(config, graph)
        if accept is None and any(differing.values()):
            count = len(set().union(*differing.values()))
            raise Conflict(
                f"On this model the rules give something else than the lists say, for {count:,} "
                "names. Accept the rules or the names.",
                differing=differing,
            )
        return self._store_config(
            model_id, adopt_names(config, graph) if accept == "names" else config
        )

    def review_import(self, model_id: int, doc: Mapping[str, Any]) -> Document:
        """What an import would store, and the names that differ, without storing anything.

        Returns:
            ``config``: the document as its rules expand on this model; ``names``: likewise where
            its lists count; ``differing``: as `differing_names` has them.
        """
        config = parse_config(members(doc, drop=CONFIG_ROW_MEMBERS))
        graph = self.read_graph(model_id)
        return {
            "config": self._expand(model_id, config),
            "names": self._expand(model_id, adopt_names(config, graph)),
            "differing": differing_names(config, graph),
        }

    def _expand(self, model_id: int, config: FreezeConfig) -> Document:
        """A config's document on that model: its names listed, the model named."""
        try:
            graph = self.read_graph(model_id)
            uri = self.get_model(model_id)["uri"]
        except NotFound as error:
            raise InvalidDocument([("model_id", error.detail)]) from error
        return config_document(replace(config, model={"uri": uri}), graph)
