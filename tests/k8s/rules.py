"""Rules for the manifests beyond their schemas: each takes rendered objects and yields what is wrong with them."""

import re
from collections.abc import Callable, Iterator
from typing import Any

Object = dict[str, Any]
Rule = Callable[[list[Object]], Iterator[str]]

NOT_AGAIN = {2, 65, 69, 78, 79}
GPU = "nvidia.com/gpu"
CLUSTER_SCOPED = {"Namespace", "PriorityClass"}
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


def of(objects: list[Object], *kinds: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] in kinds]


def job_sets(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield (name, spec of a JobSet): JobSets, and those that a TrainJob makes of its runtime."""
    for thing in of(objects, "JobSet"):
        yield thing["metadata"]["name"], thing["spec"]
    for thing in of(objects, "TrainingRuntime"):
        yield thing["metadata"]["name"], thing["spec"]["template"]["spec"]


def jobs(objects: list[Object]) -> Iterator[tuple[str, Object, str]]:
    """Yield (name, spec of a Job, labels' job name): plain Jobs and those inside a JobSet."""
    for thing in of(objects, "Job"):
        yield thing["metadata"]["name"], thing["spec"], thing["metadata"]["name"]
    for name, spec in job_sets(objects):
        for replicated in spec["replicatedJobs"]:
            yield name, replicated["template"]["spec"], ""


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield (name, pod template)."""
    for name, spec, _ in jobs(objects):
        yield name, spec["template"]
    for thing in of(objects, "Deployment"):
        yield thing["metadata"]["name"], thing["spec"]["template"]
    for thing in of(objects, "Pod"):
        yield thing["metadata"]["name"], thing


def containers(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Yield (name, pod spec, container), with those that run before the others."""
    for name, template in pods(objects):
        spec = template["spec"]
        for container in spec.get("initContainers", []) + spec["containers"]:
            yield f"{name}/{container['name']}", spec, container


def settings_name(thing: Object) -> bool:
    """Whether this is the ConfigMap of the settings, whose name ends in their hash."""
    return str(thing["metadata"]["name"]).startswith("settings-")


def settings(objects: list[Object]) -> dict[str, str]:
    return next(thing["data"] for thing in of(objects, "ConfigMap") if thing["metadata"]["name"].startswith("settings"))


@rule
def namespace_is_set_and_restricted(objects: list[Object]) -> Iterator[str]:
    (namespace,) = of(objects, "Namespace")
    if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace does not enforce the restricted profile"
    for thing in objects:
        if thing["kind"] not in CLUSTER_SCOPED and thing["metadata"].get("namespace") != namespace["metadata"]["name"]:
            yield f"{thing['kind']} {thing['metadata']['name']}: not in the namespace"


COMPONENT = "app.kubernetes.io/component"
STEPS = {"base", "data", "data-merge", "train", "export", "generate", "generate-merge", "serve", "files"}


@rule
def everything_belongs_to_a_step(objects: list[Object]) -> Iterator[str]:
    """Steps are applied one by one, chosen by this label: what lacks it would never be applied."""
    for thing in objects:
        labels = thing["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/part-of") != "dcgan" or labels.get("app.kubernetes.io/component") not in STEPS:
            yield f"{thing['kind']} {thing['metadata']['name']}: belongs to no step"


@rule
def pods_have_the_name_of_their_step(objects: list[Object]) -> Iterator[str]:
    """k8s/run.sh, and whoever reads logs, finds pods by it: a JobSet names its Jobs, and so their pods, otherwise."""
    for thing in objects:
        step = thing["metadata"].get("labels", {}).get(COMPONENT)
        for name, template in pods([thing]):
            if template["metadata"].get("labels", {}).get(COMPONENT) != step:
                yield f"{name}: its pods belong to another step"


@rule
def pods_fit_the_restricted_profile(objects: list[Object]) -> Iterator[str]:
    for name, template in pods(objects):
        security = template["spec"].get("securityContext", {})
        if not security.get("runAsNonRoot") or not security.get("runAsUser"):
            yield f"{name}: may run as root"
        if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        if "fsGroup" not in security:
            yield f"{name}: volumes belong to root"
        if template["spec"].get("automountServiceAccountToken") is not False:
            yield f"{name}: gets a token of the API server"
        for volume in template["spec"]["volumes"]:
            if not {"persistentVolumeClaim", "emptyDir", "configMap", "secret"} & set(volume):
                yield f"{name}: volume {volume['name']} is of a kind that the profile forbids"
    for name, _, container in containers(objects):
        security = container.get("securityContext", {})
        if (
            security.get("allowPrivilegeEscalation") is not False
            or security.get("capabilities", {}).get("drop") != ["ALL"]
            or not security.get("readOnlyRootFilesystem")
        ):
            yield f"{name}: not confined"


@rule
def containers_have_bounds(objects: list[Object]) -> Iterator[str]:
    for name, _, container in containers(objects):
        resources = container["resources"]
        for what in ("cpu", "memory"):
            if what not in resources.get("requests", {}) or what not in resources.get("limits", {}):
                yield f"{name}: no {what} request or limit"
        if resources.get("requests", {}).get(GPU) != resources.get("limits", {}).get(GPU):
            yield f"{name}: GPU request and limit differ"
        if GPU in resources["limits"] and not str(resources["limits"][GPU]).isdigit():
            yield f"{name}: {resources['limits'][GPU]} GPUs"


@rule
def the_last_words_are_kept(objects: list[Object]) -> Iterator[str]:
    """Else `kubectl describe` shows an exit code without a reason, and the reason goes with the pod's log."""
    for name, _, container in containers(objects):
        if container.get("terminationMessagePolicy") != "FallbackToLogsOnError":
            yield f"{name}: what it says last stays in its log"


@rule
def the_cache_of_shards_fits_its_volume(objects: list[Object]) -> Iterator[str]:
    """A pod that fills an emptyDir beyond its limit is evicted, and fills the next one again."""
    for name, spec, container in containers(objects):
        if "train" not in container.get("args", []):
            continue
        variables = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        mounted = mounts.get(variables.get("DCGAN_CACHE", ""))
        volumes = {volume["name"]: volume.get("emptyDir", {}).get("sizeLimit", "") for volume in spec["volumes"]}
        gib = re.fullmatch(r"(\d+)Gi", volumes.get(mounted, "")) if mounted else None
        limit = int(variables.get("DCGAN_CACHE_GIB", "16"))
        if gib is None or limit * 1.2 > int(gib[1]):  # shards that are being fetched come on top
            yield f"{name}: the cache takes {limit} GiB, its volume {gib and gib[1]} GiB"


@rule
def ranks_have_shared_memory(objects: list[Object]) -> Iterator[str]:
    """NCCL and the loader use it; a container has 64 MB by default. It counts towards the memory limit."""
    for name, spec, container in containers(objects):
        if "train" not in container.get("args", []):
            continue
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in spec["volumes"]}
        volume = volumes.get(mounts.get("/dev/shm", ""), {})
        size, limit = (re.fullmatch(r"(\d+)Gi", str(text)) for text in (volume.get("sizeLimit"), memory(container)))
        if volume.get("medium") != "Memory" or size is None or limit is None or 2 * int(size[1]) > int(limit[1]):
            yield f"{name}: /dev/shm is {volume}, of a limit of {memory(container)}"


def memory(container: Object) -> str:
    return str(container["resources"]["limits"]["memory"])


@rule
def nccl_says_why_it_fails(objects: list[Object]) -> Iterator[str]:
    """Else there is only "unhandled system error"."""
    for name, _, container in containers(objects):
        variables = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
        if "train" in container.get("args", []) and variables.get("NCCL_DEBUG") != "WARN":
            yield f"{name}: NCCL_DEBUG={variables.get('NCCL_DEBUG')}"


@rule
def one_setting_counts_the_gpus(objects: list[Object]) -> Iterator[str]:
    for name, _, container in containers(objects):
        found = container["resources"]["limits"].get(GPU)
        wanted = settings(objects)["GPUS"] if "train" in container.get("args", []) else "1"
        if found is not None and str(found) != wanted:
            yield f"{name}: {found} GPUs, expected {wanted}"


@rule
def batch_work_yields_to_services(objects: list[Object]) -> Iterator[str]:
    for thing in of(objects, "PriorityClass"):
        name = thing["metadata"]["name"]
        if thing["value"] >= 0 or thing.get("preemptionPolicy") != "Never" or thing.get("globalDefault"):
            yield f"PriorityClass {name}: takes the place of others"
        users = {pod for pod, template in pods(objects) if template["spec"].get("priorityClassName") == name}
        if users != {job for job, _, _ in jobs(objects)}:
            yield f"PriorityClass {name}: used by {sorted(users)}"


@rule
def servers_have_a_budget_that_blocks_no_drain(objects: list[Object]) -> Iterator[str]:
    budgets = [thing["spec"] for thing in of(objects, "PodDisruptionBudget")]
    for thing in of(objects, "Deployment"):
        labels = thing["spec"]["template"]["metadata"]["labels"]
        found = [budget for budget in budgets if budget["selector"]["matchLabels"].items() <= labels.items()]
        if len(found) != 1:
            yield f"Deployment {thing['metadata']['name']}: {len(found)} disruption budgets"
    for budget in budgets:
        if "minAvailable" in budget or budget.get("maxUnavailable") != 1:
            yield f"PodDisruptionBudget {budget['selector']}: may block a drain, or lets all go at once"


@rule
def gpu_pods_tolerate_gpu_nodes(objects: list[Object]) -> Iterator[str]:
    """All of them: those without a GPU may have to follow their volume to a node with one."""
    if not any(GPU in container["resources"]["limits"] for _, _, container in containers(objects)):
        return
    for name, template in pods(objects):
        if not any(toleration["key"] == GPU for toleration in template["spec"].get("tolerations", [])):
            yield f"{name}: does not tolerate the taint of GPU nodes"


@rule
def images_are_pinned(objects: list[Object]) -> Iterator[str]:
    for name, _, container in containers(objects):
        image = container["image"]
        if "/" not in image or not re.fullmatch(r"[^@]+(:(?!latest$)\w[\w.-]*|@sha256:[0-9a-f]{64})", image):
            yield f"{name}: image {image} names no registry or no version"


@rule
def jobs_follow_the_rules_of_their_fields(objects: list[Object]) -> Iterator[str]:
    for name, spec, _ in jobs(objects):
        pod = spec["template"]["spec"]
        if "podFailurePolicy" not in spec:
            yield f"{name}: no podFailurePolicy"
            continue
        if pod.get("restartPolicy") != "Never":
            yield f"{name}: podFailurePolicy needs restartPolicy: Never"
        if spec.get("podReplacementPolicy") != "Failed":
            yield f"{name}: podFailurePolicy needs podReplacementPolicy: Failed"
        for policy in spec["podFailurePolicy"]["rules"]:
            if policy["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
                yield f"{name}: FailIndex needs backoffLimitPerIndex"
            if policy["action"] not in ("FailJob", "FailIndex", "Ignore", "Count"):
                yield f"{name}: action {policy['action']}"
            if 0 in policy.get("onExitCodes", {}).get("values", []):
                yield f"{name}: a rule about exit code 0"
        if not pod.get("terminationGracePeriodSeconds", 30) >= 30:
            yield f"{name}: no time to save"


@rule
def indexed_jobs_follow_the_rules_of_their_fields(objects: list[Object]) -> Iterator[str]:
    """As the API server checks them, which schemas do not."""
    for name, spec, _ in jobs(objects):
        indexed = spec.get("completionMode") == "Indexed"
        if ("backoffLimitPerIndex" in spec or "maxFailedIndexes" in spec) and not indexed:
            yield f"{name}: limits per index without indices"
        if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
            yield f"{name}: maxFailedIndexes needs backoffLimitPerIndex"
        if spec.get("maxFailedIndexes", 0) > spec.get("completions", 0):
            yield f"{name}: maxFailedIndexes {spec['maxFailedIndexes']} of {spec['completions']} completions"
        if indexed and not spec.get("completions"):
            yield f"{name}: indexed, without completions"


@rule
def jobs_stop_on_our_exit_codes(objects: list[Object]) -> Iterator[str]:
    for name, spec, _ in jobs(objects):
        stops: set[int] = set()
        for policy in spec["podFailurePolicy"]["rules"]:
            codes = set(policy.get("onExitCodes", {}).get("values", []))
            if policy["action"] in ("FailJob", "FailIndex"):
                stops |= codes
            elif codes & NOT_AGAIN or 75 in codes:
                yield f"{name}: ignores {sorted(codes)}"
        if stops != NOT_AGAIN:
            yield f"{name}: ends for good on {sorted(stops)}, expected {sorted(NOT_AGAIN)}"
        whole = "backoffLimitPerIndex" not in spec
        if whole and any(policy["action"] == "FailIndex" for policy in spec["podFailurePolicy"]["rules"]):
            yield f"{name}: fails an index where all depend on each other"


@rule
def disruption_is_no_failure(objects: list[Object]) -> Iterator[str]:
    for thing in of(objects, "Job"):
        rules = thing["spec"]["podFailurePolicy"]["rules"]
        conditions = [c["type"] for r in rules if r["action"] == "Ignore" for c in r.get("onPodConditions", [])]
        if "DisruptionTarget" not in conditions:
            yield f"{thing['metadata']['name']}: a drained node counts as a failure"
        if not any(r["action"] == "Ignore" and r.get("onExitCodes", {}).get("values") == [143] for r in rules):
            yield f"{thing['metadata']['name']}: being stopped counts as a failure"


@rule
def training_restarts_as_one(objects: list[Object]) -> Iterator[str]:
    for name, spec, _ in jobs(objects):
        if name != "train":
            continue
        if "backoffLimitPerIndex" in spec:
            yield "train: ranks would fail one by one"
        if spec["completions"] != spec["parallelism"]:
            yield "train: not all ranks run at once"
        if not spec["template"]["spec"].get("subdomain") and not of(objects, "TrainingRuntime"):
            yield "train: ranks have no names"
    for _, spec in job_sets(objects):
        if any(replicated["template"]["spec"]["backoffLimit"] != 0 for replicated in spec["replicatedJobs"]):
            yield "JobSet: a pod would be replaced alone"
    for thing in of(objects, "JobSet"):
        if thing["spec"]["network"]["subdomain"] != "ranks":
            yield "JobSet: another subdomain"


@rule
def a_train_job_finds_its_runtime_and_its_ranks_each_other(objects: list[Object]) -> Iterator[str]:
    """What Kubeflow Trainer 2.3 asks for: it gives its variables to the container `node` of the job that has the label.

    They send all ranks to NAME-node-0-0.NAME, which is the default of a JobSet, and say how many there are.
    """
    values = settings(objects)
    runtimes = {thing["metadata"]["name"]: thing["spec"] for thing in of(objects, "TrainingRuntime")}
    for thing in of(objects, "TrainJob"):
        spec, reference = thing["spec"], thing["spec"]["runtimeRef"]
        runtime = runtimes.get(reference["name"]) if reference["kind"] == "TrainingRuntime" else None
        if runtime is None:
            yield f"TrainJob: no runtime {reference['name']}"
            continue
        job_set = runtime["template"]["spec"]
        (replicated,) = job_set["replicatedJobs"]
        template = replicated["template"]
        (container,) = template["spec"]["template"]["spec"]["containers"]
        wanted = (int(values["NODES"]), int(values["GPUS"]), container["image"])
        if (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"], spec["trainer"]["image"]) != wanted:
            yield f"TrainJob: other nodes, processes or image than {wanted}"
        sources = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
        if sources != [thing["metadata"]["annotations"].get("dcgan.settings")]:
            yield "TrainJob: does not say which settings it was started with"
        labels = template.get("metadata", {}).get("labels", {})
        if (
            "torch" not in runtime["mlPolicy"]
            or (replicated["name"], replicated["replicas"], container["name"]) != ("node", 1, "node")
            or labels.get("trainer.kubeflow.org/trainjob-ancestor-step") != "trainer"
        ):
            yield "TrainJob: the controller would not tell the ranks where they are"
        if job_set.get("network") or "subdomain" in template["spec"]["template"]["spec"]:
            yield "TrainJob: rank 0 would have another name than the controller says"
        if "ttlSecondsAfterFinished" in job_set:
            yield "TrainJob: would be run again when its JobSet goes"


@rule
def batch_jobs_end(objects: list[Object]) -> Iterator[str]:
    for name, spec, _ in jobs(objects):
        if name == "train":
            continue
        if not spec.get("activeDeadlineSeconds") or not spec.get("ttlSecondsAfterFinished"):
            yield f"{name}: no deadline, or stays for ever"


@rule
def numbers_of_pods_are_the_settings(objects: list[Object]) -> Iterator[str]:
    values = settings(objects)
    for name, spec, _ in jobs(objects):
        key = {"train": "NODES", "generate": "PARTS", "data": "DATA_PARTS"}.get(name)
        if key and spec["completions"] != int(values[key]):
            yield f"{name}: {spec['completions']} pods, but {key}={values[key]}"
        if key and not any(f"$({key})" in argument for argument in spec["template"]["spec"]["containers"][0]["args"]):
            yield f"{name}: the program is not told {key}"


@rule
def the_trainer_accepts_the_numbers(objects: list[Object]) -> Iterator[str]:
    """What pipeline/config.py asks for: every process owns some of the streams, and every stream some of the batch."""
    values = settings(objects)
    batch, streams = int(values["BATCH"]), int(values["STREAMS"])
    for container in [c for _, _, c in containers(objects) if "train" in c.get("args", [])]:
        processes = int(values["NODES"]) * int(container["resources"]["limits"].get(GPU, 1))
        if streams % processes:
            yield f"STREAMS={streams} cannot be split over {processes} processes"
    if batch % streams:
        yield f"BATCH={batch} cannot be split over STREAMS={streams}"


@rule
def a_job_keeps_its_settings(objects: list[Object]) -> Iterator[str]:
    """Else a pod that is replaced goes on with those of the next job."""
    for thing in of(objects, "ConfigMap"):
        if thing["metadata"]["name"].startswith("settings") and (
            not settings_name(thing) or not thing.get("immutable")
        ):
            yield f"{thing['metadata']['name']}: may change under a Job that runs"


@rule
def every_variable_is_a_setting(objects: list[Object]) -> Iterator[str]:
    known = set(settings(objects)) | {"JOB_COMPLETION_INDEX"}
    for name, _, container in containers(objects):
        used = set(re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []) + container.get("command", []))))
        for variable in sorted(used - known):
            yield f"{name}: $({variable}) is not in the settings"
        sources = [source.get("configMapRef", {}).get("name") for source in container.get("envFrom", [])]
        if used and not any(str(source).startswith("settings-") for source in sources):
            yield f"{name}: uses settings without having them"


