"""Everything a user can do, one verb each; it knows no HTTP, no SQL and no torch."""

from app.service.datasets import Datasets
from app.service.documents import Conflict, Document, NotFound
from app.service.ground import RunnerStatus
from app.service.sweeps import Sweeps
from app.service.system import System
from app.service.trials import Trials

__all__ = ["Conflict", "Document", "NotFound", "RunnerStatus", "Service"]


class Service(Trials, Sweeps, Datasets, System):
    """The verbs: synchronous, and callable from any thread.

    They take and give JSON-ready documents in the contract's shapes; a number that is not finite is
    the string "NaN", "Infinity" or "-Infinity".

    Raises (all verbs): InvalidDocument, NotFound, Conflict.
    """
