"""What is deployed beside the plugin speaks of metrics that it has."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import prometheus_client
import pytest
import yaml

from vllm_lvspec import __version__
from vllm_lvspec.observe.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboard.json"
ALERTS = DEPLOY / "grafana" / "alerts.yml"
ENDINGS = {
    prometheus_client.Counter: ("_total",),
    prometheus_client.Gauge: ("",),
    prometheus_client.Histogram: ("_sum", "_count", "_bucket"),
}


def expressions():
    found = [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]
    return [*found, *re.findall(r"expr: >\n((?:\s{10}.*\n)+)", ALERTS.read_text())]


def test_dashboard_and_alerts_ask_for_series_that_exist_with_labels_that_they_have():
    assert len(expressions()) > 20
    known = {name + ending: metric for name, metric in METRICS.items() for ending in ENDINGS[metric.kind]}
    asked = set()
    for expression in expressions():
        for name, matchers in re.findall(r"lvspec:(\w+)(?:{([^}]*)})?", expression):
            metric = known[name]
            asked.add(metric)
            for label, _, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
                assert label in ("model_name", metric.label)
                if label == metric.label:
                    assert set(value.split("|")) <= set(metric.values)
        for labels in re.findall(r"by \(([\w, ]+)\)", expression):
            assert set(labels.split(", ")) <= {"model_name", "le", *(metric.label for metric in METRICS.values())}
    assert len(asked) >= 9


def test_panels_lie_side_by_side_and_are_explained():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    assert all(panel["description"].endswith(".") for panel in panels)
    assert len({panel["id"] for panel in panels}) == len(panels)


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not installed"
)


def promtool(*arguments, cwd):
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should():
    promtool("test", "rules", "alerts_test.yml", cwd=ALERTS.parent)


@needs_promtool
def test_panels_ask_in_the_language_of_prometheus(tmp_path):
    asked = [expression.replace("$__rate_interval", "5m").replace("$model", ".*") for expression in expressions()]
    rules = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", "rules.yml", cwd=tmp_path)
    (tmp_path / "rules.yml").write_text(
        json.dumps({"groups": [{"name": "x", "rules": [{"record": "a", "expr": "("}]}]})
    )
    with pytest.raises(AssertionError, match="could not parse"):
        promtool("check", "rules", "rules.yml", cwd=tmp_path)


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles_are_fine_by_their_linter(name, tmp_path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DEPLOY / "docker" / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (tmp_path / name).write_text("FROM vllm/vllm-openai\n")
    done = subprocess.run([hadolint, tmp_path / name], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3006" in done.stdout  # it does look


def test_compose_mounts_and_builds_what_is_there():
    folder = DEPLOY / "docker"
    services = yaml.safe_load((folder / "compose.yml").read_text())["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())]
    files = [folder / source for source in mounted if source.startswith(".")]
    build = services["vllm"]["build"]
    context = (folder / build["context"]).resolve()
    assert len(files) == 4 and all(path.exists() for path in [*files, context / build["dockerfile"]])
    copied = re.findall(r"^COPY (.+) \S+$", (context / build["dockerfile"]).read_text(), re.MULTILINE)
    assert len(copied) == 4 and all((context / name).exists() for line in copied for name in line.split())


def test_what_compose_starts_has_the_settings_that_are_given():
    command = yaml.safe_load((DEPLOY / "docker" / "compose.yml").read_text())["services"]["vllm"]["command"]

    def started(**variables: str) -> list[str]:
        """As compose fills variables in, and then splits what there is."""
        filled = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda m: variables.get(m[1], m[2]), command)
        return shlex.split(filled)

    assert started(MODEL="M") == ["M", "--speculative-config", "lvspec"]
    # Quotes end at an apostrophe, which JSON can write otherwise.
    config = '{"method": "lvspec", "trace": 3, "guard_words": {"negation": ["don\\u0027t"]}}'
    more = started(MODEL="M", SPECULATIVE_CONFIG=config, VLLM_ARGUMENTS="--tensor-parallel-size 2")
    assert more == ["M", "--speculative-config", config, "--tensor-parallel-size", "2"]


def test_whoever_asks_for_an_image_names_one_that_is_built():
    texts = {path: path.read_text() for path in DEPLOY.rglob("*") if path.suffix in (".yml", ".yaml", ".cpu", ".cuda")}
    asked = {name for text in texts.values() for name in re.findall(r"image: (vllm-lvspec\S*)", text)}
    built = {name for text in texts.values() for name in re.findall(r"-t (vllm-lvspec\S*)", text)}
    assert asked <= built == {f"vllm-lvspec:{__version__}{kind}" for kind in ("", "-ray", "-cpu")}


def manifests():
    return [
        (path.name, manifest)
        for path in (DEPLOY / "kubernetes").glob("*.yaml")
        for manifest in yaml.safe_load_all(path.read_text())
    ]


def test_manifests_are_what_kubernetes_takes():
    """By its own schemas; KubeRay's kind, which is not among them, by what its pods are made of."""
    version = kubernetes_validate.latest_version()
    kinds = []
    for name, manifest in manifests():
        kinds.append(manifest["kind"])
        if manifest["kind"] != "RayService":
            kubernetes_validate.validate(manifest, version, strict=True)
            continue
        cluster = manifest["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": group["template"]["spec"]}
            kubernetes_validate.validate(pod, version, strict=True)
    assert sorted(kinds) == ["Deployment", "PersistentVolumeClaim", "RayService", "Service"]
    pod["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(pod, version, strict=True)


def test_kuberay_asks_ray_serve_for_what_it_takes(monkeypatch):
    schema = pytest.importorskip("ray.serve.schema", reason="ray is not installed (pip install .[ray])")
    service = yaml.safe_load((DEPLOY / "kubernetes" / "rayservice.yaml").read_text())
    config = schema.ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    monkeypatch.syspath_prepend(str(DEPLOY / "ray"))
    module, name = application.import_path.split(":")
    app = importlib.import_module(module)
    assert callable(getattr(app, name))
    llm = app.llm_config(app.Settings(**application.args))
    assert llm.engine_kwargs["speculative_config"] == "lvspec"
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == application.args["tensor_parallel_size"]
