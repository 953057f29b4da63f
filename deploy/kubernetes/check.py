"""Validate the manifests against the schemas of Kubernetes, and hold what schemas cannot: the names in them agree.

python deploy/kubernetes/check.py         with requirements/container.txt
"""

import sys
from pathlib import Path

import kubernetes_validate
import yaml

FOLDER = Path(__file__).parent
VERSIONS = ("1.29", "1.37")


def main() -> None:
    """Exit with the reason if a manifest is not valid."""
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text(encoding="utf-8"))
    objects = [
        found
        for name in kustomization["resources"]
        for found in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
    ]
    for version in VERSIONS:
        for found in objects:
            try:
                kubernetes_validate.validate(found, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                sys.exit(f"{found['kind']}, Kubernetes {version}: {error.message}")
    kinds = {found["kind"]: found for found in objects}
    pod = kinds["Deployment"]["spec"]["template"]
    labels, container = pod["metadata"]["labels"], pod["spec"]["containers"][0]
    selectors = [
        kinds["Deployment"]["spec"]["selector"]["matchLabels"],
        kinds["Service"]["spec"]["selector"],
        kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    if any(selector.items() - labels.items() for selector in selectors):
        sys.exit("a selector does not find the pods")
    ports = {port["name"] for port in container["ports"]}
    if any(container[probe]["httpGet"]["port"] not in ports for probe in ("startupProbe", "livenessProbe", "readinessProbe")):
        sys.exit("a probe asks a port that does not exist")
    print(f"{len(objects)} objects are valid for Kubernetes {' and '.join(VERSIONS)}")


if __name__ == "__main__":
    main()
