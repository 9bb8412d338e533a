"""The bill of materials of the image: every Python distribution in it, as CycloneDX 1.6 in JSON, on standard output.

    python scripts/sbom.py ROOT SITE_PACKAGES REPORT...

ROOT is the name of the distribution that all the others are there for. Names, versions, licences and who needs whom are
read from what is installed in SITE_PACKAGES; the hash of the file that each distribution was installed from is in the
reports that pip writes (`--report`). The same input gives the same bytes: there is no date and no serial number in it.

The image is built by this, so it needs no more than `packaging`, which the package's build brings. A test holds what it
writes against the schema of CycloneDX. Exit code 1 when something is installed that no report knows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def hashes(reports: Iterable[Path]) -> dict[str, str]:
    """Name of a distribution to the SHA-256 of the file that it was installed from."""
    found: dict[str, str] = {}
    for report in reports:
        for item in json.loads(report.read_text())["install"]:
            archive = item["download_info"]["archive_info"]
            # pip before 23.1 knows only the older of the two forms
            found[canonicalize_name(item["metadata"]["name"])] = (
                archive["hashes"]["sha256"] if "hashes" in archive else archive["hash"].removeprefix("sha256=")
            )
    return found


def licences(installed: Distribution) -> list[dict[str, Any]]:
    """The SPDX expression in the field for that, or in the free one; where neither has one, the classifiers."""
    metadata = installed.metadata
    for field in ("License-Expression", "License"):
        for text in metadata.get_all(field) or ():
            try:
                return [{"expression": canonicalize_license_expression(text)}]
            except InvalidLicenseExpression:
                continue
    classifiers = [text for text in metadata.get_all("Classifier") or () if text.startswith("License :: ")]
    return [{"license": {"name": text.rpartition(" :: ")[2]}} for text in classifiers]


def needs(installed: Distribution, extras: Iterable[str]) -> Iterator[str]:
    """The names of what this distribution requires on this machine, with these of its extras."""
    for text in installed.requires or ():
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(wanted.name)


def bill(root: str, installed: Iterable[Distribution], hashed: dict[str, str]) -> dict[str, Any]:
    """The whole document. KeyError when a distribution is in none of the reports."""
    by_name: dict[str, Distribution] = {canonicalize_name(one.metadata["Name"]): one for one in installed}
    purls = {name: f"pkg:pypi/{name}@{one.version}" for name, one in sorted(by_name.items())}
    components: dict[str, dict[str, Any]] = {
        name: {
            "type": "application" if name == root else "library",
            "bom-ref": purl,
            "name": name,
            "version": by_name[name].version,
            "hashes": [{"alg": "SHA-256", "content": hashed[name]}],
            "licenses": licences(by_name[name]),
            "purl": purl,
        }
        for name, purl in purls.items()
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": components.pop(root)},
        "components": list(components.values()),
        "dependencies": [
            # what belongs to an extra is there because the extra was asked for
            {"ref": purl, "dependsOn": sorted({purls[other] for other in needs(one, extras(one)) if other in purls})}
            for one, purl in ((by_name[name], purl) for name, purl in purls.items())
        ],
    }


def extras(installed: Distribution) -> list[str]:
    """All extras of this distribution."""
    return installed.metadata.get_all("Provides-Extra") or []


def main(root: str, site_packages: str, *reports: str) -> int:
    """Write it to standard output; 0, or 1 with a line on standard error."""
    try:
        found = bill(root, distributions(path=[site_packages]), hashes(Path(report) for report in reports))
    except KeyError as error:
        print(f"sbom: {error} is installed in {site_packages}, and in no report of pip", file=sys.stderr)
        return 1
    json.dump(found, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
