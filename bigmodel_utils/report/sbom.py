"""The software bill of materials: every package of the environment that computed and rendered the report, as CycloneDX 1.6."""

from __future__ import annotations

import json
import re
import uuid
from importlib import metadata
from typing import Any

import bigmodel_utils
from bigmodel_utils.report.compose import Report


def bill_of_materials(report: Report) -> dict[str, Any]:
    """CycloneDX JSON (https://cyclonedx.org/docs/1.6/json/) of all installed distributions, sorted by name."""
    found = {_name(package): package for package in metadata.distributions() if package.metadata["Name"]}
    components = [_component(name, found[name]) for name in sorted(found)]
    course = {"type": "application", "bom-ref": "course", "name": "bigmodel-utils", "version": bigmodel_utils.__version__}
    content = {
        "metadata": {"timestamp": report.date.isoformat(timespec="seconds"), "component": course},
        "components": [component for component in components if component["name"] != course["name"]],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}", "version": 1, **content}


def _name(package: metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()


def _component(name: str, package: metadata.Distribution) -> dict[str, Any]:
    address = f"pkg:pypi/{name}@{package.version.replace('+', '%2B')}"
    component = {"type": "library", "bom-ref": address, "name": name, "version": package.version, "purl": address}
    licences = _licences(package.metadata)
    return component | ({"licenses": licences} if licences else {})


def _licences(fields: Any) -> list[dict[str, Any]]:
    """What the package declares: an SPDX expression, or else the name in its classifiers or its licence field."""
    if fields["License-Expression"]:
        return [{"expression": fields["License-Expression"]}]
    names = [line.split(" :: ")[-1] for line in fields.get_all("Classifier", []) if line.startswith("License :: ")]
    if not names and fields["License"]:
        names = [fields["License"].strip().splitlines()[0][:100]]
    return [{"license": {"name": name}} for name in names if name]
