"""The OpenAPI document: bodies are read by hand here, so their schemas are put in by hand too.

Must not know what routes do.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from accessory.serve.api.protocol import BODIES

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REFUSALS = {
    "400": "What cannot be asked.",
    "401": "No key, or a wrong one.",
    "404": "No such thing.",
    "405": "Not with this method, or not of this model.",
    "408": "The request came too slowly.",
    "413": "Too large.",
    "415": "No JSON.",
    "429": "Too many ask at once; again after Retry-After seconds.",
    "500": "An error of the server.",
    "503": "The server ends.",
}


def schema_of(body: type[BaseModel]) -> dict[str, Any]:
    """What a route's entry says of its body."""
    ref = {"$ref": _REF.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref}}}}


def document(app: FastAPI) -> None:
    """Have the application tell its document, with the schemas of bodies and errors."""

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REF)
            components = made.setdefault("components", {})
            components["schemas"] = {**schemas["$defs"], "Error": _ERROR}
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{}, {"key": []}]
            for path in made["paths"].values():
                for operation in path.values():
                    _refusals(operation)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = told  # type: ignore[method-assign]


def _refusals(operation: dict[str, Any]) -> None:
    """What may be answered in place of an answer."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    answers = operation["responses"]
    answers.pop("422", None)
    for response in answers.values():
        response.pop("content", None)
    answers |= {status: {"description": text, "content": content} for status, text in _REFUSALS.items()}