@rule
def every_setting_is_used(objects: list[Object]) -> Iterator[str]:
    steps = {name for name, _ in pods(objects)}
    if not {"data", "train", "export", "generate"} <= steps:
        return  # an overlay without some of the steps has settings to spare
    text = " ".join(" ".join(container.get("args", [])) for _, _, container in containers(objects))
    # Kubernetes' own to know:
    placed = {"NODES", "PARTS", "DATA_PARTS", "GPUS", "TRAIN_CPU", "TRAIN_MEMORY", "DEADLINE"}
    for key in sorted(set(settings(objects)) - placed - set(re.findall(r"\$\((\w+)\)", text))):
        yield f"settings: {key} is read by nobody"


@rule
def references_exist(objects: list[Object]) -> Iterator[str]:
    names = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    for name, template in pods(objects):
        spec = template["spec"]
        if ("ServiceAccount", spec.get("serviceAccountName")) not in names:
            yield f"{name}: no service account {spec.get('serviceAccountName')}"
        mounted = {volume["name"] for volume in spec["volumes"]}
        for volume in spec["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in names:
                yield f"{name}: no volume claim {claim}"
        for container in spec.get("initContainers", []) + spec["containers"]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in mounted:
                    yield f"{name}: no volume {mount['name']}"
            for source in container.get("envFrom", []):
                kind, reference = (
                    ("ConfigMap", source.get("configMapRef"))
                    if "configMapRef" in source
                    else (
                        "Secret",
                        source["secretRef"],
                    )
                )
                if not reference.get("optional") and (kind, reference["name"]) not in names:
                    yield f"{name}: no {kind} {reference['name']}"
            paths = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
            if not {"/work", "/tmp"} <= paths:
                yield f"{name}: nowhere to write"


@rule
def services_find_their_pods(objects: list[Object]) -> Iterator[str]:
    templates = dict(pods(objects))
    for service in of(objects, "Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        chosen = []
        for pod, template in templates.items():
            labels = dict(template["metadata"]["labels"])
            if pod in {job for job, _, _ in jobs(objects)}:
                labels["batch.kubernetes.io/job-name"] = pod  # the controller adds it
            if spec["selector"].items() <= labels.items():
                chosen.append(template["spec"])
        if len(chosen) != 1:
            yield f"Service {name}: selects {len(chosen)} pod templates"
            continue
        ports = {port["name"] for container in chosen[0]["containers"] for port in container.get("ports", [])}
        for port in spec["ports"]:
            if isinstance(port["targetPort"], str) and port["targetPort"] not in ports:
                yield f"Service {name}: no port {port['targetPort']}"
        if chosen[0].get("subdomain") and (
            chosen[0]["subdomain"] != name
            or spec.get("clusterIP") != "None"
            or not spec.get("publishNotReadyAddresses")
        ):
            yield f"Service {name}: ranks cannot find each other by it"
    subdomains = {template["spec"].get("subdomain") for template in templates.values()} - {None}
    headless = {service["metadata"]["name"] for service in of(objects, "Service")}
    if not of(objects, "JobSet") and not subdomains <= headless:
        yield f"no Service for the subdomain {subdomains - headless}"


@rule
def deployments_select_their_pods(objects: list[Object]) -> Iterator[str]:
    for thing in of(objects, "Deployment"):
        labels = thing["spec"]["template"]["metadata"]["labels"]
        if not thing["spec"]["selector"]["matchLabels"].items() <= labels.items():
            yield f"Deployment {thing['metadata']['name']}: does not select its own pods"
        for container in thing["spec"]["template"]["spec"]["containers"]:
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if container.get(probe, {}).get("httpGet", {}).get("port") not in ports:
                    yield f"Deployment {thing['metadata']['name']}: no {probe} on a port that it has"


@rule
def networks_are_closed_but_for_what_is_needed(objects: list[Object]) -> Iterator[str]:
    policies = {thing["metadata"]["name"]: thing["spec"] for thing in of(objects, "NetworkPolicy")}
    deny = policies.get("default-deny", {})
    if deny.get("podSelector") != {} or set(deny.get("policyTypes", [])) != {"Ingress", "Egress"} or len(deny) != 2:
        yield "no default-deny for all pods, both ways"
    if not any(p["port"] == 53 and p["protocol"] == "UDP" for e in policies["dns"]["egress"] for p in e["ports"]):
        yield "pods cannot resolve names"
    for name, spec in policies.items():
        for peer in [p for way in spec.get("egress", []) for p in way.get("to", [{}])]:
            block = peer.get("ipBlock")
            if peer == {} or (
                block and block["cidr"] == "0.0.0.0/0" and "169.254.0.0/16" not in block.get("except", [])
            ):
                yield f"NetworkPolicy {name}: reaches the metadata service"
        for way in spec.get("egress", []):
            of_the_node = [p for p in way.get("to", []) if p.get("ipBlock", {}).get("cidr", "").startswith("169.254.")]
            if of_the_node and {port["port"] for port in way.get("ports", [{"port": None}])} != {53}:
                yield f"NetworkPolicy {name}: reaches more than names at the node's own addresses"
    labels = [template["metadata"]["labels"] for name, template in pods(objects) if name == "train"]
    ranks = policies["ranks"]
    for peers in (ranks["ingress"][0]["from"], ranks["egress"][0]["to"]):
        chosen = peers[0]["podSelector"]["matchLabels"]
        if labels and not (
            chosen.items() <= labels[0].items() and ranks["podSelector"]["matchLabels"].items() <= labels[0].items()
        ):
            yield "ranks may not talk to each other"
    ports = {port["name"] for _, _, container in containers(objects) for port in container.get("ports", [])}
    for spec in policies.values():
        for port in [p["port"] for way in spec.get("ingress", []) for p in way.get("ports", [])]:
            if isinstance(port, str) and port not in ports:
                yield f"a policy opens port {port}, which no pod has"


@rule
def names_and_stores_are_reached_in_every_network(objects: list[Object]) -> Iterator[str]:
    """OpenShift's pods of DNS listen on 5353; addresses may be of IPv6; Cilium knows pods by their labels only."""
    policies = {thing["metadata"]["name"]: thing["spec"] for thing in of(objects, "NetworkPolicy")}
    ports = [port for way in policies["dns"]["egress"] for port in way["ports"]]
    if {"protocol": "UDP", "port": 5353} not in ports:
        yield "pods on OpenShift cannot resolve names"
    peers = policies["object-store"]["egress"][0]["to"]
    if not {"0.0.0.0/0", "::/0"} <= {peer.get("ipBlock", {}).get("cidr") for peer in peers}:
        yield "a store outside cannot be reached by each kind of address"
    if {"namespaceSelector": {}} not in peers:
        yield "Cilium closes a store in the cluster"


@rule
def metrics_are_served_where_they_are_scraped(objects: list[Object]) -> Iterator[str]:
    for name, template in pods(objects):
        for container in template["spec"]["containers"]:
            serves = any("--metrics-port" in argument for argument in container.get("args", []))
            port = [p["containerPort"] for p in container.get("ports", []) if p["name"] == "metrics"]
            if serves and port != [int(settings(objects)["METRICS_PORT"])]:
                yield f"{name}: serves metrics on another port than it declares"
            if serves and "--metrics-address=0.0.0.0" not in container["args"]:
                yield f"{name}: serves metrics to itself only"
            if serves and "--push-gateway=$(PUSH_GATEWAY)" not in container["args"]:
                yield f"{name}: has no last word"
            if serves and "POD_NAMESPACE" not in {variable["name"] for variable in container.get("env", [])}:
                yield f"{name}: what it pushes has no namespace, and is of another series than what is scraped"
    for monitor in of(objects, "PodMonitor"):
        chosen = monitor["spec"]["selector"]["matchLabels"]
        for name, template in pods(objects):
            if not chosen.items() <= template["metadata"]["labels"].items():
                yield f"PodMonitor: does not see {name}"


@rule
def volumes_of_one_node_keep_pods_together(objects: list[Object]) -> Iterator[str]:
    single = [
        c["metadata"]["name"]
        for c in of(objects, "PersistentVolumeClaim")
        if "ReadWriteOnce" in c["spec"]["accessModes"]
    ]
    for name, template in pods(objects):
        spec = template["spec"]
        claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in spec["volumes"]}
        if claims & set(single):
            terms = (
                spec.get("affinity", {})
                .get("podAffinity", {})
                .get("requiredDuringSchedulingIgnoredDuringExecution", [])
            )
            together = [
                t["labelSelector"]["matchLabels"] for t in terms if t["topologyKey"] == "kubernetes.io/hostname"
            ]
            if not any(chosen.items() <= template["metadata"]["labels"].items() for chosen in together):
                yield f"{name}: may be scheduled away from its ReadWriteOnce volume"


@rule
def hand_overs_meet(objects: list[Object]) -> Iterator[str]:
    values = settings(objects)
    shared = bool(of(objects, "PersistentVolumeClaim"))
    if shared and values["CKPT"] not in (values["RUN"], values["MIRROR"]):
        yield "export reads another run than training writes"
    if not shared:
        if values["CKPT"] != values["MIRROR"] or "://" not in values["MIRROR"]:
            yield "without a shared volume, export must read the mirror"
        if "://" not in values["PUBLISH"] or "://" not in values["SAMPLES"] or "://" not in values["DATA"]:
            yield "without a shared volume, data, model and samples must be URLs"
    for name, _, container in containers(objects):
        if name.startswith("generate/generate"):
            model = next(a for a in container["args"] if a.startswith("--model="))
            if not shared and "$(PUBLISH)" not in model:
                yield "generation samples a model that is on another node"
            if values["MODEL"].endswith(".plan") and GPU not in container["resources"]["limits"]:
                yield "generation runs an engine without a GPU"
        if "trt" in container.get("args", []) and "--ckpt=$(CKPT)" not in container["args"]:
            yield "the engine is made from a graph, whose precision is its own"
